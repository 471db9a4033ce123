"""Checks a response against a regular expression or a JSON schema: 1 where it fits, else 0."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NoReturn

from judges.limited import Limited, NoResult
from online_dpo.errors import ConfigError
from online_dpo.records import Prompt, Response, Score

_FENCED = re.compile(r"\A\s*```[a-zA-Z]*\s*\n(.*)```\s*\Z", re.DOTALL)


class Regex:
    """A scorer by a Python regular expression, of the config or of each prompt.

    Matching takes place in one more process, which the system ends after `timeout_s`: some patterns
    take forever on some texts. The response then has no score.
    """

    name: ClassVar[str] = "regex"
    version: ClassVar[str] = "1"

    def __init__(
        self,
        pattern: str | None = None,
        field: str = "pattern",
        match: Literal["search", "full"] = "search",
        ignore_case: bool = False,
        timeout_s: float = 2.0,
    ) -> None:
        """`field` is where a prompt has its pattern, where the options give none.

        Raises ConfigError where `pattern` is no regular expression.
        """
        if match not in ("search", "full"):
            raise ConfigError(f"judge.options.match is search or full, not {match!r}.")
        self._pattern = pattern
        self._field = field
        self._full = match == "full"
        self._ignore_case = ignore_case
        self._fits = Limited("judges.verifiers_text:fits_pattern", timeout_s=timeout_s)
        if pattern is not None and (problem := pattern_problem(pattern)) is not None:
            raise ConfigError(f"judge.options.pattern: {problem}.")

    def score(self, prompt: Prompt, responses: Sequence[Response]) -> list[Score]:
        """1.0 or 0.0 for each response; None without a usable pattern."""
        pattern = prompt.metadata.get(self._field) if self._pattern is None else self._pattern
        if not isinstance(pattern, str):
            reason = f"the prompt has no regular expression in its field {self._field!r}"
            return [Score(None, reason) for _ in responses]
        if (problem := pattern_problem(pattern)) is not None:
            return [Score(None, f"the prompt's field {self._field!r}: {problem}")] * len(responses)
        return [self._score(pattern, response.text) for response in responses]

    def close(self) -> None:
        """End the process that matches, if it runs."""
        self._fits.close()

    def _score(self, pattern: str, text: str) -> Score:
        try:
            return Score(float(self._fits(pattern, text, self._full, self._ignore_case)))
        except NoResult as cause:
            return Score(None, f"the response could not be matched: {cause}")


class JsonSchema:
    """A scorer by a JSON schema, of the config or of each prompt.

    The response must be JSON as a whole, in a code fence or not. Checking takes place in one more
    process, which the system ends after `timeout_s`. A schema refers to nothing outside itself.
    """

    name: ClassVar[str] = "json_schema"
    version: ClassVar[str] = "1"

    def __init__(
        self,
        schema: Mapping[str, Any] | bool | None = None,
        field: str = "schema",
        timeout_s: float = 2.0,
    ) -> None:
        """`field` is where a prompt has its schema, as an object or a text, where the options
        give none.

        Raises ConfigError where jsonschema is not installed or `schema` is no schema.
        """
        if importlib.util.find_spec("jsonschema") is None:
            raise ConfigError(
                "The judge 'json_schema' needs the package jsonschema: "
                "pip install 'online-dpo[verifiers]'."
            )
        self._schema = schema
        self._field = field
        self._fits = Limited("judges.verifiers_text:fits_schema", timeout_s=timeout_s)
        if schema is not None and (problem := schema_problem(schema)) is not None:
            raise ConfigError(f"judge.options.schema: {problem}.")

    def score(self, prompt: Prompt, responses: Sequence[Response]) -> list[Score]:
        """1.0 or 0.0 for each response; None without a usable schema."""
        schema: Any = self._schema
        if schema is None:
            schema = prompt.metadata.get(self._field)
        if isinstance(schema, str):
            schema = _parsed(schema)
        if not isinstance(schema, Mapping | bool):
            reason = f"the prompt has no JSON schema in its field {self._field!r}"
            return [Score(None, reason) for _ in responses]
        if (problem := schema_problem(schema)) is not None:
            return [Score(None, f"the prompt's field {self._field!r}: {problem}")] * len(responses)
        return [self._score(schema, response.text) for response in responses]

    def close(self) -> None:
        """End the process that checks, if it runs."""
        self._fits.close()

    def _score(self, schema: Mapping[str, Any] | bool, text: str) -> Score:
        value = read_json(text)
        if value is NOT_JSON:
            return Score(0.0)
        try:
            return Score(float(self._fits(schema, value)))
        except NoResult as cause:
            return Score(None, f"the response could not be checked: {cause}")


class _NotJson:
    """The type of NOT_JSON: no value of JSON."""


NOT_JSON = _NotJson()


def read_json(text: str) -> Any:
    """The value of a text that is JSON as a whole, in a code fence or not; NOT_JSON for others.

    NaN and Infinity, which Python writes and reads, are no JSON.
    """
    fenced = _FENCED.match(text)
    try:
        return json.loads(fenced[1] if fenced else text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return NOT_JSON


def fits_pattern(pattern: str, text: str, full: bool, ignore_case: bool) -> bool:
    """Whether a pattern is found in a text, or matches all of it."""
    compiled = re.compile(pattern, re.IGNORECASE if ignore_case else 0)
    return (compiled.fullmatch(text) if full else compiled.search(text)) is not None


def fits_schema(schema: dict[str, Any] | bool, value: Any) -> bool:
    """Whether a JSON value is valid. Raises where the schema refers to another document."""
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    # An empty registry: what is not in the schema is not fetched.
    validator = validator_for(schema, default=Draft202012Validator)(schema, registry=Registry())
    return bool(validator.is_valid(value))


def pattern_problem(pattern: str) -> str | None:
    """Why a text is no regular expression."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"{pattern!r} is no regular expression: {error}"
    return None


def schema_problem(schema: Mapping[str, Any] | bool) -> str | None:
    """Why a value is no JSON schema."""
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for

    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        return f"no JSON schema: {error.message} at {error.json_path}"
    return None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
