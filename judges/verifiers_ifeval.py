"""Scores a response by the checkable instructions that its prompt carries, as in IFEval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from judges.verifiers_ifeval_checks import CHECKS, BadArguments
from online_dpo.errors import ConfigError
from online_dpo.records import Prompt, Response, Score


class Instructions:
    """A scorer by instructions whose following a program can see (Zhou et al., 2023,
    arXiv:2311.07911).

    A prompt carries `instruction_id_list`, e.g. ["length_constraints:number_words"], and `kwargs`,
    a mapping for each, e.g. [{"relation": "at least", "num_words": 50}]: the form of the IFEval
    data set, whose null arguments are left out. An empty response follows none.
    """

    name: ClassVar[str] = "instructions"
    version: ClassVar[str] = "1"
    inline: ClassVar[bool] = True

    def __init__(self, level: Literal["instruction", "prompt"] = "instruction") -> None:
        """`level` instruction: the share that is followed; prompt: 1 where all are, else 0.

        Raises ConfigError for another level.
        """
        if level not in ("instruction", "prompt"):
            raise ConfigError(f"judge.options.level is instruction or prompt, not {level!r}.")
        self._level = level

    def score(self, prompt: Prompt, responses: Sequence[Response]) -> list[Score]:
        """A number in [0, 1] for each response; None where the instructions cannot be checked.

        Raises ConfigError where checking one needs a package that is not installed.
        """
        try:
            asked = instructions_of(prompt.metadata)
            return [self._score(asked, response.text) for response in responses]
        except BadArguments as problem:
            return [Score(None, str(problem)) for _ in responses]

    def _score(self, asked: Sequence[tuple[str, Mapping[str, Any]]], text: str) -> Score:
        followed = [bool(text.strip()) and _follows(text, name, given) for name, given in asked]
        if self._level == "prompt":
            return Score(float(all(followed)))
        return Score(sum(followed) / len(followed))


def instructions_of(metadata: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(id, arguments) of each instruction of a prompt. Raises BadArguments."""
    names, arguments = metadata.get("instruction_id_list"), metadata.get("kwargs")
    if not isinstance(names, list) or not names:
        raise BadArguments("the prompt has no instructions in its field 'instruction_id_list'")
    arguments = [{}] * len(names) if arguments is None else arguments
    if not isinstance(arguments, list) or len(arguments) != len(names):
        raise BadArguments("the prompt's field 'kwargs' is no list with a mapping per instruction")
    for name in names:
        if name not in CHECKS:
            raise BadArguments(f"there is no check for the instruction {name!r}")
    return [
        (name, {key: value for key, value in (given or {}).items() if value is not None})
        for name, given in zip(names, arguments, strict=True)
    ]


def _follows(text: str, name: str, arguments: Mapping[str, Any]) -> bool:
    try:
        return CHECKS[name](text, **arguments)
    except (TypeError, AttributeError) as error:
        raise BadArguments(f"{name} cannot be checked with {dict(arguments)}: {error}") from None
