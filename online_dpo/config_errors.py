"""What is wrong with a config, said by file, line and key, with the nearest key that is known."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from online_dpo.config import Config

KeyPath = tuple[str | int, ...]

_KEY = re.compile(r"\b[a-z][a-z_0-9]*(?:\.[a-z_0-9]+)+")
"""A dotted key, as messages name it."""

_SHOULD = "input should be "


class Lines(dict[KeyPath, int]):
    """The line (from 1) on which each key of a document stands."""


def explain(
    error: ValidationError,
    data: Mapping[str, Any],
    source: str,
    lines: Lines,
    overrides: Sequence[str],
) -> str:
    """One line for each fault: where it stands, the key, and what it should be.

    `data` is what was checked, `overrides` what was set in it on the command line.
    """
    faults = [_fault(problem, data) for problem in error.errors()]
    texts = [_text(group, source, lines, overrides) for group in _grouped(faults)]
    return "\n".join(dict.fromkeys(texts))


@dataclass(frozen=True)
class _Fault:
    """What pydantic found: where the user wrote it, and whether it is one branch of a union."""

    path: KeyPath
    message: str
    branch: bool = False
    has_value: bool = False
    value: Any = None


def _fault(problem: Mapping[str, Any], data: Any) -> _Fault:
    location: KeyPath = tuple(problem["loc"])
    path: KeyPath = ()
    for part in location:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            continue  # a branch of a union, or a key that is not there
        path = (*path, part)
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = f"unknown key {_dotted(path)!r}{_did_you_mean(path)}"
    elif problem["type"] == "missing":
        path = (*path, location[-1])
        message = f"{_dotted(path)!r} is required"
    elif problem["type"] != "value_error":
        message = f"{message[:1].lower()}{message[1:]}"
        return _Fault(path, message, len(location) > len(path), True, problem["input"])
    elif path and not _KEY.search(message):
        message = f"{_dotted(path)}: {message}"
    return _Fault(path, message)


def _grouped(faults: Sequence[_Fault]) -> list[list[_Fault]]:
    """Faults by place, those of a union's branches together: of these the deepest ones count."""
    groups: dict[tuple[KeyPath, str], list[_Fault]] = {}
    for fault in faults:
        if fault.branch and any(
            len(other.path) > len(fault.path) and other.path[: len(fault.path)] == fault.path
            for other in faults
        ):
            continue
        groups.setdefault((fault.path, "" if fault.branch else fault.message), []).append(fault)
    return list(groups.values())


def _text(group: Sequence[_Fault], source: str, lines: Lines, overrides: Sequence[str]) -> str:
    first = group[0]
    parts = [fault.message.removeprefix(_SHOULD) for fault in group]
    message = " or ".join(dict.fromkeys(parts))
    if first.message.startswith(_SHOULD):
        message = _SHOULD + message
    if first.has_value:
        message = f"{_dotted(first.path)}: {message}, got {first.value!r}"
    return f"{_place(first.path, message, source, lines, overrides)}: {message}"


def _place(path: KeyPath, message: str, source: str, lines: Lines, overrides: Sequence[str]) -> str:
    """Where the user wrote what is at fault: an override, or the line of a key.

    A fault of a combination has no key of its own: those that the message names stand for it.
    """
    named = [_key_path(key) for key in _KEY.findall(message)]
    for override in overrides:
        key = _key_path(override.partition("=")[0].strip())
        if any(key == wanted[: len(key)] for wanted in (path, *named)):
            return f"--set {override}"
    exact = (path, *named) if len(path) > 1 else named
    prefixes = [path[:length] for length in range(len(path), -1, -1)]
    line = next((lines[known] for known in (*exact, *prefixes) if known in lines), None)
    return source if line is None else f"{source}:{line}"


def _key_path(dotted: str) -> KeyPath:
    return tuple(int(part) if part.isdigit() else part for part in dotted.split("."))


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def _did_you_mean(path: KeyPath) -> str:
    """The nearest known key of the same section, or of any section, as a question."""
    model = _section(path[:-1])
    name = str(path[-1])
    here = list(model.model_fields) if model is not None else []
    near = difflib.get_close_matches(name, here, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {'.'.join([*map(str, path[:-1]), near[0]])!r}?"
    elsewhere = [
        f"{section}.{key}"
        for section, field in Config.model_fields.items()
        for key in _fields(field.annotation)
        if key == name or difflib.get_close_matches(name, [key], n=1, cutoff=0.8)
    ]
    if elsewhere:
        return f"; did you mean {elsewhere[0]!r}?"
    return f"; known here: {', '.join(here)}" if here else ""


def _section(path: KeyPath) -> type[BaseModel] | None:
    model: type[BaseModel] | None = Config
    for part in path:
        if isinstance(part, int) or model is None:
            continue
        field = model.model_fields.get(part)
        model = None if field is None else _model_of(field.annotation)
    return model


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_of(argument)
        if found is not None:
            return found
    return None


def _fields(annotation: Any) -> list[str]:
    model = _model_of(annotation)
    return list(model.model_fields) if model is not None else []
