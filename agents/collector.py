"""Turns a seller's vouchers into money, when that is worth its gas or when it must be now.

What goes when is ``escrow.claims``'s to say; here it is done. A claim is a write like any other: it
is kept before it is sent and repeated under the same id, so that a crash neither loses nor doubles
it, and a voucher is claimed by its total, which the contract takes once.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import anyio

from coase.escrow.claims import ClaimPolicy, GasPrice, plan_claims
from coase.escrow.voucher import GiveBack, PayOut
from coase.protocol.errors import CallReverted, ChainUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from coase.escrow.claims import ClaimBatch
    from coase.escrow.ports import Channels
    from coase.protocol.types import AgentId

    from .runtime import Runtime, Seat

log = logging.getLogger(__name__)

LOOK_S: Final = 2.0
LOCAL_CLAIMS: Final = ClaimPolicy(value_to_cost=1, units_min=10**30, age_max_s=60)
"""Where gas costs nothing: at the end of a stream, or once a minute."""
ALL_CLAIMS: Final = ClaimPolicy(value_to_cost=0, units_min=1)
PUBLIC_CLAIMS: Final = ClaimPolicy()
COIN_UNITS: Final = 3_000 * 10**6
"""What a coin of the chain is worth, in units of a dollar token, where nobody says better: it only
decides how much has to be there before it is fetched."""


class Collector:
    """Claims for all agents of one node."""

    def __init__(
        self,
        runtime: Runtime,
        channels: Channels,
        *,
        policy: ClaimPolicy,
        coin_units: int = COIN_UNITS,
        told: Callable[[Seat, int], object] = lambda seat, units: None,
    ) -> None:
        self.runtime, self.channels, self.policy = runtime, channels, policy
        self.coin_units, self._told = coin_units, told
        self._paid: set[AgentId] = set()

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await anyio.sleep(LOOK_S)
            try:
                await self.collect()
            except* (ChainUnavailable, CallReverted) as errors:
                log.info("claims wait: %s", errors.exceptions[0])

    async def collect(self, *, policy: ClaimPolicy | None = None) -> int:
        """Claim and pay out what is due now; return how many units were claimed.

        :raises ChainUnavailable: if it cannot be told what went through; it is repeated safely
        :raises CallReverted: if the token refuses to be paid out; what was claimed stays claimed
        """
        units: list[int] = []

        async def one(seat: Seat) -> None:
            units.append(await self._collect(seat, policy or self.policy))

        async with anyio.create_task_group() as group:
            for seat in list(self.runtime.seats.values()):
                if seat.desk.streams.lines:
                    group.start_soon(one, seat)
        return sum(units)

    async def _collect(self, seat: Seat, policy: ClaimPolicy) -> int:
        if seat.desk.me not in self._paid:
            # What an earlier life claimed and did not fetch any more.
            await self._pay_out(seat, 0)
            self._paid.add(seat.desk.me)
        ready = seat.desk.streams.claimable()
        if not ready:
            return 0
        price = GasPrice(await self.channels.gas_price_wei(), self.coin_units)
        now_s = seat.desk.head.time_s
        batches = plan_claims(ready, price=price, policy=policy, now_s=now_s)
        return sum([await self._claim(seat, batch) for batch in batches])

    async def wind_up(self) -> None:
        """Claim all that vouchers say, and give the buyers back what no stream needs any more.

        :raises ChainUnavailable: if it cannot be told what went through; it is repeated safely
        :raises CallReverted: if the contract or the token refuses
        """
        await self.collect(policy=ALL_CLAIMS)
        async with anyio.create_task_group() as group:
            for seat in list(self.runtime.seats.values()):
                group.start_soon(self._give_back, seat)

    async def _give_back(self, seat: Seat) -> None:
        ends = [line.seller for line in seat.desk.streams.lines.values() if line.seller]
        views = await self.channels.views([end.channel_id for end in ends]) if ends else {}
        for end in ends:
            seen = end.see(views[end.channel_id])
            if units := seen.refundable_units:
                view = views[end.channel_id]
                effect_id = f"giveback:{end.channel_id.hex()}:{view.refund_nonce}"
                await self.channels.perform(effect_id, GiveBack(end.config, units), seat.identity)
                seat.desk.streams.want(end.channel_id)
        self.runtime.nudge()

    async def _claim(self, seat: Seat, batch: ClaimBatch) -> int:
        streams = seat.desk.streams
        outcome = await self.channels.claim("claim", batch.rows, seat.identity)
        units = 0
        for row in outcome.claimed:
            channel_id = row.voucher.channel_id
            line = streams.lines.get(channel_id)
            before = line.seller.view if line is not None and line.seller is not None else None
            units += row.units - (before.claimed_units if before is not None else 0)
            streams.want(channel_id)
        for row, why in outcome.refused:
            log.warning("%s cannot claim from %s: %s", seat.name, row.config.payer, why)
            streams.want(row.voucher.channel_id)
        if outcome.claimed:
            await self._pay_out(seat, units)
        self.runtime.nudge()
        return units

    async def _pay_out(self, seat: Seat, units: int) -> None:
        """Fetch what was claimed into the agent's own account."""
        unpaid = await self.channels.unpaid(seat.desk.me)
        if not unpaid:
            return
        head = await self.channels.head()
        effect_id = f"payout:{seat.desk.me}:{head.number}"
        await self.channels.perform(effect_id, PayOut(seat.desk.me), seat.identity)
        self._told(seat, units)
