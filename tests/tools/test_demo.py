"""The demonstration, whole: with the real model once, and twice alike with the echo."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from coase.agents.compute.model import find_model
from tests.tools.commands import Home

pytestmark = [pytest.mark.xdist_group("demo"), pytest.mark.timeout(300)]

if TYPE_CHECKING:
    from pathlib import Path

FIGURES = {
    "transport": str,
    "chain": str,
    "model": str,
    "engine": str,
    "agents": int,
    "requests": int,
    "offers": int,
    "counter_offers": int,
    "agreements": int,
    "settled": int,
    "refunded": int,
    "disputed": int,
    "by_escrow": int,
    "by_channel": int,
    "tokens_generated": int,
    "wall_s": float,
    "digest": str,
    "conserved": bool,
    "failures": list,
    "deals": list,
}


def require_whole(figures: dict[str, Any]) -> None:
    """Return if a run shows everything that the demonstration promises."""
    assert {name: type(figures[name]) for name in FIGURES} == FIGURES
    assert figures["conserved"] is True
    assert figures["failures"] == []
    assert figures["refunded"] >= 2
    assert figures["disputed"] >= 1
    assert figures["counter_offers"] > 0
    assert min(figures["by_escrow"], figures["by_channel"]) > 0
    assert figures["tokens_generated"] > 0
    assert figures["settled"] + figures["refunded"] == figures["agreements"]
    assert len(figures["deals"]) == figures["agreements"]
    assert {deal["capability"] for deal in figures["deals"]} == {
        "digest",
        "summarise",
        "inference",
    }
    how = {deal["how"] for deal in figures["deals"]}
    assert {"settled", "undelivered", "ruled"} <= how
    before, after = (
        sum(int(row[when]) for row in figures["balances"].values())
        for when in ("before_units", "after_units")
    )
    assert before == after
    for deal in figures["deals"]:
        assert int(deal["paid_units"]) <= int(deal["price_agreed_units"])
        # A channel's deals are signatures: its deposits and claims belong to no single one.
        assert len(deal["transactions"]) >= (2 if deal["method"] == "escrow" else 0)
        times = [state["at_ms"] for state in deal["states"]]
        assert times == sorted(times)
        assert deal["states"][-1]["state"] == deal["state"]


def both(*runs: tuple[Home, tuple[str, ...]]) -> list[str]:
    """Return what runs printed, side by side: most of a run waits for windows to pass."""
    with ThreadPoolExecutor(len(runs)) as pool:
        done = [pool.submit(home.run, "demo", *options) for home, options in runs]
        return [future.result().stdout for future in done]


def test_the_demo_with_the_real_model_and_with_a_text_of_ones_own(tmp_path: Path) -> None:
    if find_model() is None:
        pytest.skip("the small model is not here: coase model get")
    text = tmp_path / "own.txt"
    text.write_text("Of tea\n\nTea is dried, [/b] then steeped: ein Getränk.\n")
    shipped, shown = both(
        (Home(tmp_path / "a"), ("--seed", "7", "--json")),
        (Home(tmp_path / "b"), ("--engine", "echo", "--input", str(text))),
    )
    figures = json.loads(shipped)
    require_whole(figures)
    assert "SmolLM2" in figures["model"]
    # More than one seller of each kind found work, so there is a market.
    for capability in ("digest", "summarise", "inference"):
        sold = {d["seller"] for d in figures["deals"] if d["capability"] == capability}
        assert len(sold) >= 2, capability
    for said in ("Of tea", "[/b] then", "who earned what", "conserved: "):
        assert said in shown


def test_the_same_seed_gives_the_same_deals(tmp_path: Path) -> None:
    options = ("--engine", "echo", "--seed", "a", "--json")
    first, second = map(
        json.loads, both((Home(tmp_path / "a"), options), (Home(tmp_path / "b"), options))
    )
    require_whole(first)
    require_whole(second)
    assert first["digest"] == second["digest"]
