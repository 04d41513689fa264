"""Machines with interfaces of their own: each a network namespace, all on one switch."""

from __future__ import annotations

import contextlib
import os
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from coase.protocol.joincode import JoinCode
from tests.lan.machines import Segment, segment
from tests.tools.commands import ROOT, Home, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

# Every command is a process that loads for some seconds where many run beside it.
pytestmark = [pytest.mark.xdist_group("lan"), pytest.mark.timeout(400)]

MACHINES_MANY = 10

GATED = """
import anyio
from pathlib import Path
from pydantic import BaseModel
from coase.agents import Agent, Job, Price

class Words(BaseModel):
    text: str

gated = Agent("gated")

@gated.offers("shout", price=Price.per_task("0.02"))
async def shout(task: Words, job: Job) -> Words:
    while not Path({gate!r}).exists():
        await anyio.sleep(0.05)
    return Words(text=task.text.upper())
"""


@pytest.fixture
def lan(tmp_path: Path) -> Iterator[Segment]:
    with segment(tmp_path) as made:
        yield made


def met(home: Home) -> set[str]:
    """The ids of the machines that one is joined with."""
    return {neighbour["node"] for neighbour in home.json("lan", "status")["met"]}


def below(pid: int) -> list[int]:
    """A process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


def knows_all(home: Home) -> bool:
    """Whether one of ten is joined with the nine others."""
    return len(met(home)) == MACHINES_MANY - 1


def start(home: Home, *arguments: str) -> Any:
    """A command that says when it is ready."""
    return home.running(*arguments, "--json")


def test_two_machines_make_one_market(lan: Segment) -> None:
    first, second = lan.add(), lan.add()
    inference = str(ROOT / "examples" / "inference.py")
    with start(first, "up", "--lan") as up:
        reached = up.ready()["lan"]
        assert reached["addresses"] == ["10.77.0.1", "fd77::1"]
        code = first.json("lan", "code")["code"]
        with (
            start(first, "agent", "run", inference, "--engine", "echo") as agent,
            start(second, "join", code) as join,
        ):
            agent.ready()
            assert join.ready()["lan"]["addresses"] == ["10.77.0.2", "fd77::2"]
            asked = second.run("ask", "Over a wire?", "--max-price", "0.01")
            assert asked.stdout == "Over a wire?\n"
            agent.until_said("oracle: earned ")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_deal_outlives_a_cable_that_is_pulled(lan: Segment) -> None:
    holder, worker, buyer = (lan.add() for _ in range(3))
    gate, agent_file, task = (lan.place / name for name in ("gate", "gated.py", "task.txt"))
    agent_file.write_text(GATED.format(gate=str(gate)))
    task.write_text("hello")
    with start(holder, "up", "--lan") as up:
        up.ready()
        code = holder.json("lan", "code")["code"]
        with (
            start(worker, "join", code) as one,
            start(buyer, "join", code) as two,
        ):
            one.ready()
            two.ready()
            with start(worker, "agent", "run", f"{agent_file}:gated", "--engine", "none") as agent:
                agent.ready()
                order = ("hire", "shout", "--input", str(task), "--max-price", "0.05")
                with buyer.running(*order) as purchase:
                    purchase.until_said("locked 0.02")
                    lan.unplug(buyer)
                    eventually(lambda: len(met(holder)) == 1)
                    gate.touch()  # The result goes out to nobody.
                    agent.until_said("delivered")
                    lan.plug(buyer)
                    eventually(lambda: len(met(holder)) == 2)
                    assert purchase.process.stdout is not None
                    assert purchase.process.stdout.read() == b"HELLO\n"
                    assert purchase.process.wait() == 0
                agent.until_said("gated: earned ")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_machine_that_gets_another_address_is_found_there(lan: Segment) -> None:
    first, second = lan.add(ipv6=False), lan.add(ipv6=False)
    inference = str(ROOT / "examples" / "inference.py")
    with start(first, "up", "--lan") as up:
        up.ready()
        code = first.json("lan", "code")["code"]
        with (
            start(second, "join", code) as join,
            start(first, "agent", "run", inference, "--engine", "echo") as agent,
        ):
            join.ready()
            agent.ready()
            lan.readdress(first, "10.77.0.99")
            eventually(lambda: "10.77.0.99" in str(second.json("lan", "status")["heard"]))
            eventually(lambda: met(first) and met(second))
            assert second.run("ask", "There?", "--max-price", "0.01").stdout == "There?\n"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_lost_laptop_is_shut_out_by_a_new_code(lan: Segment) -> None:
    first, kept, lost = (lan.add() for _ in range(3))
    state = ("--state", str(first.path / "state"))
    with start(first, "up", "--lan", *state) as up:
        net = up.ready()["lan"]["mesh"]
        old = first.json("lan", "code")["code"]
        with start(kept, "join", old) as one, start(lost, "join", old) as two:
            one.ready()
            two.ready()
    with start(first, "up", "--lan", "--new-code", *state) as up:
        assert up.ready()["lan"]["mesh"] != net
        code = first.json("lan", "code")["code"]
        assert code != old
        assert first.json("status")["network"]["net"] == net  # So agents keep their keys.
        with start(lost, "join") as two, start(kept, "join", code) as one:
            one.ready()
            two.ready()  # With the card that it kept; it is alone all the same.
            eventually(lambda: len(met(first)) == 1)
            eventually(lambda: "another join code" in str(lost.json("lan", "status")["heard"]))
            assert met(lost) == set()
            lost.run("status", code=69)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_machine_that_slept_is_back_when_it_wakes(lan: Segment) -> None:
    first, sleeper = lan.add(), lan.add()
    inference = str(ROOT / "examples" / "inference.py")
    with start(first, "up", "--lan") as up:
        up.ready()
        code = first.json("lan", "code")["code"]
        with (
            start(sleeper, "join", code) as join,
            start(first, "agent", "run", inference, "--engine", "echo") as agent,
        ):
            join.ready()
            agent.ready()
            eventually(lambda: met(first))
            asleep = below(join.process.pid)
            for pid in asleep:
                os.kill(pid, signal.SIGSTOP)
            eventually(lambda: not met(first))
            for pid in asleep:
                os.kill(pid, signal.SIGCONT)
            eventually(lambda: met(first) and met(sleeper))
            assert sleeper.run("ask", "Awake?", "--max-price", "0.01").stdout == "Awake?\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_machines_know_each_other(lan: Segment) -> None:
    first, *others = (lan.add() for _ in range(MACHINES_MANY))
    inference = str(ROOT / "examples" / "inference.py")
    with start(first, "up", "--lan") as up:
        up.ready()
        code = first.json("lan", "code")["code"]
        with contextlib.ExitStack() as stack:
            running = [stack.enter_context(start(other, "join", code)) for other in others]
            for join in running:
                join.ready()
            for home in (first, *others):
                eventually(partial(knows_all, home))
            with start(others[0], "agent", "run", inference, "--engine", "echo") as agent:
                agent.ready()
                asked = others[-1].run("ask", "All here?", "--max-price", "0.01")
                assert asked.stdout == "All here?\n"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rogue_who_knows_the_place_but_not_the_code_stays_outside(lan: Segment) -> None:
    first, rogue = lan.add(), lan.add()
    with start(first, "up", "--lan") as up:
        port = up.ready()["lan"]["port"]
        other = JoinCode.of(b"sixteen of chaos").text
        with rogue.running("join", other, "--peer", f"10.77.0.1:{port}") as join:
            join.until_said(f"10.77.0.1:{port}: ")
            assert met(first) == set()
            heard = first.json("lan", "status")["heard"]
            assert [row["why"] for row in heard] == ["it has another join code"]
        assert "ready" not in join.said()
