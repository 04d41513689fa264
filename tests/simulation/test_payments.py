"""Deals paid while they are done, in bad worlds; and proof that what must not happen is found."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from coase.agents import delivery, desk, streams
from coase.agents.streams import Streams
from coase.escrow import accounts
from coase.escrow.accounts import BuyerChannel, SellerChannel, Stream
from coase.escrow.backends.memory_channels import MemoryLedger
from coase.protocol.errors import LocalProtocolError
from coase.protocol.states import State
from tests.simulation.plan import BUYER_VICES, SELLER_VICES, Plan
from tests.simulation.world import Violation, World

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.simulation.node import Node

# A short text in a few chunks, from the first word to the last voucher.
ONE_STREAM = Plan(buyers=1, sellers=1, both=0, asks=1, channel_percent=100)
SEED = 11
MIXED = Plan(channel_percent=60, firm_percent=60, asks=30, metered_percent=40)


def test_in_a_calm_world_every_deal_settles_however_it_is_paid() -> None:
    report = World(1, MIXED).run()
    for name in ("settled", "channel settled", "none settled"):
        assert report.outcomes[name] > 1
    assert set(report.outcomes) == {"settled", "channel settled", "none settled", "no deal"}


def test_keys_of_the_real_curve_sign_the_same_story() -> None:
    report = World(1, replace(MIXED, asks=4, channel_percent=100, real_keys=True)).run()
    assert report.outcomes["channel settled"] > 1


@pytest.mark.parametrize("seed", range(6))
def test_liars_and_runaways_cost_a_chunk_and_no_more(seed: int) -> None:
    plan = Plan(
        channel_percent=100,
        firm_percent=10,
        vices_percent=70,
        asks=20,
        crash_permille=(0, 3)[seed % 2],
        loss_permille=(0, 60)[seed % 2],
        double_permille=60,
        slow_permille=60,
        confirmations=seed % 3,
        reorg_permille=80,
        lose_call_permille=60,
        deep_reorgs=seed == 5,
    )
    assert World(seed, plan).run().deals > 4


def test_channels_that_are_topped_up_for_each_deal_lose_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "DEPOSIT_DEALS", 1)
    deposits = 0
    for seed in range(2):
        plan = Plan(
            channel_percent=100,
            asks=14,
            asks_every_ms=(100, 3_000)[seed % 2],
            crash_permille=(0, 5)[seed % 2],
            loss_permille=40,
            confirmations=seed,
            lose_call_permille=60,
        )
        deposits += World(seed, plan).run().counts["channels: Fund"]
    assert deposits > 10


def points() -> list[tuple[str, int]]:
    """Every point of a streamed deal at which the power of one side may go."""
    world = World(SEED, ONE_STREAM)
    assert world.run().outcomes["channel settled"] == 1
    return [(node.name, at) for node in world.nodes for at in range(1, node.points + 1)]


def at_points(fate: Callable[[Node, int], None], *, every: int) -> list[World]:
    """Run the same world again and again, and let something happen at another point each time."""
    found = []
    for name, at in points()[::every]:
        world = World(SEED, ONE_STREAM)
        fate(next(node for node in world.nodes if node.name == name), at)
        world.run()
        found.append(world)
    assert len(found) > 150 // every
    return found


SOME = [3, pytest.param(1, marks=pytest.mark.slow)]


@pytest.mark.parametrize("every", SOME)
def test_a_crash_at_any_point_of_a_stream_costs_nobody_anything(every: int) -> None:
    settled = 0
    for world in at_points(lambda node, at: setattr(node, "crash_at", at), every=every):
        assert sum(node.crashes for node in world.nodes) == 1
        assert set(world.outcomes) <= {"channel settled", "no deal"}
        for tab in world.payments.tabs.values():
            assert tab.taken_units == tab.promised_units
        settled += world.outcomes["channel settled"]
    assert settled > 140 // every


@pytest.mark.parametrize("every", SOME)
def test_whoever_vanishes_at_any_point_costs_the_other_a_chunk_at_most(every: int) -> None:
    ends = set()
    for world in at_points(lambda node, at: setattr(node, "vanish_at", at), every=every):
        assert sum(node.vanished for node in world.nodes) == 1
        ends |= set(world.outcomes)
    assert {"channel settled", "channel refunded", "channel left", "no deal"} <= ends


def test_a_commit_that_fails_during_a_stream_costs_nobody_anything() -> None:
    world = World(SEED, ONE_STREAM)
    world.run()
    failures = [(node.name, at) for node in world.nodes for at in range(1, node.commits + 1)]
    assert len(failures) > 20
    for name, at in failures:
        world = World(SEED, ONE_STREAM)
        node = next(node for node in world.nodes if node.name == name)
        node.fail_commit_at = at
        assert set(world.run().outcomes) <= {"channel settled", "no deal"}
        assert node.crashes == 1


def test_claims_that_a_reorg_undoes_are_made_again() -> None:
    undone = 0
    for seed in range(4):
        plan = Plan(channel_percent=100, reorg_permille=300, confirmations=3, asks=16)
        report = World(seed, plan).run()
        # The time to deposit may pass, but what was begun is done.
        ends = {"settled", "channel settled", "channel lapsed", "no deal"}
        assert set(report.outcomes) <= ends
        undone += report.counts["reorgs"]
    assert undone > 10


def test_what_agents_took_for_certain_may_be_undone_and_no_unit_is_lost() -> None:
    for seed in range(3):
        plan = Plan(channel_percent=100, deep_reorgs=True, reorg_permille=250, vices_percent=30)
        World(seed, plan).run()


# ---- planted faults ---------------------------------------------------------------------------

BAD = Plan(channel_percent=100, vices_percent=100, asks=16)
CRASHES = Plan(channel_percent=100, crash_permille=20, asks=16)
LOSSES = Plan(channel_percent=100, loss_permille=200, slow_permille=200, asks=16)


def find(plan: Plan, *, seeds: int = 12) -> str:
    """Return the first violation that some seeds of ``plan`` bring, or nothing."""
    for seed in range(seeds):
        try:
            World(seed, plan).run()
        except Violation as error:
            return str(error)
    return ""


def test_without_planted_faults_the_same_plans_find_nothing() -> None:
    for plan in (BAD, CRASHES, LOSSES):
        assert find(plan, seeds=2) == ""
    assert {"overcounts", "other_text", "stops"} <= set(SELLER_VICES)
    assert {"underpays", "stale_voucher", "foreign_voucher", "arms"} <= set(BUYER_VICES)


def test_a_buyer_who_forgets_what_he_signed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    after = BuyerChannel.after

    def forgetful(self: BuyerChannel, record: Any) -> BuyerChannel:
        moved = after(self, record)
        promised = isinstance(record, accounts.VoucherPromised)
        # Only while the journal is read: a restart has seen no chain yet.
        return (
            replace(moved, signed_units=self.signed_units) if promised and not self.view else moved
        )

    monkeypatch.setattr(BuyerChannel, "after", forgetful)
    with pytest.raises(Violation, match=r"forgot what was signed|signed a total twice"):
        at_points(lambda node, at: setattr(node, "crash_at", at), every=7)


def test_a_buyer_who_believes_every_count_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (desk, delivery):
        monkeypatch.setattr(module, "fault_in_stream", lambda thread: "")
    assert "paid for more than came" in find(BAD)


def test_a_seller_who_delivers_before_it_is_paid_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    send = SellerChannel.send

    def generous(self: SellerChannel, **chunk: Any) -> Any:
        kept = {name: Stream() for name in self.streams}
        moved, records = send(replace(self, streams=kept, left_units=0), **chunk)
        return replace(moved, streams=self.streams), records

    monkeypatch.setattr(SellerChannel, "send", generous)
    monkeypatch.setattr("coase.protocol.session.Thread.owed_units", 0)
    assert find(BAD, seeds=20) != ""


def test_a_voucher_that_pays_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def credulous(self: Streams, thread: Any, body: Any, **_: Any) -> Any:
        return lambda step, now_ms: None

    monkeypatch.setattr(Streams, "taking", credulous)
    assert find(BAD) != ""


def test_a_deposit_that_is_made_anew_each_time_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def at_once(self: Streams, channel_id: bytes, line: Any, *_: Any, **__: Any) -> None:
        if line.deposit is not None and line.deposit.landed:
            line.deposit = None

    monkeypatch.setattr(Streams, "_see_deposit", at_once)
    plan = Plan(channel_percent=100, confirmations=2, asks=20, limit_units=5_000)
    assert "was another call" in find(plan, seeds=30)


def test_streams_without_a_deadline_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coase.protocol.session._see_stream", lambda thread, *_, **__: thread)
    monkeypatch.setattr(Streams, "_begin", _begin_for_ever)
    assert "stuck in a stream" in find(BAD)


def _begin_for_ever(self: Streams, thread: Any, step: Any, *, now_ms: int) -> None:
    from coase.agents.streams import READY

    begun = replace(thread, state=State.LOCKED, view=READY)
    self.desk.saw(begun, READY, self.desk.head.time_s, step, now_ms=now_ms)


def test_units_out_of_nothing_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    move = MemoryLedger._move

    def twice(self: MemoryLedger, source: str, to: str, units: int) -> None:
        move(self, source, to, units)
        self.balances[to] += 1

    monkeypatch.setattr(MemoryLedger, "_move", twice)
    assert "units were made or lost" in find(BAD)


def test_a_claim_above_what_was_signed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryLedger, "_check_signed", lambda self, row, channel_id: None)
    claim: Any = vars(SellerChannel)["claim"]

    def greedy(self: SellerChannel) -> Any:
        made = claim.fget(self)
        if made is None or self.view is None or made.units == self.view.balance_units:
            return made
        voucher = replace(made.voucher, units=self.view.balance_units)
        return replace(made, voucher=voucher, units=voucher.units)

    monkeypatch.setattr(SellerChannel, "claim", property(greedy))
    assert "claimed above what was signed" in find(BAD)


def test_the_error_of_a_second_meaning_of_an_id_is_ours() -> None:
    world = World(0, ONE_STREAM)
    call: Any = object()
    world.ledger.send("one", call, "me")
    world.ledger.send("one", call, "me")
    with pytest.raises(LocalProtocolError):
        world.ledger.send("one", object(), "me")  # type: ignore[arg-type]
