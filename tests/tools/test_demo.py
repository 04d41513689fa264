"""The demonstration, whole: with the real model once, and twice alike with the echo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from coase.agents.compute.model import find_model
from tests.tools.commands import Home

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.xdist_group("demo")

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
        assert len(deal["transactions"]) >= 2
        times = [state["at_ms"] for state in deal["states"]]
        assert times == sorted(times)
        assert deal["states"][-1]["state"] == deal["state"]


def test_the_demo_with_the_real_model(tmp_path: Path) -> None:
    if find_model() is None:
        pytest.skip("the small model is not here: coase model get")
    figures = Home(tmp_path).json("demo", "--seed", "7")
    require_whole(figures)
    assert "SmolLM2" in figures["model"]
    # More than one seller of each kind found work, so there is a market.
    for capability in ("digest", "summarise", "inference"):
        sold = {d["seller"] for d in figures["deals"] if d["capability"] == capability}
        assert len(sold) >= 2


def test_the_same_seed_gives_the_same_deals(tmp_path: Path) -> None:
    runs = [Home(tmp_path).json("demo", "--seed", "a", "--engine", "echo") for _ in range(2)]
    for figures in runs:
        require_whole(figures)
    assert runs[0]["digest"] == runs[1]["digest"]


def test_a_text_of_ones_own(tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("Of tea\n\nTea is dried, [/b] then steeped: ein Getränk.\n")
    done = Home(tmp_path).run("demo", "--engine", "echo", "--input", str(text))
    assert "Of tea" in done.stdout
    assert "conserved: " in done.stdout
    assert "who earned what" in done.stdout
