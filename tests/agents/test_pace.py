"""Margins and windows follow the chain: on a slow one deals are still made, and still defended."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from coase.agents import Agent, Job, Price
from coase.agents.caution import confirmations_of
from coase.agents.config import NatsAddress, Network
from coase.agents.fairness import unfair
from coase.agents.pace import BLOCK_SLOWEST_MS, Pace, pace_of
from coase.agents.seller import Windows
from coase.agents.wares import Summarise, Summary
from coase.escrow.presets import BASE
from coase.protocol.messages import LOCK_BY_MAX_S
from coase.protocol.session import Margins
from coase.protocol.types import Asset
from tests.agents.market import market
from tests.protocol.threads import NOW_MS, NOW_S, REQUEST, TERMS

if TYPE_CHECKING:
    from pathlib import Path

    from coase.protocol.session import Thread
    from coase.protocol.terms import Terms

HOUR_S = 3_600
WORK_S = 60
LOCAL = {"chain_id": 31337, "faucet": True}


def network(**changes: Any) -> Network:
    fields: dict[str, Any] = {
        "nats": NatsAddress(url="nats://127.0.0.1:4222"),
        "rpc": "http://127.0.0.1:8545",
        "token": "0x" + "11" * 20,
        "factory": "0x" + "22" * 20,
        "escrow": "0x" + "33" * 20,
    }
    return Network(**fields | changes)


def pace(**changes: Any) -> Pace:
    return pace_of(network(**changes))


def test_a_local_chain_needs_no_more_than_it_did() -> None:
    local = pace(**LOCAL)
    assert (local.margins, local.windows) == (Margins(), Windows())
    assert (local.block_ms, local.submit_s, local.poll_s) == (1_000, 0, 0.2)


def test_base_is_two_seconds_a_block_and_five_blocks_deep() -> None:
    base = pace(chain_id=BASE.chain_id)
    assert base.block_ms == 2_000
    # Two blocks to be in one, five on top of it, and half a minute of clocks that differ.
    assert base.margins.chain_s == 2 * (2 + 5) + 30
    assert base.windows.dispute_s == base.windows.answer_s == HOUR_S
    assert base.windows.rule_s == 24 * HOUR_S
    assert base.poll_s == 0.4
    patient = pace(chain_id=BASE.chain_id, confirmations=60)
    assert patient.margins.chain_s == 2 * (2 + 60) + 30
    assert patient.windows.lock_s > base.windows.lock_s


def test_any_other_chain_is_what_the_file_says_or_the_slowest() -> None:
    unknown = pace(chain_id=777_777)
    assert unknown.block_ms == BLOCK_SLOWEST_MS
    quick = pace(chain_id=777_777, block_ms=250)
    assert quick.margins.chain_s < unknown.margins.chain_s
    assert quick.windows.dispute_s == HOUR_S  # Quick, and other people's all the same.
    assert pace(chain_id=31337, faucet=True, block_ms=12_000).margins.chain_s == 24


NETWORKS: list[dict[str, Any]] = [
    LOCAL,
    LOCAL | {"block_ms": 12_000},
    {"chain_id": 31337},
    {"chain_id": BASE.chain_id},
    {"chain_id": 84532},
    {"chain_id": 1},
    {"chain_id": 1, "confirmations": 12},
    {"chain_id": 42_161, "block_ms": 250},
]


def offered(seller: Pace) -> Terms:
    """The terms of a seller who names no windows."""
    windows, lock_by_s = seller.windows, NOW_S + seller.windows.lock_s
    return replace(
        TERMS,
        lock_by_s=lock_by_s,
        deliver_by_s=lock_by_s + seller.within_s(WORK_S),
        dispute_s=windows.dispute_s,
        answer_s=windows.answer_s,
        rule_s=windows.rule_s,
    )


@pytest.mark.parametrize("chain", NETWORKS)
def test_both_sides_of_a_network_agree_on_its_pace(chain: dict[str, Any]) -> None:
    seller = pace(**chain)
    terms, within_s = offered(seller), seller.within_s(WORK_S)
    request = REQUEST.model_copy(
        update={"deliver_within_s": within_s, "input_max": 0, "output_max": 0}
    )
    assert unfair(terms, request, seller.margins, now_ms=NOW_MS) == ""
    # Who waits for one block more than the others is no stranger to them.
    deeper = confirmations_of(network(**chain)) + 1
    buyer = pace(**chain | {"confirmations": deeper})
    assert buyer.margins.chain_s > seller.margins.chain_s or seller.block_ms < 1_000
    assert unfair(terms, request, buyer.margins, now_ms=NOW_MS) == ""


@pytest.mark.parametrize("chain", NETWORKS)
def test_everybody_has_time_for_what_he_owes(chain: dict[str, Any]) -> None:
    one = pace(**chain)
    chain_s, windows = one.margins.chain_s, one.windows
    assert windows.lock_s > 2 * chain_s  # The buyer bargains on, and its lock is still in time.
    assert windows.lock_s <= LOCK_BY_MAX_S - 30
    assert one.within_s(WORK_S) - chain_s >= WORK_S - Margins().chain_s  # The work keeps its time.
    assert windows.dispute_s > 2 * chain_s + one.margins.halt_s
    assert windows.rule_s > 3 * chain_s + one.margins.halt_s


@pytest.mark.anyio
async def test_a_deal_on_a_chain_of_others_is_made_at_its_pace(tmp_path: Path) -> None:
    seller, buyer = Agent("seller", by_rounds=True), Agent("buyer")

    @seller.offers("summarise", price=Price.per_task("0.02"), deliver_within=WORK_S)
    async def summarise(task: Summarise, job: Job) -> Summary:
        return Summary(summary=task.text[:10])

    made: list[Thread] = []
    asset = Asset(BASE.chain_id, "0x" + "33" * 20)
    async with market(tmp_path, asset=asset, faucet=False, margins=None) as place:
        await place.join(seller, buyer)
        bought = await buyer.purchase(
            "summarise",
            Summarise(text="A lighthouse sells what cannot be sold."),
            returns=Summary,
            max_price="0.05",
            on_agreed=made.append,
        )
        await place.rest()
        assert place.earned(seller) == bought.paid_units == 20_000
    base, terms = pace(chain_id=BASE.chain_id), made[0].agreed_terms
    assert terms.deliver_by_s - terms.lock_by_s == base.within_s(WORK_S) > WORK_S
    assert (terms.dispute_s, terms.rule_s) == (HOUR_S, 24 * HOUR_S)
    assert seller.seat is not None
    assert seller.seat.desk.margins == base.margins
