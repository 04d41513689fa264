"""Accounts within one purse: each has its own limits, and all together those of the purse."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from coase.agents import Agent, Budget
from coase.agents.asks import AskState
from coase.agents.charges import charged_to, charging
from coase.agents.history import summary
from coase.agents.purse import OpenPurse, Purse
from coase.protocol.errors import BudgetExhausted, DealFailed
from coase.protocol.session import NO_CHARGE, Charge
from tests.agents.desks import ASSET
from tests.agents.desks import Market as Desks
from tests.agents.market import market
from tests.agents.test_purse import PRICE_UNITS, buy, scribe

if TYPE_CHECKING:
    from pathlib import Path

ANN = "0x" + "a1" * 20
PATIENT_MS = 100_000  # A request lapses after that, if nobody offers.
ALICE: Any = Charge("alice", "call 1")


def test_an_account_is_bound_by_its_own_limits_and_by_those_above_it() -> None:
    purse = Purse(Budget(total="0.003"), ASSET)
    purse.set_account("alice", Budget(total="0.001", per_day="0.0009"))
    purse.set_account("bob", Budget())
    with pytest.raises(BudgetExhausted, match="account alice: per day"):
        purse.reserve("a", 901, ANN, now_ms=0, account="alice")
    purse.reserve("a", 900, ANN, now_ms=0, account="alice")
    purse.reserve("b", 2_000, ANN, now_ms=0, account="bob")
    with pytest.raises(BudgetExhausted, match="agent: in all") as raised:
        purse.reserve("c", 101, ANN, now_ms=0, account="bob")
    assert raised.value.left_units == 100
    assert (purse.held_by("alice"), purse.held_by("bob"), purse.open_units) == (900, 2_000, 2_900)
    purse.spend("a", 400, now_ms=0)
    purse.release("b", now_ms=0)
    assert purse.rooms(ANN, now_ms=0, account="alice") == {
        "account alice: in all": 600,
        "account alice: per day": 500,
        "agent: in all": 2_600,
    }
    assert purse.rooms(ANN, now_ms=0) == {"agent: in all": 2_600}
    purse.book.audit()


def test_an_account_alone_makes_a_purse_limited() -> None:
    purse = Purse(Budget(), ASSET)
    assert not purse.limited
    purse.set_account("alice", Budget(per_hour="1"))
    assert purse.limited
    purse.set_account("alice", Budget())
    assert not purse.limited


def test_who_is_charged_ends_with_its_block() -> None:
    with charging(ALICE):
        with charging(Charge("bob")):
            assert charged_to().account == "bob"
        assert charged_to() == ALICE
    assert charged_to() == NO_CHARGE


def test_an_account_is_charged_again_after_a_restart() -> None:
    desks = Desks()
    first = desks.buying.reserve = Purse(Budget(), ASSET)
    first.set_account("alice", Budget(total="0.0025"))
    ask = desks.ask("one", charge=ALICE)
    desks.until(lambda: ask.outcome)
    desks.works = False
    going = desks.ask("two", charge=ALICE)
    desks.until(lambda: going.state is AskState.BOUND)
    rows = [json.loads(data) for _, data in desks.buyer.closed if data]
    desks.restart(desks.buyer, purse=OpenPurse())
    threads = list(desks.buyer.desk.threads.values())
    assert {thread.charge for thread in threads} == {ALICE}
    again = Purse(Budget(), ASSET)
    again.recall(threads, rows)
    again.set_account("alice", Budget(total="0.0025"))
    assert again.rooms(ANN, now_ms=desks.now_ms, account="alice") == {"account alice: in all": 500}
    assert again.held_by("alice") == 1_000


def test_what_is_charged_to_nobody_is_written_as_ever() -> None:
    desks = Desks()
    desks.ask("one")
    desks.deliver()
    (thread,) = desks.buyer.desk.threads.values()
    assert "charge" not in json.loads(summary(thread))


@pytest.mark.anyio
async def test_a_hundred_callers_of_one_account_never_overspend_it(tmp_path: Path) -> None:
    limit, most = 70_000, 0
    paid: list[int] = []
    short: list[str] = []
    late: list[int] = []
    async with market(tmp_path) as place:
        buyer = Agent("buyer")
        await place.join(scribe(), buyer)
        purse = buyer.purse
        purse.set_account("alice", Budget(total="0.07"))

        def watch(*_: object) -> None:
            nonlocal most
            most = max(most, limit - purse.rooms("", now_ms=0, account="alice")[ROOM])

        place.node.runtime.observers.append(watch)

        async def one(number: int) -> None:
            with charging(Charge("alice", f"call {number}")):
                try:
                    paid.append(await buy(buyer, number, reply_within_ms=PATIENT_MS))
                except BudgetExhausted as error:
                    short.append(error.limit)
                except DealFailed:  # On a machine so slow that an agreement came too late.
                    late.append(number)

        async with anyio.create_task_group() as group:
            for number in range(100):
                group.start_soon(one, number)
        await place.rest()
        assert len(paid) + len(short) + len(late) == 100
        assert set(short) == {ROOM}
        spent = purse.used_by("alice")
        assert 0 < sum(paid) <= spent <= most <= limit
        assert place.earned(buyer) == -spent
        again = await buy(buyer, 101, reply_within_ms=PATIENT_MS)
        assert again == PRICE_UNITS, "the purse itself has no limit"
        await place.rest()
    async with market(tmp_path) as place:
        reborn = Agent("buyer")
        await place.join(scribe(), reborn)
        reborn.purse.set_account("alice", Budget(total="0.07"))
        left = reborn.purse.rooms("", now_ms=0, account="alice")
        assert left == {ROOM: limit - spent}


ROOM = "account alice: in all"
