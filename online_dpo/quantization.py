"""4-bit weights for QLoRA (Dettmers et al. 2023, 2305.14314), and the model that they amount to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from online_dpo.models import Dtype, load_model, save_model

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel


def nf4(dtype: Dtype) -> BitsAndBytesConfig:
    """NF4 in blocks of 64, computing in `dtype`.

    The blocks' scales are not quantized in turn: 0.4 bits a weight more, and the weights are then
    exactly those that a file of `dtype` can hold, so that quantizing this file gives them again.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def keep_layout(model: PreTrainedModel) -> None:
    """Keep the weights as they are quantized.

    On some CPUs bitsandbytes packs them anew for inference at the first forward pass, rounded to
    bfloat16 scales, and in a form that has no backward pass.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


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
