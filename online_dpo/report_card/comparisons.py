"""Labelled comparisons from a file: a prompt, two responses, and which of them is better."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from online_dpo.errors import ConfigError
from online_dpo.offline.preference_forms import UnusableError, parse_preference
from online_dpo.records import Prompt, Response, derive_seed, prompt_id
from online_dpo.rows import Row, excerpt, kind_of, read_rows
from online_dpo.tokenization import parse_prompt

FORMS = (
    ("prompt", "first", "second"),
    ("prompt", "response_a", "response_b"),
    ("input", "output_1", "output_2"),
)
"""Columns of a prompt and its two responses, beside `label` or `p`; the last are LLMBar's."""

_PREFERENCE = ("prompt", "chosen", "rejected")

_WORDS = {"first": 1.0, "a": 1.0, "1": 1.0, "second": 0.0, "b": 0.0, "2": 0.0}
_TIES = dict.fromkeys(("tie", "c", "0"), 0.5)


@dataclass(frozen=True, slots=True)
class Labelled:
    """One comparison; `gold` is the label's p that `first` is better, 0.5 a tie."""

    line: int
    prompt: Prompt
    first: Response
    second: Response
    gold: float


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that is no comparison, and why."""

    line: int
    reason: str
    excerpt: str


def read_comparisons(path: str, *, seed: int) -> tuple[list[Labelled], list[Problem]]:
    """The comparisons of a .jsonl, .json or .parquet file or a dataset, and every other row.

    A row has the columns of FORMS with `label` or `p`, or `chosen` and `rejected` in the forms of
    `parse_preference`; of these it is drawn by seed which one is the first. Its other columns are
    the prompt's metadata. Responses are whole and have no tokens. Raises ConfigError where no row
    is a comparison, or labels are of 0 and 1 alone, which would read as tie and first.
    """
    known: dict[tuple[str, frozenset[str]], int] = {}
    labelled: list[Labelled] = []
    problems: list[Problem] = []
    labels: set[str] = set()
    for row in read_rows(path):
        try:
            found = _comparison(row, seed, Path(path).stem)
            pair = found.prompt.id, frozenset((found.first.text, found.second.text))
            if (line := known.setdefault(pair, row.line)) != row.line:
                raise UnusableError(f"the comparison of line {line} again")
        except UnusableError as problem:
            problems.append(Problem(row.line, str(problem), _excerpt(row)))
            continue
        labelled.append(found)
        labels.add(str((row.values or {}).get("label")))
    _check(path, labelled, problems, labels)
    return labelled, problems


def _check(
    path: str, labelled: Sequence[Labelled], problems: Sequence[Problem], labels: set[str]
) -> None:
    if not labelled:
        first = f": line {problems[0].line}: {problems[0].reason}" if problems else ""
        raise ConfigError(f"{path} has no labelled comparison{first}.")
    if labels == {"0", "1"}:
        raise ConfigError(
            f"{path}: its labels are 0 and 1 alone. As a `label`, 1 says that the first is better, "
            "2 the second and 0 a tie. Write first, second and tie, or, if it is the probability "
            "that the first is better, call the column `p`."
        )


def _comparison(row: Row, seed: int, source: str) -> Labelled:
    if row.values is None:
        raise UnusableError(row.problem)
    values = row.values
    used: tuple[str, ...]
    form = next((form for form in FORMS if form[1] in values and form[2] in values), None)
    if form is not None:
        text, messages, problem = parse_prompt(values.get(form[0]))
        if problem:
            raise UnusableError(problem)
        first, second = (_text(values, side) for side in form[1:])
        used, gold = (*form, "label", "p"), _gold(values)
    else:
        stated = parse_preference(values)
        text, messages = stated.text, stated.messages
        first, second, used, gold = stated.chosen, stated.rejected, _PREFERENCE, 1.0
    if first == second:
        raise UnusableError("the two responses are identical")
    content = messages if text is None else text
    metadata = {name: value for name, value in values.items() if name not in used}
    prompt = Prompt(prompt_id("judge check", content), source, text, messages, metadata)
    made = Labelled(row.line, prompt, response_of(prompt, first), response_of(prompt, second), gold)
    turned = form is None and derive_seed(seed, "place", prompt.id, first, second) & 1
    return replace(made, first=made.second, second=made.first, gold=0.0) if turned else made


def response_of(prompt: Prompt, text: str) -> Response:
    """A whole response without tokens; its id is its prompt's and its text's."""
    digest = hashlib.sha256(f"{prompt.id}\0{text}".encode(errors="surrogatepass")).hexdigest()
    return Response(digest[:16], prompt.id, text, (), "eos", "file")


def _text(values: Mapping[str, Any], side: str) -> str:
    value = values[side]
    if not isinstance(value, str):
        raise UnusableError(f"{side!r} is {kind_of(value)}, not a text")
    return value


def _gold(values: Mapping[str, Any]) -> float:
    """What `label` or `p` says, as p. Raises UnusableError."""
    label, p = values.get("label"), values.get("p")
    if (label is None) == (p is None):
        raise UnusableError("it needs either a 'label' or a 'p'")
    if p is not None:
        if isinstance(p, bool) or not (isinstance(p, int | float) and 0 <= p <= 1):
            raise UnusableError(f"'p' is {excerpt(p)}, not a probability")
        return float(p)
    found = None
    if isinstance(label, str | int) and not isinstance(label, bool):
        found = (_WORDS | _TIES).get(str(label).strip().lower())
    if found is None:
        raise UnusableError(
            f"'label' is {excerpt(label)}, not first, second or tie (also A, B, tie; 1, 2, 0)"
        )
    return found


def _excerpt(row: Row) -> str:
    values = row.values or {}
    return row.excerpt or excerpt(values.get("prompt") or values.get("input") or dict(values))
