"""The report: one HTML file that holds everything and runs nothing."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_fixture import make_run

from online_dpo.errors import ConfigError
from online_dpo.files import read_json
from online_dpo.report.build import build_report, render
from online_dpo.report.charts import round_charts, step_charts
from online_dpo.report.curves import Chart, Point, Series, describe, draw, thinned, ticks
from online_dpo.report.sections import sample_pairs, source_grid
from online_dpo.tables import read_table
from online_dpo.views import Campaign

HOSTILE = (
    "</script><script>document.title='owned'</script>{{7*7}}{% raw %}<img src=x onerror=alert(1)>"
    '"\'><style>*{display:none}</style></p></section><a href="https://evil.test/">\x1b[31m\u202e'
)
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """The page as a parser sees it; a tag closed out of order fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.style = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.text += data

    def count(self, tag: str, **attributes: str) -> int:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return sum(name == tag and wanted.items() <= attrs.items() for name, attrs in self.tags)


def page_of(run: Path) -> Page:
    return Page(build_report(Campaign(run)).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return page_of(run)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Page:
    config = {"judge": {"name": "heuristic", "options": {"lexicon": HOSTILE}}}
    return page_of(make_run(tmp_path_factory.mktemp("hostile"), odd_answer=HOSTILE, config=config))


def test_rounds_without_example_pairs_are_counted(tmp_path: Path) -> None:
    campaign = Campaign(make_run(tmp_path, rounds=12))
    examples = sample_pairs(campaign, campaign.rounds())
    assert [number for number, _ in examples.shown][:2] == [1, 2] and len(examples.shown) == 10
    assert examples.left_out == 2
    assert "Of 10 of the 12 rounds with pairs" in " ".join(Page(render(campaign)).text.split())
    few = Campaign(make_run(tmp_path / "few", rounds=2))
    assert "rounds with pairs" not in render(few)


def test_every_figure_is_given_by_source(tmp_path: Path) -> None:
    run = make_run(tmp_path, rounds=1, sources=("films", "products"))
    grid = source_grid(Campaign(run).rounds())
    assert grid is not None
    assert grid.titles[:4] == ["source", "prompts", "reward", "wins vs 0"]
    assert {"KL to 0", "tokens", "distinct-2"} < set(grid.titles)
    assert [row[:2] for row in grid.rows] == [["films", "6"], ["products", "6"]]
    assert "by source" in render(Campaign(run))


def test_the_page_begins_with_the_result(run: Path, page: Page) -> None:
    figures = read_json(run / "rounds" / "003" / "evaluation" / "metrics.json")
    share = f"{100 * figures['win_rate_policy0']['value']:.0f}%"
    assert f"After 3 rounds the policy wins {share}" in page.text
    assert page.text.index("After 3 rounds") < page.text.index("Rounds\n")
    assert page.count("h1") == 1


def test_every_answer_and_some_pairs_of_every_round_are_there(run: Path, page: Page) -> None:
    for number in (0, 2, 3):
        for row in read_table(run / "rounds" / f"{number:03d}" / "evaluation" / "answers.parquet"):
            assert row["text"] in page.text
            assert row["prompt_text"].strip() in page.text
    for number in (1, 2, 3):
        pairs = read_table(run / "rounds" / f"{number:03d}" / "pairs" / "pairs.parquet")
        assert sum(pair["pair_id"] in page.text for pair in pairs) == 3


def test_counts_times_and_provenance_are_there(run: Path, page: Page) -> None:
    policy = read_json(run / "rounds" / "002" / "policy" / "manifest.json")["sha256"]
    assert page.text.count(f"rounds/002/policy {policy[:12]}") == 2
    assert "round 1: 2 × no final answer" in page.text
    assert "0.65 s" in page.text
    assert "prompts_per_round: 8" in page.text
    assert "2.13.0" in page.text


def test_curves_have_axes_intervals_and_words(page: Page) -> None:
    assert page.count("svg", role="img") == 13
    assert page.count("polygon", class_="band") == 4
    assert page.text.count("round 3: ") >= 5
    for label in (
        "mean score",
        "share won",
        "KL, nats per sequence",
        "tokens",
        "distinct-2",
        "loss",
    ):
        assert label in page.text


def test_what_models_write_is_inert(hostile: Page) -> None:
    assert hostile.count("script") == hostile.count("img") == hostile.count("a") == 0
    assert hostile.count("style") == 1
    shown = HOSTILE.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
    # An answer of rounds 0, 2 and 3, and a chosen one of rounds 1, 2 and 3.
    assert hostile.text.count(shown) == 6
    assert "{{7*7}}" in hostile.text
    for _, attributes in hostile.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]


def test_nothing_is_loaded_from_anywhere(hostile: Page) -> None:
    for _, attributes in hostile.tags:
        assert not {"src", "href", "srcset", "data", "action", "poster"} & attributes.keys()
    assert "url(" not in hostile.style and "@import" not in hostile.style
    policy = next(a["content"] for _, a in hostile.tags if "http-equiv" in a) or ""
    digest = base64.b64encode(hashlib.sha256(hostile.style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}';")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_runs_nothing_and_applies_the_style(tmp_path: Path) -> None:
    report = build_report(Campaign(make_run(tmp_path, rounds=1, odd_answer=HOSTILE)))
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=800,1200",
    ]  # fmt: skip
    dom = subprocess.run(
        [*command, "--dump-dom", f"file://{report}"], capture_output=True, text=True, check=True
    )
    assert "<title>demo · online-dpo report</title>" in dom.stdout
    assert "violates the following Content Security Policy" not in dom.stderr


def test_a_pairwise_campaign_has_no_reward(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, rounds=1, judge="compare", form="both"))
    assert "mean score" not in page.text.replace("Reward: mean score", "")
    assert "share won" in page.text


@pytest.mark.parametrize("finished", [0, 1])
def test_an_unfinished_campaign_is_reported_as_far_as_it_is(tmp_path: Path, finished: int) -> None:
    page = page_of(make_run(tmp_path, finished=finished))
    assert f"{finished} of 3 rounds are done; round {finished + 1} is at the stage" in page.text
    assert "stopped" in page.text


def test_a_campaign_that_has_only_just_begun(tmp_path: Path) -> None:
    made = make_run(tmp_path, rounds=1)
    (tmp_path / "fresh").mkdir()
    for name in ("versions.json", "campaign.yaml"):
        (tmp_path / "fresh" / name).write_bytes((made / name).read_bytes())
    assert "Nothing has been evaluated yet." in page_of(tmp_path / "fresh").text


def test_the_same_run_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    first = build_report(Campaign(run), tmp_path / "a.html")
    second = build_report(Campaign(run), tmp_path / "b.html")
    assert first == tmp_path / "a.html" and first.read_bytes() == second.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_secrets_in_judge_options_are_hidden(tmp_path: Path) -> None:
    options = {"headers": [{"api_key": "sk-very-secret"}], "max_tokens": 77, "token": "abc-secret"}
    config = {"judge": {"name": "heuristic", "options": options}}
    report = build_report(Campaign(make_run(tmp_path, rounds=1, config=config))).read_text()
    assert "very-secret" not in report and "abc-secret" not in report
    assert report.count("(hidden)") == 2 and "max_tokens: 77" in report


def test_a_place_that_cannot_be_written_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        build_report(Campaign(run), tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        build_report(Campaign(run), tmp_path / "no" / "r.html")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-2.0, 5.4, [-2.0, 0.0, 2.0, 4.0]),
        (1.0, 3.0, [1.0, 1.5, 2.0, 2.5, 3.0]),
        (0.0131, 0.0188, [0.014, 0.016, 0.018]),
        (3.0, 3.0, [3.0]),
    ],
)
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_lie_within_and_are_evenly_spaced(low: float, size: float) -> None:
    found = ticks(low, low + size)
    slack = 1e-6 * (abs(low) + size)
    assert len(found) <= 7
    assert all(low - slack <= tick <= low + size + slack for tick in found)
    gaps = [b - a for a, b in zip(found, found[1:], strict=False)]
    assert all(gap == pytest.approx(gaps[0], rel=1e-3, abs=slack) for gap in gaps)


def test_places_in_the_picture_by_hand() -> None:
    chart = Chart("T", "y", [Series("s", [Point(0, 0.0), Point(2, 1.0)])], bounds=(0.0, 1.0))
    line = re.search(r'points="([^"]+)"', draw(chart))
    # 350 x 215 with margins of 60, 10, 12 and 38.
    assert line is not None and line.group(1) == "60.0,177.0 340.0,12.0"


def test_one_point_has_a_whisker_and_none_no_picture() -> None:
    one = Chart("T", "y", [Series("s", [Point(3, 0.5, 0.25, 0.75)])], bounds=(0.0, 1.0))
    assert 'class="whisker" x1="60.0" y1="135.75" x2="60.0" y2="53.25"' in draw(one)
    assert draw(Chart("T", "y", [Series("s", [])])) == ""


def test_a_line_is_broken_where_a_round_begins() -> None:
    points = [Point(x, 0.5) for x in range(1, 7)]
    whole = Chart("T", "y", [Series("s", points)])
    parts = Chart("T", "y", [Series("s", points)], marks=[(1, "1"), (4, "2")])
    assert [draw(chart).count("<polyline") for chart in (whole, parts)] == [1, 2]


def test_titles_and_names_are_escaped() -> None:
    svg = draw(Chart("<b>", "<i>", [Series("</svg>", [Point(1, 1.0)])], x_label="<u>"))
    assert not re.search(r"<(b|i|u)>", svg) and svg.count("</svg>") == 1


def test_many_steps_are_thinned_to_means() -> None:
    points = [Point(x, float(x)) for x in range(1, 11)]
    assert thinned(points, 5) == [Point(x, x - 0.5) for x in (2, 4, 6, 8, 10)]
    assert thinned(points, 10) == points


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=30))
def test_every_value_lies_in_the_picture(values: list[float]) -> None:
    chart = Chart(
        "T", "y", [Series("s", [Point(x, y, y - 1, y + 1) for x, y in enumerate(values)])]
    )
    for place in re.findall(r'points="([^"]+)"', draw(chart)):
        for pair in place.split():
            x, y = map(float, pair.split(","))
            assert 60 <= x <= 340 and 12 - 0.01 <= y <= 177.01


def test_charts_hold_the_figures_of_the_rounds(run: Path) -> None:
    rounds = Campaign(run).rounds()
    charts = {chart.title: chart for chart in round_charts(rounds)}
    score = read_json(run / "rounds" / "002" / "evaluation" / "metrics.json")["score"]
    point = charts["Reward"].series[0].points[2]
    assert (point.x, point.y) == (2, score["mean"])
    assert point.high is not None
    assert math.isclose(point.high - point.y, 1.959964 * score["stderr"], rel_tol=1e-6)
    assert [p.x for p in charts["Win rate"].series[0].points] == [1, 2, 3]
    assert describe(charts["Length"]).startswith("mean length: ")


def test_step_charts_go_on_from_round_to_round() -> None:
    steps = {
        0: [{"loss": 6.0}, {"loss": 5.0}],
        1: [{"loss": 0.7, "accuracy": 0.5}, {"loss": 0.6, "accuracy": 0.75}],
        2: [{"loss": 0.5, "accuracy": 1.0}],
    }
    charts = {chart.title: chart for chart in step_charts(steps)}
    assert charts["Training loss"].series[0].points == [Point(1, 0.7), Point(2, 0.6), Point(3, 0.5)]
    assert charts["Training loss"].marks == [(1.0, "1"), (3.0, "2")]
    assert charts["Supervised fine-tuning"].series[0].points == [Point(1, 6.0), Point(2, 5.0)]
    assert charts["Implicit rewards"].series[0].points == []
