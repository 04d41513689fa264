"""What is shipped: the packages, the pins, the licences, and a wheel that runs elsewhere."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ROOT: Final = Path(__file__).resolve().parent.parent
BIN: Final = Path(sys.executable).parent
TOP: Final = ("protocol", "negotiation", "escrow", "agents", "tools", "examples")

# Files among the packages that programs read when they run.
SHIPPED: Final = (
    "*.py",
    "*/py.typed",
    "protocol/SPEC.md",
    "escrow/contracts/artifacts/*.json",
    "agents/templates/*",
    "examples/texts/*.txt",
)

pytestmark = pytest.mark.xdist_group("packaging")  # One build serves all of them.


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The files of the repository, those not yet committed included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a copy without its history cannot tell its own files from others")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_every_folder_with_code_is_a_package(project: dict[str, Any], tracked: list[str]) -> None:
    folders = {
        str(Path(name).parent)
        for name in tracked
        if name.startswith(tuple(f"{top}/" for top in TOP))
        and name.endswith(".py")
        and not name.startswith("agents/templates/")
    }
    listed = project["tool"]["setuptools"]
    places = listed["package-dir"]
    assert sorted(places) == sorted(listed["packages"])
    assert {place.replace("/", ".") for place in places.values()} == {
        package.removeprefix("coase.") for package in places
    }
    assert folders == set(places.values())
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)


# ---- Pins ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines]


def test_every_pin_is_one_version_and_names_no_address(pins: list[Requirement]) -> None:
    assert pins
    for pin in pins:
        assert pin.url is None, pin
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), pin


def test_every_requirement_is_pinned_within_its_range(
    project: dict[str, Any], pins: list[Requirement]
) -> None:
    pinned = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins}
    wanted = list(project["project"]["dependencies"])
    for extra in project["project"].get("optional-dependencies", {}).values():
        wanted += extra
    for group in project["dependency-groups"].values():
        wanted += [entry for entry in group if isinstance(entry, str)]
    for text in wanted:
        requirement = Requirement(text)
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), text


def test_what_is_installed_is_what_is_pinned(pins: list[Requirement]) -> None:
    pinned = {pin.name: str(pin.specifier)[2:] for pin in pins if not pin.marker}
    found = {name: importlib.metadata.version(name) for name in pinned}
    assert found == pinned


# ---- Licences --------------------------------------------------------------------------------


def forbidden_licence(metadata: Mapping[str, str], classifiers: Iterable[str]) -> bool:
    """Whether a package comes under the AGPL with no other licence to choose."""
    expression = metadata.get("License-Expression") or ""
    # The old field may hold a whole text, and a text may mention what it is not.
    first_line = (metadata.get("License") or "").strip().split("\n")[0]
    choices = re.split(r"\s+or\s+", expression or first_line, flags=re.IGNORECASE)
    if len(choices) > 1:
        return all(_is_agpl(choice) for choice in choices)
    return any(_is_agpl(text) for text in (*choices, *classifiers))


def _is_agpl(text: str) -> bool:
    return re.search(r"AGPL|Affero", text, re.IGNORECASE) is not None


def test_nothing_installed_is_under_the_agpl() -> None:
    found = list(importlib.metadata.distributions())
    assert len(found) > 50
    for distribution in found:
        meta = distribution.metadata
        licence = {name: meta[name] for name in ("License-Expression", "License") if name in meta}
        name = str(meta["Name"])
        assert not forbidden_licence(licence, meta.get_all("Classifier") or []), name


@pytest.mark.parametrize(
    ("licence", "classifiers", "forbidden"),
    [
        ({"License-Expression": "AGPL-3.0-or-later"}, [], True),
        ({"License": "GNU Affero General Public License v3"}, [], True),
        ({}, ["License :: OSI Approved :: GNU Affero General Public License v3"], True),
        ({"License-Expression": "MIT OR AGPL-3.0-only"}, [], False),
        ({"License": "Apache-2.0\n\nThis is not the AGPL."}, [], False),
        ({"License-Expression": "MIT"}, ["License :: OSI Approved :: MIT License"], False),
    ],
)
def test_the_agpl_is_recognised(
    licence: dict[str, str], classifiers: list[str], forbidden: bool
) -> None:
    assert forbidden_licence(licence, classifiers) is forbidden


# ---- The wheel -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made from the source distribution, made from a copy of the repository."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    for name in tracked:
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    command = [str(BIN / "pyproject-build"), "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(out.glob("coase-*.tar.gz"))) == 1
    (built,) = out.glob("coase-*.whl")
    return built


def test_the_wheel_holds_what_programs_read_and_nothing_else(
    wheel: Path, tracked: list[str]
) -> None:
    wanted = {
        f"coase/{name}"
        for name in tracked
        if name.split("/")[0] in TOP and any(fnmatch(name, pattern) for pattern in SHIPPED)
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (licence,) = (name for name in archive.namelist() if name.endswith("/LICENSE"))
        assert b"Apache License" in archive.read(licence)
    assert names == wanted


def fresh_environment(folder: Path) -> Path:
    """An environment of its own, outside of the repository; its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin" / "python"


def install(python: Path, *arguments: str) -> None:
    """Install into that environment."""
    command = [str(BIN / "uv"), "pip", "install", "--python", str(python), *arguments]
    done = subprocess.run(command, cwd=python.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_elsewhere(folder: Path, *command: str) -> str:
    """Run a command in another folder, with no hint of where the repository is."""
    hints = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hints}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


READ_RESOURCES: Final = """
import importlib.resources as resources, json, pathlib, sys
import coase.protocol.types
escrow = resources.files("coase.escrow")
artifact = escrow.joinpath("contracts", "artifacts", "JobEscrow.json")
assert json.loads(artifact.read_text("utf-8"))["abi"]
assert resources.files("coase.examples").joinpath("py.typed").is_file()
assert pathlib.Path(coase.protocol.types.__file__).is_relative_to(sys.prefix)
print("read")
"""


def check_installed(folder: Path, python: Path, project: dict[str, Any]) -> None:
    """The installed wheel finds its own files, and its command says its version."""
    assert run_elsewhere(folder, str(python), "-c", READ_RESOURCES) == "read\n"
    said = run_elsewhere(folder, str(python.parent / "coase"), "--version")
    assert project["project"]["version"] in said


def test_the_wheel_runs_outside_of_the_repository(
    wheel: Path, project: dict[str, Any], tmp_path: Path
) -> None:
    python = fresh_environment(tmp_path / "venv")
    install(python, "--no-deps", str(wheel))
    # The packages of this environment serve as dependencies, so that nothing is downloaded. What
    # a .pth file names is searched last and its own .pth files are not read: our sources stay out.
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (dependencies,) = BIN.parent.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    check_installed(tmp_path, python, project)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_installs_with_its_dependencies(
    wheel: Path, project: dict[str, Any], tmp_path: Path
) -> None:
    python = fresh_environment(tmp_path / "venv")
    pinned = ["--only-binary", ":all:", "--constraints", str(ROOT / "constraints.txt")]
    install(python, *pinned, str(wheel))
    check_installed(tmp_path, python, project)
