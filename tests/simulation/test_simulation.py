"""Whole economies from a seed each, and proof that the simulator can find what it looks for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from coase.agents import buyer as buying
from coase.agents import desk as desks
from coase.agents.outbox import Outbox
from coase.escrow import lifecycle
from coase.escrow.backends.memory import MemoryChain
from coase.protocol import states
from coase.protocol.effects import Poke
from coase.protocol.errors import BookOutOfBalance
from coase.protocol.states import Role, State
from coase.protocol.types import How, Phase
from tests.simulation.plan import Plan
from tests.simulation.run import main, seeds_of, simulate
from tests.simulation.world import Violation, World

if TYPE_CHECKING:
    from collections.abc import Callable

    from coase.escrow.lifecycle import Payout

CHUNK = 10
SEEDS = 120
BAD_BUYERS = Plan(vices_percent=100, asks=12)
ONE_DEAL = Plan(buyers=1, sellers=1, both=0, asks=1)


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_no_invariant_breaks(first: int) -> None:
    deals = 0
    for seed in range(first, first + CHUNK):
        deals += simulate(seed).deals
    assert deals > CHUNK  # Worlds in which nobody trades would prove nothing.


def test_the_same_seed_is_the_same_world() -> None:
    assert simulate(3).digest == simulate(3).digest
    assert simulate(3).digest != simulate(4).digest


def test_in_a_calm_world_every_deal_settles() -> None:
    report = World(1, Plan(asks=30, metered_percent=40, large_percent=10)).run()
    assert report.outcomes["settled"] >= 28
    assert set(report.outcomes) == {"settled", "no deal"}


def test_rounds_of_bargaining_break_nothing_in_a_bad_world() -> None:
    settled = 0
    for seed in range(12):
        plan = Plan(
            rounds_percent=100,
            vices_percent=60,
            loss_permille=30,
            slow_permille=50,
            crash_permille=3,
            limit_units=(1_000_000, 3_000)[seed % 2],
        )
        settled += World(seed, plan).run().outcomes["settled"]
    assert settled > 20


def test_the_seeds_show_every_outcome_that_a_deal_can_have() -> None:
    seen: set[str] = set()
    for seed in range(40):
        for arbiter in ("honest", "silent"):
            seen |= set(World(seed, Plan(vices_percent=80, arbiter=arbiter)).run().outcomes)
        if len(seen) > 7:
            break
    names = {how.name.lower().replace("_", " ") for how in How} - {"open"}
    assert names <= seen


def test_a_chain_that_breaks_its_word_stops_nobody() -> None:
    reorgs = 0
    for seed in range(8):
        plan = Plan(deep_reorgs=True, reorg_permille=250, confirmations=seed % 3, vices_percent=30)
        reorgs += World(seed, plan).run().counts["reorgs"]
    assert reorgs > 20


def crash_points() -> list[tuple[str, int]]:
    """Every point of a plain deal at which the power of one side may go."""
    world = World(5, ONE_DEAL)
    world.run()
    return [(node.name, at) for node in world.nodes for at in range(1, node.points + 1)]


def commits() -> list[tuple[str, int]]:
    world = World(5, ONE_DEAL)
    world.run()
    return [(node.name, at) for node in world.nodes for at in range(1, node.commits + 1)]


def test_a_crash_at_any_point_of_a_deal_costs_nobody_anything() -> None:
    points = crash_points()
    assert len(points) > 60
    settled = 0
    for name, at in points:
        world = World(5, ONE_DEAL)
        node = next(node for node in world.nodes if node.name == name)
        node.crash_at = at
        outcomes = world.run().outcomes
        assert node.crashes == 1, (name, at)
        assert set(outcomes) <= {"settled", "no deal"}, (name, at)
        settled += outcomes["settled"]
    assert settled > len(points) // 2


def test_a_commit_that_fails_at_any_time_costs_nobody_anything() -> None:
    failures = commits()
    assert len(failures) > 8
    for name, at in failures:
        world = World(5, ONE_DEAL)
        node = next(node for node in world.nodes if node.name == name)
        node.fail_commit_at = at
        outcomes = world.run().outcomes
        assert node.crashes == 1, (name, at)
        assert set(outcomes) <= {"settled", "no deal"}, (name, at)


# ---- planted faults ---------------------------------------------------------------------------


def find(plan: Plan, *, seeds: int = 12) -> str:
    """Return the first violation that some seeds of ``plan`` bring, or nothing."""
    for seed in range(seeds):
        try:
            World(seed, plan).run()
        except (Violation, BookOutOfBalance) as error:
            return f"{type(error).__name__} {error}"
    return ""


def test_without_planted_faults_the_same_plans_find_nothing() -> None:
    for plan in (Plan(), Plan(rounds_percent=100), BAD_BUYERS, Plan(loss_permille=300), TIGHT):
        assert find(plan, seeds=4) == ""


def test_speaking_before_the_disk_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desks, "AWAITED", frozenset())
    assert "before it was durable" in find(Plan())


def test_a_poke_that_pays_the_wrong_side_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = lifecycle.TABLE[(Poke, Phase.DELIVERED)]
    wrong = lifecycle.Row(right.who, right.when, right.to, How.UNDELIVERED)
    monkeypatch.setitem(lifecycle.TABLE, (Poke, Phase.DELIVERED), wrong)
    assert "delivered and was not paid" in find(BAD_BUYERS)


def test_messages_that_are_said_only_once_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing: Callable[..., object] = lambda self, *, now_ms: ([], [])  # noqa: E731
    monkeypatch.setattr(Outbox, "due", nothing)
    monkeypatch.setattr(Outbox, "next_ms", lambda self: None)
    assert "honest sides" in find(Plan(loss_permille=300))


def test_a_task_that_may_not_come_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(states.DEAL["escrow"], (State.AGREED, Role.BUYER, "task"))
    assert "honest sides came to nothing" in find(Plan())


def test_pieces_that_count_for_the_whole_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = Outbox.answered

    def too_soon(self: Outbox, answered_id: str, *, by: str) -> object:
        out = answered(self, answered_id, by=by)
        if out is not None and not out.unanswered:
            self.drop(out)
        return out

    monkeypatch.setattr(Outbox, "answered", too_soon)
    assert find(Plan(large_percent=100, crash_permille=30), seeds=30) != ""


TIGHT = Plan(vices_percent=100, asks=20, limit_units=1_050, buyers=1, both=0)


def test_a_purse_that_forgets_the_bond_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buying, "exposure", lambda terms: terms.price_units)
    assert "is above its limit" in find(TIGHT, seeds=60)


def test_units_out_of_nothing_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    push = MemoryChain._push

    def twice(self: MemoryChain, payout: Payout) -> None:
        push(self, payout)
        self._add(self._balances, payout.to, 1)

    monkeypatch.setattr(MemoryChain, "_push", twice)
    assert "units were made or lost" in find(Plan())


# ---- the command ----------------------------------------------------------------------------


def test_the_command_prints_what_came_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "2", "--deals", "3"]) == 0
    out = capsys.readouterr().out
    assert "deals/s" in out
    assert "settled" in out
    assert seeds_of("17..18", 0) == range(17, 19)
    assert seeds_of("5", 100) == range(100, 105)


def test_a_seed_that_fails_is_printed_with_its_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desks, "AWAITED", frozenset())
    assert main(["--seed", "0", "--deals", "2"]) == 1
    assert "run.py --seed 0 --deals 2 --trace" in capsys.readouterr().out


def test_a_run_ends_with_figures_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "2", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["deals"] == sum(
        number for name, number in figures["outcomes"].items() if name != "no deal"
    )
    assert figures["took_s"] > 0
    assert figures["failed"] == []
