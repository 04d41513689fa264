"""Ports to who holds the money: escrow for deals, channels for streams; what they say of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from coase.protocol.errors import CallReverted
from coase.protocol.identity import keccak256

from .voucher import ClaimAll

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coase.protocol.effects import Call, Rule
    from coase.protocol.identity import Identity
    from coase.protocol.terms import Domain, Terms
    from coase.protocol.types import AgentId, Asset, Head, JobView

    from .feedback import AgentRecord, FeedbackEntry, PaymentLog, RegistryCall
    from .panel import Constitution
    from .stake import Allowance, Stake, StakeCall
    from .voucher import ChannelCall, ChannelView, Claim


class FundingKind(StrEnum):
    """How a party's money reaches the escrow."""

    ALLOWANCE = "allowance"
    PERMIT = "permit"
    AUTHORIZATION = "authorization"
    """EIP-3009 with the job's id as nonce: no order among concurrent deals, the default."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """A call that is in a block. ``gas`` is 0 in the memory world."""

    tx_hash: str
    block: int
    time_s: int
    gas: int


@dataclass(frozen=True, slots=True)
class ChainEvent:
    """One event of a deal, as the log tells it. Terms come with ``opened`` only."""

    kind: str
    """opened, submitted, disputed, answered, ruled or settled."""
    job_id: bytes
    block: int
    log_index: int
    time_s: int
    tx_hash: str
    terms: ChainTerms | None = None
    evidence: bytes = b""
    to_seller_units: int = 0
    to_buyer_units: int = 0


@dataclass(frozen=True, slots=True)
class SentTx:
    """A signed transaction that may be on its way, as it was kept before it was sent."""

    effect_id: str
    sender: AgentId
    nonce: int
    raw: bytes
    tx_hash: str


@dataclass(frozen=True, slots=True)
class ChainTerms:
    """Terms as the log carries them: the work is known by its hash only."""

    buyer: AgentId
    seller: AgentId
    asset: str
    price_units: int
    arbiter: AgentId
    bond_units: int
    default_to_seller_units: int
    lock_by_s: int
    deliver_by_s: int
    dispute_s: int
    answer_s: int
    rule_s: int
    vault: str
    stake_units: int
    work_hash: bytes
    nonce: int

    def matches(self, terms: Terms) -> bool:
        """Return whether ``terms`` are these, the work included."""
        return self == chain_terms(terms)


def chain_terms(terms: Terms) -> ChainTerms:
    """Return the form of ``terms`` that the contract's ABI carries."""
    return ChainTerms(
        buyer=terms.buyer,
        seller=terms.seller,
        asset=terms.asset,
        price_units=terms.price_units,
        arbiter=terms.arbiter,
        bond_units=terms.bond_units,
        default_to_seller_units=terms.default_to_seller_units,
        lock_by_s=terms.lock_by_s,
        deliver_by_s=terms.deliver_by_s,
        dispute_s=terms.dispute_s,
        answer_s=terms.answer_s,
        rule_s=terms.rule_s,
        vault=terms.vault,
        stake_units=terms.stake_units,
        work_hash=terms.work.struct_hash,
        nonce=terms.nonce,
    )


class Settlement(ABC):
    """Holds the money of deals and lets nobody, not us either, bend the rules of their terms."""

    asset: Asset
    """The token that this escrow holds."""
    domain: Domain
    """The EIP-712 domain in which terms for this escrow are signed."""
    confirmations: int
    """How many blocks below the newest one the views are taken; 0 on a local chain."""

    @abstractmethod
    async def head(self) -> Head:
        """Return the newest block.

        :raises ChainUnavailable: if the endpoint does not answer
        """

    @abstractmethod
    async def balance(self, owner: AgentId) -> int:
        """Return the token units that ``owner`` holds outside of any escrow."""

    @abstractmethod
    async def owed(self, owner: AgentId) -> int:
        """Return the units that a failed payout left with the escrow for ``owner``."""

    @abstractmethod
    async def held(self) -> int:
        """Return all token units that the escrow itself holds."""

    @abstractmethod
    async def jobs(self, job_ids: Sequence[bytes]) -> dict[bytes, JobView]:
        """Return what the chain says of each deal, at ``confirmations`` below the newest block.

        A deal that was never opened, or whose opening was reorged out, has phase NONE.
        """

    @abstractmethod
    async def perform(self, effect_id: str, call: Call, identity: Identity) -> Receipt:
        """Send ``call`` from ``identity`` and return once it is in a block.

        Safe to repeat under the same ``effect_id``, also after a crash and by another process
        on the same state: what was already sent is found again, not sent twice with other bytes.

        :raises CallReverted: if the contract refuses it (found before sending, where possible)
        :raises ChainUnavailable: if it cannot be told whether it went through; repeat it
        """

    @abstractmethod
    async def events(self, from_block: int) -> tuple[list[ChainEvent], int]:
        """Return the escrow's events from ``from_block`` on, oldest first, and the next block.

        Ask again from that block. The first call after a fork that reaches below ``from_block``
        gives all events since the fork: what was told of those blocks before has not happened.
        """

    @abstractmethod
    async def close(self) -> None:
        """Release the connection. Safe to repeat."""


@dataclass(frozen=True, slots=True)
class ChannelEvent:
    """One event of a channel, as the log tells it."""

    kind: str
    """created, closed, deposited, claimed, refunded, withdrawing or withdrawn."""
    channel_id: bytes
    block: int
    log_index: int
    time_s: int
    tx_hash: str
    units: int = 0
    """What was moved or asked for; with ``claimed``, by how much the total rose."""
    total_units: int = 0
    """The new balance with ``deposited``, the new total with ``claimed``."""


@dataclass(frozen=True, slots=True)
class ClaimOutcome:
    """What became of a claim of several rows."""

    receipts: tuple[Receipt, ...]
    """One for each transaction that was needed."""
    claimed: tuple[Claim, ...]
    refused: tuple[tuple[Claim, str], ...] = ()
    """Rows that the contract does not take, each with its reason. They cost nothing."""


class Channels(ABC):
    """Holds deposits and pays them out by vouchers, one channel for each pair and salt."""

    asset: Asset
    """The token of all channels that are opened here."""
    domain: Domain
    """The EIP-712 domain in which vouchers are signed."""
    confirmations: int
    """How many blocks below the newest one the views are taken; 0 on a local chain."""

    @abstractmethod
    async def head(self) -> Head:
        """Return the newest block.

        :raises ChainUnavailable: if the endpoint does not answer
        """

    @abstractmethod
    async def views(self, channel_ids: Sequence[bytes]) -> dict[bytes, ChannelView]:
        """Return what the chain says of each channel, at ``confirmations`` below the newest block.

        All are of one block, whose time they carry. A channel that never was is all zeros.
        """

    @abstractmethod
    async def unpaid(self, receiver: AgentId) -> int:
        """Return the units that were claimed for ``receiver`` and not yet paid out."""

    @abstractmethod
    async def held(self) -> int:
        """Return all token units that the contract holds."""

    @abstractmethod
    async def balance(self, owner: AgentId) -> int:
        """Return the token units that ``owner`` holds outside of any channel."""

    @abstractmethod
    async def gas_price_wei(self) -> int:
        """Return what a unit of gas costs now, for ``plan_claims``."""

    @abstractmethod
    async def perform(self, effect_id: str, call: ChannelCall, identity: Identity) -> Receipt:
        """Send ``call`` from ``identity`` and return once it is in a block.

        Safe to repeat under the same ``effect_id``, as with ``Settlement.perform``.

        :raises CallReverted: if the contract refuses it (found before sending, where possible)
        :raises LocalProtocolError: if that id stands for another call
        :raises ChainUnavailable: if it cannot be told whether it went through; repeat it
        """

    async def claim(
        self, effect_id: str, rows: Sequence[Claim], identity: Identity
    ) -> ClaimOutcome:
        """Claim as many of ``rows`` as the contract takes, in as few transactions as that needs.

        They are tried together first, and in halves where that is refused: a row that fails costs
        no gas and takes no other with it. Safe to repeat under the same ``effect_id``.

        :raises ChainUnavailable: if it cannot be told what went through; repeat it
        """
        receipts: list[Receipt] = []
        claimed: list[Claim] = []
        refused: list[tuple[Claim, str]] = []
        parts = [tuple(rows)] if rows else []
        while parts:
            part = parts.pop()
            told = b"".join(row.voucher.channel_id + row.units.to_bytes(16) for row in part)
            one_id = f"{effect_id}/{keccak256(told)[:8].hex()}"
            try:
                receipts.append(await self.perform(one_id, ClaimAll(part), identity))
                claimed += part
            except CallReverted as error:
                if len(part) == 1:
                    refused.append((part[0], str(error)))
                else:
                    middle = len(part) // 2
                    parts += [part[middle:], part[:middle]]
        return ClaimOutcome(tuple(receipts), tuple(claimed), tuple(refused))

    @abstractmethod
    async def events(self, from_block: int) -> tuple[list[ChannelEvent], int]:
        """Return the events of channels from ``from_block`` on, oldest first, and the next block.

        Only blocks at ``confirmations`` below the newest one and older are told.
        """

    @abstractmethod
    async def close(self) -> None:
        """Release the connection. Safe to repeat."""


class StakeRegistry(ABC):
    """Holds sellers' stakes, a slice for each deal, and loses them by no rule but those signed.

    One vault as one escrow sees it. Everything is told as of the newest block.
    """

    vault: AgentId
    """The address that terms name."""
    domain: Domain
    """The escrow's EIP-712 domain: its deals reserve here, acknowledgements are signed in it."""

    @property
    @abstractmethod
    def asset(self) -> Asset:
        """The token of the stakes; it may be another than that of the deals."""

    @abstractmethod
    async def stake(self, owner: AgentId) -> Stake:
        """Return what ``owner`` has in the vault."""

    @abstractmethod
    async def allowance(self, owner: AgentId) -> Allowance:
        """Return what the escrow keeps and may keep reserved of ``owner``'s stake."""

    @abstractmethod
    async def slice_units(self, job_id: bytes) -> int:
        """Return what is reserved for a deal; 0 before it opened and after its slice was closed."""

    @abstractmethod
    async def owed(self, owner: AgentId) -> int:
        """Return the units that a failed payout left with the vault for ``owner``."""

    @abstractmethod
    async def held(self) -> int:
        """Return all token units that the vault holds."""

    @abstractmethod
    async def perform(self, effect_id: str, call: StakeCall, identity: Identity) -> Receipt:
        """Send ``call`` from ``identity`` and return once it is in a block.

        Safe to repeat under the same ``effect_id``, as ``Settlement.perform`` is. Who closes a
        slice that somebody else closed before is refused with NothingReserved: it is done.

        :raises CallReverted: if the vault or its token refuses it
        :raises ChainUnavailable: if it cannot be told whether it went through; repeat it
        """

    @abstractmethod
    async def close(self) -> None:
        """Release what this holds. Safe to repeat."""


class Panel(ABC):
    """One arbiter that is k of n: rules when so many of its members signed the same ruling.

    Members sign ``ruling_digest`` in the escrow's domain, as any arbiter does.
    """

    constitution: Constitution
    address: AgentId
    """What terms name as their arbiter; known before anything is there."""
    domain: Domain
    """The EIP-712 domain of the escrow whose deals are ruled."""

    @abstractmethod
    async def is_deployed(self) -> bool:
        """Return whether the panel is on the chain; it need not be before the first ruling."""

    @abstractmethod
    async def owed(self, owner: AgentId) -> int:
        """Return the units that a failed payout left with the panel for ``owner``."""

    @abstractmethod
    async def rule(
        self,
        effect_id: str,
        ruling: Rule,
        signatures: Mapping[AgentId, bytes],
        identity: Identity,
    ) -> Receipt:
        """Bring a ruling with its members' signatures, after putting the panel on the chain.

        Anybody may; a sending member counts as signed. The fee goes in equal parts to those who
        signed, and what does not divide to the first of them by address.

        :raises CallReverted: if too few signed, a signature is wrong, or the escrow refuses it
        :raises ChainUnavailable: if it cannot be told whether it went through; repeat it
        """

    @abstractmethod
    async def withdraw(self, effect_id: str, owner: AgentId, identity: Identity) -> Receipt:
        """Pay out what a failed transfer left with the panel for ``owner``. Anybody may.

        :raises CallReverted: if nothing is owed, or the token still refuses
        """

    @abstractmethod
    async def close(self) -> None:
        """Release what this holds. Safe to repeat."""


class Registries(ABC):
    """Who agents are, and what others said of them: ERC-8004's two registries.

    What is said is not checked here; ``escrow.feedback.read_entry`` does that.
    """

    domain: Domain
    """The identity registry's EIP-712 domain."""
    reputation: str
    """The reputation registry's address."""

    @abstractmethod
    async def perform(self, effect_id: str, call: RegistryCall, identity: Identity) -> Receipt:
        """Send ``call`` from ``identity`` and return once it is in a block.

        Safe to repeat under the same ``effect_id``, as with ``Settlement.perform``.

        :raises CallReverted: if the contract refuses it (found before sending, where possible)
        :raises LocalProtocolError: if that id stands for another call
        :raises ChainUnavailable: if it cannot be told whether it went through; repeat it
        """

    @abstractmethod
    async def register(self, effect_id: str, uri: str, identity: Identity) -> int:
        """Make a new agent of ``identity`` and return its id. Safe to repeat, as ``perform`` is."""

    @abstractmethod
    async def agent(self, agent_id: int, *, block: int | None = None) -> AgentRecord | None:
        """Return what is registered of an agent, now or at a block; None if it is not there."""

    @abstractmethod
    async def feedback(self, agent_id: int, from_block: int = 0) -> list[FeedbackEntry]:
        """Return what was said of an agent from ``from_block`` on, oldest first.

        Entries that were revoked since say so.
        """

    @abstractmethod
    async def links(self, from_block: int = 0) -> tuple[list[tuple[int, AgentId]], int]:
        """Return which agent was linked to which wallet, oldest first, and the next block to ask.

        An agent that is unlinked has the zero address. Who was linked once need not be any more:
        ``agent`` tells.
        """

    @abstractmethod
    async def payments(self, tx_hash: str) -> list[PaymentLog]:
        """Return the payments of one transaction, in the order of its log.

        There are none if it failed, or is not final yet.
        """

    async def payment(self, tx_hash: str, log_index: int) -> PaymentLog | None:
        """Return the payment at a place of the chain.

        None if there is none, if its transaction failed, or if it is not final yet.
        """
        found = await self.payments(tx_hash)
        return next((log for log in found if log.log_index == log_index), None)

    @abstractmethod
    async def close(self) -> None:
        """Release the connection. Safe to repeat."""


class TxStore(ABC):
    """Keeps every signed transaction from before it is sent, so that a crash forgets none.

    One effect may have several: a higher fee is another transaction with the same nonce, and one
    whose nonce was taken by something else is followed by one with a new nonce.
    """

    @abstractmethod
    async def save(
        self, effect_id: str, sender: AgentId, nonce: int, raw: bytes, tx_hash: str
    ) -> None:
        """Keep a transaction; it is on the disk when this returns. The same hash twice is once.

        :raises JournalFailed: if it cannot be kept; it must then not be sent
        """

    @abstractmethod
    async def load(self, effect_id: str) -> tuple[SentTx, ...]:
        """Return the transactions of an effect, oldest first, the finished ones included."""

    @abstractmethod
    async def all_open(self) -> tuple[SentTx, ...]:
        """Return the transactions of all effects that are not finished, oldest first."""

    @abstractmethod
    async def finish(self, effect_id: str) -> None:
        """Note that the effect is in a block, so that a restart need not send it again."""

    @abstractmethod
    async def forget(self, effect_id: str, tx_hash: str) -> None:
        """Drop one transaction that the endpoint refused and that was never sent on."""


class MemoryTxStore(TxStore):
    """A store that lives as long as its process: for tests, and for keys that keep nothing."""

    def __init__(self) -> None:
        self._sent: dict[str, list[SentTx]] = {}
        self._open: dict[str, None] = {}

    async def save(
        self, effect_id: str, sender: AgentId, nonce: int, raw: bytes, tx_hash: str
    ) -> None:
        """Keep a transaction."""
        sent = self._sent.setdefault(effect_id, [])
        if all(old.tx_hash != tx_hash for old in sent):
            sent.append(SentTx(effect_id, sender, nonce, raw, tx_hash))
        self._open[effect_id] = None

    async def load(self, effect_id: str) -> tuple[SentTx, ...]:
        """Return the transactions of an effect."""
        return tuple(self._sent.get(effect_id, ()))

    async def all_open(self) -> tuple[SentTx, ...]:
        """Return the transactions of all unfinished effects."""
        return tuple(sent for effect_id in self._open for sent in self._sent[effect_id])

    async def finish(self, effect_id: str) -> None:
        """Note that the effect is in a block."""
        self._open.pop(effect_id, None)

    async def forget(self, effect_id: str, tx_hash: str) -> None:
        """Drop one transaction."""
        kept = [sent for sent in self._sent.get(effect_id, ()) if sent.tx_hash != tx_hash]
        if kept:
            self._sent[effect_id] = kept
        else:
            self._sent.pop(effect_id, None)
            self._open.pop(effect_id, None)
