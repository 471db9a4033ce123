"""A policy's weights as an engine must be given them: all, and tied ones by both their names."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from online_dpo.errors import EngineError

NamedWeights = Iterable[tuple[str, Tensor]]
WeightSource = Callable[[Path], NamedWeights]
"""Reads the weights of a folder; a function of a module, so that it can travel to a process."""

HEAD = "lm_head.weight"
_EMBEDDING = "embed_tokens.weight"
NOISE = 0.25
"""How much weights are perturbed for a proof, as a share of their size."""


def stored_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a folder's safetensors files, one at a time, as they are stored."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise EngineError(f"{folder} holds no safetensors files.")
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, tensors.get_tensor(name)


def perturbed_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The folder's weights with noise of a quarter of their size, the same every time.

    What a model computes from these is far from what the true ones give, so that any tensor that
    stayed behind is seen above bfloat16's rounding.
    """
    for name, tensor in stored_weights(folder):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(tensor.shape, generator=generator)
        size = tensor.float().pow(2).mean().sqrt().clamp_(min=1e-2)
        yield name, (tensor.float() + NOISE * size * noise).to(tensor.dtype)


def with_head(weights: NamedWeights) -> Iterator[tuple[str, Tensor]]:
    """The weights with an output projection of their own.

    Where embeddings are tied the files hold them once; an engine that keeps two copies would go on
    with the old projection, without a word.
    """
    embedding: Tensor | None = None
    has_head = False
    for name, tensor in weights:
        has_head |= name.endswith(HEAD)
        if name.endswith(_EMBEDDING):
            embedding = tensor
        yield name, tensor
    if not has_head and embedding is not None:
        yield HEAD, embedding
