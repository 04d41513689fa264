"""Work that is called for under rates, in bad worlds; and proof that what must not be is found."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from coase.agents import streams
from coase.agents.buyer import BuyerDesk
from coase.agents.memory import Memory
from coase.agents.seller import SellerDesk
from coase.agents.standing import Standing
from coase.protocol import calls
from coase.protocol.states import Role
from tests.simulation.plan import RATES_BUYER_VICES, RATES_SELLER_VICES, Plan
from tests.simulation.rates import MISCALLS, Caller
from tests.simulation.world import Violation, World

if TYPE_CHECKING:
    from collections.abc import Callable

    from coase.protocol.messages import RateCall
    from coase.protocol.session import Thread
    from tests.simulation.node import Node

RATES = Plan(
    buyers=1, sellers=2, channel_percent=100, rates_percent=90, asks=14, asks_every_ms=2_000
)
# One pair, which buys once, agrees on rates, and calls several times at once.
ONE_PAIR = replace(
    RATES, rates_percent=100, buyers=1, sellers=1, both=0, asks=3, asks_every_ms=3_000
)
SEED = 44
GOOD = {"settled", "channel settled", "call settled", "call refused", "call given up", "no deal"}
FAULTS = {"call left", "channel lapsed"}
"""What else honest sides come to where the power goes, or a deposit is lost."""


def run(plan: Plan, seeds: range) -> Counter[str]:
    """Return how the deals of some worlds ended, and what was counted there."""
    found: Counter[str] = Counter()
    for seed in seeds:
        report = World(seed, plan).run()
        found += report.outcomes
        found += report.counts
    return found


def test_in_a_calm_world_every_call_that_is_taken_settles() -> None:
    report = World(1, replace(RATES, channel_percent=60, firm_percent=40, asks=30)).run()
    assert report.outcomes["call settled"] > 5
    assert report.counts["rates agreed"] > 2
    assert set(report.outcomes) <= GOOD | {"none settled"}


def test_keys_of_the_real_curve_sign_the_same_calls() -> None:
    report = World(SEED, replace(ONE_PAIR, real_keys=True)).run()
    assert report.outcomes["call settled"] > 1


@pytest.mark.parametrize("seed", range(3))
def test_crashes_losses_and_reorganised_blocks_cost_nobody_anything(seed: int) -> None:
    plan = replace(
        RATES,
        crash_permille=(3, 8)[seed % 2],
        commit_fail_permille=5,
        loss_permille=50,
        double_permille=80,
        slow_permille=80,
        confirmations=seed % 3,
        reorg_permille=60,
        lose_call_permille=40,
        partitions=seed == 2,
        skew_ms=300,
    )
    found = run(plan, range(2 * seed, 2 * seed + 2))
    assert found["call settled"] > 4
    assert found["crashes"] > 2


@pytest.mark.parametrize("seed", range(3))
def test_liars_get_nothing_for_their_calls(seed: int) -> None:
    plan = replace(
        RATES,
        vices_percent=(50, 80)[seed % 2],
        firm_percent=10,
        crash_permille=(0, 3)[seed % 2],
        loss_permille=(0, 40)[seed % 2],
        double_permille=60,
        eve=True,
        strangers=True,
        deep_reorgs=seed == 2,
        reorg_permille=50,
        confirmations=1,
    )
    found = run(plan, range(2 * seed, 2 * seed + 2))
    assert found["call settled"] > 4


def test_every_lie_about_calls_is_told_and_changes_nothing() -> None:
    found: Counter[str] = Counter()
    told = {f"miscalls: {how}" for how in MISCALLS} | {"delivered twice", "refused and done"}
    for seed in range(20, 80):
        world = World(seed, replace(RATES, arbiter="random"))
        for number, node in enumerate(world.nodes):
            node.vices[Role.SELLER] = RATES_SELLER_VICES[number % 2]
            node.vices[Role.BUYER] = RATES_BUYER_VICES[0]
        found += world.run().counts
        if told <= found.keys():
            break
    assert told <= found.keys()


def test_channels_that_rates_top_up_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "DEPOSIT_DEALS", 1)
    plan = replace(RATES, loss_permille=40, lose_call_permille=60)
    found = Counter[str]()
    for seed in (3, 9, 15):
        found += run(replace(plan, confirmations=seed % 2, crash_permille=5), range(seed, seed + 1))
    assert found["channels: Fund"] > 15
    assert found["call settled"] > 5


# ---- the power goes at every point ------------------------------------------------------------


def points() -> list[tuple[str, int]]:
    """Every point, from the agreement on rates on, at which the power of one side may go."""
    world = World(SEED, ONE_PAIR)
    assert world.run().outcomes["call settled"] >= 3
    since = next(iter(world.payments.contracts.values())).since
    return [
        (node.name, at) for node in world.nodes for at in range(since[node.name], node.points + 1)
    ]


def at_points(fate: Callable[[Node, int], None], *, every: int) -> list[World]:
    """Run the same world again and again, and let something happen at another point each time."""
    found = []
    for name, at in points()[::every]:
        world = World(SEED, ONE_PAIR)
        fate(next(node for node in world.nodes if node.name == name), at)
        world.run()
        found.append(world)
    return found


@pytest.mark.parametrize("every", [37, pytest.param(3, marks=pytest.mark.slow)])
def test_a_crash_at_any_point_of_calls_costs_nobody_anything(every: int) -> None:
    worlds = at_points(lambda node, at: setattr(node, "crash_at", at), every=every)
    assert len(worlds) > 300 // every
    settled = 0
    for world in worlds:
        assert sum(node.crashes for node in world.nodes) == 1
        assert set(world.outcomes) <= GOOD | FAULTS
        for tab in world.payments.tabs.values():
            assert tab.taken_units == tab.promised_units
        settled += world.outcomes["call settled"]
    assert settled > len(worlds)


@pytest.mark.parametrize("every", [73, pytest.param(2, marks=pytest.mark.slow)])
def test_whoever_vanishes_costs_the_other_a_chunk_at_most(every: int) -> None:
    ends = set[str]()
    for world in at_points(lambda node, at: setattr(node, "vanish_at", at), every=every):
        assert sum(node.vanished for node in world.nodes) == 1
        ends |= set(world.outcomes)
    assert {"call settled", "call refunded", "call left"} <= ends


@pytest.mark.parametrize("every", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_a_commit_that_fails_during_calls_costs_nobody_anything(every: int) -> None:
    world = World(SEED, ONE_PAIR)
    world.run()
    failures = [(node.name, at) for node in world.nodes for at in range(1, node.commits + 1)]
    assert len(failures) > 60
    for name, at in failures[::every]:
        world = World(SEED, ONE_PAIR)
        node = next(node for node in world.nodes if node.name == name)
        node.fail_commit_at = at
        assert set(world.run().outcomes) <= GOOD | FAULTS
        assert node.crashes == 1


@pytest.mark.slow
def test_many_worlds_with_rates() -> None:
    settled = 0
    for seed in range(5_000, 5_400):
        plan = Plan.draw(seed, World(seed).rng)
        plan = replace(plan, channel_percent=100, rates_percent=90, real_keys=False)
        settled += World(seed, plan).run().outcomes["call settled"]
    assert settled > 400


# ---- planted faults ---------------------------------------------------------------------------

LIARS = replace(RATES, arbiter="random")
"""No calm world, since all its buyers get a vice."""
CRASHES = replace(RATES, crash_permille=20, loss_permille=100)


def find(plan: Plan, *, seeds: int = 20) -> str:
    """Return the first violation that some seeds of ``plan`` bring, or nothing."""
    for seed in range(seeds):
        world = World(seed, plan)
        if plan is LIARS:
            for node in world.nodes:
                node.vices[Role.BUYER] = RATES_BUYER_VICES[0]
        try:
            world.run()
        except Violation as error:
            return str(error)
    return ""


def test_without_planted_faults_the_same_plans_find_nothing() -> None:
    for plan in (LIARS, CRASHES):
        assert find(plan, seeds=1) == ""


def test_a_seller_that_forgets_numbers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Standing.opened

    def forgetful(self: Standing, *said: Any, **more: Any) -> bytes:
        self._taken.clear()
        return opened(self, *said, **more)

    monkeypatch.setattr(Standing, "opened", forgetful)
    assert re.search("took a miscall: number|began twice|two terms", find(LIARS))


def test_rates_that_outlive_a_restart_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Caller, "abandoned", lambda self: [])
    plan = replace(ONE_PAIR, asks=24, asks_every_ms=1_500, crash_permille=30)
    assert re.search("began twice|two terms", find(plan))


def test_a_seller_that_takes_any_price_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SellerDesk, "called", lambda *_, **__: None)
    assert "took a miscall" in find(LIARS)


def test_a_seller_that_goes_beyond_its_rates_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def credulous(contract: Thread, call: RateCall, *, now_ms: int) -> Thread:
        terms = contract.agreed_terms
        within = {
            "price_units": str(min(int(call.price_units), terms.price_units)),
            "input_max": min(call.input_max, terms.work.input_max),
            "output_max": min(call.output_max, terms.work.output_max),
            "lock_by_s": min(call.lock_by_s, terms.lock_by_s),
        }
        return calls.called(contract, call.model_copy(update=within), now_ms=now_ms)

    monkeypatch.setattr("coase.agents.standing.called", credulous)
    assert "took a miscall" in find(LIARS)


def test_a_call_for_which_nothing_is_set_aside_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    called = BuyerDesk._called

    def careless(self: BuyerDesk, opened: Thread, *said: Any, now_ms: int) -> Any:
        self.reserve.release(opened.deal, now_ms=now_ms)
        return called(self, opened, *said, now_ms=now_ms)

    monkeypatch.setattr(BuyerDesk, "_called", careless)
    monkeypatch.setattr(BuyerDesk, "paying", lambda *_, **__: None)
    assert "called without money" in find(RATES)


def test_rates_that_take_a_place_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(self: Memory, thread: Thread) -> None:
        self.working.setdefault(thread.request.capability, set()).add(thread.deal)

    monkeypatch.setattr(Memory, "_count_work", counted)
    assert "rates that hold something" in find(RATES)
