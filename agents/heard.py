"""What was heard lately and how it was answered, so that a repetition changes nothing.

An id belongs to its sender: ids travel in clear, and nobody may use up another's by sending
something of its own under it first.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from coase.protocol.messages import CLOCK_SKEW_MAX_MS, ENVELOPE_LIFE_MAX_MS

if TYPE_CHECKING:
    from coase.protocol.types import AgentId

SEEN_MAX: Final = 200_000  # Ids remembered; about 40 MB. The oldest go first.
ANSWERS_MAX: Final = 20_000  # Answers kept for repetitions; about 1 KiB each.


class Heard:
    """Ids of verified messages until they have expired, and the answers to some of them."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[AgentId, str], int] = OrderedDict()
        self._answers: OrderedDict[tuple[AgentId, str], tuple[bytes, int]] = OrderedDict()

    def __len__(self) -> int:
        """How many ids are remembered."""
        return len(self._seen)

    def knows(self, sender: AgentId, message_id: str) -> bool:
        """Return whether ``sender`` has said that message already."""
        return (sender, message_id) in self._seen

    def remember(self, sender: AgentId, message_id: str, *, expires_ms: int) -> None:
        """Remember a message until no clock within the skew can still take it for alive."""
        key = (sender, message_id)
        self._seen[key] = max(expires_ms + 2 * CLOCK_SKEW_MAX_MS, self._seen.get(key, 0))
        if len(self._seen) > SEEN_MAX:
            self._seen.popitem(last=False)

    def unsay(self, sender: AgentId, message_id: str) -> None:
        """Take a message as if it had not been said: it is looked at again when it comes again."""
        self._seen.pop((sender, message_id), None)

    def answer(self, sender: AgentId, message_id: str, wire: bytes, *, now_ms: int) -> None:
        """Keep the envelope that answers a message."""
        self._answers[(sender, message_id)] = (wire, now_ms + ENVELOPE_LIFE_MAX_MS)
        if len(self._answers) > ANSWERS_MAX:
            self._answers.popitem(last=False)

    def answered(self, sender: AgentId, message_id: str, *, now_ms: int) -> bytes:
        """Return the envelope that answered a message while it is alive, or nothing."""
        wire, expires_ms = self._answers.get((sender, message_id), (b"", 0))
        return wire if now_ms < expires_ms else b""

    def forget(self, *, now_ms: int) -> None:
        """Forget what has expired, as far as nothing older is still alive."""
        while self._seen and next(iter(self._seen.values())) < now_ms:
            self._seen.popitem(last=False)
        while self._answers and next(iter(self._answers.values()))[1] < now_ms:
            self._answers.popitem(last=False)
