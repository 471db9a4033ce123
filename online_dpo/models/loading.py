"""Making, loading and saving models and tokenizers as plain transformers folders."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from online_dpo.errors import ConfigError
from online_dpo.models.adapter_files import is_adapter
from online_dpo.models.folder_check import refuse_code
from online_dpo.models.generation_config import neutral_generation_config
from online_dpo.models.pinning import base_folder

if TYPE_CHECKING:
    from transformers import (
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

Dtype = Literal["float32", "bfloat16"]

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
"""What a tokenizer consists of beside its templates, as patterns of file names."""

TEMPLATE_FILES = ("chat_template*", "additional_chat_templates/*")


def load_model(
    folder: Path,
    *,
    dtype: Dtype = "float32",
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    device: str = "cpu",
    quantize: bool = False,
) -> PreTrainedModel:
    """A causal language model in evaluation mode, its weights from safetensors files only.

    An adapter's folder gives its base with the adapter in it. `quantize` holds the linear layers in
    4 bits that compute in `dtype`.

    Raises ConfigError naming the folder and the cause, for weights that are missing too.
    """
    if is_adapter(folder):
        return _load_adapted(
            folder,
            dtype=dtype,
            attention=attention,
            trust_remote_code=trust_remote_code,
            device=device,
        )
    from transformers import AutoModelForCausalLM

    if not trust_remote_code:
        refuse_code(folder)
    _hide_progress_bars()
    extra = _quantized(dtype, device) if quantize else {}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **extra,
        )
    except Exception as error:
        raise _not_loaded("model", folder, error) from error
    model, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = sorted(str(key) for key in (*info["missing_keys"], *info["mismatched_keys"]))
        raise ConfigError(
            f"The model in {folder} cannot be used: {len(wrong)} of its weights are missing from "
            f"the safetensors files or have another shape, e.g. {wrong[0]}."
        )
    ready: PreTrainedModel = model.eval() if quantize else model.to(device).eval()
    if quantize:
        from online_dpo.models.quantization import keep_layout

        keep_layout(ready)
    return ready


def empty_model(
    config: PreTrainedConfig, *, attention: str = "sdpa", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The causal language model of a config, float32, in evaluation mode, without memory: all its
    tensors are on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            copy.deepcopy(config),  # It is written to.
            dtype=torch.float32,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
        )
    made: PreTrainedModel = model.eval()
    return made


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of the model in a folder. Raises ConfigError naming the folder and the cause."""
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:
        raise _not_loaded("model", folder, error) from error
    return config


def _load_adapted(folder: Path, **how: Any) -> PreTrainedModel:
    from online_dpo.models.lora import AdaptedModel, stored_config

    adapted = AdaptedModel(load_model(base_folder(folder), **how), stored_config(folder))
    adapted.load(folder)
    return adapted.model


def _quantized(dtype: Dtype, device: str) -> dict[str, Any]:
    """What `from_pretrained` is told of 4-bit weights, which are made on the device itself."""
    from online_dpo.models.quantization import nf4

    return {"quantization_config": nf4(dtype), "device_map": {"": device}}


def load_tokenizer(
    folder: Path, *, chat_template: Path | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; the file `chat_template` replaces its own template.

    Raises ConfigError naming the folder and the cause.
    """
    from transformers import AutoTokenizer

    if not trust_remote_code:
        refuse_code(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:
        raise _not_loaded("tokenizer", folder, error) from error
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(chat_template)
    return tokenizer


def read_chat_template(path: Path) -> str:
    """The template in a file. Raises ConfigError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"model.chat_template: {path} cannot be read: {error.strerror}."
        ) from error


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with an EOS and a padding token and no BOS; deterministic.

    It has `vocab_size` entries, fewer where the texts give no further merges.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        clean_up_tokenization_spaces=False,
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def make_model(
    init: Mapping[str, Any], *, vocab_size: int, eos_id: int, pad_id: int, seed: int
) -> PreTrainedModel:
    """A model with random float32 weights drawn from `seed`; `init` holds ModelInit's fields."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    config_class = {"llama": LlamaConfig, "qwen2": Qwen2Config}[init["architecture"]]
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=init["hidden_size"],
        intermediate_size=init["intermediate_size"],
        num_hidden_layers=init["num_layers"],
        num_attention_heads=init["num_heads"],
        num_key_value_heads=init["num_kv_heads"] or init["num_heads"],
        max_position_embeddings=init["max_length"],
        tie_word_embeddings=init["tie_embeddings"],
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made: PreTrainedModel = model.eval()
    return made


def save_model(model: PreTrainedModel, out: Path, *, dtype: Dtype) -> None:
    """Write weights, config and a neutral generation config into `out`.

    Where `dtype` is bfloat16 the weights in memory are rounded too, so that they equal the file's.
    """
    _hide_progress_bars()
    model.generation_config = neutral_generation_config(model)
    masters = {parameter: parameter.dtype for parameter in model.parameters()}
    for parameter in masters:
        parameter.data = parameter.data.to(getattr(torch, dtype))
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    for parameter, master in masters.items():
        parameter.data = parameter.data.to(master)


def copy_tokenizer(
    source: Path, out: Path, *, chat_template: Path | None = None, trust_remote_code: bool = False
) -> None:
    """Copy the tokenizer's files unchanged: saving it anew would change its config file.

    The file `chat_template` takes the place of its own templates. A model's own Python files go
    along where they are trusted; the model needs them.
    """
    patterns = (*TOKENIZER_FILES, "*.py") if trust_remote_code else TOKENIZER_FILES
    if chat_template is None:
        patterns = (*patterns, *TEMPLATE_FILES)
    else:
        template = read_chat_template(chat_template)
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    for path in sorted({path for pattern in patterns for path in source.glob(pattern)}):
        if path.is_file():
            target = out / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


@torch.no_grad()
def round_weights(model: PreTrainedModel, dtype: Dtype) -> None:
    """Give the weights in memory the values that a file of this type holds, in every process."""
    for parameter in model.parameters():
        # In place: fully_shard keeps views of the memory that a sharded weight has.
        parameter.copy_(parameter.to(getattr(torch, dtype)))


def enable_gradient_checkpointing(model: PreTrainedModel, *, offload: bool = False) -> None:
    """Recompute each layer in the backward pass, with dropout still off.

    `offload` keeps the layers' inputs in the CPU's memory until then.

    transformers checkpoints a layer in training mode only; the layer itself is put into it, its own
    dropout rates at zero, and what is inside the layer stays in evaluation mode.

    Raises ConfigError where the architecture has no checkpointing.
    """
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(f"train.gradient_checkpointing: {error} Set it to false.") from error
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)
    if offload:
        from online_dpo.training.offload import offload_checkpoints

        offload_checkpoints(model)


def max_length(model: PreTrainedModel) -> int | None:
    """Longest sequence in tokens that the model's config allows; None where it states none."""
    return _max_length(model.config)


def folder_max_length(folder: Path, *, trust_remote_code: bool = False) -> int | None:
    """`max_length` of the model in a folder, from its config file alone.

    Raises ConfigError naming the folder and the cause.
    """
    return _max_length(read_config(folder, trust_remote_code=trust_remote_code))


def _max_length(config: PreTrainedConfig) -> int | None:
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def _hide_progress_bars() -> None:
    """A bar for each load and save would fill the log of a campaign of many rounds."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _not_loaded(what: str, folder: Path, error: Exception) -> ConfigError:
    cause = " ".join(str(error).split()) or type(error).__name__
    return ConfigError(
        f"The {what} in {folder} cannot be loaded: {cause[:500]} (A model folder holds "
        "config.json, *.safetensors and the tokenizer's files.)"
    )
