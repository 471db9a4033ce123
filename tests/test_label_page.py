"""The labelling page: who may reach it, and people at work in a real headless browser."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from people_run import PeopleRun, make_people_run, pairs, serving

from online_dpo.annotation.commands import describe
from online_dpo.annotation.desk import Desk
from online_dpo.annotation.server import TOKEN_HEADER, LabelServer, page
from online_dpo.records import Prompt, Response

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
PAGE = Path(__file__).parent.parent / "online_dpo" / "annotation" / "page"

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


# --- who may reach it


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LabelServer]:
    """The page of one annotator with three pairs to label."""
    run = make_people_run(tmp_path, annotators=["ann"])
    run.post(pairs(3))
    with (
        run.board.open_log("ann") as log,
        LabelServer(Desk(run.board, log, "ann")) as made,
    ):
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


Answer = tuple[int, dict[str, str], bytes]
Ask = Callable[..., Answer]


@pytest.fixture
def ask(server: LabelServer) -> Ask:
    """Sends a request as the page does, but for what a test changes; None leaves a header out."""

    def send(method: str, path: str, body: Any = None, **headers: str | None) -> Answer:
        own = f"127.0.0.1:{server.port}"
        sent: dict[str, str | None] = {"Host": own, TOKEN_HEADER: server.token}
        if method == "POST":
            sent |= {"Origin": f"http://{own}", "Content-Type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            if method == "POST" and "Content-Length" not in sent:
                sent["Content-Length"] = str(len(data))
            for name, value in sent.items():
                if value is not None:
                    connection.putheader(name, value)
            connection.endheaders(data if method == "POST" else None)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()

    return send


def verdict(server: LabelServer) -> dict[str, Any]:
    return {"task": server.desk.state()["task"]["id"], "choice": "a", "seconds": 1}


def test_the_page_itself_may_label(server: LabelServer, ask: Ask) -> None:
    status, _, body = ask("POST", "/api/verdict", verdict(server))
    assert status == 200 and json.loads(body)["state"]["done"] == 1
    assert ask("POST", "/api/undo", {})[0] == 200
    assert ask("POST", "/api/undo", {})[0] == 409
    assert ask("GET", "/api/state", Host=f"localhost:{server.port}")[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": None},
        {"Host": "127.0.0.1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": None},
        {TOKEN_HEADER: "guess"},
        {TOKEN_HEADER: None},
        {TOKEN_HEADER: "\xe9"},
    ],
    ids=str,
)
def test_nobody_else_does(server: LabelServer, ask: Ask, headers: dict[str, Any]) -> None:
    for path, body in (("/api/verdict", verdict(server)), ("/api/undo", {})):
        status, sent, answer = ask("POST", path, body, **headers)
        assert status == 403
        assert json.loads(answer)["state"] is None
        assert not [name for name in sent if name.lower().startswith("access-control")]
    if "Origin" not in headers:
        assert ask("GET", "/api/state", **headers)[0] == 403
    assert server.desk.state()["done"] == 0


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"not json", {}),
        (b"[1]", {}),
        (b"[" * 4000, {}),
        (b'{"a": "' + b"x" * 5000 + b'"}', {}),
        (b"{}", {"Content_Type": "text/plain"}),
        (b"{}", {"Content_Length": "many"}),
        (b"{}", {"Content_Length": "-1"}),
        (b"{}", {"Content_Length": "99999999999999999999"}),
    ],
)
def test_what_is_no_small_json_object_is_refused(
    server: LabelServer, ask: Ask, body: bytes, headers: dict[str, str]
) -> None:
    assert ask("POST", "/api/verdict", body, **headers)[0] == 400


def test_other_paths_and_methods_are_nothing(ask: Ask) -> None:
    assert ask("GET", "/../../etc/passwd")[0] == 404
    assert ask("GET", "/api/verdict")[0] == 404
    assert ask("POST", "/api/state", {})[0] == 404
    assert ask("OPTIONS", "/api/verdict")[0] == 501


def test_it_listens_on_one_address_alone(server: LabelServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    with socket.socket() as other, pytest.raises(ConnectionRefusedError):
        other.settimeout(5)
        other.connect(("127.0.0.2", server.port))


def test_the_token_is_new_with_every_start_and_stays_in_the_browser(
    server: LabelServer, ask: Ask
) -> None:
    address = urlsplit(server.url)
    assert address.fragment == server.token and len(server.token) >= 43
    assert not address.query and address.path == "/"
    status, _, body = ask("GET", "/", **{TOKEN_HEADER: None})
    assert status == 200 and server.token.encode() not in body
    with LabelServer(server.desk) as another:
        assert another.token != server.token


def test_the_policy_allows_the_pages_own_style_and_script_alone(ask: Ask) -> None:
    _, headers, body = ask("GET", "/")
    assert body == page()[0]
    parts = dict(
        part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";")
    )
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", body.decode(), re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert parts.pop(directive) == f"'sha256-{digest}'"
    assert parts == {
        "default-src": "'none'", "connect-src": "'self'", "img-src": "data:",
        "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
    }  # fmt: skip
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert b"//" not in re.sub(rb"^ *//.*|; //.*", b"", body, flags=re.M)


def test_the_script_writes_texts_as_texts() -> None:
    script = (PAGE / "label.js").read_text()
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(|srcdoc"
    assert not re.search(markup, script)


def test_a_port_that_is_taken_is_named(server: LabelServer, tmp_path: Path) -> None:
    run = make_people_run(tmp_path / "other", annotators=["ann"])
    command = [sys.executable, "-m", "online_dpo.cli", "label", str(run.path), "--annotator"]
    for words, said in (
        (["ann", "--port", str(server.port)], f"Port {server.port} of 127.0.0.1"),
        (["eve"], "'eve' is no annotator"),
    ):
        ended = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
        assert ended.returncode == 2 and said in ended.stderr


# --- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's chromium, headless."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


class Annotator:
    """Somebody at the page with a keyboard."""

    def __init__(self, browser: Browser) -> None:
        self.page: Page = browser.new_page()
        self.page.set_default_timeout(20_000)
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: self.problems.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def open(self, url: str) -> None:
        self.page.goto("about:blank")  # another fragment alone would load nothing
        self.page.goto(url)

    def sees(self, done: int, total: int) -> None:
        """Wait until the page shows so much as saved."""
        self.page.get_by_text(f"{done} of {total}", exact=True).wait_for()

    def press(self, key: str) -> None:
        self.page.keyboard.press(key)

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()

    def question(self) -> str:
        return self.texts("#prompt .text")[0]

    def answers(self) -> list[str]:
        return self.texts("#answers article .text")


KEYS = {"a": ("ArrowLeft", "a", "1"), "b": ("ArrowRight", "b", "2")}


DEVIATIONS = {
    "ann": {"Question 3?": "tie", "Question 11?": "tie", "Question 5?": "worse"},
    "bob": {"Question 3?": "tie", "Question 7?": "tie", "Question 14?": "worse"},
}
"""Both take the better answer but here: of 20 verdicts 16 are equal, and each has 17 for the
better one, 2 ties and 1 for the worse one. Kappa is (0.8 - 294 / 400) / (1 - 294 / 400) = 0.25."""


def wanted(name: str, question: str, answers: list[str]) -> str:
    """The text of the answer that an annotator prefers, or "tie"."""
    word = DEVIATIONS[name].get(question, "better")
    if word == "tie":
        return word
    return next(text for text in answers if ("better" in text) == (word == "better"))


def vote(annotator: Annotator, name: str, number: int) -> tuple[str, str]:
    """Press a key for the pair in view; the question, and the text that was preferred."""
    question, answers = annotator.question(), annotator.answers()
    preferred = wanted(name, question, answers)
    if preferred == "tie":
        annotator.press("t0="[number % 3])
    else:
        annotator.press(KEYS["ab"[answers.index(preferred)]][number % 3])
    return question, preferred


@needs_chromium
def test_two_annotators_label_twenty_pairs_with_the_keyboard_through_kills(
    browser: Browser, tmp_path: Path
) -> None:
    run = make_people_run(tmp_path, per_item=2, combine="mean")
    run.post(pairs(20))
    pressed: dict[str, dict[str, str]] = {}
    for name, abrupt in (("ann", False), ("bob", True)):
        annotator = Annotator(browser)
        pressed[name] = label_through_a_kill(run, name, annotator, abrupt=abrupt)
        assert annotator.problems == []
        annotator.page.close()
    for name in ("ann", "bob"):
        assert len(pressed[name]) == 20
        assert run.given(name) == pressed[name]
    check_labels(run.ask(pairs(20)), pressed)
    shown = [sum(g.swapped for g in run.board.given(name)) for name in ("ann", "bob")]
    assert all(4 <= count <= 16 for count in shown)
    assert "Agreement on 20 items: observed 0.80, Cohen's kappa 0.25" in describe(run.board)


def label_through_a_kill(
    run: PeopleRun, name: str, annotator: Annotator, *, abrupt: bool
) -> dict[str, str]:
    """Label some, lose the server to SIGKILL, start it again, label the rest.

    `abrupt`: it is killed with a verdict under way, of which nobody has been told that it is saved.
    """
    pressed: dict[str, str] = {}
    with serving(run.path, name) as (process, url):
        annotator.open(url)
        for number in range(9):
            annotator.sees(number, 20)
            question, preferred = vote(annotator, name, number)
            pressed[question] = preferred
        if not abrupt:
            annotator.sees(9, 20)
        process.kill()
        process.wait()
        if not abrupt:
            question, _ = vote(annotator, name, 0)
            annotator.page.get_by_text("The last key was not confirmed").wait_for()
            assert annotator.question() == question not in pressed
    saved = len(run.board.given(name))
    assert saved in (8, 9) if abrupt else saved == 9
    with serving(run.path, name) as (process, url):
        annotator.open(url)
        for number in range(saved, 20):
            annotator.sees(number, 20)
            question, preferred = vote(annotator, name, number)
            pressed[question] = preferred
        annotator.page.get_by_text("All done. Thank you.").wait_for()
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        said = process.stdout.read()
        assert process.wait() == 0 and f"{20 - saved} verdicts of {name} saved." in said
    return pressed


def check_labels(labels: Any, pressed: dict[str, dict[str, str]]) -> None:
    for (prompt, responses), label in zip(pairs(20), labels, strict=True):
        values = []
        for name in ("ann", "bob"):
            word = pressed[name][prompt.content]
            values.append(0.5 if word == "tie" else float(word == responses[0].text))
        assert [c.p for c in label.comparisons] == [sum(values) / 2]


@needs_chromium
def test_undo_skip_rubric_and_differences_by_key(browser: Browser, tmp_path: Path) -> None:
    run = make_people_run(tmp_path, annotators=["ann"], rubric="Prefer what is true.")
    run.post(pairs(4))
    annotator = Annotator(browser)
    with serving(run.path, "ann") as (_, url):
        annotator.open(url)
        annotator.sees(0, 4)
        first = annotator.question()
        annotator.press("u")  # nothing to take back
        annotator.press("s")
        annotator.sees(1, 4)
        assert run.given("ann") == {first: "skip"}
        annotator.press("Backspace")
        annotator.sees(0, 4)
        assert annotator.question() == first and run.given("ann") == {}
        annotator.press("r")
        panel = annotator.page.locator("#rubric-panel")
        panel.wait_for()
        assert "Prefer what is true." in panel.inner_text()
        annotator.press("a")  # reads the rubric: no verdict
        annotator.press("Escape")
        panel.wait_for(state="hidden")
        annotator.press("d")
        assert set(annotator.texts("#answers mark")) >= {"poor", "better"}
        annotator.press("Control+a")
        annotator.sees(0, 4)
        annotator.page.get_by_role("button", name="A is better").click()
        annotator.sees(1, 4)
        annotator.page.reload()
        annotator.sees(1, 4)
    assert list(run.given("ann")) == [first] and annotator.problems == []
    annotator.page.close()


@needs_chromium
def test_one_answer_is_good_or_bad(browser: Browser, tmp_path: Path) -> None:
    run = make_people_run(tmp_path, annotators=["ann"], ask="rate")
    run.post(pairs(3))
    annotator = Annotator(browser)
    with serving(run.path, "ann") as (_, url):
        annotator.open(url)
        for number in range(6):
            annotator.sees(number, 6)
            good = "better" in annotator.answers()[0]
            annotator.press(("b", "ArrowLeft", "0")[number % 3] if not good else "g1"[number % 2])
        annotator.page.get_by_text("All done").wait_for()
    assert [[s.value for s in label.scores or ()] for label in run.ask(pairs(3))] == [
        [0.0, 1.0]
    ] * 3
    annotator.page.close()


ATTACKS = [
    "<script>window.hurt=1</script>",
    "<img src=x onerror=window.hurt=1>",
    "<svg onload=window.hurt=1>",
    "</script><script>window.hurt=1</script>",
    "</style><script>window.hurt=1</script>",
    "<iframe srcdoc='<script>parent.hurt=1</script>'></iframe>",
    "<a href=javascript:window.hurt=1 autofocus onfocus=window.hurt=1>x</a>",
    "<details open ontoggle=window.hurt=1>",
    "<link rel=stylesheet href=http://evil.example/x.css>",
    "<img src=http://evil.example/x.png>",
    "<meta http-equiv=refresh content='0;url=http://evil.example/'>",
    "<base href=http://evil.example/>",
    "<form action=http://evil.example/><input autofocus onfocus=alert(1)>",
    "<object data=javascript:alert(1)></object>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
    "{{constructor.constructor('alert(1)')()}}",
    "${window.hurt=1}",
    "'\"><img src=x onerror=alert(1)>",
    "<!--><script>alert(1)</script>-->",
    "<template><script>alert(1)</script></template>",
    "<video><source onerror=alert(1)></video>",
    "<body onload=alert(1)>",
    "<marquee onstart=alert(1)>x</marquee>",
    "\u2028<script>alert(1)</script>\u2029",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
]


@needs_chromium
def test_hostile_texts_stay_texts(browser: Browser, tmp_path: Path) -> None:
    """A hundred in prompts, answers and rubrics: nothing runs, and no request leaves."""
    from online_dpo.display.visible import visible

    asked = []
    for i, attack in enumerate(ATTACKS):
        prompt = Prompt(f"p{i}", "s", text=f"Q {attack}", metadata={"rubric": f"N {attack}"})
        answers = [Response(f"{i}-{k}", f"p{i}", f"{k} {attack}", (k,), "eos") for k in "12"]
        asked.append((prompt, answers))
    run = make_people_run(tmp_path, annotators=["ann"], rubric="".join(ATTACKS))
    run.post(asked)
    annotator = Annotator(browser)
    seen = set()
    with serving(run.path, "ann") as (_, url):
        annotator.open(url)
        for number in range(len(ATTACKS)):
            annotator.sees(number, len(ATTACKS))
            texts = [*annotator.page.locator("#prompt .text, #note, #answers .text").all()]
            seen |= {text.text_content() for text in texts}
            annotator.press("d")
            annotator.press("t")
        annotator.page.get_by_text("All done").wait_for()
        assert annotator.page.evaluate("window.hurt") is None
        assert (
            annotator.page.evaluate("document.querySelectorAll('main img, main script').length")
            == 0
        )
        own = url.split("#")[0]
        assert {
            r for r in annotator.requests if not r.startswith((own, "data:", "about:"))
        } == set()
    assert seen == {visible(f"{kind} {a}") for kind in "QN12" for a in ATTACKS}
    assert annotator.problems == []
    annotator.page.close()


@needs_chromium
def test_a_phone_shows_both_answers_and_no_sideways_scrolling(
    browser: Browser, tmp_path: Path
) -> None:
    run = make_people_run(tmp_path, annotators=["ann"])
    asked = pairs(1)
    asked[0][1][0] = Response("long", "p0", "word " * 300 + "x" * 500, (1,), "length")
    run.post(asked)
    annotator = Annotator(browser)
    annotator.page.set_viewport_size({"width": 360, "height": 740})
    with serving(run.path, "ann") as (_, url):
        annotator.open(url)
        annotator.sees(0, 1)
        wide = "document.documentElement.scrollWidth <= innerWidth"
        assert annotator.page.evaluate(wide)
        boxes = [a.bounding_box() for a in annotator.page.locator("article").all()]
        assert boxes[0] and boxes[1] and boxes[0]["x"] == boxes[1]["x"]
        assert annotator.page.get_by_role("button", name="Tie").is_visible()
    annotator.page.close()
