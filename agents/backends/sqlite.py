"""The journal in one SQLite file per node: write-ahead log, synchronous, committed in groups.

Rows are inserted in the event loop's thread, which takes microseconds, and only the commit, which
waits for the disk, runs in a thread of its own: a thread that also inserted would fight the loop
for the interpreter's lock at every row. Whatever was queued while the last commit ran goes into
the next one, so one fsync serves many deals. If a commit fails, nothing after it is ever
committed: the node stops and starts again from what is on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import logging
import os
import sqlite3
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from coase.agents.ports import Journal, Record
from coase.escrow.ports import SentTx, TxStore
from coase.protocol.errors import ConfigurationError, JournalFailed

if TYPE_CHECKING:
    from pathlib import Path

    from coase.protocol.types import AgentId

log = logging.getLogger(__name__)

SCHEMA_VERSION: Final = 1
BUSY_TIMEOUT_MS: Final = 5_000

_Statement = tuple[str, Sequence[object]]

_PRIMARY: Final = 0xFF  # The kind of an error; above it are details.
_DISK_CODES: Final = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
_DISK_ERRNOS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS records (
    seq INTEGER PRIMARY KEY, agent TEXT NOT NULL, deal TEXT NOT NULL, kind TEXT NOT NULL,
    at_ms INTEGER NOT NULL, data BLOB NOT NULL, open INTEGER NOT NULL DEFAULT 1);
CREATE INDEX IF NOT EXISTS records_open ON records (agent, deal) WHERE open = 1;
CREATE INDEX IF NOT EXISTS records_deal ON records (deal);
CREATE TABLE IF NOT EXISTS closed (
    seq INTEGER PRIMARY KEY, agent TEXT NOT NULL, deal TEXT NOT NULL, summary BLOB NOT NULL,
    UNIQUE (agent, deal));
CREATE INDEX IF NOT EXISTS closed_request
    ON closed (agent, json_extract(CAST(summary AS TEXT), '$.request'));
CREATE TABLE IF NOT EXISTS transactions (
    seq INTEGER PRIMARY KEY, effect_id TEXT NOT NULL, sender TEXT NOT NULL,
    nonce INTEGER NOT NULL, raw BLOB NOT NULL, tx_hash TEXT NOT NULL,
    open INTEGER NOT NULL DEFAULT 1, UNIQUE (effect_id, tx_hash));
CREATE INDEX IF NOT EXISTS transactions_open ON transactions (seq) WHERE open = 1;
"""


def disk_refused(error: Exception) -> bool:
    """Return whether it is the disk that refused: full, over a quota, or broken."""
    code = getattr(error, "sqlite_errorcode", 0) & _PRIMARY
    return code in _DISK_CODES or getattr(error, "errno", None) in _DISK_ERRNOS


def disk_failed(what: str, error: Exception) -> JournalFailed:
    """Return that the disk refused, which is no reason to move any file away."""
    return JournalFailed(
        f"{what}: {getattr(error, 'strerror', None) or error}; nothing is lost: free some space, or"
        " mend the disk, and start again"
    )


class StateDirectory:
    """A directory that one node holds, and nobody else may read. Locked until released."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.chmod(0o700)
            self._file = (path / "lock").open("a+")
        except OSError as error:
            if disk_refused(error):
                raise disk_failed(f"the state directory {path} cannot be used", error) from error
            raise ConfigurationError(
                f"the state directory {path} cannot be used: {error.strerror or error};"
                " choose another with --state"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise ConfigurationError(
                f"{path} is held by {holder}: a state directory serves one process at a time;"
                " stop that one, or choose another directory with --state"
            ) from None
        try:
            self._file.seek(0)
            self._file.truncate()
            self._file.write(f"process {os.getpid()}")
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.close()  # It tries once more to write.
            raise disk_failed(f"the state directory {path} cannot be used", error) from error

    def release(self) -> None:
        """Let others have the directory. Safe to repeat."""
        self._file.close()


class SqliteJournal(Journal):
    """A journal in ``path``, a file that this process alone writes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._failure: Exception | None = None
        self._queue: list[_Statement] = []
        self._queued = 0
        self._done = 0
        self._committing: asyncio.Task[None] | None = None
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.commits = 0
        self.commit_ns = 0
        try:
            self._writer = self._open()
            self._reader = self._open()
            self._migrate()
        except sqlite3.Error as error:
            if disk_refused(error):
                raise disk_failed(f"the journal {path} cannot be opened", error) from error
            raise ConfigurationError(
                f"the journal {path} cannot be opened: {error}; if the file is damaged, move it"
                " away: money that is locked stays in the escrow and is found there, but what was"
                " spent by it counts against no budget any more"
            ) from error
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path,
            timeout=BUSY_TIMEOUT_MS / 1000,
            isolation_level=None,
            check_same_thread=False,
        )
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    def _migrate(self) -> None:
        self._reader.executescript(_SCHEMA)
        row = self._reader.execute("SELECT value FROM meta WHERE name = 'version'").fetchone()
        if row is None:
            self._reader.execute("INSERT INTO meta VALUES ('version', ?)", (str(SCHEMA_VERSION),))
        elif int(row[0]) != SCHEMA_VERSION:
            raise ConfigurationError(
                f"the journal {self._path} is of version {row[0]} and this program writes"
                f" {SCHEMA_VERSION}: use the version of Coase that wrote it"
            )
        self._path.chmod(0o600)

    def _put(self, statements: list[_Statement]) -> int:
        if self._failure is not None:
            raise self._failed()
        self._queue += statements
        self._queued += 1
        if self._committing is None:
            loop = asyncio.get_running_loop()
            self._committing = loop.create_task(self._commit_all())
        return self._queued

    def _failed(self) -> JournalFailed:
        return JournalFailed(
            f"the journal {self._path} could not be written: {self._failure}; nothing of it was"
            " done, and nothing is lost: free some space and start again"
        )

    def append(self, records: Sequence[Record]) -> int:
        """Queue ``records`` for the next commit and return the number of their group."""
        return self._put(
            [
                (
                    "INSERT INTO records (agent, deal, kind, at_ms, data) VALUES (?, ?, ?, ?, ?)",
                    (r.agent, r.deal, r.kind, r.at_ms, r.data),
                )
                for r in records
            ]
        )

    def close_deals(self, agent: AgentId, deals: Sequence[tuple[str, bytes]]) -> int:
        """Mark deals as over, each with its summary; an empty one is not kept."""
        statements: list[tuple[str, Sequence[object]]] = []
        for deal, summary in deals:
            statements.append(
                (
                    "UPDATE records SET open = 0 WHERE agent = ? AND deal = ? AND open = 1",
                    (agent, deal),
                )
            )
            if summary:
                statements.append(
                    (
                        "INSERT OR IGNORE INTO closed (agent, deal, summary) VALUES (?, ?, ?)",
                        (agent, deal, summary),
                    )
                )
        return self._put(statements)

    def write(self, statement: str, values: Sequence[object]) -> int:
        """Queue one statement of a store that shares this file; return its group's number."""
        return self._put([(statement, values)])

    def read(self, query: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Return the rows of a query, as of the last commit."""
        return list(self._reader.execute(query, values))

    async def durable(self, group: int) -> None:
        """Return once everything up to ``group`` is on disk.

        :raises JournalFailed: if the disk refused it or an earlier group
        """
        if self._failure is not None:
            raise self._failed()
        if self._done >= group:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((group, future))
        await future

    async def _commit_all(self) -> None:
        """Commit group after group until nothing is queued."""
        loop = asyncio.get_running_loop()
        try:
            while self._done < self._queued and self._failure is None:
                # Whatever else happens in this turn of the loop goes into the same commit.
                await asyncio.sleep(0)
                statements, self._queue = self._queue, []
                last, started = self._queued, time.perf_counter_ns()
                try:
                    if statements:  # A group may only mean: once all before it is on disk.
                        self._insert(statements)
                        await loop.run_in_executor(self._thread, self._writer.execute, "COMMIT")
                except (sqlite3.Error, OSError) as error:
                    self._failure = error
                    log.error("the journal %s could not commit: %s", self._path, error)
                else:
                    self._done = last
                    self.commits += 1
                    self.commit_ns += time.perf_counter_ns() - started
                self._wake()
        finally:
            self._committing = None

    def _insert(self, statements: list[_Statement]) -> None:
        execute = self._writer.execute
        execute("BEGIN IMMEDIATE")
        for statement, values in statements:
            execute(statement, values)

    def _wake(self) -> None:
        """Tell those who wait for what is now on disk, or that nothing will be any more."""
        while self._waiters and (self._failure is not None or self._waiters[0][0] <= self._done):
            _, future = self._waiters.popleft()
            if future.done():
                continue
            if self._failure is None:
                future.set_result(None)
            else:
                future.set_exception(self._failed())

    def open_records(self, agent: AgentId) -> list[Record]:
        """Return, in order, all records of the deals of ``agent`` that are not closed."""
        rows = self._reader.execute(
            "SELECT agent, deal, kind, at_ms, data FROM records"
            " WHERE agent = ? AND open = 1 ORDER BY seq",
            (agent,),
        )
        return [Record(r[0], r[1], r[2], r[3], bytes(r[4])) for r in rows]

    def deal_records(self, deal: str) -> list[Record]:
        """Return all records of a deal, closed or not, whose id begins with ``deal``."""
        rows = self._reader.execute(
            "SELECT agent, deal, kind, at_ms, data FROM records"
            " WHERE deal >= ? AND deal < ? ORDER BY seq",
            (deal, deal + "g"),
        )
        return [Record(r[0], r[1], r[2], r[3], bytes(r[4])) for r in rows]

    def summaries(self, agent: AgentId | None = None) -> list[tuple[AgentId, str, bytes]]:
        """Return the summaries of closed deals, oldest first."""
        rows = self._reader.execute(
            "SELECT agent, deal, summary FROM closed WHERE ? IS NULL OR agent = ? ORDER BY seq",
            (agent, agent),
        )
        return [(r[0], r[1], bytes(r[2])) for r in rows]

    def past(self, agent: AgentId, request_id: str) -> list[bytes] | None:
        """Return the summaries of what came of a request that is over, oldest first; else None."""
        over = self._reader.execute(
            "SELECT 1 FROM records WHERE deal = ? AND agent = ? AND kind = 'asked' AND open = 0",
            (request_id, agent),
        ).fetchone()
        if over is None:
            return None
        rows = self._reader.execute(
            "SELECT summary FROM closed WHERE agent = ?"
            " AND json_extract(CAST(summary AS TEXT), '$.request') = ? ORDER BY seq",
            (agent, request_id),
        )
        return [bytes(row[0]) for row in rows]

    async def close(self) -> None:
        """Commit what is queued and close the file. Safe to repeat."""
        while self._committing is not None:
            await asyncio.wait([self._committing])
        self._thread.shutdown()
        self._writer.close()
        self._reader.close()


class SqliteTxStore(TxStore):
    """Signed transactions in the journal's file, each on disk before it is sent."""

    def __init__(self, journal: SqliteJournal) -> None:
        self._journal = journal

    async def save(
        self, effect_id: str, sender: AgentId, nonce: int, raw: bytes, tx_hash: str
    ) -> None:
        """Keep a transaction; it is on the disk when this returns."""
        statement = (
            "INSERT INTO transactions (effect_id, sender, nonce, raw, tx_hash)"
            " VALUES (?, ?, ?, ?, ?) ON CONFLICT (effect_id, tx_hash) DO UPDATE SET open = 1"
        )
        values = (effect_id, sender, nonce, raw, tx_hash)
        await self._journal.durable(self._journal.write(statement, values))

    async def load(self, effect_id: str) -> tuple[SentTx, ...]:
        """Return the transactions of an effect, oldest first."""
        return self._select("WHERE effect_id = ? ORDER BY seq", (effect_id,))

    async def all_open(self) -> tuple[SentTx, ...]:
        """Return the transactions of all effects that are not finished, oldest first."""
        return self._select("WHERE open = 1 ORDER BY seq")

    async def finish(self, effect_id: str) -> None:
        """Note that the effect is in a block. A crash forgets it, and it is looked up again."""
        self._journal.write("UPDATE transactions SET open = 0 WHERE effect_id = ?", (effect_id,))

    async def forget(self, effect_id: str, tx_hash: str) -> None:
        """Drop one transaction that the endpoint refused."""
        statement = "DELETE FROM transactions WHERE effect_id = ? AND tx_hash = ?"
        await self._journal.durable(self._journal.write(statement, (effect_id, tx_hash)))

    def _select(self, where: str, values: Sequence[object] = ()) -> tuple[SentTx, ...]:
        query = f"SELECT effect_id, sender, nonce, raw, tx_hash FROM transactions {where}"  # noqa: S608
        rows = self._journal.read(query, values)
        return tuple(SentTx(r[0], r[1], r[2], bytes(r[3]), r[4]) for r in rows)


def read_summaries(path: Path) -> list[dict[str, object]]:
    """Return the summaries in a journal that another process may be writing, oldest first.

    :raises ConfigurationError: if there is no readable journal
    """
    try:
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)
        try:
            rows = connection.execute("SELECT agent, summary FROM closed ORDER BY seq").fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise ConfigurationError(f"no journal can be read at {path}: {error}") from error
    found: list[dict[str, object]] = []
    for agent, summary in rows:
        row = json.loads(summary)
        row["agent"] = agent
        found.append(row)
    return found
