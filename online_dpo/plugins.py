"""What a user can plug in: the Protocols, and the resolution of a name to the object behind it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from online_dpo.errors import ConfigError
from online_dpo.records import (
    ModelRef,
    Prompt,
    Response,
    SamplingParams,
    SamplingRequest,
    Score,
    Verdict,
)

if TYPE_CHECKING:
    from online_dpo.paid.calls import Calls

JUDGE_GROUP = "online_dpo.judges"
SELECTOR_GROUP = "online_dpo.selectors"
_NOUNS = {JUDGE_GROUP: "judge", SELECTOR_GROUP: "selector"}


class Judge(Protocol):
    """Compares two responses of one prompt. A synchronous one runs in a judge worker."""

    async def compare(
        self, prompt: Prompt, first: Response, second: Response, *, calls: Calls
    ) -> Verdict: ...


class Scorer(Protocol):
    """Scores each response of one prompt; returns as many scores as there are responses."""

    async def score(
        self, prompt: Prompt, responses: Sequence[Response], *, calls: Calls
    ) -> Sequence[Score]: ...


class Sampler(Protocol):
    """Answers prompts with a policy. Lives in a worker; one engine serves many rounds."""

    deterministic: bool
    """Whether the same requests give the same bytes again, whatever else ran before."""

    def load(self, policy: ModelRef, folder: Path) -> None:
        """Make `policy`, whose files lie in `folder`, the model that answers."""

    def generate(
        self, requests: Sequence[SamplingRequest], params: SamplingParams
    ) -> Iterator[list[Response]]:
        """Yield the n responses of each request, in the order of the requests."""

    def score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """Raw log-probs (nats, temperature 1) of the response tokens of (prompt, response) ids."""

    def close(self) -> None: ...


def resolve(
    name: str,
    *,
    group: str = JUDGE_GROUP,
    base: Path | None = None,
    built_in: Sequence[str] = (),
) -> Any:
    """The object behind an entry point's name, `module:attr` or `file.py:attr`.

    `built_in` are names that the caller knows beside these. A relative file is looked up from
    `base` (the config's folder), then from the working directory. Raises ConfigError that says what
    was tried and what there is.
    """
    if ":" not in name:
        return _load_entry_point(name, group, built_in)
    target, _, attribute = name.rpartition(":")
    module = _load_file(target, base) if target.endswith(".py") else _load_module(target, name)
    try:
        return getattr(module, attribute)
    except AttributeError:
        public = ", ".join(sorted(n for n in vars(module) if not n.startswith("_"))) or "nothing"
        raise ConfigError(f"{name!r}: {target} has no {attribute!r}; it has {public}.") from None


def names_code(name: str) -> bool:
    """Whether `name` points at code itself, instead of at an installed plug-in."""
    return ":" in name


def member_names(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(place, name) of the judges that a judge's options list as its members."""
    members = options.get("members")
    return [
        (f"options.members[{index}].name", member["name"])
        for index, member in enumerate(members if isinstance(members, list) else [])
        if isinstance(member, Mapping) and isinstance(member.get("name"), str)
    ]


def available(group: str = JUDGE_GROUP) -> dict[str, EntryPoint]:
    """The installed plug-ins of a group by name."""
    return {point.name: point for point in entry_points(group=group)}


def _load_entry_point(name: str, group: str, built_in: Sequence[str]) -> Any:
    points, noun = available(group), _NOUNS[group]
    if name not in points:
        known = ", ".join([*built_in, *sorted(points)])
        raise ConfigError(
            f"There is no {noun} named {name!r}. Installed: "
            f"{known or 'none (is online-dpo itself installed?)'}. A {noun} of your own is named "
            f"by 'module:attr' or 'file.py:attr'."
        )
    point = points[name]
    if point.module.split(".")[0] == "judges":
        _check_own_judges()
    try:
        return point.load()
    except Exception as error:
        raise ConfigError(
            f"The {noun} {name!r} ({point.value}) cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_own_judges() -> None:
    """Name a foreign package called `judges` (there is one on PyPI) instead of failing oddly."""
    spec = importlib.util.find_spec("judges")
    origin = Path(spec.origin).parent if spec is not None and spec.origin else None
    if origin is None or not (origin / "heuristics.py").is_file():
        raise ConfigError(
            f"The package 'judges' found at {origin} is not online-dpo's. Another distribution "
            "uses the name: pip uninstall judges, then pip install --force-reinstall online-dpo."
        )


def _load_module(target: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(target)
    except Exception as error:
        raise ConfigError(
            f"{name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def _load_file(target: str, base: Path | None) -> ModuleType:
    candidates = [Path(target)] if base is None else [base / target, Path(target)]
    path = next((c for c in candidates if c.is_file()), None)
    if path is None:
        tried = " and ".join(str(c.absolute()) for c in candidates)
        raise ConfigError(f"The file {target!r} does not exist (looked for {tried}).")
    module_name = f"online_dpo_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def instantiate(target: Any, options: Mapping[str, Any], *, name: str) -> Any:
    """A judge from what `resolve` found: a class or factory is called with the options.

    A plain function that is itself the judge (its parameters are `prompt, response` or `prompt,
    first, second`) is returned as it is, and takes no options.
    """
    if inspect.isfunction(target) and function_kind(target) is not None:
        if options:
            raise ConfigError(f"The judge {name!r} is a plain function; it takes no judge.options.")
        return target
    if not callable(target):
        return target
    try:
        return target(**options)
    except TypeError as error:
        hint = ""
        if inspect.isfunction(target):
            hint = (
                ". A function that is itself the judge has the parameters (prompt, response) or "
                "(prompt, first, second)"
            )
        raise ConfigError(f"judge.options do not fit {name!r}: {error}{hint}") from error


def function_kind(function: Any) -> str | None:
    """'score' for (prompt, response), 'compare' for (prompt, first, second), else None."""
    parameters = list(inspect.signature(function).parameters)
    if parameters[:2] == ["prompt", "response"]:
        return "score"
    if parameters[:3] == ["prompt", "first", "second"]:
        return "compare"
    return None
