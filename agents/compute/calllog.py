"""What a router keeps over its restarts: why each call went where it went, and what was learnt."""

from __future__ import annotations

import json
import logging
import sqlite3
from typing import TYPE_CHECKING, Any, Final

from coase.agents.backends.kept import open_kept
from coase.protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from .explain import Explanation

log = logging.getLogger(__name__)

CALLS_FILE: Final = "calls.sqlite"
CALLS_MAX: Final = 10_000  # About 30 MB; the oldest go.
PRUNED_EVERY: Final = 200
BUSY_MAX_S: Final = 2
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS calls (
    number INTEGER PRIMARY KEY, call TEXT UNIQUE, at_ms INTEGER, document TEXT
);
CREATE TABLE IF NOT EXISTS learnt (one INTEGER PRIMARY KEY CHECK (one = 1), document TEXT);
"""


_LOOKS: Final = "SELECT at_ms, calls.document, one FROM calls, learnt LIMIT 1"


class CallLog:
    """The file of ``directory`` in which both are kept. Others may read it meanwhile.

    A disk that refuses costs explanations and what was learnt, and no answer: that is logged.
    """

    def __init__(self, directory: Path, *, say: Callable[[str], None] | None = None) -> None:
        """Open it, and make it if there is none; with ``say``, also if it is broken.

        :raises ConfigurationError: if it cannot be opened
        :raises JournalFailed: if the disk refuses
        """
        self.path = directory / CALLS_FILE
        self._kept = 0
        self._file = open_kept(self.path, _TABLES, looks=_LOOKS, busy_max_s=BUSY_MAX_S, say=say)

    def close(self) -> None:
        """Close the file. Safe to repeat."""
        self._file.close()

    def keep(self, explanation: Explanation) -> None:
        """Keep why a call went where it went; one with the same id takes the other's place."""
        document = json.dumps(explanation.shown(), ensure_ascii=False)
        self._write(
            "INSERT INTO calls (call, at_ms, document) VALUES (?, ?, ?)"
            " ON CONFLICT (call) DO UPDATE SET document = excluded.document",
            (explanation.call, explanation.at_ms, document),
        )
        self._kept += 1
        if self._kept % PRUNED_EVERY == 1:
            self._write(
                "DELETE FROM calls WHERE number <= (SELECT max(number) FROM calls) - ?",
                (CALLS_MAX,),
            )

    def find(self, call: str) -> dict[str, Any] | None:
        """Return what is kept of a call by its id, or by a beginning that only one has.

        :raises ConfigurationError: if several begin so, or the file cannot be read
        """
        like = call.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
        rows = self._read(
            "SELECT call, document FROM calls WHERE call = ? OR call LIKE ? ESCAPE '\\'"
            " ORDER BY call <> ? LIMIT 2",
            (call, like, call),
        )
        if len(rows) > 1 and rows[0][0] != call:
            raise ConfigurationError(f"several calls begin with {call!r}: give more of the id")
        return json.loads(rows[0][1]) if rows else None

    def latest(self, count: int) -> list[dict[str, Any]]:
        """Return the latest calls, the last one first.

        :raises ConfigurationError: if the file cannot be read
        """
        rows = self._read("SELECT document FROM calls ORDER BY number DESC LIMIT ?", (count,))
        return [json.loads(row[0]) for row in rows]

    def save(self, learnt: Mapping[str, Any]) -> None:
        """Keep what was learnt, in place of what was kept before: all of it or nothing."""
        self._write("INSERT OR REPLACE INTO learnt VALUES (1, ?)", (json.dumps(learnt),))

    def learnt(self) -> dict[str, Any]:
        """Return what was learnt before; nothing if there is nothing that can be read."""
        try:
            rows = self._read("SELECT document FROM learnt", ())
            found = json.loads(rows[0][0]) if rows else {}
        except (ConfigurationError, ValueError) as error:
            log.warning("what was learnt is lost: %s", error)
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, statement: str, values: tuple[Any, ...]) -> None:
        try:
            self._file.execute(statement, values)
        except sqlite3.Error as error:
            log.warning("%s cannot be written: %s", self.path, error)

    def _read(self, statement: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        try:
            return self._file.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise ConfigurationError(f"{self.path} cannot be read: {error}") from error
