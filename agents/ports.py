"""Ports of the runtime: the journal, chance, and how envelopes are sealed and signed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coase.protocol.envelope import check_signature, pack, public_key, seal, unseal
from coase.protocol.identity import Identity, keccak256
from coase.protocol.messages import SEALED, Header

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coase.protocol.types import AgentId


@dataclass(frozen=True, slots=True)
class Record:
    """One line of the journal: what happened to one deal of one agent, and when."""

    agent: AgentId
    deal: str
    kind: str
    at_ms: int
    data: bytes


class Journal(ABC):
    """Keeps records in order, and says when they are safe from a power cut."""

    @abstractmethod
    def append(self, records: Sequence[Record]) -> int:
        """Queue ``records`` and return the number of the group that will hold them."""

    @abstractmethod
    async def durable(self, group: int) -> None:
        """Return once everything up to ``group`` is on disk.

        :raises JournalFailed: if the disk refused; nothing of the group may be performed
        """

    @abstractmethod
    def open_records(self, agent: AgentId) -> list[Record]:
        """Return, in order, all records of the deals of ``agent`` that are not closed."""

    @abstractmethod
    def close_deals(self, agent: AgentId, deals: Sequence[tuple[str, bytes]]) -> int:
        """Mark deals as over, each with its summary; they are no longer replayed."""

    @abstractmethod
    def summaries(self, agent: AgentId | None = None) -> list[tuple[AgentId, str, bytes]]:
        """Return the summaries of closed deals, oldest first."""

    @abstractmethod
    def past(self, agent: AgentId, request_id: str) -> list[bytes] | None:
        """Return the summaries of what came of a request of ``agent`` that is over.

        None if it is not over, or never was made.
        """

    @abstractmethod
    async def close(self) -> None:
        """Commit what is queued and release the journal. Safe to repeat."""


class Chance(ABC):
    """Where ids, salts and keys come from."""

    @abstractmethod
    def take(self, count: int) -> bytes:
        """Return ``count`` bytes that nobody else can guess, or that a seed gives."""


class SeededChance(Chance):
    """The same bytes for the same seed, for demonstrations and simulations only."""

    def __init__(self, seed: bytes) -> None:
        self._seed, self._count = keccak256(b"coase/chance/v1\0" + seed), 0

    def take(self, count: int) -> bytes:
        """Return the next ``count`` bytes of the seed's sequence."""
        out = b""
        while len(out) < count:
            self._count += 1
            out += keccak256(self._seed + self._count.to_bytes(8, "big"))
        return out[:count]


class Codec:
    """Signs and seals what is sent, checks and opens what comes, for one agent on one net."""

    def __init__(self, identity: Identity, *, net: str) -> None:
        self.identity, self.net = identity, net

    def encode(
        self,
        *,
        kind: str,
        message_id: str,
        to: str,
        deal: str,
        re: str,
        sent_ms: int,
        expires_ms: int,
        plain: bytes,
        key: str,
        seq: int = 0,
    ) -> bytes:
        """Return the signed envelope around ``plain``, sealed to ``key`` if the kind asks it."""
        sealed = kind in SEALED
        body = seal(plain, key, deal=deal, kind=kind, seq=seq) if sealed else plain.decode()
        return pack(
            self.identity,
            net=self.net,
            kind=kind,
            message_id=message_id,
            to=to,
            deal=deal,
            re=re,
            seq=seq,
            sent_ms=sent_ms,
            expires_ms=expires_ms,
            sealed=sealed,
            body=body,
        )

    def authenticate(self, wire: bytes, header: Header) -> None:
        """Return if the header's sender signed ``wire``.

        :raises BadSignature: otherwise
        """
        check_signature(wire, header)

    def unseal(self, header: Header, secret: bytes) -> bytes:
        """Return the plain bytes of a body.

        :raises Refused: if it was not sealed to ``secret``
        """
        if header.seal == "":
            return header.body.encode()
        return unseal(header.body, secret, deal=header.deal, kind=header.kind, seq=header.seq)

    def public_key(self, secret: bytes) -> str:
        """Return the X25519 public key of ``secret`` as hex."""
        return public_key(secret)

    def sign(self, digest: bytes) -> bytes:
        """Return the agent's signature on an EIP-712 digest."""
        return self.identity.sign(digest)
