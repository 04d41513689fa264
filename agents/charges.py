"""To whose account within a purse goes what is bought: said once around whatever buys.

::

    with charging(Charge("alice", "call 17")):
        await buyer.hire("summarise", ...)

It holds for everything that is bought within the block, by tasks that begin there too, however
deep below the purchase is made.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

from coase.protocol.session import NO_CHARGE, Charge

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHARGE: Final[ContextVar[Charge]] = ContextVar("charge", default=NO_CHARGE)


@contextmanager
def charging(charge: Charge) -> Iterator[None]:
    """Charge what is bought within the block to an account; what is said inside goes over it."""
    token = _CHARGE.set(charge)
    try:
        yield
    finally:
        _CHARGE.reset(token)


def charged_to() -> Charge:
    """Return to whom a purchase that begins now is charged."""
    return _CHARGE.get()
