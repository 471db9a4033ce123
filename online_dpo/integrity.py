"""What must hold of a run directory before anything in it is used, stage by stage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from online_dpo.errors import CorruptError
from online_dpo.files import sha256_file, sha256_text
from online_dpo.records import ModelRef, model_ref_from_dict
from online_dpo.store import RoundDir, RunDir

WEIGHTS = ("policy", "optimizer", "base")
"""What is hashed where it is used; all else is at every start."""

PLANNED = ("model", "reference", "checkpoints", "training", "policy", "canary", "evaluation")
"""What no round has without a plan; one may be made anew for samples, labels and pairs."""

CONFIG, VERSIONS = "campaign.yaml", "versions.json"


def check_run(run: RunDir) -> None:
    """Compare what is committed with its manifests, and these with each other.

    Raises CorruptError, which names the file. Nothing is changed. The one thing that may be gone
    is the newest artifact of the round under way, whole: it is made again.
    """
    rounds = run.rounds()
    _check_events(run)
    _check_numbers(run, rounds)
    for round_dir in rounds:
        if round_dir.finished:
            _check_finished(round_dir)
        elif round_dir is not rounds[-1]:
            raise CorruptError(f"{round_dir.path / 'manifest.json'} is missing.")
        elif round_dir.planned:
            _check_begun(round_dir)
        elif any(round_dir.has(name) or round_dir.children(name) for name in PLANNED):
            raise CorruptError(f"{round_dir.path / 'round.json'} is missing.")
        for info in round_dir.artifacts():
            if info.name not in WEIGHTS:
                round_dir.verify(info.name)
        for checkpoint in round_dir.children("checkpoints"):
            round_dir.verify(checkpoint)
    if rounds and not rounds[-1].finished:
        for model in _models_in_use(rounds):
            run.verify_model(model)


def _check_events(run: RunDir) -> None:
    """Every line but one torn at the end, which the next event cuts off, is an event."""
    path = run.path / "events.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            json.loads(line)
        except ValueError:
            raise CorruptError(f"{path} is damaged in line {number}.") from None


def _check_numbers(run: RunDir, rounds: list[RoundDir]) -> None:
    for expected, round_dir in enumerate(rounds):
        if round_dir.number != expected:
            raise CorruptError(f"{run.round(expected).path} is missing.")


def write_start(run: RunDir, versions: str, config: str) -> None:
    """Write the two files that a campaign starts with; the second, its last line, signs both."""
    run.write_text(VERSIONS, versions)
    run.write_text(CONFIG, config + _signature(run, config))


def check_start(run: RunDir) -> None:
    """Raise CorruptError where the campaign's config is not the one that it started with."""
    path = run.path / CONFIG
    if not path.is_file():
        if run.round(0).planned:
            raise CorruptError(f"{path} is missing.")
        return
    if not (run.path / VERSIONS).is_file():
        raise CorruptError(f"{run.path / VERSIONS} is missing.")
    text = path.read_text(encoding="utf-8", errors="replace")
    body = "".join(text.splitlines(keepends=True)[:-1])
    if text != body + _signature(run, body):
        raise CorruptError(
            f"{path}, or {VERSIONS} beside it, is not what the campaign started with: its sha256 "
            "differs. Settings are changed by `online-dpo resume --set`."
        )


def _signature(run: RunDir, config: str) -> str:
    versions = sha256_file(run.path / VERSIONS)
    return f"# sha256 of the lines above: {sha256_text(config)}; of {VERSIONS}: {versions}\n"


def _check_finished(round_dir: RoundDir) -> None:
    """A closed round: its plan and the artifacts that its manifest lists, but for those pruned."""
    manifest = round_dir.manifest()
    plan = round_dir.path / "round.json"
    if not plan.is_file():
        raise CorruptError(f"{plan} is missing.")
    if sha256_file(plan) != manifest["plan"]:
        raise CorruptError(f"{plan} is not what was committed: its sha256 differs.")
    if round_dir.number > 0:
        before = round_dir.run.round(round_dir.number - 1)
        if round_dir.plan().previous_manifest_sha256 != before.manifest_sha256():
            raise CorruptError(f"{before.path / 'manifest.json'} is not what was committed.")
    for artifact in manifest["artifacts"]:
        name = artifact["name"]
        if not round_dir.has(name):
            if name not in WEIGHTS or not _was_deleted(round_dir, name):
                raise CorruptError(f"{round_dir.path / name} is missing; the round lists it.")
        elif round_dir.manifest(name)["sha256"] != artifact["sha256"]:
            raise CorruptError(f"{round_dir.path / name} is not what the round's manifest lists.")


def _was_deleted(round_dir: RoundDir, name: str) -> bool:
    wanted = {"event": "deleted", "round": round_dir.number, "artifact": name}
    return any(wanted.items() <= event.items() for event in round_dir.run.events())


def _check_begun(round_dir: RoundDir) -> None:
    """The round under way: everything that something in it was made of is there, as it was."""
    for later, earlier, sha256 in _made_of(round_dir):
        if not round_dir.has(earlier):
            raise CorruptError(
                f"{round_dir.path / earlier} is missing; {round_dir.path / later} was made of it."
            )
        if sha256 is not None and round_dir.manifest(earlier)["sha256"] != sha256:
            raise CorruptError(
                f"{round_dir.path / earlier} is not what {round_dir.path / later} was made of."
            )


def _made_of(round_dir: RoundDir) -> Iterator[tuple[str, str, str | None]]:
    """An artifact, another of the round that it rests on, and that one's hash where it is named."""
    shards = round_dir.children("samples")
    for number in range(len(shards)):
        yield shards[-1], f"samples/part-{number:05d}", None
    names = [info.name for info in round_dir.artifacts()]
    for name in [*names, *round_dir.children("checkpoints")]:
        inputs: dict[str, Any] = round_dir.manifest(name)["inputs"]
        stem, _, part = name.partition("/")
        if stem in ("labels", "scores"):
            yield name, f"samples/{part}", inputs["samples"]
        for earlier, sha256 in inputs.items():
            if earlier.startswith(("samples/", "labels/")) or earlier in ("pairs", "unpaired"):
                yield name, earlier, sha256
        scored = inputs.get("reference")  # a reference that moves is named by its model instead
        if stem not in ("labels", "scores") and scored not in (None, _reference(round_dir)):
            yield name, "reference", scored
    yield from _in_order(round_dir)


def _reference(round_dir: RoundDir) -> str | None:
    """The hash of the model that is the round's reference; round 0 has none."""
    return round_dir.plan().reference.sha256 if round_dir.number > 0 else None


def _in_order(round_dir: RoundDir) -> Iterator[tuple[str, str, str | None]]:
    """What follows from the order in which a round commits."""
    order = ["model", "prompts"] if round_dir.number == 0 else []
    order += ["training", "policy", "canary", "evaluation"]
    if round_dir.number == 0 and not (round_dir.has("policy") or round_dir.has("training")):
        order = ["model", "prompts", "canary", "evaluation"]  # a given model is trained on nothing
    for rows in ("pairs", "unpaired"):
        if round_dir.number > 0 and round_dir.has(rows):
            yield rows, "judge_check", None
    there = [name for name in order if round_dir.has(name)]
    for name in order[: order.index(there[-1])] if there else []:
        yield there[-1], name, None


def _models_in_use(rounds: list[RoundDir]) -> list[ModelRef]:
    """What the round under way will load: its policy and reference, and policy 0."""
    found = [model_ref_from_dict(r.manifest()["policy"]) for r in rounds[:1] if r.finished]
    if rounds[-1].number > 0 and rounds[-1].planned:
        plan = rounds[-1].plan()
        found += [plan.policy, plan.reference]
    if rounds[-1].has("policy"):
        found.append(rounds[-1].ref("policy"))
    return [model for model in found if model is not None]
