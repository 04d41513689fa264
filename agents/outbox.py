"""The outbox: what was said and is not answered yet, and when it is said again.

A message is done when it is answered, not when it is published: of a hundred messages that were
published and flushed to a broker that then died, none arrived, without an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from coase.protocol.messages import ENVELOPE_LIFE_MAX_MS, RESEND_FIRST_MS, RESEND_MAX_MS

from .pieces import split
from .steps import Transmit

if TYPE_CHECKING:
    from collections.abc import Callable

    from coase.protocol.envelope import Message

RENEW_BEFORE_EXPIRY_MS: Final = 1_000


@dataclass(slots=True)
class Outgoing:
    """A message that is repeated until it is answered."""

    message: Message
    key: str
    until_ms: int
    next_ms: int
    pause_ms: int = RESEND_FIRST_MS
    wires: tuple[tuple[str, bytes], ...] = ()
    """The envelopes that carry it, each with its id: one, or its pieces."""
    wire_expires_ms: int = 0
    unanswered: frozenset[str] = frozenset()
    """The ids of those envelopes that are not answered yet."""


class Outbox:
    """Unanswered messages of one desk."""

    def __init__(self, encode: Callable[..., bytes]) -> None:
        self._encode = encode
        self._out: dict[str, Outgoing] = {}
        self._carriers: dict[str, str] = {}
        self._shown: set[str] = set()

    def __len__(self) -> int:
        """How many messages wait for an answer."""
        return len(self._out)

    def send(self, message: Message, key: str, until_ms: int, *, now_ms: int) -> tuple[bytes, ...]:
        """Return the envelopes to send now, and keep them for repetition until ``until_ms``."""
        out = Outgoing(message, key, until_ms, now_ms + RESEND_FIRST_MS)
        self._renew(out, now_ms=now_ms)
        if until_ms > now_ms:
            self._out[message.id] = out
            for carrier, _ in out.wires:
                self._carriers[carrier] = message.id
        return tuple(wire for _, wire in out.wires)

    def _renew(self, out: Outgoing, *, now_ms: int) -> None:
        """Make the envelopes anew: sealed, signed, alive from now on."""
        message = out.message
        pieces = split(message)
        if pieces is None:
            wire = self._encode(
                message, message.kind, message.id, message.plain, out.key, now_ms=now_ms
            )
            out.wires = ((message.id, wire),)
        else:
            out.wires = tuple(
                (
                    piece.id,
                    self._encode(
                        message,
                        "piece",
                        piece.id,
                        piece.plain,
                        out.key,
                        now_ms=now_ms,
                        seq=piece.seq,
                    ),
                )
                for piece in pieces
            )
        out.unanswered = frozenset(carrier for carrier, _ in out.wires)
        out.wire_expires_ms = now_ms + ENVELOPE_LIFE_MAX_MS

    def awaits(self, answered_id: str, by: str) -> bool:
        """Return whether ``by`` still owes an answer to that message of ours."""
        out = self._out.get(self._carriers.get(answered_id, answered_id))
        return out is not None and out.message.to == by

    def answered(self, answered_id: str, *, by: str) -> Outgoing | None:
        """Strike off what a message answers, if it comes from whom it was sent to.

        An answer to a piece only spares its repetition: who crashes forgets pieces, so that the
        message is done when it is answered as a whole.
        """
        if not answered_id:
            return None
        out = self._out.get(self._carriers.get(answered_id, answered_id))
        if out is None or by != out.message.to:
            return None
        if answered_id == out.message.id:
            self.drop(out)
            if out.message.kind == "evidence":
                self._shown.add(out.message.deal)
        else:
            out.unanswered = out.unanswered - {answered_id}
        return out

    def was_shown(self, deal: str) -> bool:
        """Return whether our evidence of an open deal was answered for by its arbiter."""
        return deal in self._shown

    def drop(self, out: Outgoing) -> None:
        """Forget a message."""
        self._out.pop(out.message.id, None)
        for carrier, _ in out.wires:
            self._carriers.pop(carrier, None)

    def drop_deal(self, deal: str) -> None:
        """Forget what a deal that is over still wanted to say, except the consent to settle.

        The seller may still want that one, to close earlier than the windows do.
        """
        self._shown.discard(deal)
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
            # If all pieces were answered and the whole was not, some were forgotten: all again.
            rest = out.unanswered or frozenset(carrier for carrier, _ in out.wires)
            again.extend(
                Transmit(out.message.to, wire) for carrier, wire in out.wires if carrier in rest
            )
        return again, late

    def next_ms(self) -> int | None:
        """Return when the next repetition is due, or None."""
        return min((min(o.next_ms, o.until_ms) for o in self._out.values()), default=None)
