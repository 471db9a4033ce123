"""Light imports stay light, and arrows between modules run one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "transformers", "vllm", "openai"}
LIGHT = [
    "online_dpo",
    "online_dpo.offline.training",
    "online_dpo.cli",
    "online_dpo.campaign",
    "online_dpo.views",
]
ALLOWED = {
    "vllm": {"samplers/vllm.py"},
    "openai": {
        "endpoints.py",
        "samplers/openai_server.py",
        "paid/openai_client.py",
        "paid/openai_batches.py",
    },
}


def loaded_by(code: str) -> set[str]:
    out = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.split(".")[0] for name in out.stdout.split()}


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    assert not HEAVY & loaded_by(f"import {module}")


def test_the_version_is_the_packages() -> None:
    command = [sys.executable, "-m", "online_dpo.cli", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == f"online-dpo {version('online-dpo')}\n"


def test_public_names_resolve() -> None:
    import online_dpo

    for name in online_dpo.__all__:
        assert getattr(online_dpo, name) is not None
    with pytest.raises(AttributeError):
        online_dpo.nothing  # noqa: B018


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_engines_are_imported_only_where_they_belong() -> None:
    for path in (ROOT / "online_dpo").rglob("*.py"):
        name = path.relative_to(ROOT / "online_dpo").as_posix()
        tops = {module.split(".")[0] for module in imports(path)}
        for library, homes in ALLOWED.items():
            assert library not in tops or name in homes, f"{name} imports {library}"
        assert "judges" not in tops, f"{name} imports the judges package"


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("records.py", {"online_dpo."}),
        ("errors.py", {"online_dpo."}),
        ("metrics.py", {"online_dpo."}),
        ("schedule.py", {"online_dpo.store", "online_dpo.campaign", "online_dpo.stages"}),
        ("pairing.py", {"online_dpo.store", "online_dpo.campaign", "online_dpo.stages"}),
        ("store.py", {"online_dpo.stages", "online_dpo.campaign", "online_dpo.schedule"}),
        ("loss_rules.py", {"online_dpo.", "torch"}),
        ("training/dpo.py", {"online_dpo.stages", "online_dpo.campaign", "online_dpo.store"}),
    ],
)
def test_arrows_run_down_only(module: str, forbidden: set[str]) -> None:
    for name in imports(ROOT / "online_dpo" / module):
        assert not any(name.startswith(prefix) for prefix in forbidden), f"{module}: {name}"


def test_losses_know_nothing_of_models() -> None:
    names = ("group_losses", "length_losses", "response_losses", "losses", "loss_modifiers")
    own = {f"online_dpo.training.{name}" for name in names}
    for name in names:
        found = imports(ROOT / "online_dpo" / "training" / f"{name}.py")
        assert "transformers" not in found
        assert {module for module in found if module.startswith("online_dpo")} <= own, name
