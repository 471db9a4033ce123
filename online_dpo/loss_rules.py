"""What each preference loss needs, and which settings go with it; loads no torch."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

LossName = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "ipo_mean",
    "sigmoid_norm",
    "simpo",
    "orpo",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "sppo",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "kto",
]
"""The names in `training.losses.LOSSES`."""


@dataclass(frozen=True, slots=True)
class LossFacts:
    """What a loss takes and how it looks at a step.

    `knobs` are its settings beside beta. `uses_probs` says whether it can take the judge's p,
    `needs_probs` whether it must. `coupled`: an item's loss depends on the rest of the optimizer
    step. `paired` is False where chosen and rejected are two groups and not pairs.
    `of_difference`: it is a function of beta (c - r), sums over tokens, and nothing else.
    """

    knobs: tuple[str, ...] = ()
    uses_beta: bool = True
    needs_reference: bool = True
    needs_lengths: bool = False
    uses_probs: bool = False
    needs_probs: bool = False
    needs_mismatched: bool = False
    coupled: bool = False
    paired: bool = True
    of_difference: bool = False


_SMOOTHED = ("label_smoothing",)

LOSS_FACTS: Mapping[str, LossFacts] = MappingProxyType(
    {
        "sigmoid": LossFacts(_SMOOTHED, uses_probs=True, of_difference=True),
        "robust": LossFacts(_SMOOTHED, of_difference=True),
        "hinge": LossFacts(of_difference=True),
        "ipo": LossFacts(of_difference=True),
        "ipo_mean": LossFacts(needs_lengths=True),
        "sigmoid_norm": LossFacts(needs_lengths=True),
        "simpo": LossFacts(("gamma",), needs_reference=False, needs_lengths=True),
        "orpo": LossFacts(("lambda_",), uses_beta=False, needs_reference=False, needs_lengths=True),
        "exo_pair": LossFacts(_SMOOTHED, of_difference=True),
        "nca_pair": LossFacts(),
        "bco_pair": LossFacts(),
        "sppo_hard": LossFacts(),
        "sppo": LossFacts(uses_probs=True, needs_probs=True),
        "aot": LossFacts(_SMOOTHED, coupled=True),
        "aot_unpaired": LossFacts(_SMOOTHED, coupled=True, paired=False),
        "apo_zero": LossFacts(),
        "apo_down": LossFacts(),
        "discopop": LossFacts(("tau",), of_difference=True),
        "kto": LossFacts(
            ("desirable_weight", "undesirable_weight"),
            needs_mismatched=True,
            coupled=True,
            paired=False,
        ),
    }
)
"""A test holds these against the signatures of the losses."""

assert tuple(LOSS_FACTS) == get_args(LossName)


@dataclass(frozen=True, slots=True)
class Modifier:
    """A setting of `train` that changes any loss which `fits`; at `off` it changes none."""

    off: Any
    fits: Callable[[str, LossFacts], bool]
    why_not: str


MODIFIERS: Mapping[str, Modifier] = MappingProxyType(
    {
        "nll_weight": Modifier(
            0.0,
            lambda name, facts: facts.paired and name != "orpo",
            "it adds the likelihood of a pair's chosen response, which orpo contains and losses "
            "of two groups have no pair for",
        ),
        "dpop_weight": Modifier(
            0.0,
            lambda _, facts: facts.of_difference,
            "it lowers c in beta * (c - r)",
        ),
        "length_penalty": Modifier(
            0.0,
            lambda _, facts: facts.of_difference,
            "it adds to beta * (c - r) over whole responses",
        ),
        "margin_weight": Modifier(
            0.0,
            lambda _, facts: facts.of_difference,
            "it subtracts from beta * (c - r) over whole responses",
        ),
        "ld_alpha": Modifier(
            1.0,
            lambda _, facts: facts.paired and not facts.needs_lengths,
            "it weighs the tokens by which one response of a pair is longer, in sums of log-probs",
        ),
        "wpo": Modifier(
            False,
            lambda _, facts: not facts.coupled,
            "it weighs each pair's own loss",
        ),
    }
)


def checked_loss(loss: Any) -> Any:
    """`train.loss` as it is. Raises ValueError unless it is a name or {name: weight above 0}."""
    weights = list(loss.items()) if isinstance(loss, Mapping) else [(loss, 1.0)]
    for name, weight in weights:
        if not isinstance(name, str) or name not in LOSS_FACTS:
            near = difflib.get_close_matches(str(name), LOSS_FACTS, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(LOSS_FACTS)}"
            raise ValueError(f"train.loss: there is no loss {name!r}{hint}")
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0.0 < weight < math.inf:
            raise ValueError(
                f"train.loss: the weight of {name} is a number above 0, not {weight!r}"
            )
    if not weights:
        raise ValueError("train.loss: a sum of losses names at least one, e.g. {sigmoid: 1}")
    return loss


def loss_weights(loss: str | Mapping[LossName, float]) -> dict[str, float]:
    """The losses that `train.loss` names, with their weights; a name alone has weight 1."""
    return {loss: 1.0} if isinstance(loss, str) else {name: weight for name, weight in loss.items()}


def describe_loss(loss: str | Mapping[LossName, float]) -> str:
    """`train.loss` in a few words: "sigmoid", "0.8 sigmoid + 0.2 bco_pair"."""
    if isinstance(loss, str):
        return loss
    return " + ".join(f"{weight:g} {name}" for name, weight in loss.items())


def loss_problems(train: Mapping[str, Any], *, default_beta: float) -> Iterator[str]:
    """Why TrainConfig's fields do not go together; nothing where they do.

    A setting that no loss in use can take is a problem: it would do nothing.
    """
    names = list(loss_weights(train["loss"]))
    if len(names) > 1:
        for name in names:
            if not LOSS_FACTS[name].paired:
                yield (
                    f"train.loss: {name} compares two groups of responses and cannot be summed "
                    f"with losses of pairs; use it alone"
                )
    yield from _knob_problems(names, train, default_beta)
    for key, modifier in MODIFIERS.items():
        bad = [name for name in names if not modifier.fits(name, LOSS_FACTS[name])]
        if train[key] != modifier.off and bad:
            good = [name for name, facts in LOSS_FACTS.items() if modifier.fits(name, facts)]
            yield (
                f"train.{key}: not with {' and '.join(bad)}: {modifier.why_not}. "
                f"It goes with {', '.join(good)}; off is {json.dumps(modifier.off)}"
            )


def _knob_problems(
    names: list[str], train: Mapping[str, Any], default_beta: float
) -> Iterator[str]:
    given = {key: value for key, value in train["loss_options"].items() if value is not None}
    places = {key: f"train.loss_options.{key}" for key in given}
    if train["label_smoothing"]:
        places["label_smoothing"] = "train.label_smoothing"
    for key, place in places.items():
        takers = [name for name, facts in LOSS_FACTS.items() if key in facts.knobs]
        if not set(takers) & set(names):
            yield (f"{place}: no use to {' and '.join(names)}; it is a knob of {', '.join(takers)}")
    if train["beta"] != default_beta and not any(LOSS_FACTS[name].uses_beta for name in names):
        yield "train.beta: orpo has no beta; its weight is train.loss_options.lambda_"
    if "exo_pair" in names and not train["label_smoothing"]:
        yield "train.label_smoothing: exo_pair needs one above 0; its paper takes 1e-3"
    if "robust" in names and not train["label_smoothing"]:
        yield (
            "train.label_smoothing: robust is sigmoid where no label is flipped; give the share "
            "of flipped labels, e.g. 0.1, or take loss: sigmoid"
        )
