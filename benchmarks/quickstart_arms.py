"""Is the quickstart's gain real? Online against offline DPO, and a reward that can be hacked.

For each seed policy 0 is fine-tuned once, and every arm starts from it:

    promoted   the quickstart: each round's policy becomes the next reference
    fixed      the same with policy 0 as the reference throughout
    offline    one round on pairs of policy 0's samples alone: as many labels, pairs and steps
    hackable   configs/hackable.yaml: a judge that counts praise; the quickstart's reward, which it
               does not see, evaluates

Prints a row for each arm and seed, and for the hackable arm the independent score of every round.

    python benchmarks/quickstart_arms.py [--seeds 0 1 2] [--arms promoted fixed offline hackable]
                                         [--out runs/arms]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from make_quickstart_data import is_well_formed

import online_dpo
from online_dpo.config_file import load_config
from online_dpo.progress import PlainProgress
from online_dpo.resources import find_data
from online_dpo.store import read_lines

ARMS = ("promoted", "fixed", "offline", "hackable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("runs/arms"))
    args = parser.parse_args()
    for seed in args.seeds:
        start = _policy_zero(args.out / f"seed-{seed}" / "start", seed)
        for arm in args.arms:
            run = args.out / f"seed-{seed}" / arm
            campaign = online_dpo.run(_arm(arm, start, seed), run_dir=run, progress=PlainProgress())
            _report(arm, seed, campaign)


def _config(name: str) -> dict[str, Any]:
    return load_config(name).config.model_dump(mode="json")


def _policy_zero(run: Path, seed: int) -> Path:
    """The quickstart's fine-tuned policy, by a campaign whose one round is thrown away."""
    config = _config("quickstart.yaml")
    config["campaign"] |= {"seed": seed, "rounds": 1, "prompts_per_round": 8}
    config["evaluation"]["max_prompts"] = 8
    return online_dpo.run(config, run_dir=run, progress=PlainProgress()).policy(0)


def _arm(arm: str, start: Path, seed: int) -> dict[str, Any]:
    config = _config("hackable.yaml" if arm == "hackable" else "quickstart.yaml")
    config["model"] |= {"path": str(start), "init": None}
    config["sft"] = None
    config["campaign"]["seed"] = seed
    if arm == "fixed":
        config["reference"] = {"promote": "never"}
    if arm == "offline":
        _make_offline(config)
    return config


def _make_offline(config: dict[str, Any]) -> None:
    """As many samples and pairs as all rounds together, from every prompt, in a single round."""
    campaign, sampling = config["campaign"], config["sampling"]
    num_prompts = len(read_lines(find_data("quickstart.jsonl")))
    pairs = campaign["rounds"] * campaign["prompts_per_round"]
    sampling["n"] = pairs * sampling["n"] // num_prompts
    config["pairs"] |= {"selector": "all", "max_per_prompt": pairs // num_prompts}
    config["campaign"] |= {"rounds": 1, "prompts_per_round": num_prompts}


def _report(arm: str, seed: int, campaign: online_dpo.Campaign) -> None:
    rounds = campaign.rounds()
    first, last = rounds[0].evaluation, rounds[-1].evaluation
    assert first is not None and last is not None
    answers = campaign.answers(rounds[-1].round)
    formed = sum(is_well_formed(a["text"]) and a["finish_reason"] == "eos" for a in answers)
    wins = last["win_rate_policy0"]
    print(
        f"| {arm} | {seed} | {sum(r.pairs for r in rounds)} "
        f"| {sum((r.training or {}).get('steps', 0) for r in rounds)} "
        f"| {first['score']['mean']:.2f} | {last['score']['mean']:.2f} "
        f"| {wins['value']:.2f} ({wins['low']:.2f} to {wins['high']:.2f}) "
        f"| {formed / len(answers):.2f} | {last['distinct_2'] / first['distinct_2']:.2f} "
        f"| {last['kl_policy0']['mean']:.1f} |",
        flush=True,
    )
    if arm == "hackable":
        scores = [r.evaluation["score"]["mean"] for r in rounds if r.evaluation is not None]
        print(f"  independent score by round: {', '.join(f'{s:.2f}' for s in scores)}", flush=True)


if __name__ == "__main__":
    main()
