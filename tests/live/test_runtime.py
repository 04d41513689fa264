"""A node on a real market: code of others that misbehaves, callers that leave, ends in mid-deal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from pydantic import BaseModel

from coase.agents import Agent, Job, Node, Price, Windows, open_node
from coase.agents.wiring import ensure_funds
from coase.protocol.errors import ConfigurationError, DealFailed
from coase.protocol.session import Margins
from tests.live.market import FUNDS_UNITS, PRICE_UNITS, Market, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

MARGINS = Margins(halt_s=0)
# Nobody's silence is waited for here, and a slow machine must not make any.
WINDOWS = Windows(lock_s=60, dispute_s=60, answer_s=60, rule_s=60)


class Task(BaseModel):
    text: str


class Result(BaseModel):
    text: str


def seller_of(ware: str) -> Agent:
    agent = Agent("seller")

    @agent.offers(ware, price=Price.per_task("0.02"), deliver_within=40, windows=WINDOWS)
    async def work(task: Task, job: Job) -> Result:
        match task.text:
            case "raise":
                raise RuntimeError("no idea how")
            case "unsendable":
                job.meter(tokens=-1)
            case "surrogate":
                return "\ud800"  # type: ignore[return-value]
            case "block":
                time.sleep(2)  # noqa: ASYNC251
            case "linger":
                await anyio.sleep(3)
        return Result(text=task.text)

    return agent


@asynccontextmanager
async def node_with(live: Market, state: Path, *agents: Agent) -> AsyncIterator[Node]:
    async with open_node(network=live.network, state=state, margins=MARGINS) as node:
        for agent in agents:
            await node.add(agent)
            await ensure_funds(node.settlement, node.network, agent.address)
        yield node


async def ask(buyer: Agent, ware: str, text: str, **wish: Any) -> str:
    bought = await buyer.purchase(
        ware, Task(text=text), returns=Result, max_price="0.05", decide_after_ms=200, **wish
    )
    assert bought.paid_units == PRICE_UNITS
    return bought.result.text


async def rest(node: Node, *agents: Agent) -> None:
    """Return when nothing is open any more, and all money is out of the escrow."""
    seats = [agent.seat for agent in agents if agent.seat is not None]

    def over() -> bool:
        return not any(
            seat.desk.threads or node.journal.open_records(seat.desk.me) for seat in seats
        )

    await eventually(over, "all deals are over")
    assert await node.settlement.held() == 0


async def test_a_handler_that_fails_costs_its_deal_and_nothing_else(
    live: Market, tmp_path: Path
) -> None:
    seller, buyer = seller_of("fails"), Agent("buyer")

    async def fail(text: str) -> None:
        with pytest.raises(DealFailed, match="refunded"):
            await ask(buyer, "fails", text)

    async with node_with(live, tmp_path / "state", seller, buyer) as node:
        async with anyio.create_task_group() as group:
            for text in ("raise", "unsendable", "surrogate"):
                group.start_soon(fail, text)
        assert await ask(buyer, "fails", "well") == "well"
        await rest(node, seller, buyer)
        assert await node.settlement.balance(buyer.address) == FUNDS_UNITS - PRICE_UNITS


async def test_a_handler_that_blocks_the_loop_delays_and_breaks_nothing(
    live: Market, tmp_path: Path
) -> None:
    seller, buyer = seller_of("block"), Agent("buyer")
    async with node_with(live, tmp_path / "state", seller, buyer) as node:
        assert await ask(buyer, "block", "block") == "block"
        await rest(node, seller, buyer)


async def test_who_listens_and_raises_stops_nobody(live: Market, tmp_path: Path) -> None:
    seller, buyer = seller_of("listened"), Agent("buyer")
    heard = []

    def listen(agent: str, notice: object) -> None:
        heard.append(notice)
        raise RuntimeError("a listener that cannot listen")

    async with node_with(live, tmp_path / "state", seller, buyer) as node:
        node.runtime.observers.insert(0, listen)
        assert await ask(buyer, "listened", "well") == "well"
        await rest(node, seller, buyer)
    assert heard


async def test_a_check_that_breaks_disputes_and_the_node_goes_on(
    live: Market, tmp_path: Path
) -> None:
    def broken(result: Result) -> str | None:
        return 1 / 0 if result.text else None  # type: ignore[return-value]

    seller, buyer = seller_of("checked"), Agent("buyer")
    async with node_with(live, tmp_path / "state", seller, buyer) as node:
        with pytest.raises(DealFailed, match="the check failed: division by zero"):
            await ask(buyer, "checked", "well", check=broken)
        assert await ask(buyer, "checked", "better") == "better"
        await rest(node, seller, buyer)


async def test_a_caller_that_leaves_can_come_back_under_its_key(
    live: Market, tmp_path: Path
) -> None:
    seller, buyer = seller_of("left"), Agent("buyer")
    async with node_with(live, tmp_path / "state", seller, buyer) as node:
        said = []
        node.runtime.observers.append(lambda who, notice: said.append(notice.kind))
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: ask(buyer, "left", "linger", key="k"))
            await eventually(lambda: "said:task" in said, "the task is with the seller")
            group.cancel_scope.cancel()
        assert await ask(buyer, "left", "linger", key="k") == "linger"
        await rest(node, seller, buyer)
        assert await ask(buyer, "left", "linger", key="k") == "linger"
        assert await node.settlement.balance(buyer.address) == FUNDS_UNITS - PRICE_UNITS


async def test_several_callers_share_one_purchase(live: Market, tmp_path: Path) -> None:
    seller, buyer = seller_of("shared"), Agent("buyer")
    results = []

    async def one() -> None:
        results.append(await ask(buyer, "shared", "linger", key="k"))

    async with node_with(live, tmp_path / "state", seller, buyer) as node:
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(one)
            with anyio.move_on_after(0.5):  # One more that does not wait for the end.
                await one()
        assert results == ["linger"] * 3
        await rest(node, seller, buyer)
        assert await node.settlement.balance(buyer.address) == FUNDS_UNITS - PRICE_UNITS


@pytest.mark.parametrize("last", ["said:accept", "chain:locked", "said:result"])
async def test_a_node_that_ends_in_mid_deal_goes_on_in_its_next_life(
    live: Market, tmp_path: Path, last: str
) -> None:
    ware = f"ended-{last.replace(':', '-')}"
    seller, buyer = seller_of(ware), Agent("buyer")
    said: list[str] = []
    async with node_with(live, tmp_path / "state", seller, buyer) as node:
        node.runtime.observers.append(lambda who, notice: said.append(notice.kind))
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: ask(buyer, ware, "well", key="k"))
            await eventually(lambda: last in said, last)
            group.cancel_scope.cancel()
    seller, buyer = seller_of(ware), Agent("buyer")
    async with node_with(live, tmp_path / "state", seller, buyer) as node:
        assert await ask(buyer, ware, "well", key="k") == "well"
        await rest(node, seller, buyer)
        assert await node.settlement.balance(buyer.address) == FUNDS_UNITS - PRICE_UNITS
        assert await node.settlement.balance(seller.address) == FUNDS_UNITS + PRICE_UNITS


async def test_two_agents_cannot_have_one_key(live: Market, tmp_path: Path) -> None:
    async with node_with(live, tmp_path / "state", Agent("same")) as node:
        with pytest.raises(ConfigurationError, match="a name of its own"):
            await node.add(Agent("same"))


SCRIPT = """
from pydantic import BaseModel
from coase.agents import Agent, Job, Price

class Text(BaseModel):
    text: str

seller = Agent("told-to-stop")

@seller.offers("stoppable", price=Price.per_task("0.02"))
async def work(task: Text, job: Job) -> Text:
    return task

seller.run()
"""


@pytest.fixture
def script(live: Market, tmp_path: Path) -> subprocess.Popen[str]:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    environment = os.environ | {"COASE_HOME": str(live.home), "COASE_ENGINE": "echo"}
    return subprocess.Popen(
        [sys.executable, str(path)], env=environment, stderr=subprocess.PIPE, text=True
    )


async def sold(live: Market, tmp_path: Path) -> bool:
    """Return whether somebody sells what the script sells."""
    agent = Agent("looking")
    async with node_with(live, tmp_path / "looking", agent) as node:
        for _ in range(60):
            if await node.discover(agent, "stoppable", wait_s=0.5):
                return True
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_agent_ends_cleanly_when_told(
    live: Market, tmp_path: Path, script: subprocess.Popen[str], number: int
) -> None:
    try:
        assert await sold(live, tmp_path)
        script.send_signal(number)
        _, errors = await anyio.to_thread.run_sync(lambda: script.communicate(timeout=60))
        assert script.returncode == 0, errors
        assert "Traceback" not in errors
        assert "never" not in errors, "nothing was left unfinished or never awaited"
    finally:
        script.kill()
        script.communicate()


async def test_a_second_process_on_one_state_directory_is_told_who_holds_it(
    live: Market, tmp_path: Path, script: subprocess.Popen[str]
) -> None:
    try:
        assert await sold(live, tmp_path)
        environment = os.environ | {"COASE_HOME": str(live.home), "COASE_ENGINE": "echo"}
        second = await anyio.run_process(
            [sys.executable, str(tmp_path / "script.py")], env=environment, check=False
        )
        line = second.stderr.decode()
        assert second.returncode == 2
        assert line.startswith("coase: ")
        assert line.count("\n") == 1
        assert f"is held by process {script.pid}" in line
        assert await sold(live, tmp_path), "the first goes on"
    finally:
        script.kill()
        script.communicate()
