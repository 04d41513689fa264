"""Disks, brokers, chains and counterparties that fail in the midst of real deals."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.live.market import (
    FUNDS_UNITS,
    PRICE_UNITS,
    Actor,
    Forge,
    Market,
    eventually,
    terms_of,
    wish,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    Trouble = Callable[[Market], Awaitable[None]]

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

DEALS = 6
DISK_FULL = 70
STALL_S = 5
# A node's files take about 150 KiB; a deal some 100 KiB more before the log is folded in.
SMALL_DISK_BYTES = 4 * 1024 * 1024
FILE_MAX_BYTES = 100_000


class Cast:
    """The sellers and the buyer of one test."""

    def __init__(self, live: Market, forge: Forge, place: Path) -> None:
        self.live, self.forge, self.place = live, forge, place

    def actor(self, name: str, **orders: object) -> Actor:
        return Actor(self.forge, self.live, self.place / name, **orders)

    async def seller(self, ware: str, *, name: str = "seller", **terms: object) -> Actor:
        seller = self.actor(name, role="sell", wares=[ware], **terms_of(**terms))
        seller.start()
        await seller.ready()
        return seller

    async def rest(self, *sellers: Actor) -> None:
        """Return when nobody owes anything any more."""
        for seller in sellers:
            await eventually(lambda: not seller.open_deals(), "the deals are over")  # noqa: B023
            assert await seller.stop() == 0, seller.errors()
        async with self.live.settlement() as settlement:
            assert await settlement.held() == 0

    async def balance(self, actor: Actor) -> int:
        async with self.live.settlement() as settlement:
            return await settlement.balance(await actor.address())


@pytest.fixture
def cast(live: Market, forge: Forge, tmp_path: Path) -> Cast:
    return Cast(live, forge, tmp_path)


# ---- The disk --------------------------------------------------------------------------------


def spoken(actor: Actor, kind: str) -> int:
    """How often the journal of ``actor`` holds a message of that kind that it heard."""
    query = "SELECT count(*) FROM records WHERE kind = 'heard' AND instr(data, ?) > 0"
    ((count,),) = actor.rows(query.replace("?", f"""CAST('"kind":"{kind}"' AS BLOB)"""))
    return int(count)


async def test_a_buyer_whose_commits_fail_says_nothing_of_them_and_goes_on(cast: Cast) -> None:
    seller = await cast.seller("disk-buyer")
    buyer = cast.actor("buyer", role="buy", wishes=[wish("disk-buyer", "hello")])

    buyer.start('fail-on:"kind":"accept"')
    assert await buyer.end() == DISK_FULL
    assert "could not be written: disk I/O error" in buyer.errors()
    assert "Traceback" not in buyer.errors()
    assert spoken(seller, "accept") == 0, "what was not on disk was said"
    buyer.start("fail-on:INSERT INTO transactions")
    assert await buyer.end() == DISK_FULL
    async with cast.live.settlement() as settlement:
        sent = await settlement.chain.endpoint.ask(
            "eth_getTransactionCount", await buyer.address(), "pending"
        )
    assert int(sent, 16) == 0, "a transaction that was not on disk was sent"

    buyer.start()
    assert await buyer.end() == 0, buyer.errors()
    assert [line["text"] for line in buyer.said("bought")] == ["hello"]
    await cast.rest(seller)
    assert await cast.balance(buyer) == FUNDS_UNITS - PRICE_UNITS


async def test_a_seller_whose_commits_fail_says_nothing_of_them_and_goes_on(cast: Cast) -> None:
    seller = cast.actor("seller", role="sell", wares=["disk-seller"], **terms_of())
    seller.start('fail-on:"kind":"agreed"')
    await seller.ready()
    buyer = cast.actor("buyer", role="buy", wishes=[wish("disk-seller", "hello")])
    buyer.start()
    assert await seller.end() == DISK_FULL
    assert spoken(buyer, "agreed") == 0
    seller.start('fail-on:"kind":"result"')
    assert await seller.end() == DISK_FULL
    assert spoken(buyer, "result") == 0
    assert not seller.rows(
        'SELECT 1 FROM records WHERE instr(data, CAST(\'"kind":"result"\' AS BLOB))'
    )
    seller.start()
    assert await buyer.end() == 0, buyer.errors()
    assert [line["text"] for line in buyer.said("bought")] == ["hello"]
    await cast.rest(seller)
    assert await cast.balance(seller) == FUNDS_UNITS + PRICE_UNITS


@contextmanager
def small_disk(path: Path) -> Iterator[bool]:
    """Mount a small disk at ``path`` where this user may; yield whether that was so."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "tmpfs", str(path)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path: Path) -> None:
    """Leave no byte on the disk that holds ``path``."""
    with path.open("wb", buffering=0) as file:
        size = 64 * 1024
        while size:
            try:
                file.write(b"\0" * size)
            except OSError:
                size //= 2


async def test_a_full_disk_stops_the_node_and_space_lets_it_go_on(cast: Cast) -> None:
    with small_disk(cast.place / "disk") as mounted:
        log = str(cast.place / "log")
        seller = cast.actor("disk", role="sell", wares=["disk-full"], log=log, **terms_of())
        # Where nothing may be mounted, the limit on the size of files has to do.
        seller.start("" if mounted else f"size:{FILE_MAX_BYTES}")
        await seller.ready()
        filler = cast.place / "disk" / "filler"
        if mounted:
            fill(filler)
        buyer = cast.actor("buyer", role="buy", wishes=[wish("disk-full", "hello")])
        buyer.start()
        assert await seller.end() == DISK_FULL, seller.errors()
        filler.unlink(missing_ok=True)
        assert "free some space and start again" in seller.errors()
        seller.start()
        assert await buyer.end() == 0, buyer.errors()
        assert [line["text"] for line in buyer.said("bought")] == ["hello"]
        await cast.rest(seller)


# ---- The broker and the chain ----------------------------------------------------------------


async def many_deals(cast: Cast, ware: str, *troubles: tuple[str, Trouble]) -> None:
    """Make several deals at once, through troubles that each come at their notice."""
    sellers = [await cast.seller(ware, name=f"seller{number}") for number in range(2)]
    wishes = [wish(ware, f"slow {number}") for number in range(DEALS)]
    buyer = cast.actor("buyer", role="buy", wishes=wishes)
    buyer.start()
    for kind, trouble in troubles:
        await eventually(lambda: buyer.noticed(kind), kind)  # noqa: B023
        await trouble(cast.live)
    assert await buyer.end() == 0, buyer.errors()
    assert sorted(line["text"] for line in buyer.said("bought")) == [
        f"slow {number}" for number in range(DEALS)
    ]
    assert not buyer.open_deals()
    assert len(buyer.paid()) == DEALS
    await cast.rest(*sellers)
    assert await cast.balance(buyer) == FUNDS_UNITS - DEALS * PRICE_UNITS
    earned = [await cast.balance(seller) - FUNDS_UNITS for seller in sellers]
    assert sum(earned) == DEALS * PRICE_UNITS


async def kill_broker(live: Market) -> None:
    before = live.broker_pid()
    os.kill(before, signal.SIGKILL)

    def back() -> bool:
        try:
            return live.broker_pid() != before
        except (ValueError, OSError):  # Not there at this moment.
            return False

    await eventually(back, "the broker is started again")


async def stall_broker(live: Market) -> None:
    os.kill(live.broker_pid(), signal.SIGSTOP)
    await anyio.sleep(STALL_S)
    os.kill(live.broker_pid(), signal.SIGCONT)


async def kill_chain(live: Market) -> None:
    before = live.chain_pid()
    os.kill(before, signal.SIGKILL)

    def back() -> bool:
        try:
            return live.chain_pid() != before
        except ValueError:
            return False

    await eventually(back, "the chain is started again")


async def test_a_broker_that_dies_again_and_again_costs_no_deal(cast: Cast) -> None:
    await many_deals(
        cast,
        "broker-dies",
        ("said:accept", kill_broker),
        ("chain:locked", kill_broker),
        ("heard:result", kill_broker),
    )


async def test_a_broker_that_stalls_costs_no_deal(cast: Cast) -> None:
    await many_deals(cast, "broker-stalls", ("said:task", stall_broker))


async def test_a_chain_that_dies_and_comes_back_costs_no_deal(cast: Cast) -> None:
    await many_deals(cast, "chain-dies", ("agreed", kill_chain), ("said:settle", kill_chain))


# ---- The other side --------------------------------------------------------------------------


async def test_a_buyer_that_vanishes_with_the_result_has_paid_for_it(cast: Cast) -> None:
    windows = {"lock_s": 20, "dispute_s": 5, "answer_s": 3, "rule_s": 6}
    seller = await cast.seller("buyer-vanishes", windows=windows)
    buyer = cast.actor("buyer", role="buy", wishes=[wish("buyer-vanishes", "hello")])
    buyer.start("notice:heard:result")
    assert await buyer.end() == -signal.SIGKILL
    await eventually(seller.paid, "the seller is paid")
    (paid,) = seller.paid()
    assert (paid["state"], paid["to_seller_units"]) == ("settled", PRICE_UNITS)
    await cast.rest(seller)
    assert await cast.balance(seller) == FUNDS_UNITS + PRICE_UNITS


async def test_a_seller_that_vanishes_with_the_task_is_not_paid(cast: Cast) -> None:
    windows = {"lock_s": 12, "dispute_s": 5, "answer_s": 3, "rule_s": 6}
    seller = await cast.seller("seller-vanishes", windows=windows, deliver_within=6)
    task = wish("seller-vanishes", "vanish", tries=1)
    buyer = cast.actor("buyer", role="buy", wishes=[task])
    buyer.start()
    assert await seller.end() == -signal.SIGKILL
    assert await buyer.end() == 0, buyer.errors()
    (failed,) = buyer.said("failed")
    assert "refunded" in failed["why"]
    assert await cast.balance(buyer) == FUNDS_UNITS
    seller.start(wares=["something-else"])  # It comes back, too late, and finds the deal over.
    await seller.ready()
    await cast.rest(seller)
