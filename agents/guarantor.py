"""Keeps a node's stakes: puts up what sellers promise, sees what is free, closes slices."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import anyio

from coase.escrow.stake import Allow, Deposit, Release, Unbond
from coase.protocol.errors import CallReverted, ChainUnavailable

from .steps import Step

if TYPE_CHECKING:
    from coase.escrow.ports import StakeRegistry
    from coase.protocol.types import AgentId

    from .runtime import Runtime, Seat
    from .slices import Slice

log = logging.getLogger(__name__)

LOOK_S: Final = 2.0
AGAIN_S: Final = 60
"""Until a slice that could not be closed is tried again."""


class Guarantor:
    """The stakes of all agents of one node, in one vault."""

    def __init__(self, runtime: Runtime, stake: StakeRegistry) -> None:
        self.runtime, self.stake = runtime, stake
        self.wanted: dict[AgentId, int] = {}
        """What agents want to have in the vault and have not put up yet."""
        self._not_before_s: dict[bytes, int] = {}

    async def put_up(self, seat: Seat, units: int) -> None:
        """Have ``units`` of an agent in the vault, for deals of this escrow to reserve.

        What is there beyond them begins to leave, as far as no deal holds it, and is paid back
        after the vault's own delay. Safe to repeat, also after a crash: what is there already is
        not put up again.

        :raises CallReverted: if the agent has not so much, or the token refuses
        :raises ChainUnavailable: if it cannot be told whether it went through; repeat it
        """
        me = seat.desk.me
        held = await self.stake.stake(me)
        allowance = await self.stake.allowance(me)
        there = held.free_units + held.reserved_units
        where = f"stake:{me}:{held.bonded_units}:{held.unbonding_units}:{held.unbond_at_s}"
        if there < units:
            more = units - there
            await self.stake.perform(f"{where}:+{more}", Deposit(more), seat.identity)
        elif less := min(there - units, held.free_units):
            await self.stake.perform(f"{where}:-{less}", Unbond(less), seat.identity)
        if allowance.max_units != units:
            effect_id = f"stake:{me}:allow:{allowance.max_units}>{units}:{there}"
            await self.stake.perform(effect_id, Allow(seat.desk.asset.token, units), seat.identity)
        await self.look(seat)

    async def look(self, seat: Seat) -> None:
        """See what of an agent's stake is free for deals.

        :raises ChainUnavailable: if the chain does not answer
        """
        held = await self.stake.stake(seat.desk.me)
        allowance = await self.stake.allowance(seat.desk.me)
        if held.unbonding_units and seat.desk.head.time_s >= held.unbond_at_s:
            effect_id = f"stake:{seat.desk.me}:release:{held.unbond_at_s}:{held.unbonding_units}"
            await self.stake.perform(effect_id, Release(), seat.identity)
        room = min(held.free_units, allowance.max_units - allowance.reserved_units)
        seat.desk.stake_free_units = max(0, room)

    async def run(self) -> None:
        """Look and close again and again, until cancelled."""
        while True:
            await anyio.sleep(LOOK_S)
            try:
                for seat in list(self.runtime.seats.values()):
                    if (units := self.wanted.get(seat.desk.me)) is not None:
                        await self.put_up(seat, units)
                        del self.wanted[seat.desk.me]
                    if seat.desk.stake_free_units is not None:
                        await self.look(seat)
                    await self.close_slices(seat)
            except (ChainUnavailable, CallReverted) as error:
                log.info("stakes wait: %s", error)

    async def close_slices(self, seat: Seat) -> None:
        """Close the slices of an agent's deals that have ended.

        :raises ChainUnavailable: if it cannot be told what went through; it is repeated safely
        """
        now_s = seat.desk.head.time_s
        for one in list(seat.desk.slices.open.values()):
            if now_s >= max(one.from_s, self._not_before_s.get(one.job_id, 0)):
                await self._close(seat, one, now_s)

    async def _close(self, seat: Seat, one: Slice, now_s: int) -> None:
        if await self.stake.slice_units(one.job_id):
            effect_id = f"{one.job_id.hex()}:slice@{seat.desk.me}"
            try:
                await self.stake.perform(effect_id, one.call, seat.identity)
            except CallReverted as error:
                # Somebody else was quicker, or a fork has undone the end: the next look tells.
                log.info("the slice of %s is not closed: %s", one.job_id.hex()[:8], error)
                self._not_before_s[one.job_id] = now_s + AGAIN_S
                return
        step = Step()
        seat.desk.slices.closed(one.job_id, step)
        self._not_before_s.pop(one.job_id, None)
        self.runtime.apply(seat, step)
