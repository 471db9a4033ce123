"""What `status`, `show` and the end of a campaign print."""

from __future__ import annotations

import os
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from online_dpo.display.judge_table import alarms_of
from online_dpo.display.lookup import Comparisons, PairView, ResponseView, Side, find_row
from online_dpo.display.terminal_tables import (
    RECENT,
    make_console,
    print_fates,
    print_judge,
    print_rounds,
    print_sources,
    print_spending,
    print_times,
    say,
    say_folded,
)
from online_dpo.display.visible import visible
from online_dpo.display.voices import Voice, agreed
from online_dpo.display.wording import headline, number, remarks
from online_dpo.trust import trust_flags
from online_dpo.views import Campaign, RoundView, evaluated

if TYPE_CHECKING:
    from rich.console import Console

_EXCERPT_LINES, _EXCERPT_LENGTH = 8, 600


def print_status(campaign: Campaign) -> None:
    """State, rounds, models, counts by reason and times of a campaign."""
    console = make_console()
    rounds = campaign.rounds()
    _print_header(console, campaign, rounds)
    if not rounds:
        return
    print_rounds(console, rounds)
    print_sources(console, rounds)
    print_fates(console, rounds)
    print_judge(console, rounds)
    print_spending(console, rounds)
    print_times(console, rounds)
    _print_findings(console, rounds)


def print_summary(campaign: Campaign, note: str | None = None) -> None:
    """The end of `run` and `resume`: the table, sample answers, and what to do next.

    `note` says what happened, where that was not a campaign coming to its end.
    """
    console = make_console()
    rounds = campaign.rounds()
    if note is not None:
        say(console, note)
    _print_header(console, campaign, rounds)
    if rounds:
        _print_few_rounds(console, rounds)
        _print_examples(console, campaign, rounds)
        _print_findings(console, rounds)
    _print_next(console, campaign)


def print_row(campaign: Campaign, row_id: str) -> None:
    """A preference, or a good or bad response, with all that is known of it.

    Raises ConfigError naming near ids.
    """
    row, console = find_row(campaign.path, row_id), make_console()
    if isinstance(row, PairView):
        _print_pair(console, row)
    else:
        _print_response(console, row)


def _print_pair(console: Console, pair: PairView) -> None:
    say(console, f"pair {pair.pair_id}: {_trained(pair)}")
    margin, p = number(pair.margin, 3), number(pair.p, 3)
    say(console, f"source {pair.prompt_source}, margin {margin}, p {p}")
    if pair.comparison is not None:
        say(console, f"judge: {_comparison(pair.comparison)}")
        _print_voices(console, pair.comparison.voices, ("chosen", "rejected"))
    _print_section(console, "prompt", _prompt(pair))
    for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        _print_side(console, name, side)


def _print_response(console: Console, row: ResponseView) -> None:
    word = "good" if row.good else "bad"
    say(console, f"{word} response {row.row_id}: {_trained(row)}")
    margin = number(row.margin, 3)
    say(console, f"source {row.prompt_source}, {margin} from the threshold")
    _print_section(console, "prompt", _prompt(row))
    _print_side(console, word, row.response)


def _print_side(console: Console, name: str, side: Side) -> None:
    _print_section(console, f"{name}: {_side(side)}", side.text)
    _print_voices(console, side.voices, ("good", "bad"))


def _print_voices(console: Console, voices: Sequence[Voice], words: tuple[str, str]) -> None:
    """What each said, a line each, and how far they agree."""
    width = max((len(voice.name) for voice in voices), default=0)
    for voice in voices:
        say(console, f"  {voice.name:<{width}}  {_said(voice, words)}{_why(_reasons(voice))}")
    if (agreement := agreed(voices)) is not None:
        same, answered = agreement
        share = f"all {answered}" if same == answered else f"{same} of {answered}"
        say(console, f"  {share} agree")


def _said(voice: Voice, words: tuple[str, str]) -> str:
    if voice.role == "annotator":
        names = {1.0: words[0], 0.5: "tie", 0.0: words[1], None: "skipped"}
        return names[voice.ps[0]]
    return ", ".join("no verdict" if p is None else f"p {number(p, 3)}" for p in voice.ps)


def _reasons(voice: Voice) -> str:
    return visible("; ".join(voice.reasons))


def _print_section(console: Console, title: str, text: str) -> None:
    say(console, f"\n{title}", "bold")
    say(console, textwrap.indent(visible(text), "  ", lambda line: True))


def _print_header(console: Console, campaign: Campaign, rounds: Sequence[RoundView]) -> None:
    config = campaign.config
    done = sum(r.stage == "done" and r.round > 0 for r in rounds)
    state = campaign.state
    title = f"{config.campaign.name}: {state}, {done} of {config.campaign.rounds} rounds done"
    say(console, title, "bold")
    policy = next((r.policy for r in reversed(rounds) if r.policy), None)
    reference = next((r.reference for r in reversed(rounds) if r.reference), None)
    facts = {
        "run": _shown_path(campaign.path),
        "now at": _unfinished(rounds, config.sampling.n),
        "policy": _model(policy),
        "reference": _model(reference),
        "to go on": _resume(campaign) if state == "stopped" else "",
        "waits for": _people(campaign) if state == "waiting" else "",
    }
    for name, fact in facts.items():
        if fact:
            say(console, f"  {name:<11}{fact}")


def _unfinished(rounds: Sequence[RoundView], n: int) -> str:
    """What the round that is not done does next."""
    if not rounds or rounds[-1].stage == "done":
        return ""
    view = rounds[-1]
    text = f"round {view.round}, {view.stage}"
    if view.stage in ("sample", "label") and view.prompts:
        text += f" ({view.samples} of {view.prompts * n} responses sampled)"
    return text


def _model(model: dict[str, str] | None) -> str:
    return "" if model is None else f"{model['path']}  sha256 {model['sha256'][:12]}"


def _print_few_rounds(console: Console, rounds: Sequence[RoundView]) -> None:
    """All rounds, or of many the first and the last of those that were evaluated."""
    shown = list(rounds)
    if len(shown) > RECENT:
        shown = [r for r in rounds if r.evaluation is not None or r is rounds[-1]]
    if len(shown) > RECENT:
        shown = [shown[0], *shown[1 - RECENT :]]
    if len(shown) < len(rounds):
        left_out = len(rounds) - len(shown)
        say(console, f"\n{left_out} rounds are left out here; `status` shows them.", "dim")
    print_rounds(console, shown)


def _print_findings(console: Console, rounds: Sequence[RoundView]) -> None:
    console.print()
    say_folded(console, headline(rounds), "bold")
    for alarm in alarms_of(rounds):
        say_folded(console, f"Alarm: {alarm}", "bold yellow", indent="       ")
    for remark in remarks(rounds):
        say_folded(console, f"Note: {remark}", indent="      ")


def _print_examples(console: Console, campaign: Campaign, rounds: Sequence[RoundView]) -> None:
    """The first held-out prompts with the answers of policy 0 and of the last policy."""
    measured = evaluated(rounds)
    count = campaign.config.evaluation.examples
    if not measured or measured[-1].round == 0 or not count:
        return
    first = {row["prompt_id"]: row for row in campaign.answers(measured[0].round)}
    last = measured[-1].round
    for row in campaign.answers(last)[:count]:
        _print_section(console, "held-out prompt", row["prompt_text"].rstrip("\n"))
        for name, answer in (("policy 0", first.get(row["prompt_id"])), (f"round {last}", row)):
            if answer is not None:
                score = "" if answer["score"] is None else f" (score {number(answer['score'])})"
                say(console, f"{name}{score}:", "cyan")
                say(console, textwrap.indent(_excerpt(answer["text"]), "  ", lambda line: True))


def _excerpt(text: str) -> str:
    """The beginning of a long text, with what is left out counted."""
    text = visible(text)
    kept = "\n".join(text[:_EXCERPT_LENGTH].split("\n")[:_EXCERPT_LINES])
    left_out = len(text) - len(kept)
    return f"{kept} [... {left_out} more characters; the report has them]" if left_out else kept


def _print_next(console: Console, campaign: Campaign) -> None:
    path = campaign.path
    if campaign.state == "finished":
        out = shlex.quote(_shown_path(path.with_name(f"{path.name}-export")))
        commands = {
            _command("report", path): "one HTML file: curves, answers, pairs",
            f"{_command('export', path)} --out {out}": "the policy and what it was trained on",
        }
    else:
        commands = {_resume(campaign): "go on"}
    say(console, "\nnext:", "bold")
    width = max(map(len, commands))
    for command, what in commands.items():
        say(console, f"  {command:<{width}}  # {what}")


def _command(name: str, path: Path) -> str:
    return f"online-dpo {name} {shlex.quote(_shown_path(path))}"


def _resume(campaign: Campaign) -> str:
    return " ".join((_command("resume", campaign.path), *trust_flags(campaign.config)))


def _people(campaign: Campaign) -> str:
    return f"people: {_command('label', campaign.path)} --annotator NAME"


def _shown_path(path: Path) -> str:
    """Relative to the working directory where it lies below that."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _trained(row: PairView | ResponseView) -> str:
    rounds = ", ".join(str(n) for n in row.rounds)
    kind, _, made = row.origin.partition("-")
    sampled = kind == "round" and made.isdigit()
    origin = f"the samples of round {int(made)}" if sampled else row.origin
    return f"trained on in round {rounds}, from {origin}"


def _prompt(row: PairView | ResponseView) -> str:
    if row.prompt is None:
        return f"(not among the campaign's prompts; it comes with {row.origin})"
    if row.prompt.text is not None:
        return row.prompt.text.rstrip("\n")
    return "\n".join(f"{m.role}: {m.content}" for m in row.prompt.messages)


def _comparison(comparison: Comparisons) -> str:
    orders = "1 order" if comparison.orders == 1 else f"{comparison.orders} orders"
    p = "no verdict" if comparison.p is None else f"p {number(comparison.p, 3)}"
    return f"{p} that the chosen one is better, over {orders}{_why(comparison.reason)}"


def _side(side: Side) -> str:
    cut = ", cut off at the token limit" if side.truncated else ""
    score = "" if side.score is None else f", score {number(side.score, 3)}"
    return f"{side.num_tokens} tokens{cut}{score}{_why(side.reason)}"


def _why(reason: str | None) -> str:
    return f" ({reason})" if reason else ""
