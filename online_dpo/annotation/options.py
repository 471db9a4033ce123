"""What a campaign asks of its annotators: the options of the judge `human`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from online_dpo.errors import ConfigError
from online_dpo.voting import Rule

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class PeopleOptions(BaseModel):
    """Who labels what, and how their verdicts become one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    annotators: Annotated[tuple[str, ...], Field(min_length=1)]
    """Who labels, by the names that they start the page with."""
    per_item: Annotated[int, Field(ge=1)] = 1
    """Annotators that each pair, or answer, is shown to; drawn by seed."""
    ask: Literal["compare", "rate"] = "compare"
    """compare: two answers side by side; rate: one answer, good or bad."""
    combine: Rule = "majority"
    """How the verdicts on one item become one."""
    repeats: Share = 0.1
    """Share of an annotator's items that come again, the other way round, to measure them."""
    gold: str | None = None
    """A .jsonl or .parquet file of items with known verdicts, hidden among the others."""
    gold_share: Share = 0.1
    """Gold items for each item of an annotator, as far as there are any."""
    rubric: str = ""
    """What the page shows as the rubric."""

    @field_validator("annotators")
    @classmethod
    def _usable_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} is no annotator's name: letters, digits, - and _, at most 40"
                )
        if len({name.casefold() for name in names}) < len(names):
            raise ValueError("two annotators have the same name")
        return names

    @model_validator(mode="after")
    def _enough_people(self) -> PeopleOptions:
        if self.per_item > len(self.annotators):
            raise ValueError(
                f"per_item: {self.per_item} needs as many annotators, not {len(self.annotators)}"
            )
        return self


def people_options(options: Mapping[str, Any]) -> PeopleOptions:
    """The options of a config, checked. Raises ConfigError naming the first fault."""
    try:
        return PeopleOptions.model_validate(dict(options))
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(("judge.options", *(str(part) for part in fault["loc"])))
        message = fault["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{place}: {message[:1].lower()}{message[1:]}.") from None
