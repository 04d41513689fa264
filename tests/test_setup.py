"""The set-up: what it says when something is missing, and that it leaves a whole environment."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT: Final = Path(__file__).resolve().parent.parent
SHELL_TOOLS: Final = ("sh", "cat", "cksum", "dirname")

pytestmark = pytest.mark.skipif(
    not (ROOT / ".ci" / "setup.sh").exists(), reason="the set-up belongs to a checkout"
)

# What a Python would have to be like, said to the real one before it is probed.
AGED: Final = "import sys; sys.version_info = ({0}, {1}, 0, 'final', 0)\n"
WITHOUT_VENV: Final = "import sys; sys.modules['ensurepip'] = None\n"
WITHOUT_GOMP: Final = """
import ctypes
def missing(name):
    raise OSError(name)
ctypes.CDLL = missing
"""
OTHER_KIND: Final = "import sys, types; sys.implementation = types.SimpleNamespace(name='pypy')\n"


class Machine:
    """A checkout in a folder with a space, and a PATH with exactly the Pythons that we name."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        self.bin = folder / "bin"
        self.bin.mkdir()
        (self.root / ".ci").mkdir(parents=True)
        for name in ("pyproject.toml", "constraints.txt", ".ci/setup.sh"):
            shutil.copy(ROOT / name, self.root / name)
        self.use_setup("import sys\nprint('chosen', sys.version_info[:2], *sys.argv[1:])\n")
        for tool in SHELL_TOOLS:
            found = shutil.which(tool)
            assert found
            (self.bin / tool).symlink_to(found)

    def use_setup(self, source: str) -> None:
        """What takes the place of the second half of the set-up."""
        (self.root / ".ci" / "setup.py").write_text(source)

    def add_program(self, name: str, script: str) -> Path:
        """Put a shell script on the PATH."""
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def add_python(self, name: str, prelude: str) -> Path:
        """Put a Python on the PATH that differs from the real one by ``prelude``."""
        said = self.bin / f"{name}.prelude"
        said.write_text(prelude)
        return self.add_program(
            name,
            f"""
            prelude=$(cat '{said}')
            if [ "$1" = -c ]; then
                code=$2; shift 2
            else
                code="import sys; sys.argv[:1] = []; exec(open(sys.argv[0]).read())"
            fi
            exec '{sys.executable}' -c "$prelude
$code" "$@"
            """,
        )

    def set_up(self, level: str = "run", **settings: str) -> subprocess.CompletedProcess[str]:
        """Run ``setup.sh`` as make does."""
        return subprocess.run(
            ["sh", ".ci/setup.sh", level],
            cwd=self.root,
            env={"PATH": str(self.bin), **settings},
            capture_output=True,
            text=True,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The only line that a person reads when the set-up gives up."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("coase: ")
    return line


# ---- What is missing -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prelude", "said"),
    [
        (AGED.format(3, 14), "Python 3.14 is too new"),
        (AGED.format(3, 10), "Python 3.10 is too old"),
        (AGED.format(2, 7), "Python 2.7 is too old"),
        (AGED.format(3, 12) + WITHOUT_VENV, "apt-get install python3.12-venv"),
        (AGED.format(3, 13) + WITHOUT_GOMP, "apt-get install libgomp1"),
        (AGED.format(3, 11) + OTHER_KIND, "not the usual CPython"),
    ],
)
def test_each_lack_is_one_line_that_says_what_to_do(
    machine: Machine, prelude: str, said: str
) -> None:
    machine.add_python("python3", prelude)
    assert said in one_line(machine.set_up())


def test_no_python_at_all(machine: Machine) -> None:
    assert "no Python was found" in one_line(machine.set_up())


def test_a_python_that_was_named_is_the_only_one_tried(machine: Machine) -> None:
    machine.add_python("python3", AGED.format(3, 12))
    new = machine.add_python("newest", AGED.format(3, 14))
    assert "3.14 is too new" in one_line(machine.set_up(PYTHON=str(new)))
    assert "'nowhere/python' does not start" in one_line(machine.set_up(PYTHON="nowhere/python"))


def test_a_missing_package_is_a_better_hint_than_a_wrong_age(machine: Machine) -> None:
    machine.add_python("python3.12", AGED.format(3, 12) + WITHOUT_VENV)
    machine.add_python("python3", AGED.format(3, 14))
    assert "python3.12-venv" in one_line(machine.set_up())


def test_an_unknown_level_is_refused(machine: Machine) -> None:
    assert "run or dev" in one_line(machine.set_up("all"))


# ---- What is chosen --------------------------------------------------------------------------


def test_the_newest_python_that_works_is_chosen(machine: Machine) -> None:
    machine.add_program("python3.13", "echo 'not selected' >&2; exit 127")  # A shim of pyenv.
    machine.add_python("python3.12", AGED.format(3, 12))
    machine.add_python("python3.11", AGED.format(3, 11))
    machine.add_python("python3", AGED.format(3, 14))
    done = machine.set_up("dev")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("chosen (3, 12) dev ")
    assert str(machine.root) in done.stdout


def test_uv_makes_up_for_a_missing_venv(machine: Machine) -> None:
    machine.add_python("python3", AGED.format(3, 12) + WITHOUT_VENV)
    machine.add_program("uv", "exit 1")
    assert machine.set_up().stdout.startswith("chosen (3, 12) run ")


def test_uv_may_know_a_python_that_is_not_on_the_path(machine: Machine) -> None:
    machine.add_python("python3", AGED.format(3, 14))
    hidden = machine.add_python("hidden", AGED.format(3, 13))
    machine.add_program("uv", f"[ $1 = python ] && echo '{hidden}'")
    assert machine.set_up().stdout.startswith("chosen (3, 13) run ")


def test_a_named_python_is_passed_on_as_the_only_one(machine: Machine) -> None:
    machine.add_python("python3.13", AGED.format(3, 13))
    other = machine.add_python("other", AGED.format(3, 11))
    assert machine.set_up(PYTHON="other").stdout.rstrip().endswith("--exactly")
    machine.add_program("uv", f"[ $1 = python ] && [ $5 = 3.11 ] && echo '{other}'")
    assert machine.set_up(UV_PYTHON="3.11").stdout.startswith("chosen (3, 11) run ")


# ---- What is installed -----------------------------------------------------------------------

# Takes the part of uv: makes a real environment and notes when an installation starts and ends.
PRETENDED_UV: Final = """
case $1 in
    venv) '{python}' -m venv --without-pip .venv ;;
    pip)
        echo begin >> '{log}'
        case "$*" in
            *{breaks}*) exit 2 ;;
            *"-e ."*) : > .venv/bin/coase; chmod +x .venv/bin/coase ;;
        esac
        sleep 0.1
        echo end >> '{log}' ;;
esac
"""


class Installing(Machine):
    """A machine with the real second half, and a uv that downloads nothing."""

    def __init__(self, folder: Path, *, breaks: str = "never") -> None:
        super().__init__(folder)
        self.log = folder / "log"
        shutil.copy(ROOT / ".ci" / "setup.py", self.root / ".ci" / "setup.py")
        (self.bin / "python3").symlink_to(sys.executable)
        for tool in ("sleep", "chmod"):
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        self.add_program(
            "uv", PRETENDED_UV.format(python=sys.executable, log=self.log, breaks=breaks)
        )

    def installations(self) -> list[str]:
        """What the pretended uv noted."""
        return self.log.read_text().split() if self.log.exists() else []


ONE_SET_UP: Final = ["begin", "end"] * 3  # The packages, the model, coase itself.


def test_a_second_set_up_does_nothing(tmp_path: Path) -> None:
    machine = Installing(tmp_path)
    for level in ("dev", "dev", "run"):  # What makers need serves to run as well.
        done = machine.set_up(level)
        assert done.returncode == 0, done.stderr
    assert machine.installations() == ONE_SET_UP


def test_the_tools_of_makers_are_installed_when_first_needed(tmp_path: Path) -> None:
    machine = Installing(tmp_path)
    listed = machine.root / ".venv" / "coase-requirements.txt"
    assert machine.set_up("run").returncode == 0
    assert "pytest" not in listed.read_text()
    assert machine.set_up("dev").returncode == 0
    assert "pytest" in listed.read_text()
    assert machine.installations() == ONE_SET_UP * 2


def test_two_at_once_take_turns_and_the_second_finds_it_done(tmp_path: Path) -> None:
    machine = Installing(tmp_path)
    command = ["sh", ".ci/setup.sh", "run"]
    both = [
        subprocess.Popen(command, cwd=machine.root, env={"PATH": str(machine.bin)}, stderr=-1)
        for _ in range(2)
    ]
    for process in both:
        process.communicate()
    assert [process.returncode for process in both] == [0, 0]
    assert machine.installations() == ONE_SET_UP


def _changed_pins(root: Path) -> None:
    with (root / "constraints.txt").open("a") as file:
        file.write("# changed\n")


def _lost_python(root: Path) -> None:
    (root / ".venv" / "bin" / "python").unlink()


def _lost_command(root: Path) -> None:
    (root / ".venv" / "bin" / "coase").unlink()


def _cut_short(root: Path) -> None:
    for stamp in ("coase-run", "coase-dev"):
        (root / ".venv" / stamp).unlink()


@pytest.mark.parametrize("harm", [_changed_pins, _lost_python, _lost_command, _cut_short])
def test_what_no_longer_fits_is_installed_again(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    machine = Installing(tmp_path)
    assert machine.set_up("dev").returncode == 0
    harm(machine.root)
    assert machine.set_up("dev").returncode == 0
    assert machine.installations() == ONE_SET_UP * 2
    assert machine.set_up("dev").returncode == 0
    assert machine.installations() == ONE_SET_UP * 2


def test_a_moved_folder_gets_an_environment_of_its_own(tmp_path: Path) -> None:
    machine = Installing(tmp_path)
    assert machine.set_up().returncode == 0
    machine.root = machine.root.rename(tmp_path / "elsewhere")
    done = machine.set_up()
    assert "the folder was moved" in done.stderr
    assert (machine.root / ".venv" / "coase-root").read_text() == str(machine.root)
    assert list(machine.root.glob(".venv.*")) == []


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    machine = Installing(tmp_path)
    precious = machine.root / ".venv" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    done = machine.set_up()
    assert (done.returncode, precious.read_text()) == (1, "mine")
    assert "move it away" in done.stderr


def test_a_link_to_an_unusable_environment_is_left_alone(tmp_path: Path) -> None:
    machine = Installing(tmp_path)
    (machine.root / ".venv").symlink_to(tmp_path / "nowhere")
    done = machine.set_up()
    assert done.returncode == 1
    assert "remove the link" in done.stderr


def test_when_uv_fails_pip_is_tried_and_no_stamp_is_left(tmp_path: Path) -> None:
    machine = Installing(tmp_path, breaks="coase-requirements")
    done = machine.set_up(PIP_NO_INDEX="1", HOME=str(tmp_path))
    assert done.returncode == 1
    assert "trying pip" in done.stderr
    assert done.stderr.rstrip().endswith("make again goes on from there")
    assert not (machine.root / ".venv" / "coase-run").exists()


# ---- Parts -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup_py() -> Any:
    """The second half of the set-up as a module."""
    spec = importlib.util.spec_from_file_location("coase_setup", ROOT / ".ci" / "setup.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_installed_package_without_its_files_is_noticed(tmp_path: Path, setup_py: Any) -> None:
    environment = setup_py.Environment(tmp_path, checksum="1", exactly=False)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment.folder], check=True)
    (site,) = environment.folder.glob("lib/python*/site-packages")
    info = site / "something-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: something\nVersion: 1.0\n")
    (info / "RECORD").write_text("something.py,,\n__pycache__/something.pyc,,\n")
    assert environment.damaged() == "something"
    (site / "something.py").touch()
    assert environment.damaged() == ""


def test_requirements_of_both_levels(setup_py: Any) -> None:
    run, model = setup_py.requirements(ROOT, "run")
    dev, same_model = setup_py.requirements(ROOT, "dev")
    assert model == same_model
    assert "==" in model
    assert any(line.startswith("setuptools") for line in run)
    assert not any(line.startswith("pytest") for line in run)
    assert set(run) < set(dev)


def test_a_mirror_named_to_pip_serves_uv_too(
    setup_py: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    assert setup_py.settings_for_uv()["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://other.example/simple")
    assert setup_py.settings_for_uv()["UV_DEFAULT_INDEX"] == "https://other.example/simple"


def test_pip_shows_its_last_words_when_it_fails(
    tmp_path: Path, setup_py: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "print('Collecting web3'); print('no such package'); raise SystemExit(1)"
    command = [sys.executable, "-c", code]
    assert setup_py.run_with_progress(command, cwd=tmp_path, env=dict(os.environ)) == 1
    assert "no such package" in capsys.readouterr().err


def test_make_lists_what_it_can_do() -> None:
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("demo", "test", "check", "bench", "contracts", "simulate", "lock", "clean"):
        assert f"make {target} " in done.stdout
