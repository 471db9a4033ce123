"""What a call costs: from the price file, exactly, by tier and cache; and never 0 for unknown."""

from __future__ import annotations

from pathlib import Path

import pytest

from online_dpo.config import BatchConfig, JudgeConfig
from online_dpo.errors import ConfigError
from online_dpo.paid.chat import Estimate, Usage
from online_dpo.paid.prices import SHIPPED, Prices, asked_tier, is_priced

PICO_PER_MILLIONTH = 10**6
FILE = """
http://judge/v1:
  date: "2026-11-24"
  source: a contract
  models:
    m:
      {input: 2.0, cached_input: 0.5, output: 8.0, tiers: {flex: {input: 1.0, output: 4.0},
       fast: {input: 4.0, output: 16.0}, batch: {input: 0.25, output: 1.0}}}
"""


@pytest.fixture
def prices(tmp_path: Path) -> Prices:
    path = tmp_path / "prices.yaml"
    path.write_text(FILE)
    return Prices(str(path))


def test_a_price_holds_for_its_endpoint_and_model(
    prices: Prices, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = prices.find("m", "http://judge/v1/")
    assert found is not None and found[1].date == "2026-11-24"
    for model, url in (("m", None), ("m", "http://other/v1"), ("m-2", "http://judge/v1")):
        assert prices.tariff(model, url, None) is None
    monkeypatch.setenv("OPENAI_BASE_URL", "http://judge/v1")
    assert prices.find("m", None) is not None


def test_a_reply_costs_what_its_counts_and_tier_say(prices: Prices) -> None:
    def cost(asked: str | None, usage: Usage) -> float | None:
        tariff = prices.tariff("m", "http://judge/v1", asked)
        assert tariff is not None
        found = tariff.cost(usage)
        return None if found is None else found / PICO_PER_MILLIONTH  # millionths of a dollar

    assert cost(None, Usage(100, 10)) == 100 * 2 + 10 * 8
    assert cost(None, Usage(100, 10, 40)) == 60 * 2 + 40 * 0.5 + 10 * 8
    assert cost("flex", Usage(100, 10)) == 100 * 1 + 10 * 4
    assert cost("flex", Usage(100, 10, 40, "flex")) == 100 * 1 + 10 * 4
    assert cost("flex", Usage(100, 10, None, "default")) == 100 * 2 + 10 * 8
    assert cost("auto", Usage(100, 10, None, "fast")) == 100 * 4 + 10 * 16
    assert cost("batch", Usage(100, 10, None, "default")) == 100 * 0.25 + 10 * 1
    assert cost(None, Usage(100, None)) is None


def test_a_reservation_is_the_most_that_any_tier_may_bill(prices: Prices) -> None:
    def reserved(asked: str | None) -> float:
        tariff = prices.tariff("m", "http://judge/v1", asked)
        assert tariff is not None
        return tariff.at_most(Estimate(100, 10, None)) / PICO_PER_MILLIONTH

    assert reserved(None) == 100 * 2 + 10 * 8
    assert reserved("flex") == reserved("auto") == 100 * 4 + 10 * 16
    assert reserved("batch") == 100 * 0.25 + 10 * 1


def test_what_is_not_in_the_file_is_unknown(prices: Prices) -> None:
    assert prices.tariff("m", "http://judge/v1", "priority") is None
    given = prices.tariff("other", None, "priority", (1.0, 2.0))
    assert given is not None and given.cost(Usage(100, 10)) == 120 * PICO_PER_MILLIONTH

    class Judge:
        price: tuple[float, float] | None = None

    def known(price: tuple[float, float] | None, **config: object) -> bool:
        judge = Judge()
        judge.price = price
        options = {"model": "m", "base_url": "http://judge/v1"}
        settings = {"options": options, "prices": str(prices.path), **config}
        return is_priced(judge, JudgeConfig(name="j", **settings))  # type: ignore[arg-type]

    assert known((0.0, 0.0), prices=None)
    assert known(None)
    assert not known(None, prices=None)
    assert not known(None, service_tier="priority")
    assert known(None, batch=BatchConfig())
    assert is_priced(object(), JudgeConfig(name="j")), "it is asked at each call"
    assert asked_tier(JudgeConfig(name="j", service_tier="flex")) == "flex"


def test_the_shipped_file_is_dated_and_says_where_it_comes_from() -> None:
    found = Prices(None).find("gpt-4o-mini", None)
    assert found is not None
    price, endpoint = found
    assert (price.input, price.output, price.tiers["batch"].input) == (0.15, 0.60, 0.075)
    assert endpoint.date >= "2026" and "openai.com" in endpoint.source
    for model in endpoint.models.values():
        assert (model.cached_input or model.input) <= model.input <= model.output
        assert all(tier.input <= model.input for tier in model.tiers.values())
    assert "Check them" in SHIPPED.read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (FILE.replace("2026-11-24", "soon"), "no price file: http://judge/v1.date: String should"),
        (FILE.replace("input: 2.0", "input: -2.0"), "models.m.input: Input should be greater"),
        (FILE.replace("source: a contract", ""), "source: Field required"),
        (FILE.replace("tiers", "teirs"), "teirs: Extra inputs are not permitted"),
        ("[1, 2]", "a config is a mapping"),
    ],
)
def test_a_file_that_is_no_price_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Prices(str(path))
    assert said in caught.value.message
    with pytest.raises(ConfigError, match="does not exist"):
        Prices(str(tmp_path / "none.yaml"))
