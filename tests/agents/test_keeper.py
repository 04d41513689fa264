"""A keeper ends what silence has ended, for strangers, once, and nothing before its time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from coase.agents.backends.sqlite import SqliteJournal
from coase.agents.keeper import AGAIN_AFTER_S, Keeper, Poked
from coase.escrow.keeping import OUTCOMES, silence_limit_s, terms_in_log
from coase.escrow.ports import chain_terms
from coase.protocol.errors import ChainUnavailable
from coase.protocol.identity import Identity
from coase.protocol.types import How, Phase
from tests.conformance.settlement_world import LIVE, Stage, World
from tests.conformance.test_settlement_evm import EvmWorld
from tests.conformance.test_settlement_memory import MemoryWorld

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

KEEPER = Identity(b"\x51" * 32)


@dataclass
class Scene:
    """Deals of others, and a keeper who knows none of them."""

    world: World
    stage: Stage
    keeper: Keeper
    journal: SqliteJournal

    async def at(self, time_s: int, keeper: Keeper | None = None) -> list[Poked]:
        """Make a block at that time, let the keeper look, and make blocks for what it sends."""
        await self.world.set_time(time_s)
        await self.world.seal()
        found: list[Poked] = []
        done = False

        async def look() -> None:
            nonlocal done
            found.extend(await (keeper or self.keeper).look())
            done = True

        async with anyio.create_task_group() as group:
            group.start_soon(look)
            with anyio.fail_after(60):
                while not done:
                    if await self.world.pending():
                        await self.world.seal()
                    await anyio.sleep(0.002)
        return found


@pytest.fixture(params=["memory", "evm"])
async def scene(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Scene]:
    world: MemoryWorld | EvmWorld
    if request.param == "evm":
        world = EvmWorld()
        await world.start()
    else:
        world = MemoryWorld()
    await world.mint(KEEPER.address, 0)
    journal = SqliteJournal(tmp_path / "journal.sqlite")
    keeper = Keeper(world.settlement, KEEPER, journal, now_ms=lambda: 1_000, grace_s=10)
    yield Scene(world, await Stage.begin(world), keeper, journal)
    await journal.close()
    await world.close()


@pytest.mark.anyio
@pytest.mark.parametrize("phase", LIVE)
async def test_each_silence_is_ended_after_its_time_and_a_grace(scene: Scene, phase: Phase) -> None:
    terms = await scene.stage.reach(phase)
    limit_s = await scene.stage.limit_s(terms)
    view = await scene.stage.view(terms)
    assert silence_limit_s(view, terms) == limit_s
    assert await scene.at(limit_s + 10) == []
    (poked,) = await scene.at(limit_s + 11)
    assert (poked.job_id, poked.phase) == (scene.stage.id_of(terms).hex(), phase.name.lower())
    assert (poked.late_s, poked.refused) == (11, "")
    after = await scene.stage.view(terms)
    assert (after.phase, after.how) == (Phase.CLOSED, OUTCOMES[phase][0])
    assert poked.outcome == OUTCOMES[phase][1]
    assert after.tx_hash == poked.tx_hash
    # Nothing is left to do, and it knows.
    assert await scene.at(limit_s + 500) == []
    assert scene.keeper.open == {}


@pytest.mark.anyio
async def test_many_deals_at_once_and_a_restart_that_finds_them_all(scene: Scene) -> None:
    deals = [await scene.stage.reach(Phase.WORKING) for _ in range(5)]
    settled = await scene.stage.reach(Phase.WORKING)
    await scene.stage.do(
        scene.stage.settling(settled, 4, signed_by=("buyer", "seller")), "stranger"
    )
    late_s = max(terms.deliver_by_s for terms in deals) + 11
    fresh = Keeper(scene.world.settlement, KEEPER, scene.journal, now_ms=lambda: 2_000)
    done = await scene.at(late_s, fresh)
    assert {poked.job_id for poked in done} == {scene.stage.id_of(terms).hex() for terms in deals}
    again = Keeper(scene.world.settlement, KEEPER, scene.journal, now_ms=lambda: 3_000)
    assert await scene.at(late_s + 5, again) == []
    await scene.journal.durable(scene.journal.append(()))
    rows = scene.journal.read("SELECT deal, at_ms, data, open FROM records ORDER BY deal")
    assert [row[0] for row in rows] == sorted(poked.job_id for poked in done)
    assert {(row[1], row[3]) for row in rows} == {(2_000, 0)}
    assert json.loads(rows[0][2])["tx"] == min(done, key=lambda poked: poked.job_id).tx_hash


@pytest.mark.anyio
async def test_who_was_quicker_costs_nothing_and_is_not_asked_for_again_at_once(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = await scene.stage.reach(Phase.WORKING)
    real = scene.world.settlement.perform

    async def late(*args: Any) -> Any:
        """Somebody else's poke comes into a block just before."""
        monkeypatch.setattr(scene.world.settlement, "perform", real)
        await scene.stage.do(args[1], "stranger", at_s=terms.deliver_by_s + 12)
        return await real(*args)

    monkeypatch.setattr(scene.world.settlement, "perform", late)
    (poked,) = await scene.at(terms.deliver_by_s + 11)
    assert poked.refused
    assert poked.tx_hash == ""
    assert await scene.at(terms.deliver_by_s + 12 + AGAIN_AFTER_S) == []
    assert scene.keeper.open == {}
    assert scene.journal.read("SELECT * FROM records") == []


@pytest.mark.anyio
async def test_what_a_fork_undid_is_ended_again(scene: Scene) -> None:
    terms = await scene.stage.reach(Phase.WORKING)
    limit_s = terms.deliver_by_s
    assert len(await scene.at(limit_s + 11)) == 1
    await scene.world.reorg(1, drop=True)
    assert (await scene.stage.view(terms)).phase is Phase.WORKING
    (again,) = await scene.at(limit_s + 12 + AGAIN_AFTER_S)
    assert again.refused == ""
    assert (await scene.stage.view(terms)).how is How.UNDELIVERED


@pytest.mark.anyio
async def test_a_chain_that_is_away_is_said_and_nothing_is_forgotten(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = await scene.stage.reach(Phase.WORKING)
    await scene.at(terms.deliver_by_s)

    async def away(*args: Any) -> Any:
        raise ChainUnavailable("gone")

    monkeypatch.setattr(scene.world.settlement, "perform", away)
    with pytest.RaisesGroup(pytest.RaisesExc(ChainUnavailable, match="gone")):
        await scene.at(terms.deliver_by_s + 11)
    monkeypatch.undo()
    (poked,) = await scene.at(terms.deliver_by_s + 12 + AGAIN_AFTER_S)
    assert poked.refused == ""


@pytest.mark.anyio
async def test_terms_out_of_the_log_are_the_deals_own_but_for_the_work(scene: Scene) -> None:
    terms = scene.stage.terms()
    found = terms_in_log(chain_terms(terms))
    assert found.digest(scene.world.settlement.domain) == scene.stage.id_of(terms)
    assert chain_terms(found) == chain_terms(terms)
