"""The plain model that a model's 4-bit weights amount to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from online_dpo.models.loading import Dtype, load_model, save_model


@torch.no_grad()
def write_dequantized(
    folder: Path,
    out: Path,
    *,
    dtype: Dtype,
    device: str,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
) -> None:
    """Write the model that the 4-bit weights of a folder's model amount to, in `dtype`."""
    import bitsandbytes

    given: dict[str, Any] = {"attention": attention, "trust_remote_code": trust_remote_code}
    quantized = load_model(folder, dtype=dtype, device=device, quantize=True, **given)
    plain = load_model(folder, dtype=dtype, **given)
    for name, module in quantized.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight: Any = module.weight
            values = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            plain.get_parameter(f"{name}.weight").copy_(values)
    save_model(plain, out, dtype=dtype)
