"""Reading what is trained on: preference pairs, their reference log-probs, demonstrations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from online_dpo.errors import ConfigError, CorruptError, NoPairsError
from online_dpo.records import Prompt
from online_dpo.rows import read_rows
from online_dpo.tokenization import encode_answer, parse_prompt, tokenize_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PAIR_COLUMNS = (
    "pair_id",
    "prompt_token_ids",
    "chosen_token_ids",
    "rejected_token_ids",
    "p",
    "margin",
    "chosen_sampled_logp",
    "rejected_sampled_logp",
)
"""What is read of a table of pairs; the last four may be missing."""


@dataclass(frozen=True, slots=True)
class Pair:
    """What training needs of a preference.

    `sampled_logps` are the (chosen, rejected) log-probs that the sampling policy gave while it
    drew the responses, summed; None where one of them has another source.
    """

    pair_id: str
    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    p: float = 1.0
    margin: float = 0.0
    sampled_logps: tuple[float, float] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the longer of its two sequences."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A tokenized prompt with the response to imitate."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Limit:
    """Longest trainable sequence in tokens, and what sets it."""

    tokens: int | None
    reason: str

    def exceeded_by(self, num_tokens: int) -> bool:
        return self.tokens is not None and num_tokens > self.tokens


@dataclass(slots=True)
class Skipped:
    """Rows left out, by reason, with the first few named."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, reason: str, where: str | int) -> None:
        self.counts[reason] += 1
        if len(self.examples) < 20:
            self.examples.append({"row": where, "reason": reason})


def length_limit(max_tokens: int | None, model_length: int | None) -> Limit:
    """The smaller of the configured and the model's own limit; None is no limit."""
    if model_length is not None and (max_tokens is None or model_length < max_tokens):
        return Limit(model_length, f"longer than the model's {model_length} tokens")
    return Limit(max_tokens, f"longer than train.max_tokens {max_tokens}")


def read_pairs(path: Path, limit: Limit) -> tuple[list[Pair], Skipped]:
    """The pairs that fit, in the file's order. Raises NoPairsError where none is left."""
    pairs, skipped = [], Skipped()
    for row in _read_rows(path):
        pair = _pair(row)
        if not (pair.prompt and pair.chosen and pair.rejected):
            skipped.add("no prompt tokens or no response tokens", pair.pair_id)
        elif limit.exceeded_by(pair.num_tokens):
            skipped.add(limit.reason, pair.pair_id)
        else:
            pairs.append(pair)
    if not pairs:
        reasons = "; ".join(f"{n} x {reason}" for reason, n in skipped.counts.items())
        raise NoPairsError(f"No pair of {path} can be trained on: {reasons or 'it has no rows'}.")
    return pairs, skipped


def _pair(row: Mapping[str, Any]) -> Pair:
    chosen, rejected = row.get("chosen_sampled_logp"), row.get("rejected_sampled_logp")
    return Pair(
        row["pair_id"],
        tuple(row["prompt_token_ids"]),
        tuple(row["chosen_token_ids"]),
        tuple(row["rejected_token_ids"]),
        p=row.get("p", 1.0),
        margin=row.get("margin", 0.0),
        sampled_logps=None if chosen is None or rejected is None else (chosen, rejected),
    )


def read_demonstrations(
    path: str, tokenizer: PreTrainedTokenizerBase, limit: Limit
) -> tuple[list[Demonstration], Skipped]:
    """Tokenized demonstrations with an EOS each. Raises ConfigError where none is left."""
    demonstrations, skipped = [], Skipped()
    for line, values, problem in _demonstration_rows(path):
        if values is None:
            skipped.add(problem, line)
            continue
        prompt = tokenize_prompt(tokenizer, values[0])
        response = encode_answer(tokenizer, values[1], append_eos=True)
        if limit.exceeded_by(len(prompt) + len(response)):
            skipped.add(limit.reason, line)
        else:
            demonstrations.append(Demonstration(prompt, response))
    if not demonstrations:
        raise _no_demonstrations(path, skipped)
    return demonstrations, skipped


def demonstration_texts(path: str) -> list[str]:
    """Prompts and responses as separate texts, to train a tokenizer on."""
    texts: list[str] = []
    skipped = Skipped()
    for line, values, problem in _demonstration_rows(path):
        if values is None:
            skipped.add(problem, line)
            continue
        prompt, response = values
        texts.extend([prompt.text] if prompt.text else [m.content for m in prompt.messages])
        texts.append(response)
    if not texts:
        raise _no_demonstrations(path, skipped)
    return texts


def _demonstration_rows(path: str) -> Iterable[tuple[int, tuple[Prompt, str] | None, str]]:
    """(line, (prompt, response) or None, why there is none) for every row."""
    for row in read_rows(path):
        values, problem = _demonstration(path, row.values) if row.values else (None, row.problem)
        yield row.line, values, problem


def _demonstration(path: str, values: Mapping[str, Any]) -> tuple[tuple[Prompt, str] | None, str]:
    for name in ("prompt", "response"):
        if name not in values:
            return None, f"no {name!r}"
    text, messages, reason = parse_prompt(values["prompt"])
    if reason:
        return None, reason
    response = values["response"]
    if not isinstance(response, str) or not response:
        return None, "the response is empty or not a string"
    return (Prompt("", Path(path).stem, text, messages), response), ""


def _no_demonstrations(path: str, skipped: Skipped) -> ConfigError:
    reasons = "; ".join(f"{n} x {reason}" for reason, n in skipped.counts.most_common(3))
    return ConfigError(
        f"sft.demonstrations: {path} has no usable demonstration ({reasons or 'it is empty'}). "
        "A row holds a prompt (a string or messages) and a response (a string)."
    )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """A table of pairs without their texts."""
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise CorruptError(f"{path} is missing.") from error
    return list(table.select([n for n in table.column_names if n in PAIR_COLUMNS]).to_pylist())
