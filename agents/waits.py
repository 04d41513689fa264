"""Whoever waits for a purchase: how he looks at it, and what he is told at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio

from coase.protocol.states import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from coase.protocol.session import Thread

    from .asks import Ask
    from .job import Shown


@dataclass(frozen=True, slots=True)
class Eyes:
    """How a buyer looks at what it buys: at the result, at the text before it, at the deal, and at
    whether its seller has the task."""

    fault: Callable[[str], str | None] | None = None
    on_text: Callable[[str], None] | None = None
    on_agreed: Callable[[Thread], None] | None = None
    on_taken: Callable[[], None] | None = None


@dataclass(slots=True)
class Wait:
    """Somebody who waits for the end of a purchase."""

    done: anyio.Event = field(default_factory=anyio.Event)
    thread: Thread | None = None
    deal: str = ""
    why: str = ""
    shown: Shown | None = None
    on_agreed: Callable[[Thread], None] | None = None
    on_taken: Callable[[], None] | None = None

    def end(self, ask: Ask) -> None:
        """Take note that the request is over."""
        self.thread, self.why = ask.outcome, ask.why
        self.done.set()

    def resume(self, thread: Thread | None) -> None:
        """Take up a purchase of an earlier life, whose result may be there already."""
        if thread is not None and thread.verdict:
            self.thread = thread
            self.done.set()


def is_decided(kind: str, thread: Thread) -> bool:
    """Return whether a notice says that a buyer has found a result good, or not."""
    if kind == "said:voucher":
        return thread.result is not None and thread.verdict == "good"
    return kind in ("said:settle", "bad_result")


def why_not(wait: Wait, thread: Thread | None, *, sized: bool = True) -> str:
    """Return why nothing good was bought, for people; who offers by the token asks for sizes."""
    if thread is not None and thread.verdict not in ("", "good"):
        return f"the result was refused: {thread.verdict}"
    if thread is not None and thread.state is State.REFUNDED:
        return f"the price came back: {thread.why}"
    if wait.why == "nobody made an offer":
        if not sized:
            return (
                "nobody made an offer (what is sold by the token needs input_max and output_max;"
                " neither was given)"
            )
        return "nobody made an offer (nobody sells it here, or not within the time to deliver)"
    return wait.why or "nobody made an acceptable offer"
