"""What an LLM judge is told: a Jinja template in a sandbox, rendered in one pass within limits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateRuntimeError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from online_dpo.errors import ConfigError
from online_dpo.records import Message, Prompt
from online_dpo.resources import find_data

MAX_BYTES = 64 * 1024
"""Of a template's file, and of a file of principles."""

SPARE = 10_000
"""Characters and passes through loops that a template may take beside its share of the data's."""

GROWTH = 4
"""Characters and passes for each character of data: enough to show everything several times."""

FILTERS = (
    "capitalize", "count", "default", "first", "float", "int", "join", "last", "length", "list",
    "lower", "reverse", "sort", "string", "title", "tojson", "trim", "truncate", "unique", "upper",
    "wordcount",
)  # fmt: skip
METHODS = (
    "cycle", "endswith", "get", "items", "keys", "lower", "lstrip", "rstrip", "split", "splitlines",
    "startswith", "strip", "upper", "values",
)  # fmt: skip
_NODES = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.Block, nodes.For, nodes.If, nodes.Name,
    nodes.Const, nodes.List, nodes.Tuple, nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Filter,
    nodes.Test, nodes.Call, nodes.Keyword, nodes.Compare, nodes.Operand, nodes.And, nodes.Or,
    nodes.Not, nodes.CondExpr, nodes.Add, nodes.Sub, nodes.Concat,
)  # fmt: skip
"""What is left without assignments, macros, imports and products cannot grow by itself: a rendering
is as long as the data times what stands in the file, and as slow as its loops, which are counted.
"""

_MAX_SEPARATOR = 100
_TOO_MUCH = "it is longer, or goes through its loops more often, than a judge's template may"


class JudgeTemplate:
    """A template with a block `user`, and where it has one a block `system`, which stands first."""

    def __init__(self, name: str) -> None:
        """Read the file of this path, or of this name among the shipped ones.

        Raises ConfigError where it is no template or uses what a judge's template may not.
        """
        self.path = find_data(name)
        source = _read(self.path)
        self.sha256 = hashlib.sha256(source.encode()).hexdigest()
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
        environment.globals = {"range": environment.globals["range"]}
        environment.filters["counted"] = self._counted
        try:
            tree = environment.parse(source)
            self._check(tree)
            self._template = environment.from_string(tree)
        except TemplateError as error:
            raise ConfigError(f"The template {self.path} is no Jinja template: {error}") from error
        if "user" not in self._template.blocks:
            raise ConfigError(
                f"The template {self.path} has no block `user`: {{% block user %}}..."
                "{% endblock %} becomes the message to the judge, and a block `system`, if there "
                "is one, stands first."
            )
        self._steps_left = 0

    def render(self, prompt: Prompt, **variables: Any) -> tuple[Message, ...]:
        """The messages to the judge. What the variables hold is data, never rendered itself.

        Raises ConfigError where the template fails on them or exceeds its limits.
        """
        metadata = {"answer": None, "rubric": None, **prompt.metadata}
        given = {"prompt": prompt.content, "metadata": metadata, **variables}
        allowed = SPARE + GROWTH * sum(len(str(value)) for value in given.values())
        self._steps_left = allowed
        context = self._template.new_context(given)
        blocks = self._template.blocks
        try:
            return tuple(
                Message(role, _joined(blocks[role](context), allowed).strip())
                for role in ("system", "user")
                if role in blocks
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise ConfigError(
                f"The template {self.path} cannot be rendered for prompt {prompt.id!r}: {error}"
            ) from error

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._steps_left -= 1
            if self._steps_left < 0:
                raise TemplateRuntimeError(_TOO_MUCH)
            yield item

    def _check(self, tree: nodes.Template) -> None:
        """Refuse what may grow or run without bound, and count the passes through every loop."""
        for node in list(tree.find_all(nodes.Node)):
            problem = _problem(node)
            if problem is not None:
                raise ConfigError(
                    f"The template {self.path} uses {problem} in line {node.lineno}. A judge's "
                    "template has variables, `if`, `for`, the filters "
                    f"{', '.join(FILTERS)} and the methods {', '.join(METHODS)}."
                )
            if isinstance(node, nodes.For):
                node.iter = nodes.Filter(node.iter, "counted", [], [], None, None)


def unused_fence(seed: int, prompt: Prompt, *texts: str) -> str:
    """A word of 16 hex digits from the seed that occurs in none of the texts.

    The prompt's own text and metadata count as texts.
    """
    everything = "\n".join((prompt.content, str(prompt.metadata), *texts))
    while (fence := f"{seed:016x}") in everything:
        seed += 1
    return fence


def read_principles(principles: Sequence[str] | str) -> tuple[str, ...]:
    """The principles as given, or from a file with one a line; lines that begin with # are not.

    Raises ConfigError where there are none, or they are no texts.
    """
    if isinstance(principles, str):
        path = find_data(principles)
        lines = [line.strip() for line in _read(path).splitlines()]
        found = tuple(line for line in lines if line and not line.startswith("#"))
        if not found:
            raise ConfigError(f"judge.options.principles: {path} has no principle in it.")
        return found
    if not all(isinstance(text, str) and text.strip() for text in principles):
        raise ConfigError(
            f"judge.options.principles is a list of sentences or a file's name, not {principles}"
        )
    return tuple(text.strip() for text in principles)


def digest(template: JudgeTemplate, settings: Mapping[str, Any]) -> str:
    """Eight hex digits of what a judge goes by beside its model, for its version."""
    text = f"{template.sha256}\n{sorted(settings.items())}"
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _read(path: Any) -> str:
    content = path.read_bytes()
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path} has {len(content)} bytes; at most {MAX_BYTES} are read.")
    try:
        return str(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from error


def _joined(pieces: Iterable[str], allowed: int) -> str:
    text = []
    for piece in pieces:
        allowed -= len(piece)
        if allowed < 0:
            raise TemplateRuntimeError(_TOO_MUCH)
        text.append(piece)
    return "".join(text)


def _problem(node: nodes.Node) -> str | None:
    """What a template may not use, in words."""
    if not isinstance(node, _NODES):
        return f"`{type(node).__name__.lower()}`"
    if isinstance(node, nodes.Filter):
        return None if _fits(node) else f"the filter `{node.name}`"
    if isinstance(node, nodes.Call):
        method = isinstance(node.node, nodes.Getattr) and node.node.attr in METHODS
        if not method and not (isinstance(node.node, nodes.Name) and node.node.name == "range"):
            return "a call"
    return None


def _fits(node: nodes.Filter) -> bool:
    """`join` may repeat a short separator, and `tojson` takes no width to fill."""
    arguments = [*node.args, *(keyword.value for keyword in node.kwargs)]
    if node.name == "join":
        return all(
            isinstance(a, nodes.Const) and len(str(a.value)) <= _MAX_SEPARATOR for a in arguments
        )
    return node.name in FILTERS and not (node.name == "tojson" and arguments)
