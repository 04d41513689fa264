"""What the keys of this user's nodes hold, and where."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from coase.escrow.backends.evm.moves import read_balances, read_mined, read_moves
from coase.escrow.backends.keystore import NAMES_FILE, list_keys

from .ledger import deals_of
from .snapshot import Snapshot, read_snapshot

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from coase.escrow.backends.evm.moves import ChainFacts
    from coase.escrow.backends.evm.settlement import EvmSettlement
    from coase.protocol.types import AgentId

    from .ledger import Deal

JOURNAL: Final = "journal.sqlite"


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
    """Money of one key that lies somewhere else than in its wallet.

    ``kind`` is ``job``: a deal whose price or bond the escrow holds. Other kinds of places, such as
    channels and stakes, are positions too.
    """

    kind: str
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
class Holding:
    """What one key has."""

    owner: AgentId
    name: str
    place: Path
    units: int
    wei: int
    owed_units: int
    positions: tuple[Position, ...] = field(default=())

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
        """What silence gives it already: anybody may bring it about."""
        return sum(position.claimable_units for position in self.positions)


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


async def read_facts(
    settlement: EvmSettlement, places: list[Place], *, moves: bool = False, first: int = 0
) -> ChainFacts:
    """Return what the chain says of the keys of ``places``, at one block.

    With ``moves`` also every transfer of theirs from block ``first`` on, and the fees that the
    transactions in their journals took.

    :raises ChainUnavailable: if the endpoint does not answer sensibly
    """
    owners = owners_of(places)
    facts = await read_balances(settlement, owners)
    if not moves:
        return facts
    raws = {
        tx.tx_hash: tx.raw
        for place in places
        if place.journal is not None
        for tx in place.journal.transactions
        if tx.is_whole
    }
    return replace(
        facts,
        moves=await read_moves(settlement, owners, first=first, last=facts.head),
        mined=await read_mined(settlement, raws, last=facts.head),
    )


def holdings_of(facts: ChainFacts, places: list[Place]) -> list[Holding]:
    """Return what each key of ``places`` has, in their order."""
    live = [deal for deal in deals_of(facts.events).values() if deal.is_live]
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
            )
    return list(found.values())


def _position(
    deal: Deal, owner: AgentId, names: dict[bytes, str], *, now_s: int
) -> Position | None:
    if owner not in (deal.terms.buyer, deal.terms.seller):
        return None
    return Position(
        kind="job",
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
