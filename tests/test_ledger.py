"""The ledger: committed answers survive kill -9, doubtful ones are charged, none is altered."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online_dpo.errors import BudgetError, CorruptError, DiskError
from online_dpo.paid.chat import PICO
from online_dpo.paid.ledger import Ledger, check_ledger, digest_of
from online_dpo.paid.ledger_rows import Entry, Limits, session

REPLY: dict[str, Any] = {
    "cost": 40,
    "tokens_in": 30,
    "tokens_out": 10,
    "reply": 'She said "ü\u2028" \U0001f600\x00',
    "finish_reason": "stop",
    "refused": 0,
    "answered_by": "model-2",
}


def call(key: str, *, reserved: int | None = 100) -> Entry:
    return Entry(
        key=key, attempt=0, state="sent", session=session(), seq=None, judge="j", version="1",
        model="m", purpose="label", round=1, prompt_id="p", response_ids='["a", "b"]', swapped=0,
        vote=0, reserved=reserved, reserved_tokens=100,
    )  # fmt: skip


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "judgments.sqlite")
    yield opened
    opened.close()


def test_a_settled_answer_is_found_again_as_it_was(ledger: Ledger) -> None:
    assert ledger.find("k").result() is None
    sent = ledger.send(call("k")).result()
    assert (sent.attempt, sent.state) == (1, "sent")
    assert ledger.find("k").result() is None
    settled = ledger.settle(sent, **REPLY).result()
    ledger.close()
    reopened = Ledger(ledger.path)
    try:
        assert reopened.find("k").result() == settled
        assert settled.reply == REPLY["reply"]
    finally:
        reopened.close()


def test_each_fate_is_charged_as_it_should(ledger: Ledger) -> None:
    first = ledger.send(call("k")).result()
    assert ledger.totals().result().charged == 100
    ledger.fail(first, "429").result()
    assert (ledger.totals().result().charged, ledger.totals().result().calls) == (0, 0)
    second = ledger.send(call("k")).result()
    assert second.attempt == 2
    ledger.lose(second, "timeout").result()
    assert (ledger.totals().result().charged, ledger.totals().result().calls) == (100, 1)
    third = ledger.send(call("k")).result()
    ledger.settle(third, **REPLY).result()
    assert (ledger.totals().result().charged, ledger.totals().result().calls) == (140, 2)


def test_a_reply_is_not_lost_to_a_later_doubt(ledger: Ledger) -> None:
    sent = ledger.send(call("k")).result()
    ledger.settle(sent, **REPLY)
    assert ledger.lose(sent, "cancelled").result().state == "settled"
    found = ledger.find("k").result()
    assert found is not None and found.reply == REPLY["reply"]
    assert ledger.totals().result().charged == 40


def test_the_limits_count_what_is_in_flight(ledger: Ledger) -> None:
    dollars = Limits(max_usd=250 / PICO)
    ledger.send(call("a"), dollars).result()
    second = ledger.send(call("b"), dollars).result()
    with pytest.raises(
        BudgetError, match=r"no room for another call.*judge\.budget\.max_usd"
    ) as no:
        ledger.send(call("c"), dollars).result()
    assert no.value.exit_code == 4
    ledger.settle(second, **REPLY).result()
    third = ledger.send(call("c"), Limits(max_usd=250 / PICO, max_calls=3)).result()
    with pytest.raises(BudgetError, match=r"limit of 3 judge calls.*judge\.budget\.max_calls"):
        ledger.send(call("d"), Limits(max_calls=3)).result()
    ledger.fail(third, "429").result()
    ledger.send(call("d"), Limits(max_calls=3)).result()


def test_a_budget_of_tokens_counts_reservations_and_then_what_was_used(ledger: Ledger) -> None:
    limit = Limits(max_tokens=250)
    first = ledger.send(call("a"), limit).result()
    ledger.send(call("b"), limit).result()
    with pytest.raises(BudgetError, match=r"of 250 tokens.*200 are spent.*budget\.max_tokens"):
        ledger.send(call("c"), limit).result()
    ledger.settle(first, **REPLY).result()
    assert ledger.totals().result().tokens == 100 + 40
    third = ledger.send(call("c"), limit).result()
    ledger.lose(third, "an unusable reply", cost=7, tokens_in=5, tokens_out=2).result()
    totals = ledger.totals().result()
    assert (totals.charged, totals.tokens) == (40 + 100 + 7, 40 + 100 + 7)
    check_ledger(ledger.path)


def test_what_another_ledger_paid_for_counts_for_nothing(ledger: Ledger) -> None:
    ledger.reuse(replace(call("a"), **REPLY)).result()
    found = ledger.find("a").result()
    assert found is not None and (found.state, found.reply) == ("reused", REPLY["reply"])
    totals = ledger.totals().result()
    assert (totals.charged, totals.calls, totals.tokens, totals.final) == (0, 0, 0, 1)
    check_ledger(ledger.path, *digest_of(ledger.path))


def test_verdicts_stand_beside_the_replies(ledger: Ledger) -> None:
    ledger.settle(ledger.send(call("a")).result(), **REPLY).result()
    ledger.conclude(["a"], '{"p": 1.0}').result()
    assert _select(ledger.path, "SELECT key, reply, verdict FROM judgments") == [
        ("a", REPLY["reply"], '{"p": 1.0}')
    ]
    check_ledger(ledger.path, *digest_of(ledger.path))
    _execute(ledger.path, "UPDATE verdicts SET verdict = '{\"p\": 0.0}'")
    with pytest.raises(CorruptError, match="the verdict of a is not what was written"):
        check_ledger(ledger.path, *digest_of(ledger.path))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 1000))
def test_never_over_budget_and_the_totals_are_the_rows(seed: int, budget: int) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "judgments.sqlite"
        ledger = Ledger(path)
        open_rows: list[Entry] = []
        for number in range(40):
            if open_rows and rng.random() < 0.6:
                row = open_rows.pop(rng.randrange(len(open_rows)))
                reserved = row.reserved or 0
                fate = rng.choice(["settle", "fail", "lose"])
                if fate == "settle":
                    ledger.settle(row, **{**REPLY, "cost": rng.randint(0, reserved)})
                else:
                    getattr(ledger, fate)(row, "why")
            else:
                entry = call(str(number), reserved=rng.randint(1, 120))
                sending = ledger.send(entry, Limits(max_usd=budget / PICO))
                if sending.exception() is None:
                    open_rows.append(sending.result())
            assert ledger.totals().result().charged <= budget
        totals = ledger.totals().result()
        ledger.close()
        with sqlite3.connect(path) as db:
            (charged,) = db.execute(
                "SELECT coalesce(sum(CASE state WHEN 'failed' THEN 0 WHEN 'settled' THEN cost "
                "ELSE reserved END), 0) FROM calls"
            ).fetchone()
        db.close()
        assert totals.charged == charged


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_ledger import REPLY, call
from online_dpo.paid.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
rows = [ledger.send(call(f"settled-{i}")) for i in range(200)]
rows = [row.result() for row in rows]
flying = [ledger.send(call(f"flying-{i}")).result() for i in range(3)]
for row in rows:
    ledger.settle(row, **REPLY).add_done_callback(lambda f: print(f.result().key, flush=True))
import time
time.sleep(60)
"""


def test_kill_9_loses_no_settled_answer_and_charges_what_was_in_flight(tmp_path: Path) -> None:
    path = tmp_path / "judgments.sqlite"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    seen = {child.stdout.readline().strip() for _ in range(20)}
    child.send_signal(signal.SIGKILL)
    seen |= {line.strip() for line in child.stdout}
    child.wait()
    child.stdout.close()
    ledger = Ledger(path)
    try:
        for key in seen:
            assert ledger.find(key).result() is not None, f"{key} was bought and lost"
        flying = 3 + 200 - _count(path, "settled")
        assert _count(path, "unknown") == flying
        assert _count(path, "sent") == 0
        charged = 100 * flying + 40 * (203 - flying)
        assert ledger.totals().result().charged == charged
    finally:
        ledger.close()
    assert digest_of(path)[0] == 203


def test_rows_in_flight_in_this_very_process_stay_in_flight(ledger: Ledger) -> None:
    sent = ledger.send(call("k")).result()
    beside = Ledger(ledger.path)
    try:
        assert beside.settle(sent, **REPLY).result().state == "settled"
    finally:
        beside.close()


def test_the_digest_of_the_first_rows_stays(ledger: Ledger) -> None:
    assert digest_of(ledger.path) == digest_of(ledger.path.with_name("none"))
    for key in "abc":
        ledger.settle(ledger.send(call(key)).result(), **REPLY).result()
    rows, sha256 = digest_of(ledger.path)
    assert rows == 3
    flying = ledger.send(call("d")).result()
    assert digest_of(ledger.path) == (3, sha256)
    ledger.fail(flying, "500").result()
    assert digest_of(ledger.path)[0] == 4
    ledger.send(call("e")).result()
    check_ledger(ledger.path, 3, sha256)
    check_ledger(ledger.path, *digest_of(ledger.path))
    ledger.close()
    ledger.path.unlink()
    with pytest.raises(CorruptError, match="missing; the labels rest on 3 rows"):
        check_ledger(ledger.path, 3, sha256)
    check_ledger(ledger.path)


def test_a_digest_reads_no_rows(ledger: Ledger) -> None:
    """Labels name the ledger once a shard: what they do must not grow with the ledger."""
    for key in "abc":
        ledger.settle(ledger.send(call(key)).result(), **REPLY).result()
    whole = digest_of(ledger.path)
    ledger.close()
    _execute(ledger.path, "DELETE FROM calls")
    assert digest_of(ledger.path) == whole
    with pytest.raises(CorruptError, match="holds 0 finished calls where 3 were recorded"):
        check_ledger(ledger.path, *whole)


@pytest.mark.parametrize(
    "tamper",
    [
        "UPDATE calls SET reply = 'She said b' WHERE key = 'b'",
        "UPDATE calls SET cost = 0 WHERE key = 'b'",
        "UPDATE calls SET key = 'x' WHERE key = 'b'",
    ],
)
def test_an_altered_row_is_noticed(ledger: Ledger, tamper: str) -> None:
    for key in "abc":
        ledger.settle(ledger.send(call(key)).result(), **REPLY).result()
    rows, sha256 = digest_of(ledger.path)
    ledger.close()
    _execute(ledger.path, tamper)
    altered = Ledger(ledger.path)
    try:
        with pytest.raises(CorruptError, match="is not what was written"):
            altered.find("x" if "key = 'x'" in tamper else "b").result()
        assert altered.find("a").result() is not None
    finally:
        altered.close()
    with pytest.raises(CorruptError):
        check_ledger(ledger.path, rows, sha256)


def test_a_shortened_or_exchanged_ledger_is_noticed(ledger: Ledger, tmp_path: Path) -> None:
    for key in "abc":
        ledger.settle(ledger.send(call(key)).result(), **REPLY).result()
    rows, sha256 = digest_of(ledger.path)
    flying = ledger.send(call("d")).result()
    ledger.close()
    with pytest.raises(CorruptError, match="not the ledger"):
        check_ledger(ledger.path, rows, "0" * 64)
    with pytest.raises(CorruptError, match="holds 3 finished calls where 4 were recorded"):
        check_ledger(ledger.path, 4, sha256)
    _execute(ledger.path, f"DELETE FROM calls WHERE key = '{flying.key}'")
    with pytest.raises(CorruptError, match="totals are not those of its rows"):
        check_ledger(ledger.path, rows, sha256)
    _execute(ledger.path, "DELETE FROM calls WHERE key = 'c'")
    with pytest.raises(CorruptError, match="holds 2 finished calls where 3 were recorded"):
        check_ledger(ledger.path, rows, sha256)


def test_a_shorter_history_with_totals_to_match_is_noticed(ledger: Ledger) -> None:
    """Whoever takes the last row away and sets the totals back meets the labels' manifests."""
    for key in "ab":
        ledger.settle(ledger.send(call(key)).result(), **REPLY).result()
    shorter = ledger.totals().result()
    ledger.settle(ledger.send(call("c")).result(), **REPLY).result()
    named = digest_of(ledger.path)
    ledger.close()
    _execute(ledger.path, "DELETE FROM calls WHERE key = 'c'")
    values = f"{shorter.charged}, calls = {shorter.calls}, tokens = {shorter.tokens}, final = 2"
    values += f", sha256 = '{shorter.sha256}'"
    _execute(ledger.path, f"UPDATE totals SET charged = {values}")
    check_ledger(ledger.path, 2, shorter.sha256)
    with pytest.raises(CorruptError, match="holds 2 finished calls where 3 were recorded"):
        check_ledger(ledger.path, *named)


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "judgments.sqlite"
    path.write_text("not a database, but long enough to be read as a page header" * 40)
    with pytest.raises(CorruptError, match="cannot be read"):
        Ledger(path)
    path.unlink()
    _execute(path, "CREATE TABLE other (x)")
    with pytest.raises(CorruptError, match="no ledger of this version"):
        Ledger(path)
    path.unlink()
    Ledger(path).close()
    _execute(path, "PRAGMA user_version = 2")
    with pytest.raises(CorruptError, match="its schema is 2, and .* Go on with the version that"):
        check_ledger(path)


FULL = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_ledger import REPLY, call
from online_dpo.paid.chat import PICO
from online_dpo.errors import DiskError
from online_dpo.paid.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
settled = 0
try:
    while settled < 100:
        row = ledger.send(call(str(settled))).result()
        ledger.settle(row, **{**REPLY, "reply": "x" * 20_000}).result()
        settled += 1
except DiskError as error:
    print(settled, error.exit_code)
    ledger.close()
"""


def test_a_full_disk_is_a_disk_error_and_spares_what_is_settled(tmp_path: Path) -> None:
    path = tmp_path / "judgments.sqlite"
    said = subprocess.run(
        [sys.executable, "-c", FULL, str(path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    settled, code = map(int, said.split())
    assert code == DiskError.exit_code
    assert 0 < settled < 100
    assert _count(path, "settled") == settled


def _count(path: Path, state: str) -> int:
    with sqlite3.connect(path) as db:
        (count,) = db.execute("SELECT count(*) FROM calls WHERE state = ?", (state,)).fetchone()
    db.close()
    return int(count)


def _select(path: Path, query: str) -> list[Any]:
    with sqlite3.connect(path) as db:
        found = db.execute(query).fetchall()
    db.close()
    return found


def _execute(path: Path, statement: str) -> None:
    with sqlite3.connect(path) as db:
        db.execute(statement)
    db.close()
