"""What was used: each call with its key, tag and model, and each deal that it took.

A call is written when it ends, a deal when it is agreed and again when it is over, each in a
transaction of its own: a gateway that is killed loses no more than the calls it was answering.
What it missed of deals, its agent's journal tells at the next start.
"""

from __future__ import annotations

import logging
import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from coase.agents.backends.kept import open_kept
from coase.agents.compute.explain import Paid
from coase.agents.history import charge_of_row
from coase.agents.purse import spent_in, spent_in_row
from coase.protocol.errors import ConfigurationError, JournalFailed
from coase.protocol.states import Role

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from coase.agents.steps import Notice
    from coase.protocol.session import Thread
    from coase.protocol.types import AgentId, Asset

log = logging.getLogger(__name__)

USAGE_FILE: Final = "usage.sqlite"
BUSY_MAX_S: Final = 5
GROUPS: Final = ("day", "key", "tag", "model", "made")
DAY_MS: Final = 86_400_000
KEPT_DAYS: Final = 400  # A year and a month more to look back; a call takes 100 bytes.
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS calls (
    id TEXT PRIMARY KEY, at_ms INTEGER, key TEXT, tag TEXT, model TEXT, made TEXT, outcome TEXT,
    input_tokens INTEGER, cached_tokens INTEGER, output_tokens INTEGER, duration_ms INTEGER
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS calls_by_time ON calls (at_ms);
CREATE TABLE IF NOT EXISTS deals (
    deal TEXT PRIMARY KEY, call TEXT, at_ms INTEGER, key TEXT, seller TEXT, model TEXT,
    price_units TEXT, paid_units TEXT, symbol TEXT, decimals INTEGER
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS deals_by_call ON deals (call);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """One call that is over."""

    call: str
    at_ms: int
    key: str = ""
    tag: str = ""
    model: str = ""
    made: str = ""
    """``local``, ``firm`` or ``bought``; nothing where no answer began."""
    outcome: str = "done"
    """``done``, ``broken``, or why there was no answer."""
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    duration_ms: int = 0


@dataclass(slots=True, kw_only=True)
class Sum:
    """What calls of one group took together."""

    group: dict[str, str]
    calls: int = 0
    failed: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    duration_ms: int = 0
    deals: int = 0
    paid_units: int = 0
    open_units: int = 0
    """The highest price of deals that are not over: what they cost is not known yet."""
    symbol: str = ""
    decimals: int = 0


class UsageJournal:
    """The file of ``directory`` in which it is written. Several processes may have it open."""

    def __init__(self, directory: Path, *, say: Callable[[str], None] | None = None) -> None:
        """Open it, and make it if there is none; with ``say``, also if it is broken.

        What a key has spent is not counted by it, but by the agent's journal.

        :raises ConfigurationError: if it cannot be opened
        :raises JournalFailed: if the disk refuses
        """
        self.path = directory / USAGE_FILE
        self._file = open_kept(self.path, _TABLES, looks=_LOOKS, busy_max_s=BUSY_MAX_S, say=say)

    def close(self) -> None:
        """Close the file. Safe to repeat."""
        self._file.close()

    def call(self, used: Used) -> None:
        """Write down a call that is over.

        :raises JournalFailed: if the disk refuses
        """
        row = (
            *(used.call, used.at_ms, used.key, used.tag, used.model, used.made, used.outcome),
            *(used.input_tokens, used.cached_tokens, used.output_tokens, used.duration_ms),
        )
        self._write(_CALL, [row])

    def forget(self, *, before_ms: int) -> None:
        """Forget the calls before a time. Their deals stay, as they do in the agent's journal.

        :raises JournalFailed: if the disk refuses
        """
        self._write("DELETE FROM calls WHERE at_ms < ?", [(before_ms,)])

    def made(self, call: str) -> str:
        """Return where an answer was made, by the deals that its call took."""
        prices = list(self._read("SELECT price_units FROM deals WHERE call = ?", call))
        if not prices:
            return "local"
        return "bought" if any(units != "0" for (units,) in prices) else "firm"

    def deals_of(self, call: str) -> dict[str, Paid]:
        """Return the deals that a call took, as far as they were noted.

        :raises ConfigurationError: if the file cannot be read
        """
        return {
            deal: Paid(
                seller=seller,
                model=model,
                price_units=int(price),
                units=None if units is None else int(units),
                symbol=symbol,
                decimals=decimals,
            )
            for deal, seller, model, price, units, symbol, decimals in self._read(_DEALS_OF, call)
        }

    def heal(
        self, asset: Asset, threads: Iterable[Thread], summaries: Iterable[Mapping[str, Any]]
    ) -> None:
        """Take in what an agent's journal knows of deals that a killed gateway did not note.

        :raises JournalFailed: if the disk refuses
        """
        rows = [row for thread in threads if (row := _deal_of(thread, asset)) is not None]
        rows += [row for past in summaries if (row := _deal_of_row(past, asset)) is not None]
        self._deals(rows)

    def notice(self, asset: Asset, me: AgentId, who: AgentId, notice: Notice) -> None:
        """Write down a deal of ours that was agreed, or is over."""
        if who != me or notice.thread is None or notice.kind not in ("agreed", "ended"):
            return
        row = _deal_of(notice.thread, asset, ended=notice.kind == "ended")
        if row is None:
            return
        try:
            self._deals([row])
        except JournalFailed as error:
            # Whoever makes the deal must not be stopped by that; the next start takes it in.
            log.error("a deal was not noted: %s", error)

    def _deals(self, rows: Sequence[tuple[Any, ...]]) -> None:
        self._write(_DEAL, rows)

    def _write(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if not rows:
            return
        try:
            self._file.execute("BEGIN IMMEDIATE")
            try:
                self._file.executemany(statement, rows)
            finally:
                self._file.execute("COMMIT")
        except sqlite3.Error as error:
            raise JournalFailed(f"{self.path} cannot be written: {error}") from error

    def sums(self, by: Sequence[str], *, since_ms: int = 0) -> list[Sum]:
        """Return what was used since then by each group of ``by``, which are some of ``GROUPS``.

        Days are those of UTC. Deals of calls that were never written down, since the gateway was
        killed, are counted with the model that they name.
        """
        unknown = [group for group in by if group not in GROUPS]
        if unknown:
            raise ConfigurationError(f"usage is by {', '.join(GROUPS)}, not {unknown[0]!r}")
        sums: dict[tuple[str, ...], Sum] = {}
        for values in self._read(_CALLS, since_ms):
            row = dict(zip(_CALL_NAMES, values, strict=True))
            found = _sum_of(sums, row, by)
            found.calls += 1
            found.failed += row["outcome"] != "done"
            for name in ("input_tokens", "cached_tokens", "output_tokens", "duration_ms"):
                setattr(found, name, getattr(found, name) + row[name])
        for values in self._read(_DEALS, since_ms):
            row = dict(zip(_DEAL_NAMES, values, strict=True))
            found = _sum_of(sums, row, by, symbol=row["symbol"], decimals=row["decimals"])
            found.deals += 1
            if row["paid_units"] is None:
                found.open_units += int(row["price_units"])
            else:
                found.paid_units += int(row["paid_units"])
        return [sums[group] for group in sorted(sums)]

    def _read(self, statement: str, value: int | str) -> Iterable[tuple[Any, ...]]:
        try:
            yield from self._file.execute(statement, (value,))
        except sqlite3.Error as error:
            raise ConfigurationError(f"{self.path} cannot be read: {error}") from error


_CALL: Final = "INSERT OR REPLACE INTO calls VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_DEAL: Final = """
INSERT INTO deals VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (deal) DO UPDATE SET paid_units = coalesce(excluded.paid_units, paid_units)
"""
_DEALS_OF: Final = """
SELECT deal, seller, model, price_units, paid_units, symbol, decimals FROM deals WHERE call = ?
"""
_LOOKS: Final = """
SELECT tag, made, cached_tokens, duration_ms, seller, paid_units, decimals FROM calls, deals LIMIT 1
"""
_CALL_NAMES: Final = (
    *("at_ms", "key", "tag", "model", "made", "outcome", "input_tokens", "cached_tokens"),
    *("output_tokens", "duration_ms"),
)
_CALLS: Final = """
SELECT at_ms, key, tag, model, made, outcome, input_tokens, cached_tokens, output_tokens,
       duration_ms
FROM calls WHERE at_ms >= ?
"""
_DEAL_NAMES: Final = (
    *("at_ms", "key", "tag", "model", "made", "symbol", "decimals", "price_units", "paid_units"),
)
_DEALS: Final = """
SELECT coalesce(calls.at_ms, deals.at_ms) AS at, coalesce(calls.key, deals.key),
       coalesce(calls.tag, ''), coalesce(calls.model, deals.model), coalesce(calls.made, 'bought'),
       symbol, decimals, price_units, paid_units
FROM deals LEFT JOIN calls ON calls.id = deals.call WHERE at >= ?
"""


def _sum_of(
    sums: dict[tuple[str, ...], Sum],
    row: Mapping[str, Any],
    by: Sequence[str],
    *,
    symbol: str = "",
    decimals: int = 0,
) -> Sum:
    """Return the sum that a row belongs to; different money is never added up."""
    day = datetime.fromtimestamp(row["at_ms"] / 1_000, tz=UTC).date().isoformat()
    group = {name: day if name == "day" else row[name] for name in by}
    place = (*group.values(), "")
    found = sums.setdefault(place, Sum(group=group))
    if symbol and found.symbol not in ("", symbol):
        found = sums.setdefault((*group.values(), symbol), Sum(group=group))
    if symbol:
        found.symbol, found.decimals = symbol, decimals
    return found


def _deal_of(thread: Thread, asset: Asset, *, ended: bool = False) -> tuple[Any, ...] | None:
    """Return what is kept of a deal that a call of ours bought; None if it is no such."""
    charge = thread.charge
    if thread.side is not Role.BUYER or not charge.reference or not thread.job_id:
        return None
    terms = thread.agreed_terms
    return (
        *(thread.deal, charge.reference, thread.opened_ms, charge.account, thread.counterparty),
        *(terms.work.model, str(terms.price_units)),
        *(str(spent_in(thread)) if ended else None, asset.symbol, asset.decimals),
    )


def _deal_of_row(row: Mapping[str, Any], asset: Asset) -> tuple[Any, ...] | None:
    """Return the same of a deal that is over."""
    charge, spent_units = charge_of_row(row), spent_in_row(row)
    if spent_units is None or not charge.reference or not row["job_id"]:
        return None
    began_ms = row["history"][0][0] if row["history"] else 0
    return (
        *(row["deal"], charge.reference, began_ms, charge.account, row["counterparty"]),
        *("", str(row["price_units"]), str(spent_units), asset.symbol, asset.decimals),
    )
