"""SQLite files that are kept for people, and that a node can do without.

Nothing in them counts against a budget: that is in the journal, which is never put aside.
"""

from __future__ import annotations

import sqlite3
import time
from typing import TYPE_CHECKING, Final

from coase.protocol.errors import ConfigurationError, JournalFailed

from .sqlite import disk_failed, disk_refused

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PRIMARY: Final = 0xFF  # The kind of an error; above it are details.
_BROKEN: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
_BESIDE: Final = ("", "-wal", "-shm")


class Broken(ConfigurationError):
    """The file is there, and is no such file, or no longer one."""


def open_kept(
    path: Path,
    tables: str,
    *,
    looks: str,
    busy_max_s: int,
    say: Callable[[str], None] | None = None,
) -> sqlite3.Connection:
    """Return the file at ``path``, made if there is none, each statement a transaction of its own.

    ``tables`` are made if they are missing, and ``looks`` has to be possible then. With ``say`` a
    broken file is put aside under a name that says so, a new one takes its place, and that is said.

    :raises Broken: if it is broken, without ``say``
    :raises JournalFailed: if the disk refuses
    :raises ConfigurationError: if it cannot be opened otherwise
    """
    try:
        return _opened(path, tables, looks, busy_max_s)
    except Broken as error:
        if say is None:
            raise Broken(f"{error}; coase gateway puts it aside when it starts") from error
        aside = _put_aside(path)
        say(f"{error}; it was put aside as {aside.name} and a new one begun: no money is in it")
    return _opened(path, tables, looks, busy_max_s)


def _opened(path: Path, tables: str, looks: str, busy_max_s: int) -> sqlite3.Connection:
    file: sqlite3.Connection | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        file = sqlite3.connect(path, timeout=busy_max_s, isolation_level=None)
        file.execute("PRAGMA journal_mode = WAL")
        # A killed process loses nothing; a power cut the last rows, and no deal's money.
        file.execute("PRAGMA synchronous = NORMAL")
        file.executescript(tables)
        file.execute(looks).fetchone()
        (found,) = file.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise Broken(f"{path} is damaged: {found}")
    except (OSError, sqlite3.Error, Broken) as error:
        if file is not None:
            file.close()
        if isinstance(error, Broken):
            raise
        raise failure(path, "opened", error) from error
    return file


def failure(path: Path, what: str, error: Exception) -> ConfigurationError | JournalFailed:
    """Return what an error of the system or of SQLite means for the file at ``path``."""
    if disk_refused(error):
        return disk_failed(f"{path} cannot be {what}", error)
    code = getattr(error, "sqlite_errorcode", 0) & PRIMARY
    kind = Broken if code in _BROKEN else ConfigurationError
    return kind(f"{path} cannot be {what}: {error}")


def _put_aside(path: Path) -> Path:
    """Give a file, and what SQLite keeps beside it, another name, and return that.

    :raises ConfigurationError: if that cannot be done
    """
    aside = path.with_name(f"{path.name}.damaged-{time.time_ns() // 1_000_000}")
    try:
        for end in _BESIDE:
            old = path.with_name(path.name + end)
            if old.exists():
                old.rename(aside.with_name(aside.name + end))
    except OSError as error:
        raise ConfigurationError(f"{path} is damaged and cannot be put aside: {error}") from error
    return aside
