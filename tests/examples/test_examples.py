"""Every example runs, from a folder of the user's own, against one network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.tools.commands import ROOT, Home, Running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.xdist_group("examples")

EXAMPLES = {path.stem: path for path in (ROOT / "examples").glob("[!_]*.py")}
LINES_MAX = 25  # Of code: what a reader must understand to have an agent of one's own.


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("examples") / "home")


@pytest.fixture(scope="module")
def folder(home: Home) -> Path:
    """A folder outside the repository with copies of the examples."""
    path = home.path / "mine"
    path.mkdir(parents=True)
    for example in EXAMPLES.values():
        shutil.copy(example, path)
    return path


@pytest.fixture(scope="module")
def market(home: Home) -> Iterator[Running]:
    with home.running("up", "--json") as up:
        up.ready()
        yield up


@pytest.fixture(scope="module")
def seller(home: Home, folder: Path, market: Running) -> Iterator[Running]:
    path = str(folder / "seller.py")
    with home.running("agent", "run", path, "--engine", "echo", "--json") as agent:
        agent.ready()
        yield agent


def test_each_example_is_run_here() -> None:
    assert set(EXAMPLES) == {"seller", "buyer", "inference", "plan"}


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_an_example_is_short(name: str) -> None:
    text = EXAMPLES[name].read_text().split('"""', 2)[2]
    code = [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(code) <= LINES_MAX


def run(name: str, home: Home, folder: Path) -> str:
    """Run an example to its end, and return what it prints."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COASE_")}
    done = subprocess.run(
        [sys.executable, name],
        cwd=folder,
        env=environment | {"COASE_HOME": str(home.path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_buyer_hires_the_seller(home: Home, folder: Path, seller: Running) -> None:
    assert "paid 0.0" in run("buyer.py", home, folder)
    seller.until_said("summariser: earned")


def test_a_plan_is_carried_out_by_the_seller(home: Home, folder: Path, seller: Running) -> None:
    said = run("plan.py", home, folder)
    assert "3 of 3 texts, 4 deals\npaid 0.0" in said
    assert "receipt 0x" in said


def test_the_seller_of_inference_answers(home: Home, folder: Path, market: Running) -> None:
    path = str(folder / "inference.py")
    with home.running("agent", "run", path, "--engine", "echo", "--json") as agent:
        assert agent.ready()["agents"][0]["agent"] == "oracle"
        assert home.run("ask", "Anybody?", "--max-price", "0.01").stdout == "Anybody?\n"
