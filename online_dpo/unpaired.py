"""From scored responses to good and bad ones, each by itself; pure."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from online_dpo.pairing import Judged
from online_dpo.records import Prompt, Response, Unpaired


@dataclass(frozen=True)
class Labelling:
    """Good and bad responses, and the fate of every response by name; the counts add up to all."""

    rows: tuple[Unpaired, ...]
    fates: Mapping[str, int]


def make_unpaired(
    judged: Sequence[Judged], *, threshold: float, min_margin: float, round_number: int
) -> Labelling:
    """The round's rows, in the order of the prompts: good where a score reaches the threshold.

    A response's fate is `good`, `bad`, `below_margin` (nearer to the threshold than `min_margin`)
    or `invalid` (no score). Equal responses stay: each was drawn.
    """
    rows: list[Unpaired] = []
    fates: Counter[str] = Counter()
    for item in judged:
        assert item.scores is not None
        for response, score in zip(item.responses, item.scores, strict=True):
            if score.value is None:
                fates["invalid"] += 1
                continue
            margin = score.value - threshold
            if abs(margin) < min_margin:
                fates["below_margin"] += 1
                continue
            row = _row(item.prompt, response, margin, round_number)
            fates["good" if row.label else "bad"] += 1
            rows.append(row)
    return Labelling(tuple(rows), dict(sorted(fates.items())))


def check_unpaired(rows: Sequence[Unpaired]) -> None:
    """Assert what training relies on: distinct ids, a prompt, a response."""
    assert len({row.row_id for row in rows}) == len(rows), "row ids repeat"
    for row in rows:
        assert row.prompt_token_ids and row.completion_token_ids, row.row_id


def _row(prompt: Prompt, response: Response, margin: float, round_number: int) -> Unpaired:
    key = f"{round_number}/{response.id}"
    return Unpaired(
        row_id=hashlib.sha256(key.encode()).hexdigest()[:16],
        prompt_id=prompt.id,
        prompt_source=prompt.source,
        prompt_token_ids=prompt.token_ids,
        completion_id=response.id,
        completion_token_ids=response.token_ids,
        completion_text=response.text,
        completion_truncated=response.truncated,
        label=margin >= 0.0,
        margin=abs(margin),
        origin=f"round-{round_number:03d}",
    )
