"""The online regime on a CPU: what a round costs, and that kills do not change it.

20 rounds of 64 prompts x 2 responses x 32 tokens and one optimizer step, the reference fixed, the
optimizer carried, a Llama of about 1M parameters. The campaign runs twice: once undisturbed, once
killed by SIGKILL at seeded moments and resumed. Prints the seconds of each round and whether the
two are byte-equal; exits 1 where they are not.

    python benchmarks/online_regime.py [--rounds 20] [--kills 4] [--threads 2]
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

import online_dpo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        config = Path(folder) / "online.yaml"
        config.write_text(yaml.safe_dump(_config(args.rounds, args.threads)))
        _command("run", str(config), "--run-dir", str(whole)).wait()
        _report(whole)
        _run_with_kills(config, broken, args.kills, random.Random(args.seed))
        equal = _digests(whole) == _digests(broken)
        print(f"after {args.kills} kills: {'byte-equal' if equal else 'DIFFERENT'}")
    sys.exit(not equal)


def _config(rounds: int, threads: int) -> dict[str, object]:
    return {
        "model": {"init": {"hidden_size": 128, "intermediate_size": 352, "num_layers": 4}},
        "sft": {
            "demonstrations": "quickstart_demonstrations.jsonl",
            "epochs": 1,
            "learning_rate": 2e-3,
        },
        "prompts": {
            "train": [{"path": "quickstart.jsonl"}],
            "eval": [{"path": "quickstart_eval.jsonl"}],
        },
        "sampling": {"n": 2, "max_new_tokens": 32},
        "judge": {
            "name": "heuristic",
            "options": {"scorers": [{"kind": "length", "min": 8, "max": 12}]},
        },
        "train": {
            "optimizer": "carry",
            "learning_rate": 1e-4,
            "batch_size": 64,
            "checkpoint_every": 0,
        },
        "reference": {"promote": "never"},
        "evaluation": {"every": 10, "max_prompts": 64},
        "compute": {"threads": threads},
        "campaign": {"rounds": rounds, "prompts_per_round": 64},
    }


def _command(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "online_dpo.cli", *arguments]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def _run_with_kills(config: Path, run: Path, kills: int, rng: random.Random) -> None:
    """Kill the campaign a seeded while after each time it has got further."""
    process = _command("run", str(config), "--run-dir", str(run))
    for kill in range(kills):
        while process.poll() is None and _rounds_begun(run) < 2 + 3 * kill:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = _command("resume", str(run))
    assert process.wait() == 0, "the resumed campaign failed"


def _rounds_begun(run: Path) -> int:
    return len(list(run.glob("rounds/*/round.json")))


def _report(run: Path) -> None:
    rounds = [r for r in online_dpo.Campaign(run).rounds() if r.round > 0]
    plain = [r for r in rounds if r.evaluation is None]
    walls = [r.wall_s for r in plain if r.wall_s is not None]
    fixed = [r.fixed_s for r in plain if r.fixed_s is not None]
    print(f"rounds without evaluation: {len(walls)} of {len(rounds)}")
    for name, values in (("wall", walls), ("fixed cost", fixed)):
        print(f"  {name:<11} median {statistics.median(values):.3f} s, max {max(values):.3f} s")
    for stage in ("sample", "label", "pair", "train"):
        seconds = statistics.median(r.busy_s.get(stage, 0.0) for r in plain)
        print(f"  {stage:<11} median {seconds:.3f} s")


def _digests(run: Path) -> dict[str, str]:
    files = [p for p in sorted((run / "rounds").rglob("*")) if p.is_file()]
    return {
        str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in [*files, run / "metrics.jsonl"]
    }


if __name__ == "__main__":
    main()
