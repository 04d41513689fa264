"""k of n arbiters: their agreement rules, one of them alone does not, and nobody need be awake."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from coase.agents import Agent
from coase.agents.bench import Bench
from coase.agents.config import PanelOfArbiters
from coase.agents.seller import Windows
from coase.escrow.backends.memory import MemorySettlement
from coase.escrow.backends.memory_panel import MemoryPanel, MemoryPanels
from coase.escrow.panel import Constitution
from coase.protocol.identity import Identity, keccak256
from coase.protocol.messages import Ruling
from coase.protocol.terms import ruling_digest

from .market import FUNDS, Market, market
from .realmarket import buy, scribe

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from coase.agents.arbiter import Arbiter

FACTORY, CODE = "0x" + "81" * 20, "0x" + "82" * 20
MEMBERS = sorted(
    (Identity(keccak256(b"member %d" % n)) for n in range(3)), key=lambda one: one.address
)
LONG = Windows(lock_s=3, dispute_s=3, answer_s=3, rule_s=20)


@asynccontextmanager
async def ruled_by(folder: Path, *awake: Identity) -> AsyncIterator[tuple[Market, list[Arbiter]]]:
    """Yield a market whose only arbiter is a panel of two of three, of whom some are there."""
    async with market(folder) as place:
        settlement = place.node.settlement
        assert isinstance(settlement, MemorySettlement)
        panels = MemoryPanels(place.chain, FACTORY, code=CODE)
        constitution = Constitution.of(2, [one.address for one in MEMBERS])
        panel = place.node.panel = MemoryPanel(panels, settlement, constitution)
        named = PanelOfArbiters(address=panel.address, threshold=2, members=constitution.members)
        changes = {"arbiters": (panel.address,), "panel": named}
        place.node.network = place.node.network.model_copy(update=changes)
        yield place, [await place.node.add_arbiter(one) for one in awake]


async def buy_a_lie(place: Market) -> tuple[Agent, Agent]:
    seller, buyer = scribe("scribe"), Agent("buyer", by_rounds=True)
    for offering in list(seller.offerings.values()):
        object.__setattr__(offering, "windows", LONG)
    await place.join(seller, buyer)
    assert await buy(buyer, "lie") == 0
    await place.rest()
    return seller, buyer


@pytest.mark.anyio
async def test_two_of_three_rule_and_share_the_fee(tmp_path: Path) -> None:
    async with ruled_by(tmp_path, *MEMBERS[:2]) as (place, _):
        seller, buyer = await buy_a_lie(place)
        assert place.chain.balance(buyer.address) == FUNDS
        fees = [place.chain.balance(one.address) for one in MEMBERS]
        lost = FUNDS - place.chain.balance(seller.address)
        assert sum(fees) == lost > 0
        assert fees[0] - fees[1] in (0, 1)
        assert fees[2] == 0


@pytest.mark.anyio
async def test_one_of_three_rules_nothing_and_the_terms_decide(tmp_path: Path) -> None:
    async with ruled_by(tmp_path, MEMBERS[0]) as (place, _):
        seller, buyer = await buy_a_lie(place)
        paid = FUNDS - place.chain.balance(buyer.address)
        assert paid == place.chain.balance(seller.address) - FUNDS > 0
        assert place.chain.balance(MEMBERS[0].address) == 0


def seat_of(place: Market, member: Identity) -> tuple[Bench, list[str]]:
    told: list[str] = []
    panel = place.node.panel
    assert panel is not None
    return Bench(member, panel, tell=lambda to, job, body: told.append(to)), told


def ruling(signer: Identity, domain: object, **changes: str) -> Ruling:
    job, evidence = keccak256(b"job"), keccak256(b"why")
    body = {
        "job_id": "0x" + job.hex(),
        "to_seller_units": "5",
        "penalty_units": "0",
        "evidence": "0x" + evidence.hex(),
    }
    signature = signer.sign(ruling_digest(domain, job, 5, 0, evidence))  # type: ignore[arg-type]
    return Ruling(**{**body, "signature": "0x" + signature.hex(), **changes})


@pytest.mark.anyio
async def test_only_members_own_signatures_are_heard(tmp_path: Path) -> None:
    async with ruled_by(tmp_path) as (place, _):
        bench, _ = seat_of(place, MEMBERS[0])
        domain = place.node.settlement.domain
        stranger = Identity(keccak256(b"stranger"))
        assert bench.hear(MEMBERS[1].address, ruling(MEMBERS[1], domain))
        assert not bench.hear(stranger.address, ruling(stranger, domain))
        assert not bench.hear(MEMBERS[1].address, ruling(stranger, domain))
        assert not bench.hear(MEMBERS[1].address, ruling(MEMBERS[1], domain, to_seller_units="6"))


def test_a_panel_of_nobody_is_none() -> None:
    with pytest.raises(ValueError, match="threshold"):
        PanelOfArbiters(address=FACTORY, threshold=0, members=(FACTORY,))


@pytest.mark.anyio
async def test_arbiters_that_run_take_their_seats_on_a_panel_that_is_named_later(
    tmp_path: Path,
) -> None:
    async with ruled_by(tmp_path, *MEMBERS[:2]) as (place, arbiters):
        panel, network = place.node.panel, place.node.network
        assert panel is not None
        for arbiter in arbiters:  # As if they had begun before it was named.
            arbiter.benches.clear()
        place.node.sit(panel, network)
        seller, buyer = await buy_a_lie(place)
        assert place.chain.balance(buyer.address) == FUNDS
        assert place.chain.balance(seller.address) < FUNDS
