"""The router beside six other ways of choosing, in one small seeded market."""

from __future__ import annotations

import pytest

from tests.simulation.routes import BASELINES, Figures, Router, World

# All in one process, which plays the market once.
pytestmark = pytest.mark.xdist_group("routes")
SETTINGS = (150, 900)


@pytest.fixture(scope="module")
def contest() -> dict[str, Figures]:
    world = World(7, sellers=200, calls=400, rate_per_s=20, buyers=2)
    policies = [kind(7, buyers=2) for kind in BASELINES]
    ours = [Router(7, buyers=2, second_units=units, name=f"{units}") for units in SETTINGS]
    return {policy.name: world.play(policy) for policy in [*policies, *ours]}


def test_nobody_is_better_in_everything(contest: dict[str, Figures]) -> None:
    for units in SETTINGS:
        ours = contest[str(units)]
        assert [name for name, other in contest.items() if other.beats(ours)] == []


def test_where_time_is_worth_something_it_is_quicker_and_surer_than_all(
    contest: dict[str, Figures],
) -> None:
    ours = contest["900"]
    for kind in BASELINES:
        other = contest[kind.name]
        assert (ours.p50_ms, ours.p95_ms) < (other.p50_ms, other.p95_ms)
        assert ours.p95_ms < other.p95_ms
        assert ours.failed <= other.failed


def test_where_money_counts_it_is_cheaper_than_all_that_answer(
    contest: dict[str, Figures],
) -> None:
    ours = contest["150"]
    others = [contest[kind.name] for kind in BASELINES]
    answering = [other for other in others if other.failed < 0.5]
    assert len(answering) >= 5
    assert ours.cost < min(other.cost for other in answering)
    assert ours.failed <= min(other.failed for other in others)


def test_the_same_seed_is_the_same_market() -> None:
    world = World(3, sellers=40, calls=60, rate_per_s=4, buyers=2)
    once, again = (world.play(Router(3, buyers=2)) for _ in range(2))
    assert once == again
    assert world.play(Router(4, buyers=2)) != once
