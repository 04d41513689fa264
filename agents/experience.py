"""What an agent remembers of the sellers it dealt with, and the little that it heard of others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from coase.negotiation.scores import Outcome, Scorebook
from coase.protocol.states import Role, State
from coase.protocol.types import AgentId, How

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from coase.protocol.session import Thread

_BY_HOW: Final = {
    How.UNDELIVERED: Outcome.UNDELIVERED,
    How.DECLINED: Outcome.UNDELIVERED,
    How.SILENT_SELLER: Outcome.DISPUTE_LOST,
}


class Experience:
    """The score book that all requests of one agent share."""

    def __init__(self) -> None:
        self.book = Scorebook()

    def mark(self, seller: AgentId, capability: str, outcome: Outcome, *, now_ms: int) -> None:
        """Take note of one more outcome."""
        self.book = self.book.record(seller, capability, outcome, now_ms=now_ms)

    def hear(self, seller: AgentId, *, good: int, bad: int) -> None:
        """Take note of what others say of a seller, in place of what they said before."""
        self.book = self.book.hear(seller, good=good, bad=bad)

    def recall(self, summaries: Iterable[Mapping[str, Any]]) -> None:
        """Take in what the journal tells of deals that are over, oldest first."""
        for row in summaries:
            if row["side"] != Role.BUYER or not row["history"]:
                continue
            at_ms, _, role, move, *_ = row["history"][-1]
            before = row["history"][-2][1] if len(row["history"]) > 1 else ""
            outcome = _outcome(
                before=before,
                role=role,
                move=move,
                verdict=row["verdict"],
                how=How[row["how"].upper()],
                to_buyer_units=int(row["to_buyer_units"]),
            )
            if outcome is not None:
                self.mark(row["counterparty"], row["capability"], outcome, now_ms=at_ms)


def outcome_of(thread: Thread) -> Outcome | None:
    """Return what a buyer makes of a thread that is over, None if it says nothing of the seller."""
    if not thread.history:
        return None
    last = thread.history[-1]
    return _outcome(
        before=thread.history[-2].state if len(thread.history) > 1 else "",
        role=last.role,
        move=last.move,
        verdict=thread.verdict,
        how=thread.view.how,
        to_buyer_units=thread.view.to_buyer_units,
    )


def _outcome(
    *, before: str, role: str, move: str, verdict: str, how: How, to_buyer_units: int
) -> Outcome | None:
    if before == State.ACCEPTED and how is How.OPEN:
        if move == "agree_by":
            return Outcome.SILENT
        return Outcome.DECLINED if role == Role.SELLER else None
    if how is How.RULED:
        return Outcome.DISPUTE_LOST if to_buyer_units else None
    if how in _BY_HOW:
        return _BY_HOW[how]
    if verdict:
        return Outcome.DELIVERED if verdict == "good" else Outcome.UNDELIVERED
    return None
