"""What the embedded chain keeps on disk: a lock, its genesis, and one line for each block.

The lines are executed again at start. A line that the power cut in two was never answered for,
so it is dropped; anything else that does not fit is an error, since money would be guessed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from typing import TYPE_CHECKING, Any, Final

from coase.protocol.errors import ConfigurationError, JournalFailed

if TYPE_CHECKING:
    from pathlib import Path

VERSION: Final = 1
_CHAIN: Final = "chain.jsonl"
_LOCK: Final = "chain.lock"


class StateFile:
    """The append-only file of one chain. Exactly one process holds it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise ConfigurationError(
                f"another process runs the chain in {directory}: use that one, stop it, "
                "or give this one a directory of its own"
            ) from error
        self._file = os.open(
            directory / _CHAIN, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )

    def read(self) -> list[dict[str, Any]]:
        """Return every whole line, the genesis first, and cut off a torn last one.

        :raises ConfigurationError: if a line before the last cannot be read
        """
        path = self.directory / _CHAIN
        data = path.read_bytes()
        lines = data.split(b"\n")
        torn = lines.pop()
        entries: list[dict[str, Any]] = []
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                if number == len(lines) and not torn:
                    torn = line + b"\n"
                    break
                raise ConfigurationError(
                    f"{path}, line {number}, is damaged: restore the file from a copy, or remove "
                    f"{self.directory} and start a new chain (its money is test money)"
                ) from error
            entries.append(entry)
        if torn:
            os.ftruncate(self._file, len(data) - len(torn))
            os.fsync(self._file)
        if entries and entries[0].get("coase_devchain") != VERSION:
            raise ConfigurationError(
                f"{path} was written by another version of the embedded chain: remove "
                f"{self.directory} to start a new one"
            )
        return entries

    def append(self, entry: dict[str, Any], *, durable: bool) -> None:
        """Write one line; with ``durable`` it is on the disk when this returns.

        :raises JournalFailed: if the disk refuses; the block must then not be shown to anybody
        """
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        try:
            written = os.write(self._file, line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if durable:
                os.fsync(self._file)
        except OSError as error:
            raise JournalFailed(
                f"{self.directory / _CHAIN} cannot be written: {error.strerror or error}"
            ) from error

    def secret(self, name: str) -> bytes | None:
        """Return the 32 bytes kept under ``name``, or None."""
        path = self.directory / name
        return bytes.fromhex(path.read_text().strip()) if path.exists() else None

    def keep_secret(self, name: str, secret: bytes) -> None:
        """Keep 32 bytes under ``name``, readable by this user only."""
        fresh = self.directory / f".{name}.new"
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(secret.hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.directory / name)
        folder = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def close(self) -> None:
        """Let go of the file and the lock. Safe to repeat."""
        for handle in (self._file, self._lock):
            if handle >= 0:
                os.close(handle)
        self._file = self._lock = -1
