"""What the keys of this user's nodes hold, and where."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from coase.escrow.backends.evm.moves import read_balances, read_mined, read_moves
from coase.escrow.backends.keystore import NAMES_FILE, list_keys
from coase.protocol.states import Role

from .ledger import deals_of
from .snapshot import Snapshot, read_snapshot

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from coase.escrow.backends.evm.beside import Channel, ChannelFacts
    from coase.escrow.backends.evm.moves import ChainFacts
    from coase.escrow.backends.evm.settlement import EvmSettlement
    from coase.escrow.stake import Stake
    from coase.protocol.types import AgentId

    from .config import Network
    from .ledger import Deal
    from .promises import KeptChannel

JOURNAL: Final = "journal.sqlite"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """Where on a chain keys may have money beside wallet and escrow, and from when on to look."""

    first: int = 0
    """The block of the escrow's deployment: transfers are read from there on."""
    channels: AgentId = ""
    vault: AgentId = ""

    @classmethod
    def of(cls, network: Network) -> Reach:
        """Return what a network names."""
        return cls(first=network.from_block, channels=network.channels, vault=network.vault)


NOWHERE_ELSE: Final = Reach()


@dataclass(frozen=True, slots=True)
class Place:
    """One node's directory: its keys by address, and its journal as it stands."""

    path: Path
    names: dict[AgentId, str]
    journal: Snapshot | None
    imported: frozenset[AgentId] = frozenset()
    """Keys that were made elsewhere."""

    @property
    def owners(self) -> list[AgentId]:
        """The addresses that are this node's: those noted, and those that its journal knows."""
        told = self.journal.agents if self.journal is not None else frozenset()
        return sorted({*self.names, *told})


@dataclass(frozen=True, slots=True)
class Position:
    """Money of one key in a deal whose price or bond the escrow holds."""

    deal: str
    job_id: bytes
    side: str
    counterparty: AgentId
    phase: str
    units: int
    bond_units: int
    limit_s: int
    claimable_units: int


@dataclass(frozen=True, slots=True)
class ChannelPosition:
    """One end of a channel: what lies in it, and whose that is by now."""

    channel_id: bytes
    side: Role
    counterparty: AgentId
    balance_units: int
    """All that was deposited and not taken back; what was claimed is still in it."""
    signed_units: int
    """The total of the last voucher, or what was claimed if that is more."""
    claimed_units: int
    withdrawing_units: int = 0
    takeable_at_s: int = 0
    """When what is being withdrawn can be taken; 0 if nothing is."""
    stopped: str = ""
    """Why the buyer signs nothing there any more."""
    known: bool = True
    """Whether a journal tells of it; what was signed there is not known otherwise."""

    @property
    def free_units(self) -> int:
        """What of a buyer's deposit is not promised to anybody."""
        return max(0, self.balance_units - self.signed_units) if self.side is Role.BUYER else 0

    @property
    def claimable_units(self) -> int:
        """What a seller's voucher is worth now."""
        if self.side is Role.BUYER:
            return 0
        return max(0, min(self.signed_units, self.balance_units) - self.claimed_units)

    @property
    def state(self) -> str:
        """In a word, how it stands."""
        if self.takeable_at_s:
            return "withdrawing"
        return "lost" if not self.known else "stopped" if self.stopped else "open"


@dataclass(frozen=True, slots=True)
class Holding:
    """What one key has."""

    owner: AgentId
    name: str
    place: Path
    units: int
    wei: int
    owed_units: int
    positions: tuple[Position, ...] = field(default=())
    channels: tuple[ChannelPosition, ...] = field(default=())
    unpaid_units: int = 0
    """What was claimed out of channels for it, and not paid out yet."""
    stake: Stake | None = None
    """What it has in the vault; None if there is none, or it is in another token."""

    @property
    def channel_units(self) -> int:
        """What of its own deposits in channels is free."""
        return sum(channel.free_units for channel in self.channels)

    @property
    def locked_units(self) -> int:
        """Prices of its own that the escrow holds."""
        return sum(position.units for position in self.positions)

    @property
    def bond_units(self) -> int:
        """Bonds of its own that the escrow holds."""
        return sum(position.bond_units for position in self.positions)

    @property
    def claimable_units(self) -> int:
        """What it has to fetch only: what silence gave it, and what vouchers and claims are worth.

        A node that runs does it by itself.
        """
        by_silence = sum(position.claimable_units for position in self.positions)
        by_voucher = sum(channel.claimable_units for channel in self.channels)
        return by_silence + by_voucher + self.unpaid_units


def read_places(paths: Iterable[Path], *, deep: bool = False) -> list[Place]:
    """Return the nodes in these directories; one that has neither keys nor journal is none.

    :raises ConfigurationError: if keys or journal of one cannot be read
    """
    places = []
    for path in sorted(paths):
        journal = path / JOURNAL
        if journal.exists() or (path / NAMES_FILE).exists():
            keys = list_keys(path)
            names = {key.address: key.name for key in keys}
            imported = frozenset(key.address for key in keys if key.imported)
            snapshot = read_snapshot(journal, deep=deep) if journal.exists() else None
            places.append(Place(path, names, snapshot, imported))
    return places


def owners_of(places: Iterable[Place]) -> list[AgentId]:
    """Return all keys of some nodes, each once."""
    return list(dict.fromkeys(owner for place in places for owner in place.owners))


def imported_of(places: Iterable[Place]) -> frozenset[AgentId]:
    """Return the keys that were made elsewhere, and may have been used there."""
    return frozenset(owner for place in places for owner in place.imported)


def channels_of(places: Iterable[Place]) -> list[KeptChannel]:
    """Return all channels that the journals of some nodes tell of."""
    return [
        channel
        for place in places
        if place.journal is not None
        for channel in place.journal.channels
    ]


def job_ids_of(places: Iterable[Place]) -> dict[str, bytes]:
    """Return the job's id of each deal in the journals of some nodes."""
    found: dict[str, bytes] = {}
    for place in places:
        if place.journal is not None:
            found |= place.journal.job_ids()
    return found


async def read_facts(
    settlement: EvmSettlement,
    places: list[Place],
    *,
    moves: bool = False,
    reach: Reach = NOWHERE_ELSE,
) -> ChainFacts:
    """Return what the chain says of the keys of ``places``, at one block.

    With ``moves`` also every transfer of theirs since the first block of ``reach``, and the fees
    that the transactions in their journals took.

    :raises ChainUnavailable: if the endpoint does not answer sensibly
    """
    # It loads two ABIs, which a network without channels need not wait for.
    from coase.escrow.backends.evm.beside import read_channels, read_stakes

    owners, first = owners_of(places), reach.first
    facts = await read_balances(settlement, owners)
    last = facts.head
    if moves:
        raws = {
            tx.tx_hash: tx.raw
            for place in places
            if place.journal is not None
            for tx in place.journal.transactions
            if tx.is_whole
        }
        facts = replace(
            facts,
            moves=await read_moves(settlement, owners, first=first, last=last),
            mined=await read_mined(settlement, raws, last=last),
        )
    if reach.channels:
        found = await read_channels(
            settlement,
            owners,
            [channel.config for channel in channels_of(places)],
            contract=reach.channels,
            first=first,
            last=last,
            moves=facts.moves,
        )
        facts = replace(facts, channels=found)
    if reach.vault:
        stakes = await read_stakes(settlement, owners, vault=reach.vault, first=first, last=last)
        facts = replace(facts, stakes=stakes)
    return facts


def holdings_of(facts: ChainFacts, places: list[Place]) -> list[Holding]:
    """Return what each key of ``places`` has, in their order."""
    live = [deal for deal in deals_of(facts.events).values() if deal.is_live]
    kept = {(one.agent, one.channel_id): one for one in channels_of(places)}
    found: dict[AgentId, Holding] = {}
    for place in places:
        names = place.journal.deal_names() if place.journal is not None else {}
        for owner in place.owners:
            if owner in found and not place.names.get(owner):
                continue  # Another node has its key; this one only remembers it.
            positions = [_position(deal, owner, names, now_s=facts.time_s) for deal in live]
            found[owner] = Holding(
                owner=owner,
                name=place.names.get(owner, ""),
                place=place.path,
                units=facts.units[owner],
                wei=facts.wei[owner],
                owed_units=facts.owed_units[owner],
                positions=tuple(position for position in positions if position is not None),
                channels=tuple(_channels(facts.channels, owner, kept)),
                unpaid_units=facts.channels.unpaid.get(owner, 0) if facts.channels else 0,
                stake=facts.stakes.stakes.get(owner) if facts.stakes is not None else None,
            )
    return list(found.values())


def _channels(
    facts: ChannelFacts | None,
    owner: AgentId,
    kept: dict[tuple[AgentId, bytes], KeptChannel],
) -> Iterable[ChannelPosition]:
    """Yield the ends of channels that a key has, as far as money or a promise is in them."""
    for channel_id, channel in facts.channels.items() if facts is not None else ():
        one = kept.get((owner, channel_id))
        for side, holder in (
            (Role.BUYER, channel.config.payer),
            (Role.SELLER, channel.config.receiver),
        ):
            lost = side is Role.BUYER and channel.view.free_units > 0
            if holder == owner and (one is not None or lost):
                yield channel_position(channel_id, channel, side, one)


def channel_position(
    channel_id: bytes, channel: Channel, side: Role, kept: KeptChannel | None
) -> ChannelPosition:
    """Return how one end of a channel stands, by the chain and by its journal."""
    view, config = channel.view, channel.config
    return ChannelPosition(
        channel_id=channel_id,
        side=side,
        counterparty=config.receiver if side is Role.BUYER else config.payer,
        balance_units=view.balance_units,
        signed_units=max(view.claimed_units, kept.signed_units if kept is not None else 0),
        claimed_units=view.claimed_units,
        withdrawing_units=view.withdrawing_units,
        takeable_at_s=view.withdraw_since_s + config.withdraw_delay_s if view.is_withdrawing else 0,
        stopped=kept.stopped if kept is not None else "",
        known=kept is not None,
    )


def _position(
    deal: Deal, owner: AgentId, names: dict[bytes, str], *, now_s: int
) -> Position | None:
    if owner not in (deal.terms.buyer, deal.terms.seller):
        return None
    return Position(
        deal=names.get(deal.job_id, ""),
        job_id=deal.job_id,
        side="buyer" if owner == deal.terms.buyer else "seller",
        counterparty=deal.other(owner),
        phase=deal.phase.name.lower(),
        units=deal.locked_units(owner),
        bond_units=deal.bond_units(owner),
        limit_s=deal.limit_s,
        claimable_units=deal.claimable_units(owner, now_s=now_s),
    )
