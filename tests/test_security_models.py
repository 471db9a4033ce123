"""Models of strangers: code, pickles and paths in a folder are refused, and nothing runs."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import in_child, tiny_config

from online_dpo.config_file import config_from_dict
from online_dpo.errors import ConfigError
from online_dpo.models.folder_check import PICKLES
from online_dpo.models.loading import load_model, load_tokenizer
from online_dpo.models.pinning import pin_model

CODE = "import pathlib\npathlib.Path({canary!r}).write_text('it ran')\n"


class Bomb:
    """A pickle that writes a file when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (CODE.format(canary=str(self.canary)),))


@pytest.fixture
def model(tmp_path: Path, tiny_llama: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "model")


def change_json(path: Path, **values: Any) -> None:
    data = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**data, **values}))


AUTO_MAP = {"AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None]}


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_code_that_a_folder_names_is_refused(model: Path, tmp_path: Path, file: str) -> None:
    canary = tmp_path / "canary"
    (model / "evil.py").write_text(CODE.format(canary=str(canary)))
    change_json(model / file, auto_map=AUTO_MAP)
    (model / "evil.py").rename(tmp_path / "evil.py")
    for load in (load_model, load_tokenizer, pin):
        with pytest.raises(ConfigError, match=f"auto_map in {file}.*trust_remote_code"):
            load(model)
    (tmp_path / "evil.py").rename(model / "evil.py")
    for load in (load_model, load_tokenizer, pin):
        with pytest.raises(ConfigError, match=r"holds Python code: evil.py"):
            load(model)
    assert not canary.exists()


def pin(folder: Path) -> dict[str, Any]:
    return pin_model(str(folder), None, trust_remote_code=False)


@pytest.mark.parametrize("ending", PICKLES)
def test_pickles_are_refused_even_beside_safetensors(
    model: Path, tmp_path: Path, ending: str
) -> None:
    canary = tmp_path / "canary"
    (model / f"training_args{ending.upper()}").write_bytes(pickle.dumps(Bomb(canary)))
    with pytest.raises(ConfigError, match="may be a pickle, which runs code"):
        pin(model)
    assert not canary.exists()


def test_pickled_weights_alone_are_never_read(model: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(canary)))
    for load in (load_model, pin):
        with pytest.raises(ConfigError):
            load(model)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("model.safetensors.index.json", {"weight_map": {"lm_head.weight": "/etc/shadow"}}),
        ("model.safetensors.index.json", {"weight_map": {"lm_head.weight": "../../x.safetensors"}}),
        ("model.safetensors.index.json", {"weight_map": {"lm_head.weight": "C:\\x.safetensors"}}),
        ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}),
        ("tokenizer_config.json", {"tokenizer_file": "../tokenizer.json"}),
    ],
)
def test_paths_out_of_the_folder_are_refused(
    model: Path, file: str, values: dict[str, Any]
) -> None:
    change_json(model / file, **values)
    for load in (load_model, load_tokenizer, pin):
        with pytest.raises(ConfigError, match="points out of its folder"):
            load(model)


def test_an_ordinary_folder_and_a_trusted_one_are_taken(model: Path) -> None:
    assert pin(model)["files"]
    change_json(model / "tokenizer_config.json", name_or_path="/home/somebody/model")
    assert load_tokenizer(model) is not None
    (model / "evil.py").write_text("")
    (model / "optimizer.pt").write_bytes(b"")
    assert "evil.py" in pin_model(str(model), None, trust_remote_code=True)["files"]
    assert load_model(model, trust_remote_code=True) is not None


def start(config: dict[str, Any]) -> None:
    import sys

    from online_dpo.campaign import start

    try:
        start(config_from_dict(config))
    except ConfigError as error:
        sys.exit(7 if "holds Python code" in error.message else 1)


def test_a_campaign_does_not_start_from_it(model: Path, tmp_path: Path) -> None:
    (model / "modeling.py").write_text("")
    config = tiny_config(tmp_path / "run")
    config["model"], config["sft"] = {"path": str(model)}, None
    assert in_child(start, config) == 7
    assert not (tmp_path / "run").exists()
