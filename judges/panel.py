"""Several judges vote on which of two responses is better, and each one's word is kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from online_dpo.asking.judge_forms import Mode
from online_dpo.asking.members import Host, Member, all_repeat, most_demanding
from online_dpo.asking.unusable_replies import is_unusable
from online_dpo.config import JudgeConfig
from online_dpo.errors import ConfigError, JudgeError
from online_dpo.paid.calls import Calls
from online_dpo.records import Prompt, Response, Verdict
from online_dpo.voting import Rule, combine_votes

_RULES = get_args(Rule)


class Seat(BaseModel):
    """One member as the options name it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """An installed judge's name, `module:attr` or `file.py:attr`."""
    label: str = ""
    """What it is called in the record; its name, unless two members have the same."""
    options: dict[str, Any] = {}
    """What the judge itself takes."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """How much its vote counts, by majority and in the mean."""
    scale: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """For a judge that scores: two scores become p by sigmoid(difference / scale); 1 by default."""

    @property
    def called(self) -> str:
        return self.label or self.name

    @property
    def config(self) -> JudgeConfig:
        """The member as a judge by itself."""
        given: dict[str, Any] = {"name": self.name, "options": self.options}
        return JudgeConfig(**given if self.scale is None else {**given, "scale": self.scale})


class Panel:
    """A judge that compares by asking others, which score or compare, wherever they run.

    A member abstains where it gives no verdict; one that fails (an error, a deadline, a server that
    does not answer) is recorded as failed and left out. Without `quorum` verdicts the pair has
    none, or the campaign ends, where those that failed could have made the difference.
    """

    name: ClassVar[str] = "panel"

    def __init__(
        self,
        members: Sequence[Mapping[str, Any]],
        vote: Rule = "majority",
        quorum: int | None = None,
    ) -> None:
        """`vote` is a rule of `online_dpo.voting`; `quorum` is all members by default.

        Raises ConfigError, naming the option, for what is no panel.
        """
        try:
            self.seats = TypeAdapter(list[Seat]).validate_python(list(members))
        except ValidationError as error:
            raise ConfigError(_explain(error)) from None
        if len(self.seats) < 2:
            raise ConfigError("judge.options.members: a panel has at least two members.")
        if vote not in _RULES:
            raise ConfigError(f"judge.options.vote is one of {', '.join(_RULES)}, not {vote!r}.")
        if quorum is not None and not 1 <= quorum <= len(self.seats):
            raise ConfigError(
                f"judge.options.quorum: {quorum} of {len(self.seats)} members cannot be; it lies "
                f"between 1 and {len(self.seats)}."
            )
        _check_seats(self.seats, vote)
        self._vote = vote
        self._quorum = len(self.seats) if quorum is None else quorum
        self._members: dict[str, Member] = {}
        self._weights = {seat.called: seat.weight for seat in self.seats}
        self._told: set[str] = set()

    def seat(self, host: Host) -> None:
        """Open the members. Raises ConfigError where one cannot be a member."""
        try:
            for index, seat in enumerate(self.seats):
                section = f"judge.options.members[{index}]"
                self._members[seat.called] = Member(seat.config, host, section=section)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the members' processes. Safe to repeat."""
        for member in self._members.values():
            member.close()

    @property
    def version(self) -> str:
        """The panel's own and each member's, in the order of their labels."""
        known = sorted(
            f"{label}: {member.config.name} {member.version}"
            for label, member in self._members.items()
        )
        return "; ".join(["1", *known])

    @property
    def members_mode(self) -> Mode:
        """How the most demanding member runs: async where one may pay for calls."""
        return most_demanding(member.mode for member in self._members.values())

    @property
    def temperature(self) -> float | None:
        """0 where every member that may pay for calls answers at 0; None is unknown."""
        asked = ((member.mode, member.repeats) for member in self._members.values())
        return 0.0 if all_repeat(asked) else None

    @property
    def price(self) -> tuple[()] | None:
        """None where a member says that it knows no price for its calls."""
        return () if all(member.priced for member in self._members.values()) else None

    async def compare(
        self, prompt: Prompt, first: Response, second: Response, *, calls: Calls
    ) -> Verdict:
        """The members' verdict; `raw` is the JSON of what each said, by label.

        Raises JudgeError where too few members are left, because others failed.
        """
        with calls.paused():  # each member has a deadline of its own
            asked = [
                member.compare(prompt, first, second, calls=calls)
                for member in self._members.values()
            ]
            answers = await asyncio.gather(*asked, return_exceptions=True)
        said = dict(sorted(zip(self._members, answers, strict=True)))
        verdicts, failed = _sorted_out(said)
        given = {label: v.p for label, v in verdicts.items() if v.p is not None}
        if len(given) < self._quorum and len(given) + len(failed) >= self._quorum:
            raise next(iter(failed.values()))
        self._tell(prompt, failed, calls)
        raw = _record(verdicts, failed)
        if len(given) < self._quorum:
            return Verdict(None, self._too_few(verdicts, len(given)), raw)
        weights = [self._weights[label] for label in given]
        return Verdict(combine_votes(list(given.values()), self._vote, weights=weights), raw=raw)

    def _too_few(self, verdicts: Mapping[str, Verdict], num_given: int) -> str:
        """Why there is no verdict: a reply that could not be used comes first, where those that
        could not would have made the quorum.
        """
        unusable = [v.reason for v in verdicts.values() if is_unusable(v.reason)]
        heard = f"{num_given} of {len(self.seats)} members gave a verdict"
        text = f"{heard}, fewer than the quorum of {self._quorum}"
        return f"{unusable[0]}: {text}" if num_given + len(unusable) >= self._quorum else text

    def _tell(self, prompt: Prompt, failed: Mapping[str, JudgeError], calls: Calls) -> None:
        """Put the first failure of each member into the run's events."""
        for label in set(failed) - self._told:
            self._told.add(label)
            calls.tell(
                {
                    "event": "judge_member_failed",
                    "member": label,
                    "prompt_id": prompt.id,
                    "message": failed[label].message,
                }
            )


def members_said(raw: str) -> dict[str, dict[str, Any]]:
    """What each member said, by label, from the `raw` of a panel's verdict.

    Each has `p`, and where it is None a `reason`, and `raw`, its own words, where it had any.
    """
    members: dict[str, dict[str, Any]] = json.loads(raw)["members"]
    return members


def _sorted_out(
    said: Mapping[str, Verdict | BaseException],
) -> tuple[dict[str, Verdict], dict[str, JudgeError]]:
    """Verdicts and failures by label; what ends the campaign for other reasons is raised."""
    verdicts: dict[str, Verdict] = {}
    failed: dict[str, JudgeError] = {}
    for label, answer in said.items():
        if isinstance(answer, JudgeError):
            failed[label] = answer
        elif isinstance(answer, BaseException):
            raise answer
        else:
            verdicts[label] = answer
    return verdicts, failed


def _record(verdicts: Mapping[str, Verdict], failed: Mapping[str, JudgeError]) -> str:
    members: dict[str, Any] = {
        label: {"p": v.p} | {k: t for k, t in (("reason", v.reason), ("raw", v.raw)) if t}
        for label, v in verdicts.items()
    }
    members |= {
        label: {"p": None, "reason": f"failed: {error.message}"} for label, error in failed.items()
    }
    return json.dumps({"members": dict(sorted(members.items()))}, ensure_ascii=False)


def _check_seats(seats: Sequence[Seat], vote: Rule) -> None:
    labels = [seat.called for seat in seats]
    for index, seat in enumerate(seats):
        place = f"judge.options.members[{index}]"
        if seat.name == Panel.name:
            raise ConfigError(f"{place}: a panel cannot be a member of a panel; list its members.")
        if labels.count(seat.called) > 1:
            raise ConfigError(
                f"{place}: two members are called {seat.called!r}. Give each a `label` of its own."
            )
        if vote == "unanimous" and seat.weight != 1:
            raise ConfigError(
                f"{place}.weight: where the vote must be unanimous weights do not count. Leave it "
                "out, or vote by majority or mean."
            )


def _explain(error: ValidationError) -> str:
    """One line a fault, each naming the option: `judge.options.members[0].weight: ...`."""
    faults = []
    for fault in error.errors():
        index, *rest = fault["loc"]
        option = "".join(f".{part}" for part in rest)
        faults.append(f"judge.options.members[{index}]{option}: {fault['msg']}")
    return "\n".join(faults)
