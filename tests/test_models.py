"""Models and tokenizers made, loaded and saved as plain transformers folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from trainer_calls import settings
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from online_dpo.config import ModelInit
from online_dpo.errors import ConfigError
from online_dpo.models.loading import (
    copy_tokenizer,
    load_model,
    load_tokenizer,
    max_length,
    round_weights,
    save_model,
    train_tokenizer,
)
from online_dpo.training.handler import Trainer

CORPUS = ["Review of the kettle:\n", "It is good.", "It is good and it works.", "The kettle works."]


def write_corpus(path: Path) -> str:
    rows = [{"prompt": CORPUS[0], "response": text} for text in CORPUS[1:]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def init(
    folder: Path, name: str, *, seed: int = 1, template: str | None = None, **sizes: Any
) -> Path:
    given = {"vocab_size": 270, "hidden_size": 16, "intermediate_size": 32, "num_layers": 1}
    fields = ModelInit(**{**given, "num_heads": 2, "max_length": 32, **sizes})
    Trainer(settings()).init_model(
        emit=lambda event: None,
        init=fields.model_dump(),
        corpus=write_corpus(folder / "corpus.jsonl"),
        chat_template=template,
        seed=seed,
        out=str(folder / name),
    )
    return folder / name


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_seed_makes_the_same_bytes(tmp_path: Path) -> None:
    first, again = contents(init(tmp_path, "a")), contents(init(tmp_path, "b"))
    other = contents(init(tmp_path, "c", seed=2))
    assert first == again
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_made_models_are_plain_transformers_folders(
    tmp_path: Path, architecture: str, tied: bool
) -> None:
    folder = init(
        tmp_path, "m", architecture=architecture, tie_embeddings=tied, num_kv_heads=1, num_layers=2
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == architecture
    assert model.config.vocab_size == len(tokenizer)
    assert (model.config.num_hidden_layers, model.config.num_key_value_heads) == (2, 1)
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert max_length(model) == 32
    assert tokenizer.bos_token is None


def test_making_a_model_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    init(tmp_path, "m")
    assert torch.equal(torch.rand(3), expected)


def test_vocabulary_stops_where_the_texts_do(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(init(tmp_path, "m", vocab_size=5000))
    assert 258 < model.config.vocab_size < 400


TOKENIZER = train_tokenizer(CORPUS, vocab_size=280)


@given(st.text().filter(lambda text: "<|" not in text))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = TOKENIZER(text).input_ids
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_specials() -> None:
    assert len(TOKENIZER) == 280
    assert TOKENIZER("<|endoftext|>").input_ids == [TOKENIZER.eos_token_id]
    assert TOKENIZER.pad_token_id != TOKENIZER.eos_token_id
    merged = TOKENIZER("The kettle works.").input_ids
    assert len(merged) < len("The kettle works.")


def test_chat_template_of_a_made_model(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    tokenizer = load_tokenizer(init(tmp_path, "m", template=str(template)))
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "[x]"
    )
    template.write_text("other")
    assert load_tokenizer(tmp_path / "m", chat_template=template).chat_template == "other"
    with pytest.raises(ConfigError, match="model.chat_template: .*nothing.jinja"):
        load_tokenizer(tmp_path / "m", chat_template=tmp_path / "nothing.jinja")


def broken(kind: str, source: Path, folder: Path) -> None:
    shutil.copytree(source, folder)
    weights = folder / "model.safetensors"
    if kind == "pickle only":
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    elif kind == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "tensor missing":
        tensors = load_file(weights)
        del tensors["model.norm.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif kind == "other shape":
        tensors = load_file(weights)
        tensors["model.norm.weight"] = torch.ones(3)
        save_file(tensors, weights, metadata={"format": "pt"})
    elif kind == "no config":
        (folder / "config.json").unlink()
    else:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "kind", ["pickle only", "cut", "tensor missing", "other shape", "no config", "no folder"]
)
def test_what_cannot_be_loaded_is_named(tmp_path: Path, tiny_llama: Path, kind: str) -> None:
    broken(kind, tiny_llama, tmp_path / "model")
    with pytest.raises(ConfigError) as caught:
        load_model(tmp_path / "model")
    assert str(tmp_path / "model") in str(caught.value)
    if kind == "tensor missing":
        assert "model.norm.weight" in str(caught.value)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path, tiny_llama: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    for path in (tmp_path / "model").glob("*tok*"):
        path.unlink()
    with pytest.raises(ConfigError, match="tokenizer in .*model cannot be loaded"):
        load_tokenizer(tmp_path / "model")


def test_saving_bfloat16_rounds_the_weights_in_memory(tmp_path: Path, tiny_llama: Path) -> None:
    model, other = load_model(tiny_llama), load_model(tiny_llama)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(model, tmp_path / "saved", dtype="bfloat16")
    round_weights(other, "bfloat16")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name].bfloat16().float())
        assert torch.equal(tensor, saved[name].float())
        assert torch.equal(tensor, other.state_dict()[name])
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    # What is computed, not stored, keeps its precision.
    assert torch.equal(
        model.model.rotary_emb.inv_freq, load_model(tiny_llama).model.rotary_emb.inv_freq
    )


def test_generation_settings_are_not_inherited(tmp_path: Path, tiny_llama: Path) -> None:
    model = load_model(tiny_llama)
    model.generation_config = GenerationConfig(
        temperature=0.6, top_k=20, do_sample=True, eos_token_id=[0, 5], pad_token_id=1
    )
    save_model(model, tmp_path / "saved", dtype="float32")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    saved.pop("transformers_version")
    assert saved == {"eos_token_id": [0, 5], "pad_token_id": 1}


def test_tokenizer_files_are_copied_and_nothing_else(tmp_path: Path, tiny_llama: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "model" / "modeling_own.py").write_text("own = 1\n")
    for name, trusted in (("plain", False), ("trusted", True)):
        copy_tokenizer(tmp_path / "model", tmp_path / name, trust_remote_code=trusted)
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in (tmp_path / "trusted").iterdir()} == {*names, "modeling_own.py"}


def test_a_template_of_the_config_replaces_every_one_of_the_tokenizer(
    tmp_path: Path, tiny_llama: Path
) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_llama, source)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("tools")
    settings_file = source / "tokenizer_config.json"
    within = json.loads(settings_file.read_text()) | {"chat_template": "within the config"}
    settings_file.write_text(json.dumps(within))
    given = tmp_path / "given.jinja"
    given.write_text("{% for m in messages %}[{{ m.content }}]\n{% endfor %}\n")
    (tmp_path / "saved").mkdir()
    copy_tokenizer(source, tmp_path / "saved", chat_template=given)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.chat_template == given.read_text()
    assert settings_file.read_bytes() == (tmp_path / "saved/tokenizer_config.json").read_bytes()
