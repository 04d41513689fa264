"""What the journals of this user's nodes tell, read without disturbing whoever writes them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from coase.protocol.errors import CoaseError, ConfigurationError

if TYPE_CHECKING:
    from coase.agents.config import Network
    from coase.agents.ports import Record

JOURNAL: Final = "journal.sqlite"
BUSY_MAX_S: Final = 5
SLOTS_MAX: Final = 32  # Purchases of one user that may run at one time.
SLOT: Final = "shopper-"

Row = dict[str, Any]
"""A deal as its summary tells it; an open one has ``open`` set to true."""


def node_home(network: Network) -> Path:
    """Return where the nodes of one network keep their state: a fresh chain, a fresh place."""
    from coase.agents.config import state_home

    return state_home() / "nodes" / f"{network.net}-{network.escrow[2:10]}"


def deals_below(home: Path) -> list[Row]:
    """Return the deals of all nodes below ``home``, closed and open, oldest first."""
    rows: list[Row] = []
    for path in sorted(home.rglob(JOURNAL)):
        rows += deals_in(path)
    return sorted(rows, key=lambda row: row["history"][0][0] if row["history"] else 0)


def deals_in(path: Path) -> list[Row]:
    """Return the deals in one journal. One that is only being made has none yet."""
    from coase.agents.backends.sqlite import read_summaries

    where = {"journal": str(path), "node": path.parent.name}
    try:
        closed = read_summaries(path)
    except ConfigurationError:
        return []
    rows = [{**row, **where, "open": False} for row in closed]
    return rows + [{**row, **where, "open": True} for row in open_deals(path)]


def open_deals(path: Path) -> list[Row]:
    """Return the deals that both sides have signed and that are not over."""
    from coase.agents.history import summary
    from coase.agents.memory import Memory
    from coase.agents.ports import SeededChance
    from coase.protocol.messages import Request
    from coase.protocol.states import BOUND
    from coase.protocol.terms import Domain

    rows: list[Row] = []
    for agent, records in _open_threads(path):
        first = json.loads(records[0].data)
        request = Request.model_validate_json(first["request"])
        domain = Domain(request.chain_id, request.escrow)
        memory = Memory(agent, SeededChance(b""), domain=domain, encode=lambda *_, **__: b"")
        try:
            memory.replay(records, now_ms=records[-1].at_ms)
        except CoaseError:
            continue  # A record that does not follow: its own node will say so.
        for thread in memory.threads.values():
            if thread.state in BOUND:
                row: Row = json.loads(summary(thread))
                row["agent"] = agent
                row["deliver_by_s"] = thread.agreed_terms.deliver_by_s
                rows.append(row)
    return rows


def _open_threads(path: Path) -> Iterator[tuple[str, list[Record]]]:
    """Yield the agent and the records of every thread that is not closed."""
    from coase.agents.ports import Record

    query = (
        "SELECT agent, deal, kind, at_ms, data FROM records"
        " WHERE open = 1 AND kind != 'asked' ORDER BY agent, deal, seq"
    )
    try:
        address = f"{path.resolve().as_uri()}?mode=ro"
        connection = sqlite3.connect(address, uri=True, timeout=BUSY_MAX_S)
        try:
            rows = connection.execute(query).fetchall()
        finally:
            connection.close()
    except sqlite3.Error:
        return
    for (agent, _), group in groupby(rows, key=lambda row: (row[0], row[1])):
        records = [Record(r[0], r[1], r[2], r[3], bytes(r[4])) for r in group]
        if records[0].kind == "thread":
            yield agent, records


def free_slot(network: Network) -> Path:
    """Return a state directory for a purchase: one with an open deal if there is any, else free.

    :raises ConfigurationError: if none can be made, or all are held
    """
    free = list(_free_slots(node_home(network)))
    if not free:
        raise ConfigurationError(
            f"{SLOTS_MAX} purchases of yours run already; wait for one of them to end"
        )
    return next((path for path in free if open_deals(path / JOURNAL)), free[0])


def unfinished_slots(network: Network) -> list[Path]:
    """Return the free places where an earlier purchase is still open."""
    home = node_home(network)
    if not home.is_dir():
        return []
    return [path for path in _free_slots(home, new=False) if open_deals(path / JOURNAL)]


def _free_slots(home: Path, *, new: bool = True) -> Iterator[Path]:
    """Yield the places that nobody holds: all that exist, and one new one."""
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigurationError(
            f"{home} cannot be made: {error.strerror or error}; set COASE_HOME to a directory that"
            " you can write"
        ) from error
    for number in range(SLOTS_MAX):
        path = home / f"{SLOT}{number}"
        known = path.exists()
        if not known and not new:
            return
        if held_by(path):
            continue
        yield path
        if not known:
            return


def held_by(path: Path) -> str:
    """Return who holds a state directory, or nothing if it is free or not there."""
    import fcntl

    try:
        with (path / "lock").open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return file.read().strip() or "another process"
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be used: {error.strerror or error}; set COASE_HOME to a directory that"
            " you can write"
        ) from error
    return ""


def short_name(capability: str) -> str:
    """Return a capability id without the hash of its schemas, for people."""
    name, _, tail = capability.rpartition("-")
    return name if name and len(tail) == 8 else capability
