"""The places of a gateway: how many are inside at a time, and how many of those may be one caller.

Whoever asks for much, or sends a body that does not come to its end, takes places from others. Of
all places a caller may hold three quarters, and of his bodies a few may be slow.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

PLACE: Final = "coase.place"
"""Where a request's scope has its place."""
# One program that asks for all it has at once is served, and another one finds a place beside it.
SHARE_NUMERATOR: Final = 3
SHARE_DENOMINATOR: Final = 4
# Bodies come with their request, or within a moment; what does not is on a slow line, or waits on
# purpose. A household behind one address sends that many pictures at a time.
SLOW_BODIES_MAX: Final = 16


class NoPlace(Exception):
    """All places are taken, or all that one caller may have."""


class Places:
    """Who is inside: so many in all, and of one caller no more than a share of them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._share = max(-(-most * SHARE_NUMERATOR // SHARE_DENOMINATOR), 1)
        self._inside: Counter[str] = Counter()
        self._slow: Counter[str] = Counter()
        self._count = 0

    def check(self, caller: str) -> None:
        """Return if there is a place for ``caller``, a key or an address.

        :raises NoPlace: if there is none
        """
        if self._count >= self._most:
            raise NoPlace(f"{self._count} requests are being answered already")
        if self._inside[caller] >= self._share:
            raise NoPlace(f"{self._inside[caller]} requests of yours are being answered already")

    @contextmanager
    def taken(self, caller: str) -> Iterator[Held]:
        """Hold a place for the length of the block; whether there is one was asked before."""
        self._inside[caller] += 1
        self._count += 1
        try:
            yield Held(self, caller)
        finally:
            self._count -= 1
            _less(self._inside, caller)

    @contextmanager
    def slow(self, caller: str) -> Iterator[None]:
        """Let a body of ``caller`` take its time for the length of the block.

        :raises NoPlace: if as many of his are slow as may be
        """
        if self._slow[caller] >= SLOW_BODIES_MAX:
            raise NoPlace(f"{SLOW_BODIES_MAX} other requests of yours are as slow")
        self._slow[caller] += 1
        try:
            yield
        finally:
            _less(self._slow, caller)


class Held:
    """One place, held by a request."""

    def __init__(self, places: Places, caller: str) -> None:
        self._places, self._caller = places, caller

    @contextmanager
    def slow(self) -> Iterator[None]:
        """Let the body of this request take its time for the length of the block.

        :raises NoPlace: if as many of its caller's are slow as may be
        """
        with self._places.slow(self._caller):
            yield


def _less(counter: Counter[str], name: str) -> None:
    counter[name] -= 1
    if not counter[name]:
        del counter[name]
