"""Who hears which subject on one transport, whatever carries the bytes."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from coase.protocol.errors import LocalProtocolError
from coase.protocol.messages import ENVELOPE_SIZE_MAX_BYTES

if TYPE_CHECKING:
    from coase.protocol.ports import OnEnvelope, TransportHealth
    from coase.protocol.types import AgentId

ERRORS_KEPT_MAX: Final = 16  # Enough to see a pattern; a counter tells the rest.
_LOGGED_FULLY_MAX: Final = 8  # Later ones are logged at each power of two, or they fill the disk.

log = logging.getLogger("coase.protocol.transport")


class Deliveries:
    """Callbacks by subject and agent. A subject is carried once, however many agents hear it."""

    __slots__ = ("_by_agent", "_by_subject", "_health")

    def __init__(self, health: TransportHealth) -> None:
        self._health = health
        self._by_subject: dict[str, dict[AgentId, OnEnvelope]] = {}
        self._by_agent: dict[AgentId, dict[str, None]] = {}  # Insertion order, as a set has none.

    def put(self, subject: str, agent: AgentId, on_envelope: OnEnvelope) -> None:
        """Let ``agent`` hear ``subject``; replaces the callback that it had there."""
        self._by_subject.setdefault(subject, {})[agent] = on_envelope
        self._by_agent.setdefault(agent, {})[subject] = None

    def forget(self, agent: AgentId) -> list[str]:
        """Let ``agent`` hear nothing any more; return the subjects that nobody hears now."""
        silent = []
        for subject in self._by_agent.pop(agent, {}):
            hearers = self._by_subject[subject]
            del hearers[agent]
            if not hearers:
                del self._by_subject[subject]
                silent.append(subject)
        return silent

    def subjects(self) -> list[str]:
        """Return every subject that somebody hears."""
        return list(self._by_subject)

    def hears(self, subject: str) -> bool:
        """Return whether anybody hears ``subject``."""
        return subject in self._by_subject

    def deliver(self, subject: str, envelope: bytes) -> None:
        """Call whoever hears ``subject``. Never raises: one bad callback must not stop the rest.

        An envelope above the limit is counted and dropped.
        """
        if len(envelope) > ENVELOPE_SIZE_MAX_BYTES:
            self._health.oversize_drops += 1
            return
        hearers = self._by_subject.get(subject)
        if not hearers:
            return
        self._health.received += 1
        for on_envelope in tuple(hearers.values()):  # A callback may forget its own agent.
            try:
                on_envelope(envelope)
            # Whatever a callback raises ends here, or it would end every later delivery. A
            # CancelledError comes from a future that it read: nothing is awaited in here.
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001
                self._failed(error)

    def _failed(self, error: BaseException) -> None:
        self._health.callback_errors += 1
        note(self._health, f"a callback failed: {type(error).__name__}")
        if counted_loud(self._health.callback_errors):
            log.error(
                "callback of a transport failed (%d so far)",
                self._health.callback_errors,
                exc_info=error,
            )


def counted_loud(count: int) -> bool:
    """Return whether the ``count``-th of the same event deserves a line in the log."""
    return count <= _LOGGED_FULLY_MAX or count & (count - 1) == 0


def note(health: TransportHealth, text: str) -> None:
    """Keep ``text`` among the last errors, once in a row."""
    if not health.errors or health.errors[-1] != text:
        health.errors.append(text)
        del health.errors[:-ERRORS_KEPT_MAX]


def require_size(envelope: bytes) -> None:
    """Return if ``envelope`` may be sent.

    :raises LocalProtocolError: if it is above the limit of an envelope
    """
    if len(envelope) > ENVELOPE_SIZE_MAX_BYTES:
        raise LocalProtocolError(
            f"an envelope of {len(envelope)} bytes is above the limit of"
            f" {ENVELOPE_SIZE_MAX_BYTES}: send larger bodies in pieces"
        )
