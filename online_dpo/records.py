"""The frozen types that every part of a campaign hands to the next; no I/O."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

FinishReason = Literal["eos", "stop", "length"]
"""eos: the model ended by itself; stop: a stop string matched; length: cut off at the limit."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the policy answers: plain text or chat messages, with metadata that reaches the judge.

    `token_ids` holds what every sampler is given: the chat template is applied and the BOS is added
    once, before this record exists. It is empty until the prompt has been tokenized.
    """

    id: str
    source: str
    text: str | None = None
    messages: tuple[Message, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    token_ids: tuple[int, ...] = ()

    @property
    def content(self) -> str:
        """The prompt as one text, for judges and people: as given, or messages with their roles."""
        if self.text is not None:
            return self.text
        if len(self.messages) == 1:
            return self.messages[0].content
        return "\n\n".join(f"{message.role}: {message.content}" for message in self.messages)


@dataclass(frozen=True, slots=True)
class Response:
    """One answer to one prompt.

    `token_ids` is what the model emitted (the sampled EOS and a stop string's tokens included, none
    invented for a truncated response); `text` is what the judge sees. `logprobs` are the raw
    log-probabilities of the tokens at temperature 1, in nats, or None for other sources.
    """

    id: str
    prompt_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    source: str = "policy"
    logprobs: tuple[float, ...] | None = None

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True)
class Score:
    """A pointwise judgement: a finite value, or None with the reason why there is none."""

    value: float | None
    reason: str | None = None

    def __post_init__(self) -> None:
        if self.value is None and not self.reason:
            raise ValueError("a Score without a value needs a reason")


@dataclass(frozen=True, slots=True)
class Verdict:
    """A pairwise judgement: p, the probability in [0, 1] that the first response is better.

    0.5 is a tie. None means no verdict; `reason` then says why. `raw` keeps the judge's own words.
    """

    p: float | None
    reason: str | None = None
    raw: str | None = None

    def __post_init__(self) -> None:
        if self.p is None and not self.reason:
            raise ValueError("a Verdict without p needs a reason")
        if self.p is not None and not 0.0 <= self.p <= 1.0:
            raise ValueError(f"p must lie in [0, 1], got {self.p}")

    def swap(self) -> Verdict:
        """The same verdict with first and second exchanged."""
        return Verdict(None if self.p is None else 1.0 - self.p, self.reason, self.raw)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The combined verdict on two responses of one prompt; `orders` counts the orders asked.

    `raws` keeps the judge's own words, in the order in which it was asked. `order_ps` has each
    order's own p, the responses as given first. `vote_ps` has that of each vote, order by order and
    None for no verdict, where an order had several. All are p that `first_id` is better.
    """

    prompt_id: str
    first_id: str
    second_id: str
    p: float | None
    reason: str | None = None
    orders: int = 1
    raws: tuple[str, ...] = ()
    order_ps: tuple[float, ...] = ()
    vote_ps: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Preference:
    """One training pair: two responses of one prompt with distinct tokens.

    `margin` is in score units for scores and |p - 0.5| for comparisons. `p` is the probability that
    the chosen one is better. `origin` says where it comes from: this round, an earlier one, a file.
    `*_sampled_logp` are the log-probs that this round's policy gave while it drew the responses,
    summed, in nats; None for other sources.
    """

    pair_id: str
    prompt_id: str
    prompt_source: str
    prompt_token_ids: tuple[int, ...]
    chosen_id: str
    rejected_id: str
    chosen_token_ids: tuple[int, ...]
    rejected_token_ids: tuple[int, ...]
    chosen_text: str
    rejected_text: str
    chosen_truncated: bool
    rejected_truncated: bool
    margin: float
    p: float
    origin: str
    chosen_sampled_logp: float | None = None
    rejected_sampled_logp: float | None = None


@dataclass(frozen=True, slots=True)
class Unpaired:
    """One response that is good (`label` True) or bad by itself.

    `margin` is how far its score is from the threshold, in score units. `origin` says where it
    comes from: this round, an earlier one, a file.
    """

    row_id: str
    prompt_id: str
    prompt_source: str
    prompt_token_ids: tuple[int, ...]
    completion_id: str
    completion_token_ids: tuple[int, ...]
    completion_text: str
    completion_truncated: bool
    label: bool
    margin: float
    origin: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Every parameter of generation, explicit; nothing comes from a model's generation config.

    `top_k` 0 and `top_p` 1.0 are off; `temperature` 0 is greedy. `stop` holds stop strings.
    """

    n: int
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """One prompt to answer n times. `seeds` has one seed per response, in [0, 2**63)."""

    prompt: Prompt
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model by place and content.

    `path` is relative to the run directory, absolute, or `hub:NAME@COMMIT`; `sha256` is the folder
    hash over its files as `store.folder_hash` computes it.
    """

    path: str
    sha256: str


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """The inputs of a round, decided before it starts and written to `round.json`."""

    round: int
    seed: int
    prompt_ids: tuple[str, ...]
    prompts_sha256: str
    policy: ModelRef
    reference: ModelRef
    reference_round: int
    beta: float
    learning_rate: float
    rounds: int
    """Rounds that a carried optimizer's schedule spans."""
    optimizer: ModelRef | None
    """The optimizer state carried over from the previous round, if any."""
    optimizer_step: int
    """Optimizer steps taken before this round, where the state is carried over; otherwise 0."""
    evaluate: bool
    previous_manifest_sha256: str | None


@dataclass(frozen=True, slots=True)
class ArtifactInfo:
    """An artifact as a round's manifest lists it."""

    name: str
    sha256: str
    rows: int | None
    bytes: int


def to_dict(record: Any) -> dict[str, Any]:
    """A record as plain types, nested records too; tokens and other plain values are shared.

    dataclasses.asdict copies each token of a response, which takes longer than drawing it may.
    """
    return {f.name: _plain(getattr(record, f.name)) for f in fields(record)}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple) and any(is_dataclass(item) for item in value[:1]):
        return tuple(to_dict(item) for item in value)
    return value


def prompt_from_dict(row: Mapping[str, Any]) -> Prompt:
    """The inverse of `to_dict` for a Prompt."""
    return Prompt(
        id=row["id"],
        source=row["source"],
        text=row["text"],
        messages=tuple(Message(m["role"], m["content"]) for m in row["messages"]),
        metadata=row["metadata"],
        token_ids=tuple(row["token_ids"]),
    )


def response_from_dict(row: Mapping[str, Any]) -> Response:
    """The inverse of `to_dict` for a Response."""
    logprobs = row["logprobs"]
    return Response(
        id=row["id"],
        prompt_id=row["prompt_id"],
        text=row["text"],
        token_ids=tuple(row["token_ids"]),
        finish_reason=row["finish_reason"],
        source=row["source"],
        logprobs=None if logprobs is None else tuple(logprobs),
    )


def model_ref_from_dict(row: Mapping[str, Any] | None) -> ModelRef | None:
    """A ModelRef from its JSON form; None stays None."""
    return None if row is None else ModelRef(row["path"], row["sha256"])


def plan_from_dict(row: Mapping[str, Any]) -> RoundPlan:
    """The inverse of `to_dict` for a RoundPlan."""
    return RoundPlan(
        **{
            **row,
            "prompt_ids": tuple(row["prompt_ids"]),
            "policy": model_ref_from_dict(row["policy"]),
            "reference": model_ref_from_dict(row["reference"]),
            "optimizer": model_ref_from_dict(row["optimizer"]),
        }
    )


def derive_seed(campaign_seed: int, *parts: str | int) -> int:
    """A seed in [0, 2**63) from the campaign's seed and its use, e.g. (round, stage, item, k)."""
    text = "/".join(str(part) for part in (campaign_seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def prompt_id(source: str, content: str | Sequence[Message]) -> str:
    """A stable id of 16 hex digits for a prompt of a source."""
    text = content if isinstance(content, str) else repr([(m.role, m.content) for m in content])
    kind = "text" if isinstance(content, str) else "messages"
    return hashlib.sha256(f"{source}\0{kind}\0{text}".encode()).hexdigest()[:16]
