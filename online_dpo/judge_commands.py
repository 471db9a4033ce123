"""`online-dpo judge`: the report card of a config's judge, and one verdict of it."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from online_dpo.errors import ConfigError

if TYPE_CHECKING:
    from online_dpo.records import Message

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Whether a judge is any good.")

ConfigArgument = Annotated[str, typer.Argument(help="A YAML file, or a shipped config's name.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting: judge.votes=3")
]
EvaluationOption = Annotated[
    bool, typer.Option("--evaluation", help="The judge of evaluations, not of training.")
]
OutOption = Annotated[
    Path | None, typer.Option(help="A folder for the ledger and the report; below judge_check.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]

FOLDER = Path("judge_check")


@app.command()
def check(
    config: ConfigArgument,
    data: Annotated[str, typer.Option(help="Labelled comparisons: a file, or a shipped one.")],
    overrides: SetOption = None,
    evaluation: EvaluationOption = False,
    out: OutOption = None,
    attacks: Annotated[int, typer.Option(min=0, help="Attacks of each kind.")] = 10,
    repeats: Annotated[int, typer.Option(min=0, help="Comparisons asked once more.")] = 20,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use the first comparisons of the set alone.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a judge about labelled comparisons, attack it, and say how good it is."""
    from online_dpo.config_file import load_config
    from online_dpo.progress import make_progress
    from online_dpo.report_card.check import REPORT, Extent, check_judge
    from online_dpo.report_card.text import describe

    folder = out or FOLDER / f"{Path(config).stem}-{Path(data).stem}"
    report = check_judge(
        load_config(config, overrides or ()).config,
        data,
        out=folder,
        evaluation=evaluation,
        extent=Extent(attacks, repeats, limit),
        progress=make_progress(),
        command=_this_command(),
    )
    _print(json.dumps(report, indent=2) if as_json else describe(report))
    if not as_json:
        _print(f"\n{folder / REPORT}")


@app.command("try")
def try_(
    config: ConfigArgument,
    prompt: Annotated[str, typer.Option(help="What was asked: text, or messages as JSON.")],
    first: Annotated[str, typer.Option(help="A response.")],
    second: Annotated[str, typer.Option(help="Another response.")],
    metadata: Annotated[
        str | None, typer.Option(help='The prompt\'s other fields as JSON: {"answer": "42"}.')
    ] = None,
    overrides: SetOption = None,
    evaluation: EvaluationOption = False,
    out: OutOption = None,
) -> None:
    """Show one verdict with the exact request and reply."""
    from online_dpo.config_file import load_config
    from online_dpo.report_card.trial import Exchange, try_judge
    from online_dpo.report_card.trial_text import describe, describe_exchange

    exchanges: list[Exchange] = []
    try:
        tried = try_judge(
            load_config(config, overrides or ()).config,
            content=_content(prompt),
            first=first,
            second=second,
            metadata=_metadata(metadata),
            out=out or FOLDER / "try",
            on_exchange=exchanges.append,
            evaluation=evaluation,
            command=_this_command(),
        )
    finally:
        for exchange in exchanges:
            _print(describe_exchange(exchange) + "\n")
    _print(describe(tried, len(exchanges)))


def _content(prompt: str) -> str | tuple[Message, ...]:
    """A prompt's text, or its messages where it is a JSON list of them. Raises ConfigError."""
    from online_dpo.tokenization import parse_prompt

    try:
        given = json.loads(prompt)
    except ValueError:
        given = prompt
    text, messages, problem = parse_prompt(given if isinstance(given, list) else prompt)
    if problem:
        raise ConfigError(f"--prompt: {problem}.")
    return messages if text is None else text


def _metadata(given: str | None) -> dict[str, Any]:
    try:
        found = json.loads(given or "{}")
    except ValueError as error:
        raise ConfigError(f"--metadata {given!r} is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ConfigError(f"--metadata {given!r} is not a JSON object.")
    return found


def _this_command() -> str:
    return shlex.join(("online-dpo", *sys.argv[1:]))


def _print(text: str) -> None:
    from online_dpo.display.terminal_tables import make_console, say

    say(make_console(), text)
