"""Rate contracts at work: a seller takes what is called for under them, a buyer counts its calls.

They live in memory: after a restart either side withdraws from those of its earlier life, since a
new one costs less than what it would take to keep the number of each call on the disk for good.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from coase.protocol.calls import called
from coase.protocol.envelope import open_body
from coase.protocol.errors import LocalProtocolError, Refused
from coase.protocol.messages import CALLS_MAX, RateCall
from coase.protocol.states import Role, State

if TYPE_CHECKING:
    from coase.protocol.messages import Header
    from coase.protocol.session import Thread
    from coase.protocol.types import AgentId

    from .desk import Desk
    from .steps import Step

# Rates hold for so long: long enough that hardly a call waits for new ones, and short enough that
# a seller whose load has changed is not bound to what it asked for before.
CONTRACT_S: Final = 300
CONTRACTS_MAX: Final = 1_000  # Each is looked at with every block.
CONTRACTS_OF_ONE_MAX: Final = 16  # With one buyer: models and kinds of prompts that it asks for.
CALL_REFUSED: Final = "the call was refused"
"""How the reason begins why a deal ended that its seller did not begin."""


@dataclass(slots=True)
class Standing:
    """What one desk has in mind of the rate contracts in which it buys or sells."""

    desk: Desk
    _last: dict[str, int] = field(default_factory=dict)
    """By contract, the number of our own last call."""
    _taken: dict[str, set[int]] = field(default_factory=dict)
    """By contract, the numbers that were called."""

    def next_number(self, contract: str) -> int:
        """Return the number of our next call under ``contract``.

        :raises LocalProtocolError: if it was called as often as can be
        """
        number = self._last.get(contract, 0) + 1
        if number > CALLS_MAX:
            raise LocalProtocolError("the rate contract is used up")
        self._last[contract] = number
        return number

    def has_room(self, buyer: AgentId, method: str) -> bool:
        """Return whether we would bind ourselves to one more rate contract with ``buyer``.

        Whoever pays must have a channel with us already: names cost nothing, and places are few.
        """
        desk = self.desk
        return (
            (method == "none" or desk.streams.is_known(buyer))
            and len(desk.contracts(buyer)) < CONTRACTS_OF_ONE_MAX
            and len(desk.contracts()) < CONTRACTS_MAX
        )

    def covers(self, header: Header) -> bool:
        """Return whether a call names a contract of its sender with us."""
        contract = self.desk.threads.get(header.re)
        return (
            contract is not None
            and contract.counterparty == header.sender
            and contract.side is Role.SELLER
            and contract.is_contract
            and contract.state is State.AGREED
            # Of an earlier life nobody knows any more which numbers were called.
            and contract.deal not in self.desk.abandoned
        )

    def opened(self, header: Header, step: Step, *, now_ms: int) -> bytes:
        """Open the deal that a call begins, and return its body, whose task is to be taken.

        :raises Refused: if there is no such contract, it does not cover the call, the number was
            called before, or we cannot do it now
        """
        desk, contract = self.desk, self.desk.threads.get(header.re)
        if contract is None or desk.seller is None or not self.covers(header):
            raise Refused("unknown_deal", header.re)
        plain = desk.codec.unseal(header, contract.secret)
        call = open_body(header, plain).body
        if not isinstance(call, RateCall):
            raise Refused("malformed", "it is no call")
        thread = called(contract, call, now_ms=now_ms)
        if thread.deal != header.deal:
            raise Refused("unknown_deal", "the deal's id does not follow from its contract")
        taken = self._taken.setdefault(contract.deal, set())
        if call.number in taken:
            raise Refused("wrong_state", "this number was called before")
        desk.seller.called(thread, call, now_ms=now_ms)
        taken.add(call.number)
        desk.open_thread(thread, step, now_ms=now_ms)
        return plain

    def ended(self, thread: Thread) -> None:
        """Forget what was called under a contract that is over."""
        self._last.pop(thread.deal, None)
        self._taken.pop(thread.deal, None)
