"""The API keys of a gateway: whose they are, and what may be bought with each.

They lie in one file of the gateway's directory, 0600, as the SHA-256 of a key that nobody can
guess. A gateway that runs reads the file again when it changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import secrets
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from coase.agents.config import write_private
from coase.agents.purse import Budget
from coase.protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

KEYS_FILE: Final = "callers.json"  # A node's own keys.json may lie beside it.
KEYS_MAX: Final = 10_000
SIZE_MAX_BYTES: Final = 8 * 1024 * 1024
KEY_BYTES: Final = 32  # Of chance: nobody tries so many, so that a quick hash hides them well.
PREFIX: Final = "sk-coase-"  # Some clients refuse a key that does not begin so.
SHOWN_CHARS: Final = len(PREFIX) + 4  # Of the key, by which its owner knows it again.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One key: a name, what is left to recognise it by, and its limits."""

    name: str
    digest: str
    begins: str
    made_s: int
    budget: Budget


@dataclass(frozen=True, slots=True)
class Callers:
    """Who may ask, by the digest of a key."""

    keys: Mapping[str, ApiKey]

    def find(self, given: str) -> ApiKey | None:
        """Return whose key ``given`` is, or None if it is nobody's."""
        # A look-up by digest tells by its time nothing of the key.
        return self.keys.get(digest_of(given)) if given else None


class KeyFile:
    """The keys in the file of ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.path = directory, directory / KEYS_FILE
        self._stamp: tuple[int, int, int] | None = None
        self._callers = Callers({})

    def read(self) -> dict[str, ApiKey]:
        """Return the keys by name; none if there is no file.

        :raises ConfigurationError: if it cannot be read, is damaged, or others may write to it
        """
        try:
            stat = self.path.stat()
            if stat.st_size > SIZE_MAX_BYTES:
                raise ConfigurationError(f"{self.path} is too large for a file of keys")
            if stat.st_mode & 0o077:
                raise ConfigurationError(
                    f"{self.path} is open to others (mode {stat.st_mode & 0o777:o}); if it is"
                    f" yours: chmod 600 {self.path}"
                )
            rows = json.loads(self.path.read_bytes())
            return {name: _key(name, row) for name, row in rows["keys"].items()}
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ConfigurationError(f"{self.path}: {error.strerror}") from error
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(
                f"{self.path} is no file of keys ({error}): mend it, or remove it and make new ones"
            ) from error

    def callers(self) -> tuple[Callers, bool]:
        """Return who may ask now, and whether that is news. A look at the file's stamp, mostly.

        :raises ConfigurationError: if it cannot be read
        """
        stamp: tuple[int, int, int] | None = None
        try:
            found = self.path.stat()
            stamp = (found.st_mtime_ns, found.st_ino, found.st_mode)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ConfigurationError(f"{self.path}: {error.strerror}") from error
        if stamp == self._stamp:
            return self._callers, False
        self._callers = Callers({key.digest: key for key in self.read().values()})
        self._stamp = stamp
        return self._callers, True

    def add(self, name: str, budget: Budget) -> str:
        """Make a key and return it: it is told this once, and kept as a hash.

        :raises ConfigurationError: if there is one of that name, or the disk refuses
        """
        if not _NAME.fullmatch(name):
            raise ConfigurationError(
                f"{name!r} is no name for a key: up to 64 letters, digits and . _ @ + -"
            )
        text = PREFIX + secrets.token_urlsafe(KEY_BYTES)
        with self._held() as keys:
            if name in keys:
                raise ConfigurationError(f"there is a key {name!r} already: remove it first")
            if len(keys) >= KEYS_MAX:
                raise ConfigurationError(f"there are {KEYS_MAX} keys already")
            keys[name] = ApiKey(
                name=name,
                digest=digest_of(text),
                begins=text[:SHOWN_CHARS],
                made_s=int(time.time()),
                budget=budget,
            )
        return text

    def change(self, name: str, limits: Mapping[str, str | None]) -> None:
        """Set other limits of a key; those that are not named stay.

        :raises ConfigurationError: if there is no such key, or the disk refuses
        """
        with self._held() as keys:
            key = _found(keys, name)
            keys[name] = replace(key, budget=replace(key.budget, **dict(limits)))

    def remove(self, name: str) -> None:
        """Forget a key; whoever has it is let in no more.

        :raises ConfigurationError: if there is no such key, or the disk refuses
        """
        with self._held() as keys:
            _found(keys, name)
            del keys[name]

    @contextmanager
    def _held(self) -> Iterator[dict[str, ApiKey]]:
        """Let nobody else write meanwhile, and write what was changed."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = (self.directory / f"{KEYS_FILE}.lock").open("a")
        except OSError as error:
            raise ConfigurationError(f"{self.directory}: {error.strerror}") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = self.read()
            yield keys
            rows = {name: _row(key) for name, key in keys.items()}
            write_private(self.path, json.dumps({"keys": rows}, indent=1) + "\n")


def digest_of(key: str) -> str:
    """Return what is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _found(keys: Mapping[str, ApiKey], name: str) -> ApiKey:
    if name not in keys:
        has = ", ".join(keys) or "none"
        raise ConfigurationError(f"there is no key {name!r}; there is: {has}")
    return keys[name]


def _row(key: ApiKey) -> dict[str, Any]:
    limits = {limit: text for limit, text in asdict(key.budget).items() if text is not None}
    return {
        "sha256": key.digest,
        "begins": key.begins,
        "made_s": key.made_s,
        "budget": limits,
    }


def _key(name: str, row: Mapping[str, Any]) -> ApiKey:
    digest, begins, made_s = row["sha256"], row["begins"], row["made_s"]
    if not _NAME.fullmatch(name) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"the key {name!r} is none")
    if not isinstance(begins, str) or not isinstance(made_s, int):
        raise ValueError(f"the key {name!r} is none")
    return ApiKey(
        name=name, digest=digest, begins=begins, made_s=made_s, budget=Budget(**row["budget"])
    )
