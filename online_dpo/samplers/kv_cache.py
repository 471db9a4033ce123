"""A KV cache with room for a whole response: each step writes its keys and values in place."""

from __future__ import annotations

from typing import Any

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


def roomy_cache(model: PreTrainedModel, room: int) -> DynamicCache | None:
    """The model's usual cache with layers that append; None where its layers keep something else,
    such as a window or a state."""
    cache = DynamicCache(config=model.config)
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [RoomyLayer(room) for _ in cache.layers]
    return cache
