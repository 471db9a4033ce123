"""Durable file operations: hashes, fsync, atomic replacement, and disk faults by name."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from online_dpo import strict_json
from online_dpo.errors import CampaignError, ConfigError, CorruptError, DiskError

PARTIAL = ".partial"
"""The suffix of what is not complete; a path without it is."""

OWN_SHA256 = "own_sha256"

_DISK_FAULTS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
}


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """The sha256 of a text's UTF-8 bytes, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_hashes(folder: Path, *, skip: frozenset[str] = frozenset()) -> dict[str, str]:
    """The sha256 of every file below `folder` by its relative POSIX path, sorted."""
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    return {name: sha256_file(folder / name) for name in names if name not in skip}


def combined_hash(hashes: Mapping[str, str]) -> str:
    """The sha256 of the sorted lines `path sha256`: a folder's content as one value."""
    return sha256_text("".join(f"{name} {hashes[name]}\n" for name in sorted(hashes)))


def fsync_path(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Make `path` hold `text`, wholly or not at all: write, fsync, rename, fsync the parent."""
    partial = path.with_name(path.name + PARTIAL)
    partial.unlink(missing_ok=True)
    with partial.open("x", encoding="utf-8") as file:  # "x" follows no link.
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    fsync_path(path.parent)


def to_json(data: Any) -> str:
    """JSON as every file of a run holds it: indented, keys in the given order, no NaN."""
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """The JSON of a committed file. Raises CorruptError where it is none."""
    try:
        return strict_json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing.") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise CorruptError(f"{path} is not valid JSON: {error}") from error


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """What this process and its children make meanwhile is their user's alone: 0700 and 0600."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def refuse_links(folder: Path) -> None:
    """Raise ConfigError where a folder holds links or devices: writing there could go anywhere."""
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(place, name)
            with contextlib.suppress(FileNotFoundError):  # It has just been renamed or removed.
                kind = path.lstat().st_mode
                if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                    raise ConfigError(
                        f"{path} is a link or a device; a run directory holds files and folders "
                        "alone. Put in its place what it points to."
                    )


def to_signed_json(data: Mapping[str, Any]) -> str:
    """The same with a last entry, `own_sha256`: the sha256 of the text without it."""
    return to_json({**data, OWN_SHA256: sha256_text(to_json(data))})


def read_signed_json(path: Path) -> dict[str, Any]:
    """The data of a file by `to_signed_json`. Raises CorruptError where a byte is another."""
    data = read_json(path)
    signed = data.pop(OWN_SHA256, None) if isinstance(data, dict) else None
    if signed is None or path.read_text(encoding="utf-8") != to_signed_json(data):
        raise CorruptError(f"{path} is not what was committed: its own sha256 differs.")
    found: dict[str, Any] = data
    return found


def remove_tree(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def as_disk_error(
    error: BaseException, place: str | os.PathLike[str] | None = None
) -> DiskError | None:
    """The DiskError that an error amounts to, or None where it is no fault of the disk.

    Libraries in Rust (safetensors) say `(os error 28)` in their own exceptions.
    """
    if isinstance(error, CampaignError):
        return None
    number = error.errno if isinstance(error, OSError) else _rust_errno(error)
    if number not in _DISK_FAULTS:
        return None
    path = getattr(error, "filename", None) or place or "the run directory"
    return DiskError(
        f"Writing {path} failed: {os.strerror(number)}.",
        safe="Everything committed before is intact; half-written files are ignored.",
    )


def _rust_errno(error: BaseException) -> int:
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


@contextlib.contextmanager
def disk_faults(place: Path) -> Iterator[None]:
    """Turn a full, read-only or failing disk into a DiskError."""
    try:
        yield
    except Exception as error:
        fault = as_disk_error(error, place)
        if fault is None:
            raise
        raise fault from error
