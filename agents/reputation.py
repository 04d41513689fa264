"""What others say of an agent on chain, checked entry by entry, and what little it weighs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from coase.escrow.feedback import (
    BadFeedbackFile,
    Counted,
    FeedbackFile,
    Flaw,
    Reader,
    Scale,
    first_uses,
    from_data_uri,
    rating_permille,
    read_entry,
    weigh,
)
from coase.escrow.voucher import CHANNELS
from coase.negotiation.scores import HEARD_MAX
from coase.protocol.errors import ChainUnavailable
from coase.protocol.identity import keccak256

if TYPE_CHECKING:
    from collections.abc import Collection

    from coase.escrow.feedback import AgentRecord, FeedbackEntry
    from coase.escrow.ports import Registries
    from coase.protocol.types import AgentId

    from .config import Network

ENTRIES_MAX: Final = 200  # The newest ones: anybody may write as many as he pays gas for.
CHECKED_MAX: Final = 10_000
DOUBT: Final = 40_000
"""Words of this weight are believed half, those of nobody not at all: two well paid deals."""


@dataclass(frozen=True, slots=True)
class Word:
    """One entry as a reader finds it: counted with a weight, or the flaw for which it is not."""

    entry: FeedbackEntry
    counted: Counted | None
    flaw: Flaw | None
    weight: int = 0


@dataclass(frozen=True, slots=True)
class Repute:
    """What is said of one agent, oldest first."""

    record: AgentRecord
    words: tuple[Word, ...]

    def prior(self, *, me: AgentId = "") -> tuple[int, int]:
        """Return good and bad in millionths, for a score book, without what ``me`` said itself.

        The reader's own dealings stand in his book already.
        """
        good = bad = 0
        for word in self.words:
            rating = None if word.counted is None else rating_permille(word.counted)
            if rating is not None and word.entry.client != me:
                good += word.weight * rating // 1_000
                bad += word.weight * (1_000 - rating) // 1_000
        total = good + bad
        trusted = HEARD_MAX * total // (total + DOUBT)
        return (good * trusted // total, bad * trusted // total) if total else (0, 0)

    @property
    def rating_permille(self) -> int | None:
        """How good the work is found, by weight; None if nobody speaks of it."""
        told = [
            (word.weight, rating)
            for word in self.words
            if word.counted is not None and (rating := rating_permille(word.counted)) is not None
        ]
        total = sum(weight for weight, _ in told)
        return sum(weight * rating for weight, rating in told) // total if total else None


def reader_of(network: Network) -> Reader:
    """Return whose eyes these are: only pay in the network's token, on its chain, is seen."""
    return Reader(
        chain_id=network.chain_id,
        registry=network.identity_registry,
        tokens=frozenset((network.token,)),
        channels=network.channels or CHANNELS,
    )


class Readings:
    """Reads what is said of agents; what was checked once is not asked for again."""

    def __init__(self, registries: Registries, reader: Reader) -> None:
        self._registries, self._reader = registries, reader
        self._checked: dict[tuple[int, AgentId, int], Counted | Flaw] = {}

    async def read(
        self,
        record: AgentRecord,
        *,
        known: Collection[AgentId] = (),
        now_s: int,
        from_block: int = 0,
    ) -> Repute:
        """Return what is said of an agent, and what each word weighs at ``now_s``.

        ``known`` are those whom the reader can tell from strangers: he has dealt with them. All
        others share the weight of one.

        :raises ChainUnavailable: if the endpoint does not answer
        """
        entries = (await self._registries.feedback(record.agent_id, from_block))[-ENTRIES_MAX:]
        found = [(entry, await self._check(entry)) for entry in entries]
        counted = first_uses([one for _, one in found if isinstance(one, Counted)])
        groups = {address: address for address in known}
        weighed = weigh(counted, groups=groups, now_s=now_s, scale=Scale())
        weights = {id(one): units for one, units in weighed}
        return Repute(record, tuple(_word(entry, one, weights) for entry, one in found))

    async def _check(self, entry: FeedbackEntry) -> Counted | Flaw:
        if entry.is_revoked:
            return Flaw.REVOKED
        key = (entry.agent_id, entry.client, entry.index)
        if (known := self._checked.get(key)) is not None:
            return known
        found = await self.check(entry)
        if found not in (Flaw.NO_PAYMENT, Flaw.UNREADABLE):  # These may be mended by time.
            if len(self._checked) >= CHECKED_MAX:
                del self._checked[next(iter(self._checked))]
            self._checked[key] = found
        return found

    async def check(self, entry: FeedbackEntry) -> Counted | Flaw:
        """Return the entry if all holds that makes it count, or the first thing that does not.

        A file that is not on the chain itself is not fetched: a stranger chose where it lies.
        """
        data = from_data_uri(entry.uri)
        if data is None:
            return Flaw.UNREADABLE
        reader = self._reader
        try:
            proof = FeedbackFile.decode(data).proof
        except BadFeedbackFile:
            return read_entry(entry, data, None, paid_to="", reader=reader)
        if keccak256(data) != entry.file_hash or proof.chain_id != reader.chain_id:
            return read_entry(entry, data, None, paid_to="", reader=reader)
        log = await self._registries.payment(proof.tx_hash, proof.log_index)
        paid_to = ""
        if log is not None:
            try:
                then = await self._registries.agent(entry.agent_id, block=log.block)
            except ChainUnavailable:  # Few endpoints keep old states.
                return Flaw.UNREADABLE
            paid_to = then.paid_to if then is not None else ""
        return read_entry(entry, data, log, paid_to=paid_to, reader=reader)


def _word(entry: FeedbackEntry, one: Counted | Flaw, weights: dict[int, int]) -> Word:
    if isinstance(one, Flaw):
        return Word(entry, None, one)
    if id(one) not in weights:
        return Word(entry, None, Flaw.USED_BEFORE)
    return Word(entry, one, None, weights[id(one)])
