"""The firm: agents that trust each other and work for each other without a price.

Who belongs to it has its code, or is on its list of keys. A proof of belonging is an HMAC over one
request and one address, so that it is good for nobody else and for nothing later, and strangers
who hear it cannot even tell that two of them are of one firm.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, Literal

from coase.protocol.errors import ConfigurationError
from coase.protocol.joincode import SECRET_BYTES, JoinCode

from .config import state_home, write_private

if TYPE_CHECKING:
    from pathlib import Path

    from coase.protocol.envelope import Message
    from coase.protocol.messages import Description
    from coase.protocol.types import AgentId

FIRM_FILE: Final = "firm.json"
FILE_MAX_BYTES: Final = 1024 * 1024
KEYS_MAX: Final = 1_000
NAME_MAX_CHARS: Final = 64

_ADDRESS: Final = re.compile(r"0x[0-9a-f]{40}")

Side = Literal["buyer", "seller"]


@dataclass(frozen=True, slots=True)
class Firm:
    """One firm, as one machine knows it."""

    name: str
    code: JoinCode | None = field(default=None, repr=False)
    keys: tuple[tuple[AgentId, str], ...] = ()
    """Addresses that belong to it without the code, each with a name for people."""

    def proof(self, side: Side, request_id: str, agent: AgentId) -> str:
        """Return what proves that ``agent`` belongs to the firm, 64 hex digits; "" without code."""
        if self.code is None:
            return ""
        said = f"coase-firm/{side}/{request_id}/{agent}".encode()
        return hmac.digest(self.code.secret("firm"), said, sha256).hex()

    def has(self, agent: AgentId, proof: str, *, side: Side, request_id: str) -> bool:
        """Return whether ``agent`` belongs to the firm: by its proof, or by the list of keys."""
        if any(agent == key for key, _ in self.keys):
            return True
        expected = self.proof(side, request_id, agent)
        return bool(expected) and hmac.compare_digest(expected, proof)

    def with_key(self, agent: AgentId, name: str) -> Firm:
        """Return the firm with one more key.

        :raises ConfigurationError: if that is no address, or there are too many
        """
        if not _ADDRESS.fullmatch(agent):
            raise ConfigurationError(f"{agent!r} is no address: 0x and 40 hex digits")
        kept = tuple(entry for entry in self.keys if entry[0] != agent)
        if len(kept) >= KEYS_MAX:
            raise ConfigurationError(f"a firm has at most {KEYS_MAX} listed keys: use its code")
        return Firm(self.name, self.code, (*kept, (agent, name[:NAME_MAX_CHARS])))

    def without_key(self, agent: AgentId) -> Firm:
        """Return the firm without a key.

        :raises ConfigurationError: if it is not on the list
        """
        kept = tuple(entry for entry in self.keys if entry[0] != agent)
        if len(kept) == len(self.keys):
            raise ConfigurationError(f"{agent} is not on the firm's list of keys")
        return Firm(self.name, self.code, kept)


def new_firm(name: str) -> Firm:
    """Return a new firm with a code of its own.

    :raises ConfigurationError: if the name cannot be used
    """
    return Firm(_name(name), JoinCode.of(secrets.token_bytes(SECRET_BYTES)))


def joined_firm(code: str, name: str = "firm") -> Firm:
    """Return the firm whose code somebody read out.

    :raises ConfigurationError: if it is none, or has a typing error
    """
    return Firm(_name(name), JoinCode.parse(code))


def _name(name: str) -> str:
    if not name.strip() or len(name) > NAME_MAX_CHARS or not name.isprintable():
        raise ConfigurationError(f"{name!r} is no name for a firm: 1 to {NAME_MAX_CHARS} letters")
    return name.strip()


class FirmFile:
    """The firm of one machine's user, in a file; running programs see its changes."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or state_home() / FIRM_FILE
        self._stamp: tuple[int, int] = (0, 0)
        self._firm: Firm | None = None

    def read(self) -> Firm | None:
        """Return the firm, or None if there is none.

        :raises ConfigurationError: if the file cannot be used; says what to do
        """
        try:
            stat = self.path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            if stamp == self._stamp:
                return self._firm
            if stat.st_mode & 0o077:
                raise ConfigurationError(
                    f"{self.path} can be read by others; if it is yours: chmod 600 {self.path}"
                )
            if stat.st_size > FILE_MAX_BYTES:
                raise ConfigurationError(f"{self.path} is too large for a firm")
            self._firm, self._stamp = _parse(self.path.read_text()), stamp
        except FileNotFoundError:
            self._firm, self._stamp = None, (0, 0)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{self.path} cannot be read ({type(error).__name__}); remove it and join again"
            ) from None
        return self._firm

    def current(self) -> Firm | None:
        """Return the firm as far as it can be read: who cannot read it trusts nobody."""
        try:
            return self.read()
        except ConfigurationError:
            return None

    def write(self, firm: Firm) -> None:
        """Keep ``firm``, for its owner's eyes only.

        :raises ConfigurationError: if the disk refuses
        """
        row: dict[str, Any] = {
            "name": firm.name,
            "code": firm.code.text if firm.code is not None else "",
            "keys": dict(firm.keys),
        }
        write_private(self.path, json.dumps(row, indent=2) + "\n")

    def forget(self) -> None:
        """Leave the firm: from now on nobody is trusted, and nobody trusts us by the code."""
        self.path.unlink(missing_ok=True)


class Colleagues:
    """Who of the firm was met: by a proof in what it said of itself, or by the list of keys."""

    def __init__(self, file: FirmFile) -> None:
        self.file = file
        self._met: dict[AgentId, Firm] = {}

    def hear(self, message: Message, description: Description) -> None:
        """Take note of who describes itself."""
        firm, sender = self.file.current(), message.sender
        if firm is None:
            self._met.pop(sender, None)
        elif firm.has(sender, description.firm, side="seller", request_id=message.re):
            if len(self._met) >= KEYS_MAX:
                del self._met[next(iter(self._met))]
            self._met[sender] = firm
        else:
            self._met.pop(sender, None)

    def __contains__(self, agent: object) -> bool:
        """Whether an agent is of the firm as it is now, as far as it was met."""
        firm = self.file.current()
        if firm is None:
            return False
        return self._met.get(str(agent)) == firm or any(agent == key for key, _ in firm.keys)


def _parse(text: str) -> Firm:
    row = json.loads(text)
    code = JoinCode.parse(row["code"]) if row["code"] else None
    keys = tuple((str(key), str(name)) for key, name in dict(row["keys"]).items())
    return Firm(str(row["name"]), code, keys)
