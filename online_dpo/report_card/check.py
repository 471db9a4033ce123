"""A judge's report card: asked about a set of labelled comparisons, asked again, and attacked."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from online_dpo.config import Config
from online_dpo.errors import CampaignError
from online_dpo.files import sha256_file, to_json
from online_dpo.judge_figures import figures, preferred
from online_dpo.judging import Labeller
from online_dpo.paid.chat import ChatReply
from online_dpo.paid.ledger import LEDGER
from online_dpo.progress import Progress, make_progress
from online_dpo.records import derive_seed
from online_dpo.report_card.answers import Answered, Answers, judged
from online_dpo.report_card.attacks import Attack, Attempt, attack_figures, make_attacks
from online_dpo.report_card.bench import opened
from online_dpo.report_card.comparisons import Labelled, Problem, read_comparisons
from online_dpo.report_card.findings import findings
from online_dpo.report_card.spent import bought, spent
from online_dpo.resources import find_rows
from online_dpo.store import RunDir

REPORT = "report.json"
VERDICTS = "verdicts.jsonl"


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is asked beside each comparison once in its orders and votes."""

    attacks: int = 10
    """Attacks of each kind."""
    repeats: int = 20
    """Comparisons that are asked once more."""
    limit: int | None = None
    """Comparisons of the file that are used, the first ones; None is all."""


def check_judge(
    config: Config,
    data: str,
    *,
    out: Path,
    evaluation: bool = False,
    extent: Extent = Extent(),  # noqa: B008
    progress: Progress | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """The report card of the config's judge (`evaluation`: of its evaluation's) on a set.

    `data` is a file, a shipped one's name or a dataset, of what `read_comparisons` reads. In `out`
    come the ledger, report.json, and verdicts.jsonl with a line for each verdict. Asked again, it
    pays for nothing twice. Raises ConfigError, JudgeError, BudgetError and SignalError; `command`
    is what goes on after an interruption, for messages.
    """
    path = find_rows(data)
    labelled, problems = read_comparisons(path, seed=config.campaign.seed)
    labelled = labelled[: extent.limit]
    started = time.monotonic()
    with (
        closing(progress or make_progress(quiet=True)) as shown,
        opened(config, out, evaluation=evaluation, command=command) as labeller,
    ):
        folder, keys = RunDir(out), set[str]()
        events = len(folder.events())
        labeller.watch(lambda *call: keys.update(_key(call[-1])))
        said, rows = _ask(Answers(labeller, shown), labelled, extent, config.campaign.seed)
        report = {
            "judge": _described(labeller),
            "data": _data(data, path, len(labelled), problems),
            "extent": asdict(extent),
            **said,
            "cost": {
                "wall_s": time.monotonic() - started,
                **bought(folder.events()[events:]),
                "set": spent(out / LEDGER, keys),
            },
        }
        report["findings"] = findings(report)
        folder.write_text(VERDICTS, "".join(f"{json.dumps(row)}\n" for row in rows))
        folder.write_text(REPORT, to_json(report))
    return report


def _ask(
    answers: Answers, labelled: Sequence[Labelled], extent: Extent, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures of what was said, and a row for each verdict."""
    answered = _on_the_set(answers, labelled, extent.repeats, seed)
    attacks = make_attacks(labelled, num_each=extent.attacks, seed=seed)
    against = [(attack.prompt, attack.attack, attack.better) for attack in attacks]
    withstood = list(zip(attacks, answers.on(against, purpose="attack"), strict=True))
    pairs = list(zip(labelled, answered, strict=True))
    on_set = [judged(row, said) for row, said in pairs]
    facts = {
        "figures": figures(on_set),
        "no_verdict": dict(Counter(pair.reason for pair in on_set if pair.p is None)),
        "attacks": attack_figures(
            [
                Attempt(
                    attack.kind,
                    said.comparison.p,
                    said.shown(attack.attack),
                    answered[attack.row].shown(attack.worse),
                )
                for attack, said in withstood
            ]
        ),
        "wrong": [row.line for row, said in pairs if _is_wrong(row, said)],
    }
    rows = [_verdict(row, None, said) for row, said in pairs]
    rows += [_verdict(labelled[attack.row], attack, said) for attack, said in withstood]
    return facts, rows


def _on_the_set(
    answers: Answers, labelled: Sequence[Labelled], num_repeated: int, seed: int
) -> list[Answered]:
    """What is said of each comparison; some, drawn by seed, are asked once more than the others."""
    drawn = sorted(range(len(labelled)), key=lambda row: derive_seed(seed, "repeated", row))
    found: dict[int, Answered] = {}
    for rows, more in ((drawn[:num_repeated], 1), (drawn[num_repeated:], 0)):
        pairs = [(labelled[r].prompt, labelled[r].first, labelled[r].second) for r in rows]
        said = answers.on(pairs, purpose="repeat" if more else "check", more_votes=more)
        found |= zip(rows, said, strict=True)
    return [found[row] for row in range(len(labelled))]


def _is_wrong(row: Labelled, said: Answered) -> bool:
    """Whether p lies on the other side than the label."""
    p = said.comparison.p
    return p is not None and preferred(p) * preferred(row.gold) == -1


def _verdict(row: Labelled, attack: Attack | None, said: Answered) -> dict[str, Any]:
    """A line of verdicts.jsonl; an attack stands first, what it was set against second."""
    made = said.comparison
    first, second = (row.first, row.second) if attack is None else (attack.attack, attack.better)
    return {
        "line": row.line,
        "attack": None if attack is None else attack.kind,
        "prompt": row.prompt.content,
        "first": first.text,
        "second": second.text,
        "gold": row.gold if attack is None else 0.0,
        "p": made.p,
        "reason": made.reason,
        "order_ps": made.order_ps,
        "votes": said.votes,
        "raws": made.raws,
    }


def _key(outcome: ChatReply | CampaignError) -> tuple[str, ...]:
    """Under which key of the ledger a reply stands, if it is one."""
    return (outcome.key,) if isinstance(outcome, ChatReply) else ()


def _described(labeller: Labeller) -> dict[str, Any]:
    """The judge and how it was asked; one that scores is asked in no order."""
    config = labeller.config
    how: dict[str, Any] = {"votes": config.votes}
    if labeller.kind == "compare":
        how |= {"orders": config.orders, "swap": config.swap}
    else:
        how |= {"scale": config.scale}
    return {**labeller.identity, "kind": labeller.kind, **how}


def _data(name: str, path: str, num_pairs: int, problems: Sequence[Problem]) -> dict[str, Any]:
    digest = sha256_file(Path(path)) if Path(path).is_file() else None
    unusable = [asdict(problem) for problem in problems]
    return {"path": name, "sha256": digest, "pairs": num_pairs, "problems": unusable}
