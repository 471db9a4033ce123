"""Scores by rules that need no model: a weighted sum of small scorers named in the config.

    judge:
      name: heuristic
      options:
        scorers:
          - {kind: lexicon, positive: [good], negative: [bad], per_length: true, weight: 20}
          - {kind: length, min: 8, max: 20, weight: 0.5}

Words are what lies between single spaces, punctuation included, so that a doubled or missing space
is seen; the lexicon alone ignores case and the punctuation around a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from judges.heuristics_forms import FORMS
from online_dpo.errors import ConfigError
from online_dpo.records import Prompt, Response, Score
from online_dpo.resources import find_data

START, END = "start of text", "end of text"
"""Stand before the first word and after the last one; a word contains no space."""

Measure = Callable[[Response], float]


class _Options(BaseModel):
    """What all scorers share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor of this scorer in the sum; a negative one turns it round."""


class Lexicon(_Options):
    """Words of the positive list minus words of the negative one."""

    kind: Literal["lexicon"]
    positive: list[str] = []
    """Words that count +1, whatever their case."""
    negative: list[str] = []
    """Words that count -1, whatever their case."""
    per_length: bool = False
    """Divide by the number of words, so that saying it more often does not help by itself."""

    @model_validator(mode="after")
    def _check_words(self) -> Lexicon:
        if not self.positive and not self.negative:
            raise ValueError("positive and negative are both empty: name at least one word")
        if both := {w.lower() for w in self.positive} & {w.lower() for w in self.negative}:
            raise ValueError(f"both positive and negative: {', '.join(sorted(both))}")
        return self


class Length(_Options):
    """Minus the number of words by which the length misses the window; 0 inside it."""

    kind: Literal["length"]
    min: int = Field(default=0, ge=0)
    """Fewest words that cost nothing."""
    max: int | None = Field(default=None, ge=1)
    """Most words that cost nothing; none: no upper end."""

    @model_validator(mode="after")
    def _check_window(self) -> Length:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max ({self.max}) is smaller than min ({self.min})")
        return self


class Repetition(_Options):
    """Minus the share of word n-grams that occurred before in the response, from 0 to -1."""

    kind: Literal["repetition"]
    n: int = Field(default=2, ge=1, le=10)
    """Number of words in an n-gram."""


class Regex(_Options):
    """1 where the pattern is found, else 0."""

    kind: Literal["regex"]
    pattern: str
    """A Python regular expression, searched for anywhere; anchor it where needed."""

    @model_validator(mode="after")
    def _check_pattern(self) -> Regex:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern is not a regular expression: {error}") from None
        return self


class Tokens(_Options):
    """Minus the number of tokens, those that end the response included: a penalty per token."""

    kind: Literal["tokens"]
    free: int = Field(default=0, ge=0)
    """Tokens that cost nothing."""


class Format(_Options):
    """1 where the response has a form, else 0.

    json: JSON as a whole, in a code fence or not; bullets: every line that is not blank is a bullet
    point (-, * or +); numbered: such lines begin 1. 2. 3. or 1) 2) 3); one_line: no line break;
    plain: no Markdown headings, bullet points, emphasis, code or tables.
    """

    kind: Literal["format"]
    form: Literal["json", "bullets", "numbered", "one_line", "plain"]
    """The form that is asked for."""


class Transitions(_Options):
    """Minus the number of neighbouring words that never stand so in a corpus: illegal word order.

    The start of a response counts as a word, and so does its end where the model ended it.
    """

    kind: Literal["transitions"]
    corpus: str
    """A JSONL file with a `response` in each row: a path, or the name of a shipped file."""


class Finished(_Options):
    """-1 where the response was cut off at the token limit, else 0."""

    kind: Literal["finished"]


Options = Annotated[
    Lexicon | Length | Tokens | Repetition | Regex | Format | Transitions | Finished,
    Field(discriminator="kind"),
]


class Heuristic:
    """A judge for `judge.name: heuristic`; see the module for its options."""

    name: ClassVar[str] = "heuristic"
    version: ClassVar[str] = "1"
    inline: ClassVar[bool] = True
    """Pure and fast: runs where labelling runs, without a judge worker."""

    def __init__(self, scorers: Sequence[Mapping[str, Any]]) -> None:
        """Raises ConfigError, naming the option, where `scorers` does not describe any scorer."""
        try:
            options = TypeAdapter(list[Options]).validate_python(list(scorers))
        except ValidationError as error:
            raise ConfigError(_explain(error)) from None
        if not options:
            raise ConfigError("judge.options.scorers is empty: name at least one scorer.")
        self._measures = [(option.weight, _measure(option)) for option in options]

    def score(self, prompt: Prompt, responses: Sequence[Response]) -> list[Score]:
        """The weighted sum of all scorers for each response."""
        return [
            Score(sum(weight * measure(response) for weight, measure in self._measures))
            for response in responses
        ]


def _measure(options: Options) -> Measure:
    match options:
        case Lexicon():
            return _lexicon(options)
        case Length(min=low, max=high):
            return lambda response: -_distance(len(words(response.text)), low, high)
        case Tokens(free=free):
            return lambda response: -float(max(len(response.token_ids) - free, 0))
        case Format(form=form):
            has_form = FORMS[form]
            return lambda response: float(has_form(response.text.strip()))
        case Repetition(n=n):
            return lambda response: -repeated_share(words(response.text), n)
        case Regex(pattern=pattern):
            found = re.compile(pattern)
            return lambda response: float(found.search(response.text) is not None)
        case Transitions(corpus=corpus):
            seen = corpus_transitions(corpus)
            return lambda response: -num_unseen(response, seen)
        case Finished():
            return lambda response: -float(response.truncated)


def words(text: str) -> list[str]:
    """What lies between single spaces; a doubled space gives an empty word, no text none at all."""
    return text.split(" ") if text else []


def transitions(text: str, truncated: bool) -> list[tuple[str, str]]:
    """Neighbouring words, the start and (unless it was cut off) the end included."""
    sequence = [START, *words(text), *([] if truncated else [END])]
    return list(zip(sequence, sequence[1:], strict=False))


def num_unseen(response: Response, seen: frozenset[tuple[str, str]]) -> float:
    """How many of a response's transitions are not among those seen."""
    pairs = transitions(response.text, response.truncated)
    return float(sum(pair not in seen for pair in pairs))


def repeated_share(sequence: Sequence[str], n: int) -> float:
    """The share, in [0, 1], of n-grams that are not their first occurrence; 0 without n-grams."""
    grams = [tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def corpus_transitions(corpus: str) -> frozenset[tuple[str, str]]:
    """Every transition of the responses in a JSONL file."""
    path = find_data(corpus)
    seen: set[tuple[str, str]] = set()
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            row = json.loads(line)
            if not isinstance(row.get("response"), str):
                raise ConfigError(f"{path}:{number}: a row of the corpus needs a text `response`.")
            seen.update(transitions(row["response"], truncated=False))
    return frozenset(seen)


def _lexicon(options: Lexicon) -> Measure:
    value = {
        **{word.lower(): -1 for word in options.negative},
        **{word.lower(): 1 for word in options.positive},
    }

    def measure(response: Response) -> float:
        bare = [word.strip(".,;:!?\"'()").lower() for word in words(response.text)]
        total = sum(value.get(word, 0) for word in bare)
        return total / max(len(bare), 1) if options.per_length else float(total)

    return measure


def _distance(length: int, low: int, high: int | None) -> float:
    """By how much a length misses the window from `low` to `high`, 0 inside."""
    return float(max(low - length, 0 if high is None else length - high, 0))


def _explain(error: ValidationError) -> str:
    """One line per fault, each naming the option: `judge.options.scorers[0].weight: ...`."""
    faults = []
    for fault in error.errors():
        index, *rest = fault["loc"]
        # The second part of a location inside a scorer is its kind: the union's tag, not an option.
        option = "".join(f".{part}" for part in rest[1:]) if rest else ""
        faults.append(f"judge.options.scorers[{index}]{option}: {fault['msg']}")
    return "\n".join(faults)
