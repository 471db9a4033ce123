"""Takes out one fsync, rename or hash check at a time and shows which tests notice.

python tests/mutations.py [NAME ...]

Run by a person on a clean working tree: each mutation is written into the package, its tests are
run, and the file is put back. A mutation that no test notices is printed as SURVIVED, and the exit
code is 1.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Mutation:
    """A text of a file, what stands in its place, and the tests that should fail."""

    file: str
    old: str
    new: str
    tests: str


OUTSIDE = "tests/test_outside.py -k synced"
DAMAGE = "tests/test_damage.py -k before_use"

MUTATIONS = {
    "fsync of a small file": Mutation(
        "files.py", "        os.fsync(file.fileno())\n", "        pass\n", OUTSIDE
    ),
    "rename of a small file": Mutation(
        "files.py", "    partial.rename(path)\n", "    path.write_text(text)\n", OUTSIDE
    ),
    "fsync of a small file's parent": Mutation(
        "files.py", "    fsync_path(path.parent)\n", "    pass\n", OUTSIDE
    ),
    "fsync of an artifact's files": Mutation(
        "store.py",
        "                fsync_path(draft.path / file)\n",
        "                pass\n",
        OUTSIDE,
    ),
    "fsync of an artifact's parent": Mutation(
        "store.py", "                fsync_path(target.parent)\n", "                pass\n", OUTSIDE
    ),
    "rename of an artifact": Mutation(
        "store.py",
        "                draft.path.rename(target)\n",
        "                __import__('shutil').copytree(draft.path, target)\n",
        OUTSIDE,
    ),
    "fsync after a folder's creation": Mutation(
        "store.py", "            fsync_path(self.path.parent)\n", "            pass\n",
        "tests/test_fault_points.py -k listed",
    ),
    "hash of a file": Mutation(
        "store.py", "            if sha256_file(path) != expected:", "            if False:", DAMAGE
    ),
    "hash of a manifest": Mutation(
        "files.py",
        "    if signed is None or path.read_text(encoding=\"utf-8\") != to_signed_json(data):",
        "    if signed is None:",
        DAMAGE,
    ),
    "hash of the config": Mutation(
        "integrity.py", "    if text != body + _signature(run, body):", "    if False:", DAMAGE
    ),
    "hash of models in use": Mutation(
        "integrity.py",
        "            run.verify_model(model)\n",
        "            pass\n",
        DAMAGE,
    ),
    "hash of step checkpoints": Mutation(
        "integrity.py", "            round_dir.verify(checkpoint)\n", "            pass\n", DAMAGE
    ),
    "presence of what an artifact was made of": Mutation(
        "integrity.py",
        "        if not round_dir.has(earlier):",
        "        if False:",
        "tests/test_damage.py -k older",
    ),
    "artifacts that a closed round lists": Mutation(
        "integrity.py",
        "            if name not in WEIGHTS or not _was_deleted(round_dir, name):",
        "            if False:",
        "tests/test_damage.py -k closed",
    ),
    "optimizer state of a step checkpoint": Mutation(
        "training/checkpoints.py",
        "    load_optimizer(folder, model, optimizer)\n    lines",
        "    lines",
        "tests/test_training.py -k twenty",
    ),
    "seed of a step": Mutation(
        "training/loop.py",
        "            torch.manual_seed(_step_seed(",
        "            (lambda seed: None)(_step_seed(",
        "tests/test_left_out.py -k 'nothing or RNG'",
    ),
    "tidying at a start": Mutation(
        "loop.py",
        "        tidy(self._folder, self._config)\n",
        "",
        "tests/test_fault_points.py -k 'checkpoint or finish'",
    ),
}  # fmt: skip


def survives(mutation: Mutation) -> bool:
    """Whether the tests pass all the same."""
    file = ROOT / "online_dpo" / mutation.file
    text = file.read_text(encoding="utf-8")
    assert mutation.old in text, f"{file} has changed: {mutation.old!r}"
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        command = f"{sys.executable} -m pytest -q -x -m 'not slow' {mutation.tests}"
        return subprocess.run(command, shell=True, cwd=ROOT, capture_output=True).returncode == 0
    finally:
        file.write_text(text, encoding="utf-8")


def main(names: list[str]) -> int:
    """Try the mutations of these names, or all; how many survived."""
    survived = 0
    for name in names or MUTATIONS:
        lives = survives(MUTATIONS[name])
        survived += lives
        print(
            f"{'SURVIVED' if lives else 'noticed ':8}  {name}: {MUTATIONS[name].tests}", flush=True
        )
    return survived


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
