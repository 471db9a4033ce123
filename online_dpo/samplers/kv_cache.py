"""A KV cache with room for a whole response, into which each prompt is read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """DynamicLayer copies all keys and values in every step, to append one; this one appends."""

    def __init__(self, room: int) -> None:
        """`room` is the number of positions, prompts included."""
        make: Any = super().__init__
        make()
        self._room = room

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Views of all keys and values (B, H, L, D), the new ones (B, H, n, D) at their end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._key_room, self._value_room = (
                x.new_empty((*x.shape[:2], self._room, x.shape[3]))
                for x in (key_states, value_states)
            )
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        self._key_room[:, :, start:end] = key_states
        self._value_room[:, :, start:end] = value_states
        self.keys, self.values = self._key_room[:, :, :end], self._value_room[:, :, :end]
        return self.keys, self.values

    def spread(self, rows: Tensor) -> None:
        """Give each of B sequences what row `rows[b]` holds; `rows` is (B,)."""
        length = self.get_seq_length()
        self._key_room, self._value_room = (
            x.new_empty((len(rows), *x.shape[1:])).index_copy_(
                2, torch.arange(length, device=x.device), x[rows, :, :length]
            )
            for x in (self._key_room, self._value_room)
        )
        self.keys, self.values = self._key_room[:, :, :length], self._value_room[:, :, :length]


def roomy_cache(model: PreTrainedModel, room: int) -> DynamicCache | None:
    """The model's usual cache with layers that append; None where its layers keep something else,
    such as a window or a state."""
    cache = DynamicCache(config=model.config)
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [RoomyLayer(room) for _ in cache.layers]
    return cache


@torch.no_grad()
def read_prompts_once(
    model: PreTrainedModel,
    cache: DynamicCache,
    input_ids: Tensor,
    attention_mask: Tensor,
    prompts: Sequence[int],
) -> None:
    """Fill an empty cache with all but the last token of each row's prompt, (B, P) left-padded.

    Rows with the same number in `prompts` have the same prompt. Where no two have, or prompts are
    single tokens, there is nothing to save, and the cache stays empty.
    """
    first: dict[int, int] = {}
    for row, prompt in enumerate(prompts):
        first.setdefault(prompt, row)
    if len(first) == len(prompts) or input_ids.shape[1] < 2:
        return
    distinct = torch.tensor(list(first.values()), device=input_ids.device)
    mask = attention_mask[distinct, :-1]
    model(
        input_ids[distinct, :-1],
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp_(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    numbers = {prompt: number for number, prompt in enumerate(first)}
    rows = torch.tensor([numbers[prompt] for prompt in prompts], device=input_ids.device)
    for layer in cache.layers:
        assert isinstance(layer, RoomyLayer)
        layer.spread(rows)
