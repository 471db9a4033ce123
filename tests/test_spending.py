"""What a round's paid calls came to is what the ledger charges for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from test_ledger import REPLY, call

from online_dpo.display.judge_table import spending_table
from online_dpo.paid.chat import PICO
from online_dpo.paid.ledger import Ledger
from online_dpo.paid.spending import Spending, spending_by_round, total


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "judgments.sqlite")
    yield opened
    opened.close()


def test_each_fate_counts_as_for_the_budget(ledger: Ledger) -> None:
    refused, lost, answered = (ledger.send(call(key)).result() for key in "abc")
    ledger.fail(refused, "429", latency_s=9.0).result()
    ledger.lose(lost, "timeout", latency_s=3.0).result()  # at its reservation, 100
    ledger.settle(answered, **REPLY, latency_s=1.0).result()  # at 40
    ledger.send(replace(call("d"), round=2)).result()  # in flight
    found = spending_by_round(ledger.path)
    assert found == {
        1: Spending(2, 140, 140 / PICO, 2.0),
        2: Spending(1, 100, 100 / PICO, None),
    }
    charged = ledger.totals().result()
    everything = total(found.values())
    assert everything == Spending(charged.calls, charged.tokens, charged.charged / PICO, 2.0)


def test_an_unknown_price_is_unknown_and_never_0(ledger: Ledger) -> None:
    ledger.settle(ledger.send(call("a")).result(), **REPLY).result()
    unpriced = ledger.send(replace(call("b", reserved=None), round=2)).result()
    ledger.settle(unpriced, **{**REPLY, "cost": None}).result()
    found = spending_by_round(ledger.path)
    assert [found[n].usd for n in (1, 2)] == [40 / PICO, None]
    everything = total(found.values())
    assert everything is not None and (everything.calls, everything.usd) == (2, None)


def test_where_nothing_was_paid_there_is_nothing_to_show(tmp_path: Path, ledger: Ledger) -> None:
    assert spending_by_round(tmp_path / "none.sqlite") == {} == spending_by_round(ledger.path)
    (tmp_path / "torn").write_bytes(b"no database")
    assert spending_by_round(tmp_path / "torn") == {}
    assert total([]) is None and spending_table([]) is None
