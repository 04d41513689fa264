"""Texts for vectors on their way: made here, else bought; and who made them is told with them."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from coase.agents.runtime import clock_ms
from coase.protocol.errors import CoaseError, ComputeFailed

from .explain import Attempt, Explanation, wish_shown
from .gate import BYTES_PER_TOKEN

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from coase.protocol.types import Asset

    from .ports import Embeddings
    from .routing import Wish
    from .ways import Place

    Way = Callable[[list[Attempt]], Awaitable[Embeddings]]

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Trip:
    """One request for vectors, and what came of each way that it went."""

    call: str
    texts: Sequence[str]
    model: str | None
    wish: Wish
    asset: Asset | None
    attempts: list[Attempt] = field(default_factory=list)
    outcome: str = "broken off"
    _at_ms: int = field(default_factory=clock_ms)
    _begun_ns: int = field(default_factory=time.monotonic_ns)

    async def go(self, ways: Sequence[tuple[str, Way]], *, none: ComputeFailed) -> Embeddings:
        """Return what the first way gives that leads anywhere; raise ``none`` if there is none.

        :raises ComputeFailed: why the first way led nowhere, if none did
        """
        failure: ComputeFailed | None = None
        for name, way in ways:
            try:
                made = await way(self.attempts)
            except ComputeFailed as error:
                log.info("no vectors of %s: %s", name, error)
                failure = failure or error
            except CoaseError as error:
                self.outcome = f"failed: {error}"
                raise
            else:
                self.outcome = "answered"
                return replace(made, explanation=self.explanation())
        self.outcome = f"failed: {failure or none}"
        raise failure or none

    def here(self, place: Place, seller: str, way: Callable[[], Awaitable[Embeddings]]) -> Way:
        """Return a way on which nothing is bought, and that is noted nevertheless."""

        async def go(attempts: list[Attempt]) -> Embeddings:
            begun_ns = time.monotonic_ns()

            def note(outcome: str, model: str, why: str = "") -> None:
                took_ms = (time.monotonic_ns() - begun_ns) // 1_000_000
                attempts.append(
                    Attempt(
                        seller=seller,
                        place=place,
                        model=model,
                        outcome=outcome,
                        why=why,
                        took_ms=took_ms,
                    )
                )

            try:
                made = await way()
            except ComputeFailed as error:
                note("failed", self.model or "", str(error))
                raise
            note("answered", made.model)
            return made

        return go

    def explanation(self) -> Explanation:
        """Return what is known of it by now."""
        size = sum(len(text.encode("utf-8", "replace")) for text in self.texts)
        return Explanation(
            call=self.call,
            at_ms=self._at_ms,
            models=(self.model,) if self.model else (),
            input_tokens=size // BYTES_PER_TOKEN,
            wish=wish_shown(self.wish),
            attempts=tuple(self.attempts),
            outcome=self.outcome,
            took_ms=(time.monotonic_ns() - self._begun_ns) // 1_000_000,
            symbol=self.asset.symbol if self.asset is not None else "",
            decimals=self.asset.decimals if self.asset is not None else 0,
        )
