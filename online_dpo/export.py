"""A round's policy as a plain transformers folder, and what it was trained on as tables."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from online_dpo.display.model_card import model_card
from online_dpo.errors import ConfigError, DiskError
from online_dpo.files import PARTIAL, disk_faults, fsync_path, remove_tree, size_of
from online_dpo.models.adapter_files import BASE_FILE, base_of, is_adapter
from online_dpo.models.pinning import base_folder, check_pin
from online_dpo.records import ModelRef
from online_dpo.store import MANIFEST, RunDir
from online_dpo.views import Campaign, preference_rows, unpaired_rows

Row = dict[str, Any]

_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
"""What some readers take for the end of a line; JSON may hold it as an escape instead."""

_OWN = frozenset({MANIFEST, "README.md"})


def export_campaign(
    campaign: Campaign, out: Path, round_number: int | None = None, *, adapter: bool = False
) -> list[Path]:
    """Write `out/policy` with a model card, and what was trained on as JSONL and parquet.

    A policy that is an adapter is merged into its base, in the campaign's model.dtype; `adapter`
    writes it unmerged into `out/adapter` too.

    The policy is that of the round, of the last finished one without a number; the preferences, or
    the good and bad responses, are those of all rounds up to it, in the form that TRL and datasets
    read. `out` is made whole or not at all. Returns what was written. Raises ConfigError where
    `out` holds something, where the round trained no policy or its policy was deleted, and where
    `adapter` is asked of whole weights; CorruptError where its files have changed.
    """
    target = out.absolute()
    _check_target(target)
    number = _trained_round(campaign, round_number)
    run = RunDir(campaign.path)
    campaign.policy(number)
    policy = _verified_policy(run, number)
    if adapter and not is_adapter(policy):
        raise ConfigError(
            f"Round {number} of {campaign.path} trained whole weights, so there is no adapter to "
            "export; leave --adapter out."
        )
    rounds = range(1, number + 1)
    tables = {
        "preferences": [row for n in rounds for row in preference_rows(run, n)],
        "unpaired": [row for n in rounds for row in unpaired_rows(run, n)],
    }
    partial = target.with_name(target.name + PARTIAL)
    with disk_faults(target):
        _check_space(target.parent, _size(policy) + (size_of(policy) if adapter else 0))
        remove_tree(partial)
        partial.mkdir()
        _write_policy(campaign, policy, partial / "policy")
        if adapter:
            _copy_model(policy, partial / "adapter", without=_OWN | {BASE_FILE})
        names = [n for name, rows in tables.items() for n in _write_rows(partial, name, rows)]
        card = model_card(campaign, number)
        (partial / "policy" / "README.md").write_text(card, encoding="utf-8")
        _flush(partial)
        partial.rename(target)
        fsync_path(target.parent)
    return [target / name for name in ("policy", *(["adapter"] if adapter else []), *names)]


def _check_target(target: Path) -> None:
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty; name a new folder with --out.")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; name a new folder with --out.")
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} does not exist; make it, or name another --out.")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskError(
            f"The policy takes {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB left; "
            "name an --out on another disk."
        )


def _trained_round(campaign: Campaign, number: int | None) -> int:
    """The round whose policy is meant, which must be one that training made."""
    rounds = campaign.rounds()
    done = [view.round for view in rounds if view.stage == "done"]
    chosen = number if number is not None else max(done, default=0)
    policy = next((view.policy for view in rounds if view.round == chosen and view.policy), None)
    trained = {f"rounds/{chosen:03d}/policy", f"rounds/{chosen:03d}/base"}
    if chosen in done and policy is not None and policy["path"] not in trained:
        raise ConfigError(
            f"Round {chosen} of {campaign.path} trained nothing: its policy is the given model "
            f"{policy['path']}, which needs no export."
        )
    if chosen not in done:
        known = f"finished: {', '.join(map(str, done))}" if done else "no round is finished yet"
        raise ConfigError(f"{campaign.path} has no finished round {chosen} ({known}).")
    return chosen


def _verified_policy(run: RunDir, number: int) -> Path:
    """A round's policy, after its files and those of an adapter's base held their hashes."""
    name = Path(run.round(number).manifest()["policy"]["path"]).name
    policy = run.round(number).verify(name)
    if is_adapter(policy):
        check_pin(run)
        run.verify_model(ModelRef(run.relative(base_folder(policy)), base_of(policy).sha256))
    return policy


def _size(policy: Path) -> int:
    """Bytes of a policy as a whole model."""
    return size_of(policy) + (size_of(base_folder(policy)) if is_adapter(policy) else 0)


def _write_policy(campaign: Campaign, policy: Path, folder: Path) -> None:
    if not is_adapter(policy):
        _copy_model(policy, folder)
        return
    from online_dpo.models.merging import write_merged

    model = campaign.config.model
    write_merged(policy, folder, dtype=model.dtype, trust_remote_code=model.trust_remote_code)


def _copy_model(policy: Path, folder: Path, without: frozenset[str] = _OWN) -> None:
    """The model's own files, without what the run directory adds."""
    for file in sorted(path for path in policy.rglob("*") if path.is_file()):
        name = file.relative_to(policy)
        if name.as_posix() not in without:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)


def _write_rows(folder: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Write the rows; returns the files' names.

    Readers want one form in a file, so rows of text and rows of messages go to files of their own
    where a campaign has both.
    """
    usable = [dict(row) for row in rows]
    texts = [row for row in usable if isinstance(row["prompt"], str)]
    chats = [row for row in usable if not isinstance(row["prompt"], str)]
    if texts and chats:
        tables = {f"{name}-text": texts, f"{name}-messages": chats}
    else:
        tables = {name: usable} if usable else {}
    for stem, table in tables.items():
        _write_tables(folder / stem, table)
    return [f"{stem}.{suffix}" for stem in tables for suffix in ("jsonl", "parquet")]


def _write_tables(path: Path, rows: list[Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    lines = lines.translate(_LINE_ENDS)
    path.with_name(f"{path.name}.jsonl").write_text(lines, encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), path.with_name(f"{path.name}.parquet"))


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        fsync_path(path)
    fsync_path(folder)
