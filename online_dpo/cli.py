"""The command line: reads arguments, calls the library, prints; no torch, no file formats."""

from __future__ import annotations

import json
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from online_dpo.display.visible import visible
from online_dpo.errors import CampaignError, SignalError
from online_dpo.files import as_disk_error
from online_dpo.judge_commands import app as judge_app

if TYPE_CHECKING:
    from online_dpo.views import Campaign

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(judge_app, name="judge")

ConfigArgument = Annotated[str, typer.Argument(help="A YAML file, or a shipped config's name.")]
RunArgument = Annotated[Path, typer.Argument(help="The run directory.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting: train.beta=0.05")
]
RunDirOption = Annotated[Path | None, typer.Option(help="Where the run is written.")]
TrustOption = Annotated[
    list[str] | None, typer.Option("--trust", help="Code the config names: FIELD=VALUE")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"online-dpo {version('online-dpo')}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Multi-round online and iterative DPO: sample, judge, pair, train, evaluate, promote."""


def main() -> None:
    """Run a command; every end but 0 prints its cause, what is safe and how to go on."""
    debug = "--debug" in sys.argv
    sys.argv[:] = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except (CampaignError, SignalError) as error:
        _fail(error, debug)
    except Exception as error:
        fault = as_disk_error(error)
        if fault is None:
            raise
        _fail(fault, debug)


@app.command()
def run(config: ConfigArgument, overrides: SetOption = None, run_dir: RunDirOption = None) -> None:
    """Start a campaign and see it to its end."""
    from online_dpo.campaign import start, with_run_dir
    from online_dpo.config_file import load_config
    from online_dpo.progress import make_progress

    loaded = load_config(config, overrides or ())
    if run_dir is not None:
        loaded = with_run_dir(loaded, run_dir)
    starts = _count_starts(loaded.config.campaign.run_dir)
    _finish(start(loaded, progress=make_progress()), starts)


@app.command()
def resume(
    run_dir: RunArgument,
    overrides: SetOption = None,
    accept_change: Annotated[
        bool, typer.Option(help="Let --set change what later rounds do.")
    ] = False,
    trust: TrustOption = None,
) -> None:
    """Go on with a campaign wherever it was interrupted."""
    from online_dpo.campaign import resume as resume_campaign
    from online_dpo.progress import make_progress

    starts = _count_starts(run_dir)
    campaign = resume_campaign(
        run_dir,
        overrides=overrides or (),
        accept_change=accept_change,
        trust=trust or (),
        progress=make_progress(),
    )
    _finish(campaign, starts)


@app.command()
def status(
    run_dir: RunArgument,
    as_json: JsonOption = False,
    watch: Annotated[bool, typer.Option(help="Show it again every two seconds.")] = False,
) -> None:
    """Where a campaign stands, round by round."""
    from online_dpo.display.terminal import print_status
    from online_dpo.views import Campaign

    while True:
        campaign = Campaign(run_dir)
        if watch:
            typer.echo("\x1b[2J\x1b[H", nl=False)  # Clears a terminal; left out elsewhere.
        if as_json:
            typer.echo(json.dumps(campaign.status(), indent=2))
        else:
            print_status(campaign)
        if not watch or campaign.state != "running":
            return
        time.sleep(2.0)


@app.command()
def show(run_dir: RunArgument, row_id: str) -> None:
    """A pair, or a good or bad response: the prompt, the texts, what the judge said and who."""
    from online_dpo.display.terminal import print_row
    from online_dpo.views import Campaign

    print_row(Campaign(run_dir), row_id)


@app.command()
def label(
    run_dir: RunArgument,
    annotator: Annotated[
        str | None, typer.Option(help="Serve the labelling page to this annotator.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Any free one if 0.")] = 0,
    stand_in: Annotated[
        bool, typer.Option("--stand-in", help="Also offer what others have left open.")
    ] = False,
    export_to: Annotated[
        Path | None, typer.Option("--export", help="Write tasks and verdicts: .jsonl or .csv.")
    ] = None,
    import_from: Annotated[
        Path | None, typer.Option("--import", help="Take over verdicts: .jsonl or .csv.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Label as one of the people that a campaign asks; without a name: who has labelled what."""
    from online_dpo.annotation import commands, exchange
    from online_dpo.annotation.figures import figures
    from online_dpo.errors import ConfigError

    exchanges = export_to is not None or import_from is not None
    if annotator is not None and (exchanges or as_json):
        raise ConfigError("--annotator serves the page: --export, --import and --json go without.")
    if annotator is None and (port or stand_in):
        raise ConfigError("--port and --stand-in are for the page: name an --annotator.")
    if annotator is not None:
        say: Callable[[str], None] = lambda text: typer.echo(visible(text))  # noqa: E731
        commands.serve(run_dir, annotator, port=port, stand_in=stand_in, say=say)
        return
    board = commands.open_board(run_dir)
    if import_from is not None:
        typer.echo(f"{exchange.import_labels(board, import_from)} new verdicts taken over.")
    if export_to is not None:
        typer.echo(f"{exchange.export_labels(board, export_to)} tasks written to {export_to}.")
    if as_json:
        typer.echo(json.dumps(figures(board), indent=2))
    elif not exchanges:
        typer.echo(visible(commands.describe(board)))


@app.command()
def report(
    run_dir: RunArgument, out: Annotated[Path | None, typer.Option(help="The HTML file.")] = None
) -> None:
    """Write the campaign's report, one self-contained HTML file."""
    from online_dpo.report.build import build_report
    from online_dpo.views import Campaign

    typer.echo(build_report(Campaign(run_dir), out))


@app.command()
def export(
    run_dir: RunArgument,
    out: Annotated[Path, typer.Option(help="A new folder.")],
    round_number: Annotated[
        int | None, typer.Option("--round", help="The round; the last finished one if unset.")
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Beside the merged policy, its adapter as PEFT's.")
    ] = False,
) -> None:
    """Write the policy as a transformers folder and the preferences as JSONL and parquet."""
    from online_dpo.export import export_campaign
    from online_dpo.views import Campaign

    for path in export_campaign(Campaign(run_dir), out, round_number, adapter=adapter):
        typer.echo(path)


@app.command()
def train(
    pairs: Annotated[str, typer.Option(help="prompt, chosen, rejected: a file or a dataset.")],
    model: Annotated[str, typer.Option(help="The model to train: a folder or hub id.")],
    out: Annotated[Path, typer.Option(help="A new folder for the policy.")],
    reference: Annotated[
        str | None, typer.Option(help="The frozen reference; the model itself if unset.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A YAML file with sections train, model, compute.")
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Train on given preferences (offline DPO), or go on with that."""
    from online_dpo.offline.config import offline_config
    from online_dpo.offline.training import describe, train_offline
    from online_dpo.progress import make_progress

    made = offline_config(pairs, model, config=config, overrides=overrides or ())
    command = shlex.join(("online-dpo", *sys.argv[1:]))
    idle = out.is_dir() and any(out.iterdir())
    trained = train_offline(
        made, out=out, reference=reference, progress=make_progress(), command=command
    )
    if idle:
        typer.echo("This training was finished already: nothing to do.")
    typer.echo(describe(trained))


@app.command()
def validate(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Check a config without starting it."""
    from online_dpo.config_file import load_config
    from online_dpo.preflight import check_config

    loaded = load_config(config, overrides or ())
    checked = check_config(loaded.config)
    typer.echo(f"{loaded.source} is valid.")
    if checked.here:
        typer.echo(f"It cannot run here: {checked.here}")


@app.command()
def plan(config: ConfigArgument, overrides: SetOption = None) -> None:
    """What a config would do: rounds, samples, judge calls, sizes."""
    from online_dpo.config_file import load_config
    from online_dpo.preflight import check_config

    planned = check_config(load_config(config, overrides or ()).config)
    typer.echo(planned.text)
    if planned.here:
        typer.echo(f"It cannot run here: {planned.here}")


@app.command()
def schema() -> None:
    """The config's JSON schema, for editors."""
    from online_dpo.config import Config

    typer.echo(json.dumps(Config.model_json_schema(), indent=2))


@app.command()
def init(
    out: Annotated[Path, typer.Argument(help="The file to write.")] = Path("campaign.yaml"),
) -> None:
    """Write a config to start from."""
    from online_dpo.errors import ConfigError
    from online_dpo.resources import find_data

    if out.exists():
        raise ConfigError(f"{out} exists already; name another file.")
    out.write_text(find_data("quickstart.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    typer.echo(f"Wrote {out}. Next: online-dpo validate {out}")


@app.command()
def doctor() -> None:
    """What is installed, what is missing, and the command that mends it."""
    from online_dpo.doctor import diagnose, render

    findings = diagnose()
    typer.echo(render(findings))
    if any(finding.status == "missing" for finding in findings):
        raise typer.Exit(1)


def _count_starts(run_dir: str | Path | None) -> int:
    """How often a campaign has been started or resumed."""
    from online_dpo.store import RunDir

    return sum(event["event"] == "campaign started" for event in RunDir(run_dir or "").events())


def _finish(campaign: Campaign, starts: int) -> None:
    """The end of `run` and `resume`: the table, and where to look next."""
    from online_dpo.display.terminal import print_summary

    idle = _count_starts(campaign.path) == starts
    print_summary(campaign, "This campaign was finished already: nothing to do." if idle else None)


def _fail(error: CampaignError | SignalError, debug: bool) -> None:
    say: Callable[[str], None] = lambda text: typer.echo(visible(text), err=True)  # noqa: E731
    if debug or error.exit_code == 1:
        say("".join(traceback.format_exception(error.__cause__ or error)))
    say(f"error: {error.message}")
    if error.safe:
        say(f"safe: {error.safe}")
    if error.remedy:
        say(f"to go on: {error.remedy}")
    raise SystemExit(error.exit_code)


if __name__ == "__main__":
    main()
