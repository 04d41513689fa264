"""What the escrow's log says of its deals: read block by block, kept, and read again in a fork."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import OrderedDict
from dataclasses import replace
from typing import Any, Final

from eth_abi.exceptions import DecodingError

from coase.escrow.ports import ChainEvent, ChainTerms
from coase.protocol.errors import ChainUnavailable
from coase.protocol.types import How, JobView, Phase

from .abi import escrow_abi
from .rpc import ChainBlock, Endpoint, RpcFailed, Shared

LOGS_RANGE_MAX_BLOCKS: Final = 2_000  # What careful public endpoints give at a time.
KNOWN_BLOCKS_MAX: Final = 256  # Deeper forks are met by reading everything again.
REREAD_EVERY_S: Final = 300.0  # Endpoints of several machines lose logs without an error.
REREAD_BLOCKS: Final = 1_000
READS_MAX: Final = 3
READ_AGAIN_AFTER_S: Final = 0.1
PLAIN_ID_MAX: Final = 2**64  # Plain jobs count from 1; a deal's id is a digest.
_NO_JOB: Final = JobView()
_CANCELLED: Final = "cancelled"
_KINDS: Final = {
    "DealOpened": "opened",
    "JobSubmitted": "submitted",
    "DealDisputed": "disputed",
    "DealAnswered": "answered",
    "DealRuled": "ruled",
    "DealSettled": "settled",
    "TermsCancelled": _CANCELLED,
}
_HOW: Final = "how"


class JobLog:
    """The escrow's events up to ``confirmations`` below the newest block.

    A new block costs one question for the newest block and one for its logs, whatever the number
    of deals; with no new block it is the first alone.
    """

    def __init__(
        self, endpoint: Endpoint, escrow: str, *, confirmations: int, from_block: int
    ) -> None:
        self._endpoint = endpoint
        self._escrow = escrow
        self._confirmations = confirmations
        self._from_block = from_block
        self._next = from_block
        self._blocks: OrderedDict[int, str] = OrderedDict()
        self._events: list[ChainEvent] = []
        self._hows: dict[tuple[int, int], How] = {}
        self._by_job: dict[bytes, list[ChainEvent]] = {}
        self._views: dict[bytes, JobView] = {}
        self._forked_at: int | None = None
        self._reread_at: float | None = None
        self._sync = Shared(self._read)
        abi = escrow_abi()
        self._kinds = {event: abi.events[abi.topic(event)] for event in _KINDS}
        self._topics = ["0x" + event.topic.hex() for event in self._kinds.values()]

    async def close(self) -> None:
        """Stop reading. Safe to repeat."""
        await self._sync.close()

    async def views(self, job_ids: list[bytes]) -> dict[bytes, JobView]:
        """Return what the log says of each deal, at least as new as the moment of the call."""
        if not job_ids:
            return {}
        await self._sync.get()
        return {job_id: self._view(job_id) for job_id in job_ids}

    async def events(self, from_block: int) -> tuple[list[ChainEvent], int]:
        """Return the events from ``from_block`` on, and the block to ask from next.

        After a fork that reaches below ``from_block``, the first call gives all events since the
        fork: what was there before has not happened, and what came in its place must not be lost.
        So it is when reading again brings up what an endpoint had left out.
        """
        await self._sync.get()
        if self._forked_at is not None:
            from_block, self._forked_at = min(from_block, self._forked_at), None
        first = bisect_left(self._events, from_block, key=lambda event: event.block)
        found = [event for event in self._events[first:] if event.kind != _CANCELLED]
        return found, max(from_block, self._next)

    # -- reading -----------------------------------------------------------------------------

    async def _read(self) -> None:
        for left in reversed(range(READS_MAX)):
            try:
                return await self._read_once()
            except ChainUnavailable:  # A block may vanish between two questions.
                if not left:
                    raise
                await asyncio.sleep(READ_AGAIN_AFTER_S)

    async def _read_once(self) -> None:
        head = await self._endpoint.latest()
        target = head
        if self._confirmations:
            if head.number < self._confirmations:
                return
            target = await self._endpoint.block(hex(head.number - self._confirmations))
        clock = asyncio.get_running_loop().time()
        if self._reread_at is None:
            self._reread_at = clock + REREAD_EVERY_S
        elif clock >= self._reread_at:
            await self._read_again(target)
            self._reread_at = clock + REREAD_EVERY_S
            return
        if self._blocks.get(target.number) == target.hash and self._next == target.number + 1:
            return
        await self._find_fork(target)
        await self._read_logs(target)

    async def _read_again(self, target: ChainBlock) -> None:
        """Read the newest blocks once more, and remember from where on something was missing."""
        told, end = {_place(event) for event in self._events}, self._next
        await self._find_fork(target)
        end = min(end, self._next)
        self._cut(max(self._from_block, self._next - REREAD_BLOCKS))
        await self._read_logs(target)
        left_out = [e.block for e in self._events if e.block < end and _place(e) not in told]
        if left_out:
            self._forked_at = min(left_out[0], self._forked_at or left_out[0])

    async def _find_fork(self, target: ChainBlock) -> None:
        """Forget what the chain has forgotten: everything above the last block that still is."""
        if not self._blocks:
            return
        newest = next(reversed(self._blocks))
        if newest == target.number - 1 and self._blocks[newest] == target.parent_hash:
            return
        known = [number for number in self._blocks if number <= target.number]
        # Of the known blocks the first some are still there. The newest is looked at first, as it
        # nearly always is; then the search halves.
        stand, gone, place = 0, len(known), len(known) - 1
        while stand < gone:
            number = known[place]
            block = target if number == target.number else await self._endpoint.block(hex(number))
            if self._blocks[number] == block.hash:
                stand = place + 1
            else:
                gone = place
            place = (stand + gone) // 2
        keep = known[stand - 1] if stand else self._from_block - 1
        if keep < self._next - 1:
            self._forked_at = min(keep + 1, self._forked_at or keep + 1)
            self._cut(keep + 1)

    def _cut(self, first: int) -> None:
        """Forget all blocks from ``first`` on."""
        self._next = min(self._next, first)
        for number in [number for number in self._blocks if number >= first]:
            del self._blocks[number]
        place = bisect_left(self._events, first, key=lambda event: event.block)
        for event in self._events[place:]:
            self._views.pop(event.job_id, None)
            self._hows.pop((event.block, event.log_index), None)
            kept = self._by_job[event.job_id]
            kept.pop()
            if not kept:
                del self._by_job[event.job_id]
        del self._events[place:]

    async def _read_logs(self, target: ChainBlock) -> None:
        span = LOGS_RANGE_MAX_BLOCKS
        while self._next <= target.number:
            last = min(target.number, self._next + span - 1)
            try:
                raws = await self._logs(self._next, last, target)
            except RpcFailed as error:
                if span == 1 or last == self._next:
                    raise ChainUnavailable(
                        f"{self._endpoint.url} gives no logs of block {last}: {error}"
                    ) from error
                span = max(1, (last - self._next + 1) // 4)  # It has a limit of its own.
                continue
            await self._take(raws, self._next, last)
            self._next = last + 1
        self._blocks[target.number] = target.hash
        while len(self._blocks) > KNOWN_BLOCKS_MAX:
            self._blocks.popitem(last=False)

    async def _logs(self, first: int, last: int, target: ChainBlock) -> list[dict[str, Any]]:
        query: dict[str, Any] = {"address": self._escrow, "topics": [self._topics]}
        if first == last == target.number:
            # By its hash: a machine that lags says so, instead of giving an empty list.
            query["blockHash"] = target.hash
        else:
            query |= {"fromBlock": hex(first), "toBlock": hex(last)}
        raws: list[dict[str, Any]] = await self._endpoint.ask("eth_getLogs", query)
        return raws

    async def _take(self, raws: list[dict[str, Any]], first: int, last: int) -> None:
        """Add what logs tell, all of it or nothing."""
        try:
            found = self._told(raws, await self._times(raws))
        except (KeyError, TypeError, ValueError, IndexError, DecodingError) as error:
            raise ChainUnavailable(
                f"{self._endpoint.url} gives no sensible logs: {type(error).__name__} {error}"
            ) from error
        for told, how in sorted(found, key=lambda item: _place(item[0])):
            if not first <= told.block <= last:
                raise ChainUnavailable(
                    f"{self._endpoint.url} gives logs of block {told.block} for {first} to {last}"
                )
            if how is not None:
                self._hows[told.block, told.log_index] = how
            self._events.append(told)
            self._by_job.setdefault(told.job_id, []).append(told)
            self._views.pop(told.job_id, None)

    def _told(
        self, raws: list[dict[str, Any]], times: dict[int, int]
    ) -> list[tuple[ChainEvent, How | None]]:
        found: list[tuple[ChainEvent, How | None]] = []
        for raw in raws:
            if str(raw["address"]).lower() != self._escrow.lower():
                raise ValueError(f"of {raw['address']}, not of the escrow")
            topics = [bytes.fromhex(topic[2:]) for topic in raw["topics"]]
            event = escrow_abi().events[topics[0]]
            if int.from_bytes(topics[1], "big") < PLAIN_ID_MAX or raw.get("removed"):
                continue
            fields = event.decode(topics, bytes.fromhex(raw["data"][2:]))
            number, index = int(raw["blockNumber"], 16), int(raw["logIndex"], 16)
            told = ChainEvent(
                kind=_KINDS[event.name],
                job_id=topics[1],
                block=number,
                log_index=index,
                time_s=times[number],
                tx_hash=raw["transactionHash"],
                terms=_terms(fields["terms"]) if "terms" in fields else None,
                evidence=fields.get("evidence", fields.get("deliverable", b"")),
                to_seller_units=fields.get("toSeller", 0),
                to_buyer_units=fields.get("toBuyer", 0),
            )
            found.append((told, How(fields[_HOW]) if _HOW in fields else None))
        return found

    async def _times(self, raws: list[dict[str, Any]]) -> dict[int, int]:
        times: dict[int, int] = {}
        missing: dict[int, None] = {}
        for raw in raws:
            number, time = int(raw["blockNumber"], 16), raw.get("blockTimestamp")
            if time is None:
                missing[number] = None
            else:
                times[number] = int(time, 16)
        for number in missing:
            times[number] = (await self._endpoint.block(hex(number))).time_s
        return times

    # -- folding -----------------------------------------------------------------------------

    def _view(self, job_id: bytes) -> JobView:
        view = self._views.get(job_id)
        if view is None:
            view, bond_units = _NO_JOB, 0
            for event in self._by_job.get(job_id, ()):
                if event.terms is not None:
                    bond_units = event.terms.bond_units
                how = self._hows.get((event.block, event.log_index), How.OPEN)
                view = fold(view, event, bond_units=bond_units, how=how)
            self._views[job_id] = view
        return view


def fold(view: JobView, event: ChainEvent, *, bond_units: int, how: How) -> JobView:
    """Return what a deal is after ``event``."""
    match event.kind:
        case "opened" if event.terms is not None:
            return JobView(Phase.WORKING, event.terms.deliver_by_s, tx_hash=event.tx_hash)
        case "submitted":
            return _moved(replace(view, deliverable=event.evidence), Phase.DELIVERED, event)
        case "disputed":
            # Without a bond there is nothing to answer with: the arbiter's time starts.
            return _moved(view, Phase.DISPUTED if bond_units else Phase.ANSWERED, event)
        case "answered":
            return _moved(view, Phase.ANSWERED, event)
        case "settled":
            return replace(
                view,
                phase=Phase.CLOSED,
                clock_s=view.clock_s if view.phase is Phase.DELIVERED else 0,
                how=how,
                to_seller_units=event.to_seller_units,
                to_buyer_units=event.to_buyer_units,
                tx_hash=event.tx_hash,
            )
        case "cancelled":
            return JobView(Phase.CANCELLED, tx_hash=event.tx_hash)
    return view


def _place(event: ChainEvent) -> tuple[int, int]:
    return event.block, event.log_index


def _moved(view: JobView, phase: Phase, event: ChainEvent) -> JobView:
    return replace(view, phase=phase, clock_s=event.time_s, tx_hash=event.tx_hash)


def _terms(values: tuple[Any, ...]) -> ChainTerms:
    return ChainTerms(*values)
