"""Finding a file by path, or by the name it ships under."""

from __future__ import annotations

from pathlib import Path

from online_dpo.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent
_FOLDERS = ("prompts", "configs")
_ROW_FILES = (".jsonl", ".json", ".parquet")


def is_row_file(name: str) -> bool:
    """Whether rows of this name come from a file, rather than from a dataset."""
    return Path(name).suffix in _ROW_FILES


def shipped(name: str) -> Path | None:
    """The shipped prompt set, template or config of this name, in a wheel or a checkout."""
    parts = Path(name).parts
    if Path(name).is_absolute():
        return None
    if parts and parts[0] in _FOLDERS:
        name = str(Path(*parts[1:]))
    for folder in _FOLDERS:
        for root in (_PACKAGE / "_data", _PACKAGE.parent):
            candidate = root / folder / name
            if candidate.is_file():
                return candidate
    return None


def find_data(name: str, *, base: Path | None = None) -> Path:
    """The file `name`: absolute, relative to `base` or the working directory, or shipped.

    Raises ConfigError naming every place that was tried.
    """
    candidates = [base / name] if base is not None else []
    candidates.append(Path(name))
    for candidate in candidates:
        if candidate.is_file():
            return candidate.absolute()
    found = shipped(name)
    if found is not None:
        return found
    tried = ", ".join(dict.fromkeys(str(c.absolute()) for c in candidates))
    raise ConfigError(f"The file {name!r} does not exist (looked for {tried} and shipped files).")


def find_rows(name: str) -> str:
    """The place of a file of rows, and a dataset's name as it is. Raises ConfigError."""
    return str(find_data(name)) if is_row_file(name) else name
