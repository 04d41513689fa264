"""Strategies against each other: only what holds for any sensible choice of scenarios."""

from __future__ import annotations

from itertools import pairwise

import pytest

from coase.negotiation.issues import FULL
from coase.negotiation.tournament import (
    Row,
    nash_permille,
    pareto_distance,
    play,
    scenarios,
    strategies,
    table,
    tournament,
)

BOULWARE, LINEAR, CONCEDER = "Boulware e=0.2", "linear e=1", "conceder e=3"
FIXED = "fixed price"


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], Row]:
    return {(row.buyer, row.seller): row for row in tournament()}


def test_every_pair_is_played_and_conceders_agree_wherever_a_deal_exists(
    rows: dict[tuple[str, str], Row],
) -> None:
    assert len(rows) == len(strategies()) ** 2
    possible = sum(bool(scenario.frontier()) for scenario in scenarios())
    assert possible == 3, "the fourth has nothing in common"
    for (buyer, seller), row in rows.items():
        if FIXED not in (buyer, seller):
            assert row.agreements == possible
        assert row.agreements <= possible


def test_who_holds_out_gets_more_of_the_same_counterparty(
    rows: dict[tuple[str, str], Row],
) -> None:
    for seller in (BOULWARE, LINEAR, CONCEDER):
        held, lined, gave = (rows[buyer, seller] for buyer in (BOULWARE, LINEAR, CONCEDER))
        assert held.buyer_utility > lined.buyer_utility > gave.buyer_utility
    for buyer in (BOULWARE, LINEAR, CONCEDER):
        held, lined, gave = (rows[buyer, seller] for seller in (BOULWARE, LINEAR, CONCEDER))
        assert held.seller_utility > lined.seller_utility > gave.seller_utility


def test_haste_costs_utility_and_saves_messages(rows: dict[tuple[str, str], Row]) -> None:
    assert rows[CONCEDER, CONCEDER].proposals < rows[BOULWARE, BOULWARE].proposals


def test_deals_lie_near_the_frontier(rows: dict[tuple[str, str], Row]) -> None:
    for (buyer, seller), row in rows.items():
        if FIXED not in (buyer, seller):
            assert row.pareto_distance < FULL // 10


def test_nobody_is_worse_off_than_without_a_deal() -> None:
    for scenario in scenarios():
        for buyer in strategies().values():
            for seller in strategies().values():
                played = play(buyer(scenario.buyer), seller(scenario.seller))
                assert played.buyer_utility >= 0
                assert played.seller_utility >= 0


def test_the_frontier_is_one_and_distances_are_measured_from_it() -> None:
    front = scenarios()[0].frontier()
    assert front == sorted(front, reverse=True)
    assert all(late[1] > early[1] for early, late in pairwise(front))
    assert pareto_distance(front[3], front) == 0
    below = (front[3][0] - 30_000, front[3][1] - 40_000)
    assert 0 < pareto_distance(below, front) <= 50_000
    assert max(nash_permille(pair, front) for pair in front) == 1_000
    assert nash_permille((0, FULL), front) == 0
    assert nash_permille((1, 1), []) == 0


def test_the_table_has_a_row_for_each_pair(rows: dict[tuple[str, str], Row]) -> None:
    lines = table(list(rows.values())).splitlines()
    assert len(lines) == len(rows) + 2
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert f"| {BOULWARE} | {CONCEDER} | 3/4 |" in table(list(rows.values()))
