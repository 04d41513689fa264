"""A journal as it stands at one moment, read without disturbing whoever writes it."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from coase.protocol.errors import CoaseError, ConfigurationError
from coase.protocol.identity import keccak256
from coase.protocol.messages import Request
from coase.protocol.states import BOUND
from coase.protocol.terms import Domain

from .history import summary
from .memory import Memory
from .ports import Record, SeededChance
from .promises import kept_channels

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from coase.protocol.session import Thread
    from coase.protocol.types import AgentId

    from .promises import KeptChannel

BUSY_MAX_S: Final = 5
WITHDRAWAL: Final = "withdraw:"
"""How the effects of withdrawals begin: what they move, the owner took out."""
OWNERS: Final = ("withdraw", "withdrawn", "takeback", "takenback")
"""The kinds of records that are no deal's: what the owner ordered, and what came of it."""


@dataclass(frozen=True, slots=True)
class Closed:
    """A deal that is over: its summary, and as far as it was folded again, what that gives."""

    agent: AgentId
    deal: str
    row: dict[str, Any]
    data: bytes
    again: bytes | None = None


@dataclass(frozen=True, slots=True)
class KeptTx:
    """A transaction that was signed and kept."""

    effect_id: str
    sender: AgentId
    nonce: int
    raw: bytes
    tx_hash: str

    @property
    def is_whole(self) -> bool:
        """Whether the bytes are those of the hash."""
        return "0x" + keccak256(self.raw).hex() == self.tx_hash


@dataclass(slots=True)
class Snapshot:
    """What one journal says."""

    path: Path
    agents: frozenset[AgentId] = frozenset()
    closed: list[Closed] = field(default_factory=list)
    threads: list[Thread] = field(default_factory=list)
    """Those that are not over, bound or not."""
    channels: list[KeptChannel] = field(default_factory=list)
    transactions: list[KeptTx] = field(default_factory=list)
    owners_records: list[Record] = field(default_factory=list)
    """What the owner ordered, by key or out of channels, and what came of it."""
    faults: list[str] = field(default_factory=list)
    """What in it cannot be read, each with its place."""

    def deal_names(self) -> dict[bytes, str]:
        """Return the ids by which we know the deals that the chain knows by their job's."""
        names = {bytes.fromhex(c.row["job_id"]): c.deal for c in self.closed if c.row["job_id"]}
        return names | {t.job_id: t.deal for t in self.threads if t.job_id}

    def job_ids(self) -> dict[str, bytes]:
        """Return the same the other way round."""
        return {deal: job_id for job_id, deal in self.deal_names().items()}

    def bound(self) -> list[Thread]:
        """Return the deals that both sides have signed and that are not over, without rates."""
        signed = (thread for thread in self.threads if thread.state in BOUND)
        return [thread for thread in signed if not thread.is_contract]

    def withdrawals(self) -> dict[str, AgentId]:
        """Return the hashes of the transactions by which the owner took money out, and whose."""
        return {
            tx.tx_hash: tx.sender for tx in self.transactions if tx.effect_id.startswith(WITHDRAWAL)
        }


def read_snapshot(path: Path, *, deep: bool = False) -> Snapshot:
    """Return what the journal at ``path`` says, all of it of the same moment.

    With ``deep`` deals that are over are folded again from their records, to see whether their
    summaries are what follows.

    :raises ConfigurationError: if there is no journal that can be read
    """
    try:
        address = f"{path.resolve().as_uri()}?mode=ro"
        connection = sqlite3.connect(address, uri=True, timeout=BUSY_MAX_S, isolation_level=None)
        # Whatever a hand has put there is to be named, and not to stop the reading.
        connection.text_factory = lambda text: text.decode(errors="replace")
        try:
            connection.execute("BEGIN")
            return _read(connection, path, deep=deep)
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise ConfigurationError(f"no journal can be read at {path}: {error}") from error


def _read(connection: sqlite3.Connection, path: Path, *, deep: bool) -> Snapshot:
    found = Snapshot(path)
    if deep:
        checked = [str(row[0]) for row in connection.execute("PRAGMA quick_check")]
        found.faults += [f"the file is damaged: {line}" for line in checked if line != "ok"]
    rows = connection.execute(
        "SELECT agent FROM records UNION SELECT agent FROM closed"
        " UNION SELECT sender FROM transactions"
    )
    found.agents = frozenset(str(row[0]) for row in rows)
    found.transactions = [
        KeptTx(row[0], row[1], row[2], _bytes(row[3]), row[4])
        for row in connection.execute(
            "SELECT effect_id, sender, nonce, raw, tx_hash FROM transactions ORDER BY seq"
        )
    ]
    rows = connection.execute(
        "SELECT agent, deal, kind, at_ms, data, open FROM records"
        " WHERE (open = 1 OR ? OR kind IN (?, ?, ?, ?)) ORDER BY agent, deal, seq",
        (deep, *OWNERS),
    )
    open_: list[Record] = []
    over: dict[tuple[str, str], list[Record]] = {}
    for row in rows:
        record = Record(row[0], row[1], row[2], row[3], _bytes(row[4]))
        if record.kind in OWNERS:
            found.owners_records.append(record)
        elif row[5]:
            open_.append(record)
        else:
            over.setdefault((record.agent, record.deal), []).append(record)
    for (agent, deal), group in groupby(open_, key=lambda record: (record.agent, record.deal)):
        thread = _fold(list(group), found.faults, f"deal {deal} of {agent}")
        if thread is not None:
            found.threads.append(thread)
    found.channels = kept_channels(open_, found.faults)
    closed = connection.execute("SELECT agent, deal, summary FROM closed ORDER BY seq")
    for agent, deal, data in closed:
        _add_closed(found, agent, deal, _bytes(data), over.pop((agent, deal), []), deep=deep)
    if deep:
        found.faults += [
            f"deal {deal} of {agent} is over, and its summary is missing"
            for (agent, deal), records in over.items()
            if records[0].kind == "thread"
        ]
    return found


def _add_closed(
    found: Snapshot, agent: str, deal: str, data: bytes, records: list[Record], *, deep: bool
) -> None:
    where = f"deal {deal} of {agent}"
    row = _row(data, deal)
    if row is None:
        found.faults.append(f"the summary of {where} cannot be read")
        return
    again: bytes | None = None
    if deep:
        thread = _fold(records, found.faults, where)
        if thread is None:
            found.faults.append(f"{where} is over, and its records are missing")
        else:
            again = summary(thread)
    found.closed.append(Closed(agent, deal, row, data, again))


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def _row(data: bytes, deal: str) -> dict[str, Any] | None:
    """Return a summary with the fields that are relied on, or None."""
    try:
        row = json.loads(data)
        bytes.fromhex(row["job_id"])
        numbers = ("price_units", "bond_units", "to_seller_units", "to_buyer_units")
        good = all(isinstance(row[name], int) and row[name] >= 0 for name in numbers)
        names = ("side", "counterparty", "state", "how", "capability")
        good = good and all(isinstance(row[name], str) for name in names)
        good = good and all(len(entry) == 6 for entry in row["history"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return row if good and row.get("deal") == deal else None


def _fold(records: Iterable[Record], faults: list[str], where: str) -> Thread | None:
    """Return the thread that follows from its records, or None if they are of no thread."""
    records = list(records)
    if not records or records[0].kind != "thread":
        return None
    try:
        first = json.loads(records[0].data)
        request = Request.model_validate_json(first["request"])
        domain = Domain(request.chain_id, request.escrow)
        memory = Memory(
            records[0].agent, SeededChance(b""), domain=domain, encode=lambda *_, **__: b""
        )
        memory.replay(records, now_ms=records[-1].at_ms)
    except (CoaseError, ValueError, KeyError, TypeError) as error:
        faults.append(f"the records of {where} do not follow: {error}")
        return None
    return next(iter(memory.threads.values()), None)
