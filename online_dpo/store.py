"""The run directory: rounds, atomic artifacts, manifests, events; knows no stage's meaning."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from online_dpo import strict_json
from online_dpo.errors import ConfigError, CorruptError
from online_dpo.files import (
    PARTIAL,
    combined_hash,
    disk_faults,
    file_hashes,
    fsync_path,
    read_signed_json,
    refuse_links,
    remove_tree,
    sha256_file,
    size_of,
    to_signed_json,
    write_atomic,
)
from online_dpo.records import ArtifactInfo, ModelRef, RoundPlan, plan_from_dict, to_dict

MANIFEST = "manifest.json"
_OWN = frozenset({MANIFEST})


@dataclass
class Draft:
    """An artifact being written: its folder, and what its manifest will say beside the hashes."""

    path: Path
    rows: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class RunDir:
    """A campaign's folder. Reading needs no lock; writing is for the holder of the lock."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self._verified: set[str] = set()

    @property
    def exists(self) -> bool:
        return (self.path / "campaign.yaml").is_file()

    def require(self) -> None:
        """Raise ConfigError where this folder is no campaign, or leads out of itself."""
        if not self.exists:
            what = "does not exist" if not self.path.exists() else "holds no campaign.yaml"
            raise ConfigError(f"{self.path} is no run directory: it {what}.")
        refuse_links(self.path)

    def round(self, number: int) -> RoundDir:
        return RoundDir(self, number)

    def rounds(self) -> list[RoundDir]:
        """The rounds that have begun, in order."""
        folder = self.path / "rounds"
        if not folder.is_dir():
            return []
        numbers = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
        return [self.round(number) for number in numbers]

    def resolve(self, path: str) -> Path:
        """A path as plans record it (relative to the run, or absolute) as a place on this disk."""
        return self.path / path

    def relative(self, path: Path) -> str:
        """The inverse of `resolve`."""
        absolute = path.absolute()
        inside = absolute.is_relative_to(self.path)
        return absolute.relative_to(self.path).as_posix() if inside else str(absolute)

    def verify_model(self, model: ModelRef) -> None:
        """Compare a model of this run with its recorded hash, the first time it is used here.

        Models from elsewhere are compared with their pin when the campaign starts. Raises
        CorruptError.
        """
        parts = Path(model.path).parts
        if parts[0] != "rounds" or model.sha256 in self._verified:
            return
        origin = self.round(int(parts[1]))
        origin.verify("/".join(parts[2:]))
        if origin.manifest("/".join(parts[2:]))["sha256"] != model.sha256:
            raise CorruptError(f"{self.path / model.path} is not the model that was recorded.")
        self._verified.add(model.sha256)

    def event(self, kind: str, **facts: Any) -> None:
        """Append one line to events.jsonl: what happened, when, with its figures.

        A worker's own event may be passed on whole: its `event` then stands for `kind`.
        """
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **facts}, default=str)
        with disk_faults(self.path), (self.path / "events.jsonl").open("ab+") as file:
            _cut_torn_line(file)
            file.write(line.encode() + b"\n")

    def events(self) -> list[dict[str, Any]]:
        """All events; a torn last line, as a crash leaves it, is passed over."""
        return read_lines(self.path / "events.jsonl")

    def write_text(self, name: str, text: str) -> None:
        """Replace a file at the run's top atomically."""
        with disk_faults(self.path / name):
            write_atomic(self.path / name, text)


class RoundDir:
    """One round's folder: its plan, its artifacts, its manifest."""

    def __init__(self, run: RunDir, number: int) -> None:
        self.run = run
        self.number = number
        self.path = run.path / "rounds" / f"{number:03d}"

    @property
    def planned(self) -> bool:
        return (self.path / "round.json").is_file()

    @property
    def finished(self) -> bool:
        return (self.path / MANIFEST).is_file()

    def write_plan(self, plan: RoundPlan | Mapping[str, Any]) -> None:
        """Record the round's inputs, before anything else of it exists."""
        data = to_dict(plan) if isinstance(plan, RoundPlan) else dict(plan)
        with disk_faults(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            fsync_path(self.path.parent)
            write_atomic(self.path / "round.json", to_signed_json(data))

    def plan(self) -> RoundPlan:
        """The recorded inputs."""
        try:
            return plan_from_dict(self.plan_facts())
        except (KeyError, TypeError) as error:
            raise CorruptError(f"{self.path / 'round.json'} is not a plan: {error}") from error

    def plan_facts(self) -> dict[str, Any]:
        """The recorded inputs as they stand in the file; round 0's are no plan."""
        return read_signed_json(self.path / "round.json")

    def has(self, name: str) -> bool:
        """Whether an artifact is committed. Raises CorruptError where only its manifest is gone."""
        folder = self.path / name
        if (folder / MANIFEST).is_file():
            return True
        if folder.is_dir() and any(path.is_file() for path in folder.iterdir()):
            raise CorruptError(f"{folder / MANIFEST} is missing.")
        return False

    def artifact(self, name: str) -> Path:
        """A committed artifact's folder. Raises CorruptError where it is missing."""
        if not self.has(name):
            raise CorruptError(f"{self.path / name} is missing or not complete.")
        return self.path / name

    def manifest(self, name: str = ".") -> dict[str, Any]:
        """An artifact's manifest, or the round's own."""
        return read_signed_json(self.path / name / MANIFEST)

    def children(self, name: str) -> list[str]:
        """The committed artifacts below a folder of this round, by name, sorted."""
        folder = self.path / name
        if not folder.is_dir():
            return []
        found = sorted(p.name for p in folder.iterdir() if not p.name.endswith(PARTIAL))
        return [f"{name}/{child}" for child in found if self.has(f"{name}/{child}")]

    @contextlib.contextmanager
    def commit(self, name: str, *, inputs: Mapping[str, str]) -> Iterator[Draft]:
        """Write an artifact: yields a fresh folder, and makes it `name` whole when the block ends.

        `inputs` are the hashes of what it was made from. Where the block raises, nothing is made.
        """
        draft = self.begin(name)
        with disk_faults(draft.path):
            yield draft
            self.finish(name, draft, inputs=inputs)

    def begin(self, name: str) -> Draft:
        """An empty folder to write an artifact in; leftovers of an earlier try are removed."""
        partial = self.path / (name + PARTIAL)
        with disk_faults(partial):
            remove_tree(partial)
            partial.mkdir(parents=True)
        return Draft(partial)

    def finish(self, name: str, draft: Draft, *, inputs: Mapping[str, str]) -> ArtifactInfo:
        """fsync the files, write the manifest, rename, fsync the parent."""
        with disk_faults(draft.path):
            hashes = file_hashes(draft.path, skip=_OWN)
            for file in hashes:
                fsync_path(draft.path / file)
            manifest = {
                "artifact": name,
                "sha256": combined_hash(hashes),
                "rows": draft.rows,
                "bytes": size_of(draft.path),
                "files": hashes,
                "inputs": dict(inputs),
                **draft.facts,
            }
            write_atomic(draft.path / MANIFEST, to_signed_json(manifest))
            for folder in [p for p in draft.path.rglob("*") if p.is_dir()]:
                fsync_path(folder)
            target = self.path / name
            with _set_aside(target):
                draft.path.rename(target)
                fsync_path(target.parent)
        self.run._verified.add(str(manifest["sha256"]))
        return _info(manifest)

    def verify(self, name: str) -> Path:
        """The artifact's folder after every file's hash was compared with its manifest."""
        folder = self.artifact(name)
        manifest = self.manifest(name)
        for file, expected in manifest["files"].items():
            path = folder / file
            if not path.is_file():
                raise CorruptError(f"{path} is missing; {folder / MANIFEST} lists it.")
            if sha256_file(path) != expected:
                raise CorruptError(f"{path} is not what was committed: its sha256 differs.")
        return folder

    def ref(self, name: str) -> ModelRef:
        """A committed artifact by place and content hash."""
        return ModelRef(self.run.relative(self.path / name), str(self.manifest(name)["sha256"]))

    def artifacts(self) -> list[ArtifactInfo]:
        """Every committed artifact of the round, sorted by name; step checkpoints left out."""
        found = sorted(self.path.rglob(MANIFEST))
        names = [p.parent.relative_to(self.path).as_posix() for p in found]
        return [
            _info(self.manifest(name))
            for name in names
            if name != "." and PARTIAL not in name and not name.startswith("checkpoints/")
        ]

    def close(self, facts: Mapping[str, Any]) -> str:
        """Write the round's manifest, the last of its files; returns its sha256."""
        artifacts = [to_dict(info) for info in self.artifacts()]
        plan_hash = sha256_file(self.path / "round.json")
        text = to_signed_json(
            {"round": self.number, "plan": plan_hash, "artifacts": artifacts, **facts}
        )
        with disk_faults(self.path):
            write_atomic(self.path / MANIFEST, text)
        return self.manifest_sha256()

    def manifest_sha256(self) -> str:
        """The hash by which the next round names this one."""
        return sha256_file(self.path / MANIFEST)

    def remove(self, name: str) -> None:
        """Delete an artifact and what is left of a half-written one."""
        with disk_faults(self.path):
            target = self.path / name
            if target.is_dir() and not name.endswith(PARTIAL):
                doomed = target.with_name(target.name + PARTIAL)
                remove_tree(doomed)
                target.rename(doomed)
                fsync_path(target.parent)
                target = doomed
            remove_tree(target)


@contextlib.contextmanager
def _set_aside(target: Path) -> Iterator[None]:
    """Move what stands in an artifact's place away, and delete it once the new one is there."""
    aside = target.with_name(f"{target.name}.old{PARTIAL}")
    there = target.exists()
    if there:
        remove_tree(aside)
        target.rename(aside)
    yield
    if there:
        remove_tree(aside)


def _info(manifest: Mapping[str, Any]) -> ArtifactInfo:
    return ArtifactInfo(
        manifest["artifact"], manifest["sha256"], manifest["rows"], manifest["bytes"]
    )


def _cut_torn_line(file: IO[bytes]) -> None:
    """Take away what a crash left of a line at the end of a file of whole lines."""
    if file.tell() == 0 or (file.seek(-1, os.SEEK_END), file.read(1))[1] == b"\n":
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a line torn by a crash is passed over, no file is no rows."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(strict_json.loads(line))
    return rows
