"""The transactions that wait for a block: ordered by nonce, replaced by a higher fee."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

POOL_SIZE_MAX: Final = 8192  # About 8 MB of our calls; a block takes some hundreds.
SENDER_SIZE_MAX: Final = 1024  # One key must not fill the pool; a busy seller has some dozens.
REPLACE_FEE_PERCENT_MIN: Final = 10  # What public nodes ask too, or replacing would be free spam.


class PoolRefused(Exception):
    """The pool does not take the transaction. The text is the one that public nodes use."""


@dataclass(frozen=True, slots=True)
class Pooled:
    """A signed transaction and what the pool needs to know of it."""

    tx_hash: bytes
    raw: bytes
    tx: Any
    sender: bytes
    nonce: int
    fee_max: int
    tip_max: int
    order: int

    def tip(self, base_fee: int) -> int:
        """Return what it pays above ``base_fee`` for each unit of gas."""
        return min(self.tip_max, self.fee_max - base_fee)


class Pool:
    """Waiting transactions by sender and nonce. A gap of nonces holds back what follows it."""

    def __init__(self) -> None:
        self._senders: dict[bytes, dict[int, Pooled]] = {}
        self._by_hash: dict[bytes, Pooled] = {}
        self._order = 0

    def __len__(self) -> int:
        return len(self._by_hash)

    def get(self, tx_hash: bytes) -> Pooled | None:
        """Return the waiting transaction of that hash, or None."""
        return self._by_hash.get(tx_hash)

    def all(self) -> list[Pooled]:
        """Return every waiting transaction, in the order of arrival."""
        return sorted(self._by_hash.values(), key=lambda item: item.order)

    def add(
        self, *, tx_hash: bytes, raw: bytes, tx: Any, sender: bytes, fee_max: int, tip_max: int
    ) -> Pooled:
        """Take a transaction, or replace the one of the same sender and nonce.

        :raises PoolRefused: if it is known, the pool is full, or the fee is no real raise
        """
        if tx_hash in self._by_hash:
            raise PoolRefused("already known")
        mine = self._senders.get(sender, {})
        nonce = int(tx.nonce)
        old = mine.get(nonce)
        if old is not None:
            least = 100 + REPLACE_FEE_PERCENT_MIN
            if fee_max * 100 < old.fee_max * least or tip_max * 100 < old.tip_max * least:
                raise PoolRefused("replacement transaction underpriced")
        elif len(self._by_hash) >= POOL_SIZE_MAX or len(mine) >= SENDER_SIZE_MAX:
            raise PoolRefused("txpool is full")
        if old is not None:
            self.drop(old)
        self._order += 1
        item = Pooled(tx_hash, raw, tx, sender, nonce, fee_max, tip_max, self._order)
        self._senders.setdefault(sender, {})[nonce] = item
        self._by_hash[tx_hash] = item
        return item

    def drop(self, item: Pooled) -> None:
        """Forget one transaction. Safe to repeat."""
        self._by_hash.pop(item.tx_hash, None)
        mine = self._senders.get(item.sender)
        if mine is None or mine.get(item.nonce) is not item:
            return
        del mine[item.nonce]
        if not mine:
            del self._senders[item.sender]

    def forget_below(self, sender: bytes, nonce: int) -> None:
        """Forget what ``sender`` can no longer send, since its nonce has passed ``nonce``."""
        for old in [n for n in self._senders.get(sender, {}) if n < nonce]:
            self.drop(self._senders[sender][old])

    def next_nonce(self, sender: bytes, nonce: int) -> int:
        """Return the first nonce from ``nonce`` on that is free, as "pending" counts."""
        mine = self._senders.get(sender, {})
        while nonce in mine:
            nonce += 1
        return nonce

    def ready(self, nonces: dict[bytes, int], base_fee: int) -> Iterator[Pooled]:
        """Yield what a block may take: each sender's by nonce, the best tip first.

        ``nonces`` says where each of ``senders()`` stands. What pays less than ``base_fee``
        stays, and with it what the same sender sent after it.
        """
        heap: list[tuple[int, int, Pooled]] = []

        def push(sender: bytes, nonce: int) -> None:
            item = self._senders.get(sender, {}).get(nonce)
            if item is not None and item.fee_max >= base_fee:
                heapq.heappush(heap, (-item.tip(base_fee), item.order, item))

        for sender, nonce in nonces.items():
            push(sender, nonce)
        while heap:
            _, _, item = heapq.heappop(heap)
            yield item
            push(item.sender, item.nonce + 1)

    def senders(self) -> list[bytes]:
        """Return everybody who has something waiting."""
        return list(self._senders)
