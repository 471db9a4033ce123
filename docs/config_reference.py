"""Prints docs/config.md: every field of the config with its type, default and meaning.

python docs/config_reference.py > docs/config.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from online_dpo.config import Config
from online_dpo.drift import OPERATIONAL

Schema = Mapping[str, Any]

INTRO = """\
# Config reference

Made by `python docs/config_reference.py > docs/config.md` from `online_dpo/config.py`: do not edit.

A campaign is one YAML file with these sections; `model`, `prompts` and `judge` are required.

- **Checking.** `online-dpo validate CONFIG` names every fault by file and line; an unknown key is \
an error, with the nearest known one. `online-dpo plan CONFIG` says what a config would do. Every \
command that takes a config takes `--set section.key=value`, as often as needed.
- **YAML** is read as version 1.2 defines it: `5e-7` is a number, `no` is a string. A key that \
stands twice is an error.
- **Paths** are relative to the config's own folder, then to the working directory. The files in \
`prompts/` and `configs/` are found by their bare name from anywhere: `path: general.jsonl`, \
`online-dpo run quickstart.yaml`. `campaign.run_dir` is relative to the working directory.
- **Losses**, their knobs, and what combines with what: [losses.md](losses.md).
- **Editors** that know YAML schemas complete and check a config: `online-dpo schema > schema.json`.

Fields marked * may be changed by `online-dpo resume RUN_DIR --set ...` without `--accept-change`: \
they do not alter what is committed.
"""


def main() -> None:
    """Print the page."""
    schema = Config.model_json_schema()
    print(INTRO)
    print("\n\n".join(_sections(schema)))


def _sections(schema: Schema) -> Iterator[str]:
    """One section a model, the fields of sub-sections under their dotted names."""
    places: dict[str, str] = {}
    todo = [(path, _model_of(field)) for path, field in schema["properties"].items()]
    while todo:
        path, name = todo.pop(0)
        assert name is not None, f"{path} is no section"
        model = schema["$defs"][name]
        places[name] = path
        inner = []
        rows = []
        for key, field in model["properties"].items():
            target = _model_of(field)
            many = "[]" if _is_list(field) else ""
            if target is not None and target not in places:
                places[target] = f"{path}.{key}{many}"
                inner.append((places[target], target))
            required = key in model.get("required", ())
            rows.append(_row(f"{path}.{key}", key, field, places, required=required))
        yield "\n".join(_table(path, model, rows))
        todo = inner + todo


def _table(path: str, model: Schema, rows: Sequence[str]) -> list[str]:
    level = "##" if "." not in path else "###"
    head = [f"{level} {path}", "", model["description"], ""]
    return [*head, "| Field | Type | Default | Meaning |", "| --- | --- | --- | --- |", *rows]


def _row(path: str, key: str, field: Schema, places: Mapping[str, str], *, required: bool) -> str:
    mark = " *" if path.startswith(OPERATIONAL) else ""
    default = "required" if required else f"`{_value(field.get('default'))}`"
    meaning = " ".join(field["description"].split()).replace("None", "null").replace("<", "&lt;")
    cells = (f"`{key}`{mark}", _type(field, places), default, meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _value(default: Any) -> str:
    """A default as YAML would have it."""
    if isinstance(default, Mapping) and default:
        return "{...}"
    if isinstance(default, float) and default and abs(default) < 1e-3:
        return f"{default:.0e}".replace("e-0", "e-")
    return json.dumps(default)


def _type(field: Schema, places: Mapping[str, str]) -> str:
    """A field's type in words, with its bounds."""
    if "$ref" in field:
        return f"section [{_place(field, places)}](#{_anchor(_place(field, places))})"
    if "anyOf" in field:
        options = [option for option in field["anyOf"] if option.get("type") != "null"]
        return " or ".join(_type(option, places) for option in options)
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        if "prefixItems" in field:
            return "[" + ", ".join(_type(item, places) for item in field["prefixItems"]) + "]"
        return f"list of {_type(field['items'], places)}"
    if field["type"] == "object":
        return _object(field)
    names = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}
    return names[field["type"]] + _bounds(field)


def _object(field: Schema) -> str:
    keys = field.get("propertyNames", {})
    if len(keys.get("enum", [])) > 1:
        return "`{name: k, ...}`"
    key = keys.get("const") or next(iter(keys.get("enum", [])), None)
    return f"`{{{key}: k}}`" if key else "mapping"


def _bounds(field: Schema) -> str:
    words = {
        "minimum": "≥",
        "exclusiveMinimum": ">",
        "maximum": "≤",
        "exclusiveMaximum": "<",
    }
    bounds = [f"{word} {_number(field[key])}" for key, word in words.items() if key in field]
    return f" {', '.join(bounds)}" if bounds else ""


def _number(bound: float) -> str:
    return "2^63" if bound == 2**63 else f"{bound:g}"


def _place(field: Schema, places: Mapping[str, str]) -> str:
    return places[field["$ref"].rpartition("/")[2]]


def _anchor(path: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return "".join(c for c in path.lower() if c.isalnum() or c in "-_")


def _is_list(field: Schema) -> bool:
    options = [field, *field.get("anyOf", ())]
    return any(option.get("type") == "array" for option in options)


def _model_of(field: Schema) -> str | None:
    """The name of the model that a field holds, alone, optional or in a list."""
    if "$ref" in field:
        return str(field["$ref"].rpartition("/")[2])
    inner = [*field.get("anyOf", ()), *([field["items"]] if "items" in field else ())]
    return next((name for option in inner if (name := _model_of(option))), None)


if __name__ == "__main__":
    main()
