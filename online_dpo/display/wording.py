"""How a run's figures read, in the terminal and in the report alike; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from online_dpo.views import RoundView, evaluated

FATES = {
    "paired": "in a pair that is trained on",
    "good": "trained on as good: scored at least pairs.threshold",
    "bad": "trained on as bad: scored less",
    "not_selected": "could be paired, but the selector took others",
    "tied": "judged equal to those it could be paired with",
    "identical": "the same text as those it could be paired with",
    "below_margin": "better or worse (than pairs.threshold) by less than pairs.min_margin",
    "invalid": "without a verdict of the judge",
    "alone": "compared with no other response",
}
"""What can become of a response, in the order in which tables show it."""

DISPLACED = 0.05
"""Chosen rewards below minus this are no noise of a last small batch: half a nat at beta 0.1."""


def number(value: float | None, digits: int = 2) -> str:
    """A plain number, or a dash for none."""
    if value is None:
        return "-"
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text


def estimate(value: Mapping[str, Any] | None, digits: int | None = None) -> str:
    """A mean ± its standard error, with as many digits as that makes sense of."""
    if value is None:
        return "-"
    shown = precision(value) if digits is None else digits
    return f"{number(value['mean'], shown)} ± {number(value['stderr'], shown)}"


def precision(value: Mapping[str, Any]) -> int:
    """Decimals worth showing of a mean whose scale nobody knows beforehand."""
    stderr = value["stderr"]
    if not 0.0 < stderr < 0.05:
        return 1 if stderr >= 5.0 else 2
    return 3 if stderr >= 0.005 else 4


def drift(value: Mapping[str, Any] | None) -> str:
    """A KL divergence, which runs from thousandths to hundreds of nats, ± its standard error."""
    return estimate(value, 3 if value is not None and abs(value["mean"]) < 1 else 1)


def percent(share: float | None) -> str:
    """A share in [0, 1] in whole percent."""
    return "-" if share is None else f"{100 * share:.0f}%"


def rate(value: Mapping[str, Any] | None) -> str:
    """A share with its 95% interval, e.g. 97% (93-99)."""
    if value is None:
        return "-"
    return f"{percent(value['value'])} ({100 * value['low']:.0f}-{100 * value['high']:.0f})"


def seconds(value: float | None) -> str:
    """A duration: 0.35 s, 12.3 s, 4 min 05 s, 3 h 20 min."""
    if value is None:
        return "-"
    if value < 99.95:
        return f"{value:.2f} s" if value < 1 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def usd(dollars: float | None) -> str:
    """An amount of money: $12.35, $0.00024."""
    if dollars is None:
        return "cost unknown"
    return f"${dollars:.2f}" if dollars == 0 or dollars >= 1 else f"${dollars:.2g}"


def change(first: float | None, last: float | None, digits: int = 2) -> str:
    """From one value to another."""
    if first is None or last is None:
        return "-"
    return f"{number(first, digits)} → {number(last, digits)}"


def fate_order(rounds: Sequence[RoundView]) -> list[str]:
    """The fates that occur in these rounds, known ones first."""
    found = {fate for r in rounds for fate in r.responses}
    return [fate for fate in FATES if fate in found] + sorted(found - set(FATES))


def figure(view: RoundView, name: str) -> Any:
    """A figure of a round's evaluation, None where there is none."""
    return None if view.evaluation is None else view.evaluation.get(name)


def headline(rounds: Sequence[RoundView]) -> str:
    """In one sentence, what the campaign has come to."""
    measured = evaluated(rounds)
    if not measured:
        return "Nothing has been evaluated yet."
    first, last = measured[0], measured[-1]
    reward, before = figure(last, "score"), figure(first, "score")
    if last.round == 0:
        start = "" if reward is None else f" Its reward is {_mean(reward, reward)}."
        return f"Only policy 0 has been evaluated yet.{start}"
    opening = f"After {_rounds(last.round)} the policy"
    won = figure(last, "win_rate_policy0")
    if won is None:
        return f"{opening} could not be compared with policy 0: the judge gave no verdict."
    interval = f"{100 * won['low']:.0f}-{100 * won['high']:.0f}%"
    sentence = (
        f"{opening} wins {percent(won['value'])} (95% interval {interval}) of "
        f"{won['count']} held-out prompts against policy 0"
    )
    if before is not None and reward is not None:
        sentence += f"; reward {_mean(before, reward)} → {_mean(reward, reward)}"
    return sentence + _verdict(won)


def _verdict(won: Mapping[str, Any]) -> str:
    if won["low"] > 0.5:
        return "."
    if won["high"] < 0.5:
        return ". It has become worse."
    return ". That does not tell the two apart."


def remarks(rounds: Sequence[RoundView]) -> list[str]:
    """What a careful reader would notice about the last evaluated policy."""
    measured = evaluated(rounds)
    if len(measured) < 2:
        return []
    first, last = measured[0], measured[-1]
    found = [
        _better_before(measured),
        _less_diverse(first, last),
        _truncated(first, last),
        _longer(first, last),
        _unjudged(last),
        _displaced(last),
        _from_sampler(last),
    ]
    return [remark for remark in found if remark is not None]


def _better_before(measured: Sequence[RoundView]) -> str | None:
    won = {r.round: figure(r, "win_rate_policy0") for r in measured}
    known = {number: rate["value"] for number, rate in won.items() if rate is not None}
    last = measured[-1].round
    if not known or last not in known:
        return None
    best = max(known, key=lambda n: (known[n], n))
    if known[last] >= won[best]["low"]:
        return None
    return (
        f"Round {best} won more against policy 0 ({rate(won[best])}) than round {last} "
        f"({rate(won[last])})."
    )


def _less_diverse(first: RoundView, last: RoundView) -> str | None:
    before, after = figure(first, "distinct_2"), figure(last, "distinct_2")
    if not before or after is None or after >= before / 2:
        return None
    return f"Answers have become alike: distinct-2 fell from {number(before)} to {number(after)}."


def _truncated(first: RoundView, last: RoundView) -> str | None:
    before, after = figure(first, "truncated"), figure(last, "truncated")
    if before is None or after is None or after < 0.1 or after <= before:
        return None
    return (
        f"{percent(after)} of the answers are cut off at the token limit; "
        f"of policy 0's it was {percent(before)}."
    )


def _longer(first: RoundView, last: RoundView) -> str | None:
    before, after = figure(first, "mean_tokens"), figure(last, "mean_tokens")
    if not before or after is None or 0.5 <= after / before <= 2.0:
        return None
    return f"The mean length went from {number(before, 1)} to {number(after, 1)} tokens."


def _unjudged(last: RoundView) -> str | None:
    invalid, prompts = figure(last, "invalid"), figure(last, "prompts")
    if not invalid:
        return None
    return f"The judge gave no verdict on {invalid} of {prompts} answers of round {last.round}."


def _displaced(last: RoundView) -> str | None:
    reward = (last.training or {}).get("last_chosen_reward")
    if last.round == 0 or reward is None or reward > -DISPLACED:
        return None
    return (
        f"Round {last.round} ended with the chosen responses less likely than under the reference "
        f"(chosen reward {number(reward)}): probability has moved to other responses than these."
    )


def _from_sampler(last: RoundView) -> str | None:
    error = (last.training or {}).get("sampled_max_error")
    if error is None:
        return None
    checked = (last.training or {})["pairs_checked"]
    return (
        f"The reference's log-probs of round {last.round} came from the sampler; on {checked} "
        f"pairs that were scored as well they differ by at most {error:.2g} nats a response."
    )


def _mean(value: Mapping[str, Any], like: Mapping[str, Any]) -> str:
    """A mean with the decimals that another one is worth."""
    return number(value["mean"], precision(like))


def _rounds(count: int) -> str:
    return "1 round" if count == 1 else f"{count} rounds"
