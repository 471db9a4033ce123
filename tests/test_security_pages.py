"""What models, prompts and judges write into pages: a hundred attacks, escaped and inert."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from page_attacks import ATTACKS
from people_run import make_people_run, serving
from run_fixture import make_run
from test_label_page import CHROMIUM, FLAGS, Annotator
from test_report import Page

from online_dpo.annotation.server import page as label_page
from online_dpo.display.visible import visible
from online_dpo.integrity import write_start
from online_dpo.records import Prompt, Response
from online_dpo.report.build import build_report
from online_dpo.store import RunDir
from online_dpo.tables import read_table, write_table
from online_dpo.views import Campaign

if TYPE_CHECKING:
    from playwright.sync_api import Browser

PER_RUN = 12
"""Answers, and so attacks, that one report shows."""


def attacked_run(folder: Path, attacks: list[str]) -> Path:
    """A run whose prompts, answers, reasons, sources and names are attacks."""
    folder.mkdir(parents=True)
    judge = {"name": "heuristic", "options": {"kind": attacks[0], attacks[-1]: attacks}}
    run = make_run(
        folder, rounds=1, config={"judge": judge}, sources=(attacks[0], attacks[-1], "s")
    )
    for number in (0, 1):
        file = run / "rounds" / f"{number:03d}" / "evaluation" / "answers.parquet"
        rows = read_table(file)
        for i, row in enumerate(rows):
            attack = attacks[i % len(attacks)]
            row |= {"prompt_text": f"Q {attack}", "text": f"A {attack}", "reason": f"R {attack}"}
        write_table(file, "answers", rows)
    pairs = run / "rounds" / "001" / "pairs" / "pairs.parquet"
    rows = read_table(pairs)
    for i, row in enumerate(rows):
        attack = attacks[-1 - i % len(attacks)]
        row |= {"chosen_text": f"C {attack}", "rejected_text": f"J {attack}"}
    write_table(pairs, "pairs", rows)
    versions = '{"python": "<script>hurt=1</script>"}'
    config = (run / "campaign.yaml").read_text().splitlines(keepends=True)
    write_start(RunDir(run), versions, "".join(config[:-1]))
    return run


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[str], Path]]:
    """Every attack is in one of them."""
    folder = tmp_path_factory.mktemp("attacked")
    made = []
    for start in range(0, len(ATTACKS), PER_RUN):
        attacks = ATTACKS[start : start + PER_RUN]
        made.append((attacks, build_report(Campaign(attacked_run(folder / str(start), attacks)))))
    return made


def test_there_are_a_hundred() -> None:
    assert len(set(ATTACKS)) >= 100


def test_the_report_holds_every_attack_as_text(reports: list[tuple[list[str], Path]]) -> None:
    harmless: set[str] | None = None
    for attacks, report in reports:
        page = Page(report.read_text(encoding="utf-8"))
        for attack in attacks:
            for kind in "QAR":
                assert visible(f"{kind} {attack}".strip()) in page.text, f"{kind} {attack}"
        tags = {tag for tag, _ in page.tags}
        harmless = tags if harmless is None else harmless
        assert tags == harmless and not {"script", "img", "iframe", "a", "object"} & tags
        for _, attributes in page.tags:
            assert not {"style", "src", "href"} & set(attributes)
            assert not [name for name in attributes if name.startswith("on")]


def test_both_policies_name_no_other_place(reports: list[tuple[list[str], Path]]) -> None:
    """Each allows what stands in the page itself, by hash, and no host, scheme or inline code."""
    for _, report in reports:
        page = Page(report.read_text(encoding="utf-8"))
        policy = next(a["content"] for _, a in page.tags if "http-equiv" in a) or ""
        digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
        assert directives(policy)["style-src"] == [f"'sha256-{digest}'"]
        assert "script-src" not in directives(policy)
        check_policy(policy)
    check_policy(label_page()[1])


def check_policy(policy: str) -> None:
    assert directives(policy)["default-src"] == ["'none'"]
    for sources in directives(policy).values():
        for source in sources:
            assert source in ("'none'", "'self'", "data:") or source.startswith("'sha256-")


def directives(policy: str) -> dict[str, list[str]]:
    parts = [part.split() for part in policy.split(";") if part.strip()]
    return {name: sources for name, *sources in parts}


def test_pages_name_no_address(reports: list[tuple[list[str], Path]]) -> None:
    """Neither of our own files asks for anything: what looks like an address is a namespace."""
    body, _ = label_page()
    named = set(re.findall(rb"(?:https?:)?//[\w.-]+\.\w+[^\s'\"]*", body))
    assert {name for name in named if b"www.w3.org" not in name} == set()
    assert b"@import" not in body and b"url(" not in body.replace(b"url(data:", b"")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_runs_none_of_them(
    browser: Browser, reports: list[tuple[list[str], Path]]
) -> None:
    for _, report in reports:
        problems: list[Any] = []
        tab = browser.new_page()
        tab.on("dialog", lambda dialog, seen=problems: seen.append(dialog.message))
        tab.on("pageerror", lambda error, seen=problems: seen.append(str(error)))
        tab.on("request", lambda request, seen=problems: seen.append(request.url))
        tab.on("console", lambda message, seen=problems: seen.append(message.text))
        tab.goto(report.as_uri())
        tab.wait_for_timeout(200)
        assert tab.evaluate("window.hurt") is None
        assert tab.locator("script, img, a, iframe").count() == 0
        assert problems == [report.as_uri()], "nothing but the page itself was asked for"
        tab.close()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_labelling_page_runs_none_of_them(browser: Browser, tmp_path: Path) -> None:
    asked = []
    for i, attack in enumerate(ATTACKS):
        prompt = Prompt(f"p{i}", "s", text=f"Q {attack}", metadata={"rubric": f"N {attack}"})
        answers = [Response(f"{i}-{k}", f"p{i}", f"{k} {attack}", (k,), "eos") for k in "12"]
        asked.append((prompt, answers))
    run = make_people_run(tmp_path, annotators=["ann"], rubric="".join(ATTACKS))
    run.post(asked)
    annotator, seen = Annotator(browser), set()
    with serving(run.path, "ann") as (_, url):
        annotator.open(url)
        for number in range(len(ATTACKS)):
            annotator.sees(number, len(ATTACKS))
            shown = annotator.page.locator("#prompt .text, #answers .text")
            seen |= {text.text_content() for text in shown.all()}
            assert annotator.page.locator("main img, main script, main iframe").count() == 0
            annotator.press("t")
        annotator.page.get_by_text("All done").wait_for()
        assert annotator.page.evaluate("window.hurt") is None
        own = (url.split("#")[0], "data:", "about:")
        assert [address for address in annotator.requests if not address.startswith(own)] == []
    assert seen == {visible(f"{kind} {a}") for kind in "Q12" for a in ATTACKS}
    assert annotator.problems == []
    annotator.page.close()
