"""Who may cost us a look at a signature: token buckets for strangers, per address and in all.

A stranger is whoever is not the other side of one of our deals. Before its signature is looked
at nothing is known of a message but what it says of itself, so an address pays for what was
*verified* to be its own: nobody can empty another's bucket. The bucket for all bounds what
forgeries can cost us; deals that are under way do not draw on it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from coase.protocol.types import AgentId

# A signature, a sealed offer and its own signature cost about 0.3 ms: half of a core at most.
STRANGERS_PER_S: Final = 2_000
STRANGERS_BURST: Final = 4_000
# A gateway asks for many people with one address; nobody needs a tenth of our time.
ADDRESS_PER_S: Final = 200
ADDRESS_BURST: Final = 1_000
ADDRESSES_MAX: Final = 10_000  # Buckets kept; about 2 MB. A forgotten one is full again.


@dataclass(slots=True)
class _Bucket:
    thousandths: int
    at_ms: int

    def fill(self, *, per_s: int, burst: int, now_ms: int) -> None:
        passed_ms = max(0, now_ms - self.at_ms)
        self.thousandths = min(burst * 1_000, self.thousandths + per_s * passed_ms)
        self.at_ms = now_ms


class Admission:
    """The door for strangers. Its limits may be set; ``funded`` asks whether a buyer can pay."""

    def __init__(
        self,
        *,
        per_s: int = STRANGERS_PER_S,
        burst: int = STRANGERS_BURST,
        address_per_s: int = ADDRESS_PER_S,
        address_burst: int = ADDRESS_BURST,
        funded: Callable[[AgentId], bool] = lambda address: True,
    ) -> None:
        self.per_s, self.burst = per_s, burst
        self.address_per_s, self.address_burst = address_per_s, address_burst
        self.funded = funded
        self._all = _Bucket(burst * 1_000, 0)
        self._by_address: OrderedDict[AgentId, _Bucket] = OrderedDict()

    def admit(self, sender: AgentId, *, now_ms: int) -> bool:
        """Return whether to look at a stranger's signature, and count that we did."""
        own = self._by_address.get(sender)
        if own is not None:
            own.fill(per_s=self.address_per_s, burst=self.address_burst, now_ms=now_ms)
            if own.thousandths < 1_000:
                return False
        self._all.fill(per_s=self.per_s, burst=self.burst, now_ms=now_ms)
        if self._all.thousandths < 1_000:
            return False
        self._all.thousandths -= 1_000
        return True

    def verified(self, sender: AgentId, *, now_ms: int) -> None:
        """Let ``sender`` pay for a message that proved to be its own."""
        own = self._by_address.get(sender)
        if own is None:
            own = self._by_address[sender] = _Bucket(self.address_burst * 1_000, now_ms)
            if len(self._by_address) > ADDRESSES_MAX:
                self._by_address.popitem(last=False)
        self._by_address.move_to_end(sender)
        own.fill(per_s=self.address_per_s, burst=self.address_burst, now_ms=now_ms)
        own.thousandths = max(0, own.thousandths - 1_000)
