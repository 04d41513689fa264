"""What reaches the terminal of whoever uses the library: what they can mend, in plain words."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest

from coase.agents import Agent, Job, Price
from coase.agents.wares import Summarise, Summary
from coase.protocol.effects import Open
from coase.protocol.errors import CallReverted, ConfigurationError
from coase.tools.cli.agent_command import _engine
from tests.agents.market import market
from tests.agents.realmarket import LONG

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("refusal", "warned"),
    [
        (CallReverted("WrongPhase", 7169, 20), ""),
        (CallReverted("ERC20InsufficientBalance", 1, 2, 3), "the wallet holds too little"),
    ],
)
async def test_a_refusal_is_a_warning_only_if_somebody_can_mend_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    refusal: CallReverted,
    warned: str,
) -> None:
    seller, buyer = Agent("seller"), Agent("buyer")

    @seller.offers("summarise", price=Price.per_task("0.02"), deliver_within=30, windows=LONG)
    async def summarise(task: Summarise, job: Job) -> Summary:
        return Summary(summary=task.text[:10])

    caplog.set_level(logging.WARNING)
    notices: list[str] = []
    async with market(tmp_path) as place:
        await place.join(seller, buyer)
        place.node.runtime.observers.append(
            lambda _, notice: notices.append(notice.detail) if notice.detail else None
        )
        perform = place.node.settlement.perform
        refused = False

        async def once_refused(effect_id: str, call: Any, identity: Any) -> Any:
            nonlocal refused
            if isinstance(call, Open) and not refused:
                refused = True
                raise refusal
            return await perform(effect_id, call, identity)

        monkeypatch.setattr(place.node.settlement, "perform", once_refused)
        await buyer.purchase(
            "summarise",
            Summarise(text="one"),
            returns=Summary,
            max_price="0.05",
            decide_after_ms=100,
        )
        await place.rest()
    assert refused
    told = [r.getMessage() for r in caplog.records if refusal.error in r.getMessage()]
    assert len(told) == bool(warned)
    assert all(warned in line and line.startswith("buyer, deal ") for line in told)
    assert any(refusal.error in detail for detail in notices), "who listens is told all the same"


async def test_an_engine_that_nobody_knows_is_answered_with_all_there_are() -> None:
    with pytest.raises(ConfigurationError) as raised:
        await _engine("nosuch")
    for kind in ("auto", "ollama", "openai", "llamacpp", "echo", "none"):
        assert kind in str(raised.value)
