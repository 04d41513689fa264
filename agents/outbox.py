"""The outbox: what was said and is not answered yet, and when it is said again.

A message is done when it is answered, not when it is published: of a hundred messages that were
published and flushed to a broker that then died, none arrived, without an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from coase.protocol.envelope import Message
from coase.protocol.messages import ENVELOPE_LIFE_MAX_MS, RESEND_FIRST_MS, RESEND_MAX_MS

from .pieces import split
from .steps import Transmit

RENEW_BEFORE_EXPIRY_MS: Final = 1_000


@dataclass(slots=True)
class Outgoing:
    """A message that is repeated until it is answered."""

    message: Message
    key: str
    until_ms: int
    next_ms: int
    pause_ms: int = RESEND_FIRST_MS
    wires: tuple[bytes, ...] = ()
    wire_expires_ms: int = 0
    unanswered: frozenset[str] = frozenset()
    """The ids of the envelopes that carry it: one, or its pieces."""


class Outbox:
    """Unanswered messages of one desk."""

    def __init__(self, encode: Callable[..., bytes]) -> None:
        self._encode = encode
        self._out: dict[str, Outgoing] = {}
        self._carriers: dict[str, str] = {}

    def __len__(self) -> int:
        """How many messages wait for an answer."""
        return len(self._out)

    def send(self, message: Message, key: str, until_ms: int, *, now_ms: int) -> tuple[bytes, ...]:
        """Return the envelopes to send now, and keep them for repetition until ``until_ms``."""
        out = Outgoing(message, key, until_ms, now_ms + RESEND_FIRST_MS)
        self._renew(out, now_ms=now_ms)
        if until_ms > now_ms:
            self._out[message.id] = out
            for carrier in out.unanswered:
                self._carriers[carrier] = message.id
        return out.wires

    def _renew(self, out: Outgoing, *, now_ms: int) -> None:
        """Make the envelopes anew: sealed, signed, alive from now on."""
        message = out.message
        pieces = split(message)
        if pieces is None:
            out.wires = (
                self._encode(
                    message, message.kind, message.id, message.plain, out.key, now_ms=now_ms
                ),
            )
            out.unanswered = frozenset((message.id,))
        else:
            out.wires = tuple(
                self._encode(
                    message, "piece", piece.id, piece.plain, out.key, now_ms=now_ms, seq=piece.seq
                )
                for piece in pieces
            )
            out.unanswered = frozenset(piece.id for piece in pieces) | {message.id}
        out.wire_expires_ms = now_ms + ENVELOPE_LIFE_MAX_MS

    def answered(self, answered_id: str, *, by: str = "") -> Outgoing | None:
        """Strike off what a message answers, if it comes from whom it was sent to."""
        if not answered_id:
            return None
        out = self._out.get(self._carriers.get(answered_id, answered_id))
        if out is None or (by and by != out.message.to):
            return None
        out.unanswered = out.unanswered - {answered_id}
        if answered_id == out.message.id or out.unanswered <= {out.message.id}:
            self.drop(out)
        return out

    def drop(self, out: Outgoing) -> None:
        """Forget a message."""
        self._out.pop(out.message.id, None)
        for carrier in [c for c, owner in self._carriers.items() if owner == out.message.id]:
            del self._carriers[carrier]

    def drop_deal(self, deal: str) -> None:
        """Forget what a deal that is over still wanted to say, except the consent to settle.

        The seller may still want that one, to close earlier than the windows do.
        """
        for out in [o for o in self._out.values() if o.message.deal == deal]:
            if out.message.kind != "settle":
                self.drop(out)

    def due(self, *, now_ms: int) -> tuple[list[Transmit], list[Message]]:
        """Return what is to be said again now, and what nobody answered in time."""
        again: list[Transmit] = []
        late: list[Message] = []
        for out in list(self._out.values()):
            if now_ms >= out.until_ms:
                self.drop(out)
                late.append(out.message)
                continue
            if now_ms < out.next_ms:
                continue
            if now_ms > out.wire_expires_ms - RENEW_BEFORE_EXPIRY_MS:
                self._renew(out, now_ms=now_ms)
            out.pause_ms = min(2 * out.pause_ms, RESEND_MAX_MS)
            out.next_ms = now_ms + out.pause_ms
            again.extend(Transmit(out.message.to, wire) for wire in out.wires)
        return again, late

    def next_ms(self) -> int | None:
        """Return when the next repetition is due, or None."""
        return min((min(o.next_ms, o.until_ms) for o in self._out.values()), default=None)
