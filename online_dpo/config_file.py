"""Reading a config: YAML without its traps, overrides, errors that name file, line and remedy."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from online_dpo.config import Config
from online_dpo.config_errors import KeyPath, Lines, explain
from online_dpo.errors import ConfigError
from online_dpo.judge_clashes import PEOPLE
from online_dpo.resources import find_data, shipped

Edit = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class LoadedConfig:
    """A checked config, the folder its relative paths start from, and the file it came from."""

    config: Config
    base: Path
    source: str


MAX_BYTES = 1 << 20
"""Of a YAML file."""

MAX_VALUES = 100_000
"""Values of a YAML text, those that aliases repeat counted each time."""

_PLAIN_TAGS = frozenset(("map", "seq", "str", "int", "float", "bool", "null"))


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of scalars: 1e-6 is a number, `no` is a string, dates stay text."""


_Loader.yaml_implicit_resolvers = {}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|)$"), ["~", "n", ""]
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    resolved: bool = False,
    edit: Edit | None = None,
) -> LoadedConfig:
    """The config at `path` (a file, or the name of a shipped one) with `a.b=c` overrides applied.

    Files that it names become absolute, shipped ones keep their name. `resolved` reads a run's own
    campaign.yaml, whose paths are already so. `edit` turns what the file holds into what is meant,
    before the overrides. Raises ConfigError.
    """
    file = _find_config(path)
    text = _read(file)
    lines = Lines()
    data = _parse(text, str(file), lines)
    if edit is not None:
        data = edit(data)
    for override in overrides:
        _apply(data, override)
    config = _validate(data, str(file), lines, overrides)
    if not resolved:
        config = _resolve_paths(config, file.parent, file.stem)
    return LoadedConfig(config, file.parent, str(file))


def load_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a file, read as configs are. Raises ConfigError."""
    return _parse(_read(file), str(file), Lines())


def config_from_dict(
    data: Mapping[str, Any], overrides: Sequence[str] = (), *, base: Path | None = None
) -> LoadedConfig:
    """A config from plain Python values, for notebooks and scripts."""
    values = copy.deepcopy(dict(data))
    for override in overrides:
        _apply(values, override)
    config = _validate(values, "the given mapping", Lines(), overrides)
    folder = base or Path.cwd()
    return LoadedConfig(_resolve_paths(config, folder, "campaign"), folder, "<python>")


def override_config(config: Config, overrides: Sequence[str], *, source: str) -> Config:
    """`config` with `a.b=c` overrides applied and checked again."""
    data = config.model_dump(mode="json")
    for override in overrides:
        _apply(data, override)
    return _validate(data, source, Lines(), overrides)


def dump_yaml(data: Any) -> str:
    """YAML that `load_config` reads back to the same values."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would take for another type, and writes floats in full."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers
_Dumper.add_representer(
    float, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:float", repr(value))
)


ABSENT = "(not set)"
"""Stands in a difference for a key that one of the configs does not have."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Text as YAML's rules have it, but with its three exotic line breaks escaped."""
    style = '"' if any(c in text for c in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ, with both values."""
    return data_differences(old.model_dump(mode="json"), new.model_dump(mode="json"))


def data_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`differences` of nested mappings of JSON values."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    keys = [*before, *(key for key in after if key not in before)]
    pairs = {key: (before.get(key, ABSENT), after.get(key, ABSENT)) for key in keys}
    return {key: (old, new) for key, (old, new) in pairs.items() if old != new}


def _leaves(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(data, dict) and data:
        for key, value in data.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, data


def _find_config(path: str | Path) -> Path:
    file = Path(path)
    if file.is_dir():
        raise ConfigError(f"{path} is a folder; name a config file.")
    if file.is_file():
        return file.absolute()
    found = shipped(str(path))
    if found is None:
        raise ConfigError(
            f"There is no config {str(path)!r} here, and none of that name is shipped.",
            remedy="online-dpo init",
        )
    return found


def _read(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{file} is no config: it is larger than {MAX_BYTES >> 20} MiB.")
    return text


def _parse(text: str, source: str, lines: Lines) -> dict[str, Any]:
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        data = None if node is None else _build(loader, node, (), source, lines)
    except ConfigError:
        raise
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"{source}: not usable: {_shortly(error)}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}:{mark.line + 1}" if mark is not None else source
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{place}: not valid YAML: {problem}") from error
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(data, dict):
        raise ConfigError(
            f"{source}: a config is a mapping of sections, this is {type(data).__name__}"
        )
    return data


def _shortly(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]


def _build(loader: _Loader, node: yaml.Node, path: KeyPath, source: str, lines: Lines) -> Any:
    if len(lines) > MAX_VALUES:
        raise ConfigError(f"{source}: more than {MAX_VALUES} values; aliases repeat what they name")
    lines.setdefault(path, node.start_mark.line + 1)
    if node.tag.removeprefix("tag:yaml.org,2002:") not in _PLAIN_TAGS:
        raise ConfigError(f"{source}:{node.start_mark.line + 1}: the tag {node.tag} is not allowed")
    if isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise ConfigError(f"{source}:{line}: the key {key!r} is not text; quote it")
            if key in mapping:
                raise ConfigError(f"{source}:{line}: the key {key!r} stands here a second time")
            lines[(*path, key)] = line
            mapping[key] = _build(loader, value_node, (*path, key), source, lines)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [
            _build(loader, item, (*path, index), source, lines)
            for index, item in enumerate(node.value)
        ]
    return loader.construct_object(node, deep=True)


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override!r}: write it as section.key=value")
    value = _scalar_or_flow(text, override)
    *parents, last = key.strip().split(".")
    target: Any = data
    for part in parents:
        index: Any = int(part) if isinstance(target, list) and part.isdigit() else part
        try:
            if isinstance(target, dict) and target.get(index) is None:
                target[index] = {}
            target = target[index]
        except (IndexError, KeyError, TypeError):
            raise ConfigError(f"--set {override!r}: there is no {part!r} in the config") from None
    if isinstance(target, list):
        if not last.isdigit() or int(last) >= len(target):
            raise ConfigError(f"--set {override!r}: the list has no entry {last!r}")
        target[int(last)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise ConfigError(f"--set {override!r}: {'.'.join(parents)} is a value, not a section")


def _scalar_or_flow(text: str, override: str) -> Any:
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _build(loader, node, (), f"--set {override}", Lines())
    except ConfigError:
        raise
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML") from error
    finally:
        if loader is not None:
            loader.dispose()


def _validate(data: dict[str, Any], source: str, lines: Lines, overrides: Sequence[str]) -> Config:
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, data, source, lines, overrides)) from None


def _resolve_paths(config: Config, base: Path, stem: str) -> Config:
    """Absolute paths for files beside the config; a name and a run directory if none is given."""
    data = config.model_dump(mode="json")
    for section in ("train", "eval"):
        for source in data["prompts"][section]:
            source["name"] = source["name"] or Path(source["path"]).stem
            source["path"] = _resolve_table(source["path"], base)
    if data["sft"] is not None:
        data["sft"]["demonstrations"] = _resolve_table(data["sft"]["demonstrations"], base)
    if data["pairs"]["offline"] is not None:
        offline = data["pairs"]["offline"]
        offline["path"] = _resolve_table(offline["path"], base)
    if data["model"]["chat_template"] is not None:
        data["model"]["chat_template"] = str(find_data(data["model"]["chat_template"], base=base))
    if data["model"]["path"] is not None and (base / data["model"]["path"]).is_dir():
        data["model"]["path"] = str((base / data["model"]["path"]).absolute())
    for judge in filter(None, (data["judge"], data["evaluation"]["judge"])):
        judge["name"] = _resolve_code(judge["name"], base)
        if judge["name"] == PEOPLE and isinstance(gold := judge["options"].get("gold"), str):
            judge["options"]["gold"] = _resolve_table(gold, base)
        if judge["gold"] is not None:
            judge["gold"] = _resolve_table(judge["gold"], base)
        for member in _members(judge["options"]):
            member["name"] = _resolve_code(member["name"], base)
        judge["reuse_from"] = [_resolve_run(run, base) for run in judge["reuse_from"]]
    if data["judge"]["prices"] is not None:
        data["judge"]["prices"] = str(find_data(data["judge"]["prices"], base=base))
    data["pairs"]["selector"] = _resolve_code(data["pairs"]["selector"], base)
    campaign = data["campaign"]
    campaign["name"] = campaign["name"] or stem
    campaign["run_dir"] = os.path.abspath(campaign["run_dir"] or Path("runs") / campaign["name"])
    return _validate(data, str(base / stem), Lines(), ())


def _members(options: dict[str, Any]) -> list[dict[str, Any]]:
    """The judges that a panel's options list."""
    members = options.get("members")
    members = members if isinstance(members, list) else []
    return [m for m in members if isinstance(m, dict) and isinstance(m.get("name"), str)]


def _resolve_table(path: str, base: Path) -> str:
    """An absolute file, a shipped file's name, or a dataset's name unchanged."""
    if Path(path).suffix not in (".jsonl", ".parquet", ".json"):
        return path
    found = find_data(path, base=base)
    return Path(path).name if found == shipped(path) else str(found)


def _resolve_code(name: str, base: Path) -> str:
    """`file.py:attr` with the file made absolute; anything else unchanged."""
    target, colon, attribute = name.rpartition(":")
    if not colon or not target.endswith(".py"):
        return name
    return f"{find_data(target, base=base)}:{attribute}"


def _resolve_run(path: str, base: Path) -> str:
    """An earlier run's directory, absolute: beside the config, else from the working directory."""
    return os.path.abspath(base / path if (base / path).is_dir() else path)
