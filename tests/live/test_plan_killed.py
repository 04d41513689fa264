"""A plan whose seller is killed, and a plan that is killed itself: real processes throughout."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING

import pytest

from coase.agents.receipt import Receipt
from tests.tools.commands import ROOT, Home, Running, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PIECES = 20


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path / "home")
    with home.running("up", "--json") as up:
        up.ready()
        (tmp_path / "long.txt").write_text("\n\n".join("A sheep. " * 60 for _ in range(PIECES)))
        yield home


def seller(home: Home, name: str) -> Path:
    path = home.path / f"{name}.py"
    text = (ROOT / "examples" / "inference.py").read_text()
    path.write_text(text.replace('"oracle"', f'"{name}"'))
    return path


def plan(home: Home, words: int) -> tuple[str, ...]:
    path = str(home.path.parent / "long.txt")
    way = ("--engine", "none", "--budget", "1", "--chunk", "600", "--at-once", "4")
    return ("plan", "summarise", path, *way, "--words", str(words), "--within", "600", "--json")


def receipt_of(text: str) -> Receipt:
    document = json.loads(text)
    assert document["covers"] == f"{PIECES} of {PIECES} parts"
    receipt = Receipt.from_json(json.dumps(document["receipt"]))
    receipt.check()
    assert receipt.total_units == int(document["spent_units"])
    return receipt


def finished(running: Running) -> str:
    out = running.process.stdout
    assert out is not None
    text = out.read().decode()
    assert running.process.wait(60) == 0, running.said()
    return text


def test_a_seller_dies_and_the_others_finish_its_pieces(home: Home) -> None:
    one, two = str(seller(home, "one")), str(seller(home, "two"))
    with (
        home.running("agent", "run", one, "--engine", "echo", "--json") as first,
        home.running("agent", "run", two, "--engine", "echo", "--json") as second,
    ):
        first.ready()
        second.ready()
        with home.running(*plan(home, 20)) as running:
            second.until_said("delivered to")
            second.process.send_signal(signal.SIGKILL)
            receipt = receipt_of(finished(running))
    used = [part for part in receipt.parts if part.used]
    assert len(used) == receipt.pieces


def test_a_plan_that_was_killed_goes_on_and_buys_nothing_twice(home: Home) -> None:
    path = str(seller(home, "one"))
    with home.running("agent", "run", path, "--engine", "echo", "--json") as one:
        one.ready()
        with home.running(*plan(home, 20)) as running:
            eventually(lambda: one.said().count("delivered to") >= 5)
            running.process.send_signal(signal.SIGKILL)
            running.process.wait(60)
        receipt = receipt_of(home.run(*plan(home, 20)).stdout)
        deals = {part.deal for part in receipt.parts}
        assert len(deals) == len(receipt.parts)
        eventually(lambda: one.said().count("one: earned") >= len(deals))
        assert one.said().count("one: earned") == len(deals)
