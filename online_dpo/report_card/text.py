"""A report card as lines for the terminal; pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from online_dpo.display.wording import number, percent, seconds, usd
from online_dpo.report_card.attacks import WORDS

_SHOWN = 12
"""Lines of the set that are listed one by one."""


def describe(report: Mapping[str, Any]) -> str:
    """The whole card: who was asked about what, every figure, attacks, cost, what stands out."""
    parts = [
        _header(report),
        _columns([list(row) for row in _figures(report["figures"])]),
        _reliability(report["figures"]["calibration"]),
        _attacks(report["attacks"]),
        "\n".join(_cost(report["cost"])),
        "\n".join(_rows(report)),
        "\n".join(_findings(report["findings"])),
    ]
    return "\n\n".join(part for part in parts if part)


def _header(report: Mapping[str, Any]) -> str:
    judge, data = report["judge"], report["data"]
    votes = f"{judge['votes']} votes" if judge["votes"] > 1 else "once"
    how = "each response scored" if judge["kind"] == "score" else "each pair asked"
    if judge["kind"] == "compare":
        how += " in both orders" if judge["orders"] == "both" else " in one drawn order"
    return (
        f"{judge['name']} (version {judge['version']}) on {data['path']}: "
        f"{data['pairs']} comparisons, {how}, {votes}"
    )


def _figures(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Label, value and remark of each figure that there is."""
    orders = found["accuracy_by_order"]
    yield "accuracy", _rate(found["accuracy"]), "ties count half; of what the labels decide"
    if orders is not None:
        yield "  in the order given", _rate(orders["as_given"]), ""
        yield "  in the other order", _rate(orders["swapped"]), ""
        yield "  better one shown first", _rate(orders["better_shown_first"]), ""
        yield "  better one shown second", _rate(orders["better_shown_second"]), ""
        yield "orders agree", _rate(found["agreement"]), ""
        yield "  opposite verdicts", percent(found["order_conflicts"]), "of pairs in both orders"
        yield "  kappa", number(found["kappa_orders"]), "between the two orders"
    yield "kappa with the labels", number(found["kappa"]), "0 is chance, 1 agreement"
    yield "ties", percent(found["ties"]), f"the labels: {percent(found['labels_tied'])}"
    yield "abstained", percent(found["abstained"]), "no verdict, of its own accord"
    yield "invalid", percent(found["invalid"]), "no verdict, for a reply that could not be used"
    labels = found["labels_prefer_longer"]
    remark = "" if labels is None else f"the labels: {percent(labels['value'])}"
    yield "prefers the longer", _rate(found["prefers_longer"]), remark
    if orders is not None:
        yield "prefers the first shown", _rate(found["prefers_first"]), "50% is no preference"
    stable = found["repeat_stability"]
    if stable is not None:
        shown = f"{percent(stable['value'])} of {stable['count']}"
        yield "answers alike when asked again", shown, "questions asked twice or more"
    circles = found["intransitive"]
    if circles is not None:
        shown = f"{percent(circles['value'])} of {circles['count']}"
        yield "circles", shown, "triples of a prompt's responses; a coin: 25%"
    calibration = found["calibration"]
    if calibration is not None:
        yield "Brier score of p", number(calibration["brier"]), "0 is perfect, 0.25 always p = 0.5"
        yield "calibration error of p", number(calibration["ece"]), "expected, 0 is perfect"


def _reliability(calibration: Mapping[str, Any] | None) -> str:
    """What is right where p says how sure it is; nothing to tell of one bin."""
    if calibration is None or len(calibration["reliability"]) < 2:
        return ""
    rows = [["how sure p is", "mean", "right", "of"]]
    rows += [
        [
            f"{100 * row['low']:.0f}-{100 * row['high']:.0f}%",
            percent(row["confidence"]),
            percent(row["accuracy"]),
            str(row["count"]),
        ]
        for row in calibration["reliability"]
    ]
    return _columns(rows)


def _attacks(attacks: Mapping[str, Mapping[str, Any]]) -> str:
    """What won against better responses; the column of single orders only where there are any."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "tried": lambda tried: str(tried["tried"]),
        "won": lambda tried: _share(tried["fooled"]),
        "won an order": lambda tried: _share(tried["fooled_once"]),
        "turned": lambda tried: _share(tried["flipped"]),
        "no verdict": lambda tried: percent(tried["no_verdict"]),
    }
    if not attacks:
        return ""
    both = ", in both orders together"
    if all(tried["fooled_once"] is None for tried in attacks.values()):
        del columns["won an order"]
        both = ""
    rows = [["set against the better response", *columns]]
    for kind, tried in attacks.items():
        rows.append([WORDS[kind], *(show(tried) for show in columns.values())])
    legend = (
        f"won: preferred to the better response{both}; turned: verdicts that were\n"
        "for the better response before the other one got what is appended, and then against it"
    )
    return f"{_columns(rows)}\n{legend}"


def _cost(cost: Mapping[str, Any]) -> Iterator[str]:
    whole = cost["set"]
    if whole is None:
        yield f"No calls were paid for; asked in {seconds(cost['wall_s'])}."
        return
    yield (
        f"The set: {whole['calls']} calls, {whole['tokens']:,} tokens, {usd(whole['usd'])}; "
        f"a call took {seconds(whole['latency_s'])} (median). "
        f"Answered by {', '.join(whole['answered_by']) or 'nobody'}."
    )
    yield (
        f"This time: {cost['requests']} calls sent, {cost['from_ledger']} answers from the ledger, "
        f"{usd(cost['usd'])}, {seconds(cost['wall_s'])}."
    )


def _rows(report: Mapping[str, Any]) -> Iterator[str]:
    """Where to look: what the judge has wrong, and what was no comparison."""
    if wrong := report["wrong"]:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        yield f"Wrong in line {', '.join(map(str, wrong[:_SHOWN]))}{more}."
    problems = report["data"]["problems"]
    if problems:
        yield f"{len(problems)} rows of {report['data']['path']} are no comparisons:"
        for problem in problems[:_SHOWN]:
            yield f"  line {problem['line']}: {problem['reason']}: {problem['excerpt']}"
    if len(problems) > _SHOWN:
        yield f"  and {len(problems) - _SHOWN} more, in the report"


def _findings(found: Sequence[str]) -> Iterator[str]:
    yield "What stands out:" if found else "Nothing stands out."
    for sentence in found:
        yield f"- {sentence}"


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _rate(rate: Mapping[str, Any] | None) -> str:
    """E.g. 97% (84-99) of 31."""
    if rate is None:
        return "-"
    interval = f"{100 * rate['low']:.0f}-{100 * rate['high']:.0f}"
    return f"{percent(rate['value'])} ({interval}) of {rate['count']}"


def _share(rate: Mapping[str, Any] | None) -> str:
    return "-" if rate is None else f"{percent(rate['value'])} of {rate['count']}"
