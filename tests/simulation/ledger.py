"""The channels of a simulated world: a ledger in blocks, which may be lost, late or undone."""

from __future__ import annotations

from copy import copy, deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from coase.escrow.backends.memory_channels import MemoryLedger
from coase.protocol.errors import CallReverted, LocalProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from coase.escrow.voucher import ChannelCall, ChannelView
    from coase.protocol.types import Asset

KEPT_BLOCKS: Final = 16  # More than anybody waits for, and than any reorg undoes.


@dataclass(frozen=True, slots=True)
class Sent:
    """A call on its way, or in a block."""

    caller: str
    effect_id: str
    call: ChannelCall


@dataclass(slots=True)
class _Block:
    """One block: what was true after it, and what came of its calls."""

    time_s: int
    after: MemoryLedger
    done: list[tuple[Sent, str]] = field(default_factory=list)


class Ledger:
    """A token with channels whose calls wait for a block, and whose blocks may be undone."""

    def __init__(self, asset: Asset, *, time_s: int) -> None:
        self.tip = MemoryLedger(asset, time_s=time_s)
        self.domain = self.tip.domain
        self.minted_units = 0
        self.loses: Callable[[Sent], bool] = lambda sent: False
        self._waiting: list[Sent] = []
        self._known: dict[tuple[str, str], Sent] = {}
        self._blocks: list[_Block] = []

    def mint(self, owner: str, units: int) -> None:
        """Give ``owner`` new units, before the first block."""
        self.tip.mint(owner, units)
        self.minted_units += units

    def send(self, effect_id: str, call: ChannelCall, caller: str) -> None:
        """Send a call; the same id of a caller is the same call.

        :raises LocalProtocolError: if that id stands for another one
        """
        sent = Sent(caller, effect_id, call)
        if (known := self._known.get((caller, effect_id))) is not None:
            if known != sent:
                raise LocalProtocolError(f"the effect {effect_id!r} was another call")
            return
        self._known[caller, effect_id] = sent
        if not self.loses(sent):
            self._waiting.append(sent)

    def forget(self, effect_id: str, caller: str) -> None:
        """Let a call that came to nothing be sent again."""
        if self._found(effect_id, caller, 0) != "":
            self._known.pop((caller, effect_id), None)

    def seal(self, time_s: int) -> list[tuple[Sent, str]]:
        """Make a block of what waits, and return what came of each call."""
        self.tip.time_s = time_s
        self.tip.events.clear()
        block = _Block(time_s, self.tip)
        waiting, self._waiting = self._waiting, []
        if not waiting and self._blocks:  # The same as before, but for its time.
            block.after = copy(self._blocks[-1].after)
            block.after.time_s = time_s
            self._blocks = [*self._blocks[1 - KEPT_BLOCKS :], block]
            return block.done
        for sent in waiting:
            try:
                self.tip.execute(sent.call, sent.caller)
                block.done.append((sent, ""))
            except CallReverted as refusal:
                block.done.append((sent, refusal.error))
        block.after = deepcopy(self.tip)
        self._blocks = [*self._blocks[1 - KEPT_BLOCKS :], block]
        return block.done

    def undo(self, depth: int, keep: Callable[[Sent], bool]) -> None:
        """Undo the newest blocks; what was in them waits again, or is gone."""
        gone, self._blocks = self._blocks[-depth:], self._blocks[:-depth]
        self.tip = deepcopy(self._blocks[-1].after)
        again = [sent for block in gone for sent, _ in block.done]
        for sent in again:
            if not keep(sent):
                self._known.pop((sent.caller, sent.effect_id), None)
        kept = [sent for sent in again if (sent.caller, sent.effect_id) in self._known]
        self._waiting = kept + self._waiting

    @property
    def height(self) -> int:
        """How many blocks could be undone."""
        return max(0, len(self._blocks) - 1)

    def view(self, channel_id: bytes, depth: int) -> ChannelView:
        """Return what the block ``depth`` below the newest says of a channel."""
        at = self._blocks[max(0, len(self._blocks) - 1 - depth)].after if self._blocks else self.tip
        return at.view(channel_id)

    def outcome(self, effect_id: str, caller: str, depth: int) -> str | None:
        """Return the refusal of a call, empty if it went through; None if no block has it yet."""
        return self._found(effect_id, caller, depth)

    def _found(self, effect_id: str, caller: str, depth: int) -> str | None:
        for block in reversed(self._blocks[: len(self._blocks) - depth]):
            for sent, error in block.done:
                if (sent.caller, sent.effect_id) == (caller, effect_id):
                    return error
        return None
