"""Which pairs are worth a label? Active choice of comparisons against a draw, at equal labels.

The quickstart's policy 0 is fine-tuned once for each seed. Every arm then has as many rounds with
as many comparisons, judged without error by the quickstart's reward; it trains on every pair that
was compared and is not a tie. The reference stays policy 0, so that implicit margins exist.

    draw            pairs of each prompt by seed
    uncertainty     those that a Bradley-Terry model of the verdicts so far foretells least
    reward_margin   those with the widest implicit reward margin
    entropy         more pairs where the policy is less sure of its answer
    knockout        best and worst of fewer prompts: what one costs, so many fewer of them

    python benchmarks/active_pairs.py --seed 0 [--arms draw uncertainty ...] [--out runs/active]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import online_dpo
from judges.heuristics import Heuristic
from online_dpo.asking.comparison_schedules import most_comparisons
from online_dpo.config_file import load_config
from online_dpo.progress import SilentProgress
from online_dpo.records import Prompt, Response

ARMS = ("draw", "uncertainty", "reward_margin", "entropy", "knockout")
ROUNDS, PROMPTS, COMPARISONS, ANSWERS = 6, 96, 2, 8


class Oracle:
    """Compares by the scores of `heuristic` with the same options, without error."""

    inline = True

    def __init__(self, **options: Any) -> None:
        self._scorer = Heuristic(**options)

    def compare(self, prompt: Prompt, first: Response, second: Response) -> float:
        """1 for the higher score, 0.5 for equal ones."""
        scores: Sequence[Any] = self._scorer.score(prompt, [first, second])
        a, b = (score.value for score in scores)
        return 0.5 * (1 + (a > b) - (a < b))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("runs/active"))
    args = parser.parse_args()
    folder = args.out / f"seed-{args.seed}"
    start = _policy_zero(folder / "start", args.seed)
    for arm in args.arms:
        config = _arm(arm, start, args.seed)
        run = online_dpo.run(config, run_dir=folder / arm, progress=SilentProgress())
        print(_row(arm, args.seed, run), flush=True)


def _config() -> dict[str, Any]:
    return load_config("quickstart.yaml").config.model_dump(mode="json")


def _policy_zero(run: Path, seed: int) -> Path:
    """The quickstart's fine-tuned policy, by a campaign whose one round is thrown away."""
    config = _config()
    config["campaign"] |= {"seed": seed, "rounds": 1, "prompts_per_round": 8}
    config["evaluation"]["max_prompts"] = 8
    return online_dpo.run(config, run_dir=run, progress=SilentProgress()).policy(0)


def _arm(arm: str, start: Path, seed: int) -> dict[str, Any]:
    config = _config()
    scorer = config["judge"]
    prompts = PROMPTS
    judge = {
        "name": f"{Path(__file__).resolve()}:Oracle",
        "options": scorer["options"],
        "orders": "one",  # it has no preference for either place
        "schedule": arm,
        "comparisons": COMPARISONS,
    }
    if arm == "knockout":
        judge["comparisons"] = "all"
        prompts = PROMPTS * COMPARISONS // most_comparisons("knockout", "all", ANSWERS)
    config["model"] |= {"path": str(start), "init": None}
    config["sft"] = None
    config["judge"] = judge
    config["sampling"]["n"] = ANSWERS
    config["pairs"]["selector"] = "all"
    config["reference"] = {"promote": "never"}
    config["evaluation"] |= {"judge": scorer, "every": ROUNDS}
    config["campaign"] |= {"seed": seed, "rounds": ROUNDS, "prompts_per_round": prompts}
    return config


def _row(arm: str, seed: int, campaign: online_dpo.Campaign) -> str:
    rounds = campaign.rounds()
    first, last = rounds[0].evaluation, rounds[-1].evaluation
    assert first is not None and last is not None
    wins = last["win_rate_policy0"]
    return (
        f"| {arm} | {seed} | {_labels(campaign)} | {sum(r.pairs for r in rounds)} "
        f"| {first['score']['mean']:.2f} "
        f"| {last['score']['mean']:.2f} ± {last['score']['stderr']:.2f} "
        f"| {wins['value']:.2f} ({wins['low']:.2f} to {wins['high']:.2f}) "
        f"| {last['kl_policy0']['mean']:.1f} |"
    )


def _labels(campaign: online_dpo.Campaign) -> int:
    """The comparisons that the judge was asked for."""
    from online_dpo.store import RunDir
    from online_dpo.tables import read_table

    tables = [
        round_dir.path / name / "labels.parquet"
        for round_dir in RunDir(campaign.path).rounds()
        for name in round_dir.children("labels")
    ]
    return sum(row["orders"] > 0 for table in tables for row in read_table(table))


if __name__ == "__main__":
    main()
