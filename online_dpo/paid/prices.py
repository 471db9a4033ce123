"""What a call costs: the price file, and the tariff of a model at a service tier."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from online_dpo.config import Config, JudgeConfig, NonNegative, Section
from online_dpo.config_file import load_yaml
from online_dpo.errors import ConfigError
from online_dpo.paid.chat import PICO, Estimate, Price, Usage
from online_dpo.resources import find_data

SHIPPED = Path(__file__).with_name("prices.yaml")
OPENAI = "https://api.openai.com/v1"
BATCH = "batch"
"""The batch API's place among a model's tiers."""

_STANDARD = (None, "default", "standard")
_PER_MILLION = PICO // 10**6


class TierPrice(Section):
    """Dollars per million tokens."""

    input: NonNegative
    """Of tokens in."""
    output: NonNegative
    """Of tokens out, a model's thinking included."""
    cached_input: NonNegative | None = None
    """Of tokens in that came from the endpoint's cache; None is the price of any."""

    def cost(self, tokens_in: int, tokens_out: int, tokens_cached: int = 0) -> int:
        """Whole picodollars; `tokens_cached` is the part of `tokens_in` that was cached."""
        cached = self.input if self.cached_input is None else self.cached_input
        return (
            (tokens_in - tokens_cached) * round(self.input * _PER_MILLION)
            + tokens_cached * round(cached * _PER_MILLION)
            + tokens_out * round(self.output * _PER_MILLION)
        )


class ModelPrice(TierPrice):
    """A model's price, and what it costs at other service tiers."""

    tiers: dict[str, TierPrice] = {}
    """By the tier's name at the endpoint; `batch` is its batch API."""


class Endpoint(Section):
    """The prices of one endpoint, on one day."""

    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}(-\d{2})?$")]
    """When they held: YYYY-MM or YYYY-MM-DD."""
    source: Annotated[str, Field(min_length=1)]
    """Where they are published."""
    models: dict[str, ModelPrice]
    """By the name that requests give."""


@dataclass(frozen=True, slots=True)
class Tariff:
    """The price of a model and the service tier that is asked for."""

    price: ModelPrice
    tier: str | None = None
    source: str = "the config"
    """Where the price comes from, with its date."""

    @property
    def asked(self) -> TierPrice:
        return self.price.tiers.get(self.tier or "", self.price)

    @property
    def shown(self) -> dict[str, float | None]:
        """The price as an event shows it."""
        return self.asked.model_dump(include={"input", "output", "cached_input"})

    def at_most(self, estimate: Estimate) -> int:
        """Picodollars to reserve. Who asks for a tier may be served, and billed, at another."""
        possible = [self.asked]
        if self.tier not in (*_STANDARD, BATCH):
            possible = [self.price, *self.price.tiers.values()]
        return max(tier.cost(estimate.tokens_in, estimate.tokens_out) for tier in possible)

    def cost(self, usage: Usage) -> int | None:
        """Picodollars of a reply by its counts of tokens and tier; None where it has no counts."""
        if usage.tokens_in is None or usage.tokens_out is None:
            return None
        served = self.asked
        if usage.tier is not None and self.tier != BATCH:
            served = self.price.tiers.get(usage.tier, self.price)
        return served.cost(usage.tokens_in, usage.tokens_out, usage.tokens_cached or 0)


class Prices:
    """A price file, read and checked."""

    def __init__(self, file: str | None) -> None:
        """Raises ConfigError where the file is missing or is no price file."""
        self.path = SHIPPED if file is None else find_data(file)
        try:
            self._endpoints = _FILE.validate_python(load_yaml(self.path))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ConfigError(
                f"{self.path} is no price file: {place}: {first['msg']}. It looks like {SHIPPED}."
            ) from None

    def find(self, model: str, base_url: str | None) -> tuple[ModelPrice, Endpoint] | None:
        """The price of a model at an endpoint (None is OpenAI's), and where it comes from."""
        place = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
        for url, endpoint in self._endpoints.items():
            if url.rstrip("/") == place.rstrip("/") and model in endpoint.models:
                return endpoint.models[model], endpoint
        return None

    def tariff(
        self, model: str, base_url: str | None, tier: str | None, given: Price | None = None
    ) -> Tariff | None:
        """What a call costs: the price `given` in a config at every tier, or else the file's.

        None is unknown: the model is not in the file, or has no price at that tier.
        """
        if given is not None:
            return Tariff(ModelPrice(input=given[0], output=given[1]), tier)
        found = self.find(model, base_url)
        if found is None:
            return None
        price, endpoint = found
        if tier not in (*_STANDARD, "auto", *price.tiers):
            return None
        return Tariff(price, tier, f"{self.path}, {endpoint.date}: {endpoint.source}")


_FILE = TypeAdapter(dict[str, Endpoint])


def asked_tier(config: JudgeConfig) -> str | None:
    """The tier that a judge's calls are priced at."""
    return BATCH if config.batch is not None else config.service_tier


def is_priced(judge: Any, config: JudgeConfig) -> bool:
    """Whether what a judge's calls cost is known: from itself, or from the price file.

    A judge that knows has its attribute `price`, of one that says None the options `model` and
    `base_url` are looked up, and one without the attribute is asked at each call.
    """
    if getattr(judge, "price", ()) is not None:
        return True
    model, base_url = config.options.get("model"), config.options.get("base_url")
    tariff = Prices(config.prices).tariff(str(model), base_url, asked_tier(config))
    return tariff is not None


def also_priced(config: Config) -> bool:
    """Whether what the answers of sampling.also cost is known; without such answers it is."""
    also = config.sampling.also
    if also is None:
        return True
    prices = Prices(config.judge.prices)
    return prices.tariff(also.model, also.url, None, also.price_per_million) is not None
