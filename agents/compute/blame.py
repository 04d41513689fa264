"""What a caller is told when an answer could not be had: who failed and why, and whose fault it is.

A seller that stops says why, in the words of its engine. Where all who were asked say that it was
the prompt, the caller is told so and not that the market failed. One of them alone is not believed
about that: it may only want to be rid of the work.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from coase.protocol.errors import ComputeFailed

from .ports import PromptTooLong, Unsupported, failed

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .explain import Attempt

TOLD_MAX: Final = 4  # A person reads no longer list; the rest is in the explanation of the call.
WHY_MAX_CHARS: Final = 300
ADDRESS_CHARS: Final = 10
_HEAD: Final = re.compile(r"(the deal ended \w+: )?(the price came back: )?(the seller stopped: )?")
_KIND: Final = re.compile(r"([A-Z]\w*): ")
_DEAL: Final = re.compile(r" \(deal [0-9a-f]+\)$")
_REFUSALS: Final = ("PromptRefused", "PromptTooLong", "Unsupported")


class NoOffer(ComputeFailed):
    """Nobody offered what is wanted, at that price, now; whoever is busy may in a moment."""

    dear = False
    """Whether somebody did, and only the price was in the way."""
    tried: tuple[Attempt, ...] = ()
    """Who did before, and failed; then nobody else did."""

    def __str__(self) -> str:
        """Return who failed, if anybody did, and what nobody offered."""
        said = super().__str__()
        if not self.tried:
            return said
        return f"no answer could be bought: {told(self.tried)}; nobody else offered: {said}"


def summed(error: ComputeFailed, attempts: Iterable[Attempt]) -> ComputeFailed:
    """Return the error that ends a call of these attempts, the last of which ended with ``error``.

    It names all who failed. If each of them says that it was the prompt, it is a refusal of that.
    """
    bad = tuple(attempt for attempt in attempts if attempt.outcome == "failed")
    kinds = {refusal(attempt.why) for attempt in bad}
    if bad and "" not in kinds:
        if kinds == {"PromptTooLong"}:
            return PromptTooLong(f"the prompt is too long: {told(bad)}")
        return Unsupported(f"all who were asked refused this prompt: {told(bad)}")
    if isinstance(error, NoOffer):
        error.tried = bad
        return error
    known = [attempt.why for attempt in bad] == [str(error)]
    if bad and not known and type(error) is ComputeFailed:
        return failed("no answer could be had", why=told(bad), todo="Ask again later")
    return error


def carried(error: Exception, before: Exception) -> None:
    """Let an error that nobody offered tell, too, who failed when it was tried before."""
    if isinstance(error, NoOffer) and isinstance(before, NoOffer):
        error.tried = error.tried or before.tried


def refusal(why: str) -> str:
    """Return which kind of refusal a seller gave as the reason why it stopped; nothing if none."""
    head = _HEAD.match(why)
    if head is None or head[3] is None:
        return ""
    kind = _KIND.match(why, head.end())
    return kind[1] if kind is not None and kind[1] in _REFUSALS else ""


def told(attempts: Sequence[Attempt]) -> str:
    """Return who failed and why, for people."""
    said = [f"{_who(attempt)}: {in_words(attempt.why)}" for attempt in attempts[:TOLD_MAX]]
    more = len(attempts) - TOLD_MAX
    return "; ".join([*said, f"and {more} more"] if more > 0 else said)


def in_words(why: str) -> str:
    """Return the reason of a failure without the words for machines around it."""
    head = _HEAD.match(why)
    rest = why[head.end() :] if head is not None else why
    if head is not None and head[3] is not None:
        kind = _KIND.match(rest)
        rest = f"it stopped: {rest[kind.end() :] if kind is not None else rest}"
    return _DEAL.sub("", rest)[:WHY_MAX_CHARS].rstrip(".") or "it did not say why"


def _who(attempt: Attempt) -> str:
    if not attempt.seller.startswith("0x"):
        return "the engine here"
    return attempt.seller[:ADDRESS_CHARS]
