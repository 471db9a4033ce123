"""Builds report.html: one file with its style and curves inside, which loads and runs nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from online_dpo.config_file import dump_yaml
from online_dpo.display.judge_table import alarms_of
from online_dpo.display.visible import visible
from online_dpo.display.wording import headline, number, remarks, seconds
from online_dpo.errors import ConfigError
from online_dpo.files import disk_faults, private_files, write_atomic
from online_dpo.loss_rules import describe_loss
from online_dpo.report import sections
from online_dpo.report.charts import judge_charts, round_charts, step_charts
from online_dpo.report.curves import Chart, draw
from online_dpo.views import Campaign, RoundView

_FOLDER = Path(__file__).parent


def build_report(campaign: Campaign, out: Path | None = None) -> Path:
    """Write the report, to the run's report.html where `out` is unset; returns where it lies."""
    target = campaign.path / "report.html" if out is None else out.absolute()
    if target.is_dir():
        raise ConfigError(f"{target} is a folder; name a file for the report.")
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} does not exist; make it, or name another --out.")
    text = render(campaign)
    with disk_faults(target), private_files():
        write_atomic(target, text)
    return target


def render(campaign: Campaign) -> str:
    """The report as HTML. The same run gives the same text."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": visible, "number": number}
    style = (_FOLDER / "report.css").read_text(encoding="utf-8")
    template = environment.get_template("report.html.jinja")
    return template.render(
        # Trusted: it is ours, and its hash is what the policy allows.
        style=Markup(style),
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        **_content(campaign),
    )


def _content(campaign: Campaign) -> dict[str, Any]:
    rounds = campaign.rounds()
    config = campaign.config
    fates = sections.fate_grid(rounds)
    return {
        "name": config.campaign.name or campaign.path.name,
        "run_name": campaign.path.name,
        "state": campaign.state,
        "rounds_done": sum(view.stage == "done" and view.round > 0 for view in rounds),
        "rounds_total": config.campaign.rounds,
        "now_at": rounds[-1] if rounds and rounds[-1].stage != "done" else None,
        "headline": headline(rounds),
        "remarks": remarks(rounds),
        "alarms": alarms_of(rounds),
        "facts": _facts(campaign, rounds),
        "tiles": sections.tiles(rounds),
        "rounds": sections.round_grid(rounds),
        "sources": sections.source_grid(rounds),
        "charts": _drawn([*round_charts(rounds), *step_charts(_steps(campaign, rounds))]),
        "judge": sections.judge_grid(rounds),
        "spending": sections.spending_grid(rounds),
        "judge_charts": _drawn(judge_charts(rounds)),
        "answers": sections.sample_answers(campaign, rounds),
        "pairs": sections.sample_pairs(campaign, rounds),
        "fates": fates[0] if fates else None,
        "meanings": fates[1] if fates else [],
        "unjudged": sections.unjudged(rounds),
        "times": sections.time_grid(rounds),
        "origins": sections.origin_grid(rounds),
        "config": dump_yaml(sections.without_secrets(config.model_dump(mode="json"))),
        "versions": sections.versions(campaign),
    }


def _facts(campaign: Campaign, rounds: Sequence[RoundView]) -> list[tuple[str, str]]:
    """What was done, in a few words each."""
    config = campaign.config
    walls = [view.wall_s for view in rounds if view.wall_s is not None]
    promote = config.reference.promote
    reference = promote if isinstance(promote, str) else f"every {promote['every']} rounds"
    facts = {
        "judge": config.judge.name,
        "evaluation judge": config.eval_judge.name if config.evaluation.judge else "",
        "method": f"DPO, {describe_loss(config.train.loss)} loss, beta {config.train.beta:g}",
        "reference promoted": reference.replace("_", " "),
        "responses": f"{sum(view.samples for view in rounds):,}",
        "pairs": _total(view.pairs for view in rounds),
        "good or bad responses": _total(view.unpaired for view in rounds),
        "time": seconds(sum(walls)) if walls else "",
    }
    return [(name, fact) for name, fact in facts.items() if fact]


def _total(counts: Iterable[int]) -> str:
    total = sum(counts)
    return f"{total:,}" if total else ""


def _steps(campaign: Campaign, rounds: Sequence[RoundView]) -> dict[int, list[dict[str, Any]]]:
    return sections.logged_steps(campaign, rounds)


def _drawn(charts: Sequence[Chart]) -> list[tuple[Chart, list[str], Markup]]:
    """Charts that have something to show: the chart, its series' names where several, the SVG."""
    drawn = []
    for chart in charts:
        svg = draw(chart)
        names = [series.name for series in chart.series if series.points]
        if svg:
            drawn.append((chart, names if len(names) > 1 else [], svg))
    return drawn
