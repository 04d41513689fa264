"""Make or buy: each prompt goes where its answer is expected to cost least, all things counted.

::

    router = RouterCompute(local=engine, market=market)
    async for chunk in router.stream(prompt, Wish(deadline_ms=20_000, reach=Place.FIRM)):
        ...

What is learnt on the way, and why each call went where it went, lies in a ``CallLog``.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from coase.agents.charges import charged_to
from coase.agents.runtime import clock_ms
from coase.protocol.errors import ComputeFailed, WorldError

from .gate import guess_tokens
from .hedging import Hedges
from .journey import Journey, Means
from .market import MarketCompute, Pick
from .ports import (
    Chunk,
    Compute,
    ComputeBusy,
    Embeddings,
    Estimate,
    ModelInfo,
    Prompt,
    PromptRefused,
    PromptTooLong,
    Unsupported,
    failed,
)
from .routing import HERE, TOO_SMALL, Decision, RouteBook, Wish
from .vectors import Trip
from .ways import Listing, Place, Size

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from .calllog import CallLog
    from .vectors import Way

log = logging.getLogger(__name__)

ANY_MODEL = ("", "auto")
_LATEST = ":latest"
LOCAL_AGE_MAX_S: Final = 2.0  # What models are here is asked for again after that.
FRESH_MAX_S: Final = 2.0  # Before a model is said to be unknown, sellers are asked once more.
LOCAL_STALE_MAX_S: Final = 60.0  # Older than that nobody goes by it.
LOAD_GUESS_US: Final = 5_000_000  # A model that lies on the disk yet.
LOCAL_SLOTS: Final = 4
OUTPUT_GUESS_TOKENS: Final = 200
PRICE_IN_S: Final = 60
"""The highest price of a prompt is worth so many seconds, where nobody says what a second is."""
HEDGES_AT_FIRST: Final = 2  # Late first tokens that are bought beside before anything was spent.
SAVED_EVERY_S: Final = 60.0
Made = Literal["local", "bought"]


class ModelUnknown(PromptRefused):
    """No engine here and no seller in reach has the model that was asked for."""


class Unreachable(PromptRefused):
    """There are ways to an answer, and the caller's wish excludes every one of them."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A model, and where its answers would come from first."""

    info: ModelInfo
    made: Made


class RouterCompute(Compute):
    """Made here or bought, whichever is expected to cost less. Closes both with itself.

    :raises ComputeFailed: if it is given neither
    """

    def __init__(
        self,
        *,
        local: Compute | None = None,
        market: Compute | None = None,
        wish: Wish | None = None,
        calls: CallLog | None = None,
        local_slots: int = LOCAL_SLOTS,
    ) -> None:
        """Route by what ``wish`` says where a caller says nothing.

        ``calls`` keeps what is learnt over restarts. The engine here serves ``local_slots`` at
        once.
        """
        if local is None and market is None:
            raise failed("no prompt can be run", why="no engine, no market", todo="Give it one")
        self.local, self.market, self.calls = local, market, calls
        self.wish = wish or Wish()
        self.buys = market if isinstance(market, MarketCompute) else None
        self.book = self.buys.book if self.buys is not None else RouteBook()
        self.hedges = Hedges()
        self._local_slots = local_slots
        self._local: list[ModelInfo] = []
        self._local_s: float | None = None
        self._looking: asyncio.Task[None] | None = None
        """Held here, and ended with ``close``."""
        self._outputs: dict[str, int] = {}
        self._saved_s = time.monotonic()
        if calls is not None:
            self.book.restore(calls.learnt(), now_ms=clock_ms())

    @property
    def name(self) -> str:
        """What it is and where."""
        parts = [compute.name for compute in (self.local, self.market) if compute is not None]
        return ", else ".join(parts)

    # ---- What can be asked for -------------------------------------------------------------------

    async def listed(self) -> list[Listed]:
        """Return all models that can be asked for, those of this machine first.

        :raises ComputeFailed: if neither can be asked
        """
        found: dict[str, Listed] = {}
        failure: WorldError | None = None
        sources: tuple[tuple[Compute | None, Made], ...] = (
            (self.local, "local"),
            (self.market, "bought"),
        )
        for compute, made in sources:
            if compute is None:
                continue
            try:
                for info in await compute.models():
                    found.setdefault(info.name, Listed(info, made))
            except WorldError as error:
                failure = error
                log.warning("no models of %s: %s", compute.name, error)
        if not found and failure is not None:
            raise failure
        return list(found.values())

    async def models(self) -> list[ModelInfo]:
        """Return what can be asked for, the models of this machine first."""
        return [entry.info for entry in await self.listed()]

    async def find(self, name: str) -> Listed | None:
        """Return the model that ``name`` means, None if any will do.

        :raises ModelUnknown: if there is none of that name
        :raises ComputeFailed: if neither engine nor market can be asked
        """
        if name in ANY_MODEL:
            return None
        entries = await self.listed()
        for entry in entries:
            if _plain(name) == _plain(entry.info.name):
                return entry
        have = ", ".join(entry.info.name for entry in entries) or "none"
        raise ModelUnknown(f"there is no model {name!r} here; there is: {have}")

    async def estimate(self, prompt: Prompt) -> Estimate:
        """Return what the prompt would take where it would go first."""
        entry = await self.find(prompt.model or "")
        prompt = replace(prompt, model=entry.info.name if entry is not None else None)
        first = self.local if entry is None or entry.made == "local" else self.market
        first = first or self.market
        assert first is not None
        return await first.estimate(prompt)

    # ---- Answers ---------------------------------------------------------------------------------

    async def stream(self, prompt: Prompt, wish: Wish | None = None) -> AsyncGenerator[Chunk, None]:
        """Yield the answer; its first and its last chunk tell why it came from where it came.

        The models that ``wish`` names are tried after that of the prompt, in their order. A wish
        takes the place of the router's own; what that limits, no wish widens.

        :raises ModelUnknown: if there is no such model in reach
        :raises Unreachable: if the wish excludes all that there is
        :raises BudgetExhausted: if it had to be bought and no limit covers it
        """
        prompt.check()
        journey = await self._journey(prompt, _narrowed(wish, self.wish))
        try:
            async with aclosing(journey.stream()) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            self._over(journey, prompt)

    async def embed(
        self, texts: Sequence[str], model: str | None = None, wish: Wish | None = None
    ) -> Embeddings:
        """Return a vector for each of ``texts``: made here if that can be done, else bought.

        No text goes further than ``wish`` and the router's own wish allow.

        :raises Unreachable: if they exclude all that there is
        """
        wish = _narrowed(wish, self.wish)
        ways: list[tuple[str, Way]] = []
        local, buys = self.local, self.buys
        trip = Trip(
            call=charged_to().reference or secrets.token_hex(12),
            texts=texts,
            model=model,
            wish=wish,
            asset=buys.asset if buys is not None and buys.agent.node is not None else None,
        )
        here = HERE not in wish.banned and (not wish.sellers or HERE in wish.sellers)
        if local is not None and here:
            way = trip.here(Place.HERE, HERE, lambda: local.embed(texts, model))
            ways.append((local.name, way))
        if buys is not None and wish.reach > Place.HERE and wish.most_units != 0:
            pick = Pick(
                allowed=wish.sellers or None,
                banned=wish.banned,
                most_units=wish.most_units,
                firm=wish.reach is Place.FIRM,
            )
            if buys.firm or not pick.firm:
                ways.append((buys.name, lambda tries: buys.embed(texts, model, pick, tries)))
        none = Unreachable("nobody may see these texts who could embed them")
        try:
            return await trip.go(ways, none=none)
        finally:
            if self.calls is not None:
                self.calls.keep(trip.explanation())

    async def close(self) -> None:
        """Keep what was learnt and close both."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait((self._looking,))
        self._save()
        for compute in (self.local, self.market):
            if compute is not None:
                await compute.close()

    # ---- Deciding --------------------------------------------------------------------------------

    async def _journey(self, prompt: Prompt, wish: Wish) -> Journey:
        """Return the call's way, decided on.

        :raises ModelUnknown: if there is no such model in reach
        :raises Unreachable: if the wish excludes all that there is
        """
        first = "" if prompt.model in (None, *ANY_MODEL) else prompt.model or ""
        others = ("" if name in ANY_MODEL else name for name in wish.models)
        asked = tuple(dict.fromkeys((first, *others))) if first or wish.models else ()
        buys = self.buys
        outside = buys is not None and wish.reach > Place.HERE
        if buys is not None and (wish.reach is Place.FIRM or buys.most_units == 0):
            outside = outside and buys.firm
        buyable = outside and not prompt.logprobs  # For which the ware has no words.
        models = await self._resolve(asked, outside=outside)
        wish = replace(
            wish,
            models=models,
            needs=frozenset(prompt.needs()),
            second_units=self._second_units(wish),
        )
        if self.buys is not None:
            most_units = self._most_units()
            wish = replace(wish, most_units=_least(wish.most_units, most_units))
        output = self._outputs.get(models[0] if models else "", OUTPUT_GUESS_TOKENS)
        size = Size(
            guess_tokens(prompt),
            min(output, prompt.max_tokens),
            output_max=prompt.max_tokens,
        )
        decided = wish if buyable else replace(wish, reach=Place.HERE)
        decision = self._default_only(
            self.book.decide(decided, size, now_ms=clock_ms(), chance=secrets.randbits(64)),
            anything=not models or "" in models,
        )
        journey = Journey(
            charged_to().reference or secrets.token_hex(12),
            replace(prompt, model=(models[0] if models else "") or None),
            wish,
            size,
            decision,
            Means(local=self.local, market=self.buys, book=self.book, hedges=self.hedges),
            open_market=buyable and self._open(wish),
        )
        if not journey.legs and outside and not buyable:
            raise Unsupported("log-probabilities cannot be bought; ask an engine of your own")
        if not journey.legs:
            raise self._no_way(decision, wish)
        if not decision.ranking and TOO_SMALL in decision.refused:
            self._check_length(decision, wish, size)
        return journey

    def _check_length(self, decision: Decision, wish: Wish, size: Size) -> None:
        """Return if somebody may take so long a prompt.

        :raises PromptTooLong: if all who could answer tell that their context is smaller
        """
        if decision.refused.keys() & {"too dear", "expected too late"}:
            return  # At another price, or with more time, somebody could.
        names = set(wish.models) - {""}
        listings = [way.listing for way in self.book if not names or way.listing.model in names]
        most = max(each.context_tokens for each in listings if each.context_tokens < size.input)
        raise PromptTooLong(
            f"the prompt has about {size.input} tokens, and no model in reach has a context of as"
            f" many: the largest one is of {most}. Shorten it, or ask for another model"
        )

    def _open(self, wish: Wish) -> bool:
        """Return whether sellers that nobody knows yet may be asked."""
        assert self.buys is not None
        if wish.sellers or wish.regions or wish.quantisations:
            return False  # Of strangers nobody knows where they are and what they have.
        return wish.most_units != 0 or self.buys.firm

    def _no_way(self, decision: Decision, wish: Wish) -> PromptRefused | ComputeFailed:
        why = f"nobody may answer this: {decision.why_none()}"
        if TOO_SMALL in decision.refused:
            return PromptTooLong(why)
        if "too dear" in decision.refused:
            return failed(why, why="the highest price", todo="Raise it")
        if "expected too late" in decision.refused:
            return ComputeBusy(why)
        return Unreachable(why)

    def _default_only(self, decision: Decision, *, anything: bool) -> Decision:
        """Return the decision with the default model of this machine only, if none was named."""
        if not anything or not self._local:
            return decision
        default = self._local[0].name
        kept = [c for c in decision.ranking if c.place is not Place.HERE or c.model == default]
        return replace(decision, ranking=tuple(kept))

    async def _resolve(self, asked: tuple[str, ...], *, outside: bool) -> tuple[str, ...]:
        """Return the names by which what was asked for goes here and on the market.

        :raises ModelUnknown: if there is none of any of these names
        """
        await self._look_here()
        scout = self.buys.scout if self.buys is not None and outside else None
        here = [info.name for info in self._local]
        if scout is not None:
            # Nobody waits for the market while the engine here can begin.
            needed = not here if not asked else not _matching(asked[0], here)
            try:
                await scout.look(wait=needed)
            except WorldError as error:
                log.warning("the market cannot be asked: %s", error)
        if not asked:
            return ()
        names = here + (scout.names() if scout is not None else [])
        found = _found(asked, names)
        if not found and scout is not None:  # Somebody who has it may have come since.
            await scout.look(FRESH_MAX_S)
            names = here + scout.names()
            found = _found(asked, names)
        if not found:
            have = ", ".join(dict.fromkeys(names)) or "none"
            raise ModelUnknown(f"there is no model {asked[0]!r} here; there is: {have}")
        return found

    async def _look_here(self) -> None:
        """Bring what is known of the engine here up to date."""
        now_s = time.monotonic()
        if self.local is None:
            self.book.drop(HERE)  # Of an earlier life that had an engine.
            return
        age_s = now_s - self._local_s if self._local_s is not None else None
        if age_s is not None and age_s < LOCAL_STALE_MAX_S and self._local:
            # Nobody waits for what is nearly sure; an engine that has gone fails, and that is seen.
            if age_s > LOCAL_AGE_MAX_S and (self._looking is None or self._looking.done()):
                self._looking = asyncio.create_task(self._ask_here(now_s))
            return
        await self._ask_here(now_s)

    async def _ask_here(self, now_s: float) -> None:
        assert self.local is not None
        try:
            self._local = await self.local.models()
        except WorldError as error:
            log.warning("no models of %s: %s", self.local.name, error)
            self._local, self._local_s = [], None
            self.book.drop(HERE)
            if self.market is None:
                raise
            return
        self._local_s, now_ms = now_s, clock_ms()
        for gone in self.book.models(HERE) - {info.name for info in self._local}:
            self.book.drop(HERE, gone)
        for info in self._local:
            listing = Listing(
                seller=HERE,
                place=Place.HERE,
                model=info.name,
                quantisation=info.quantisation,
                slots=self._local_slots,
                first_us=LOAD_GUESS_US if info.loaded is False else 0,
            )
            self.book.learn(listing, now_ms=now_ms)

    def _second_units(self, wish: Wish) -> int:
        """Return what a second is worth."""
        if wish.second_units:
            return wish.second_units
        return max(self._most_units() // PRICE_IN_S, 1) if self.buys is not None else 1

    def _most_units(self) -> int:
        assert self.buys is not None
        self.hedges.begin(HEDGES_AT_FIRST * self.buys.most_units)
        return self.buys.most_units

    # ---- Afterwards ------------------------------------------------------------------------------

    def _over(self, journey: Journey, prompt: Prompt) -> None:
        """Keep why a call went where it went, and now and then what was learnt."""
        explanation = journey.explanation()
        self.hedges.earn(explanation.paid_units)
        if journey.answered:
            model = prompt.model or ""
            before = self._outputs.get(model, journey.output_tokens)
            self._outputs[model] = (3 * before + max(journey.output_tokens, 1)) // 4 or 1
        if self.calls is None:
            return
        self.calls.keep(explanation)
        if time.monotonic() - self._saved_s > SAVED_EVERY_S:
            self._save()

    def _save(self) -> None:
        if self.calls is not None:
            self._saved_s = time.monotonic()
            self.calls.save(self.book.saved())


def _plain(name: str) -> str:
    return name.removesuffix(_LATEST)


def _found(asked: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Return the names by which what was asked for is known; nothing stands for any model."""
    found = [name for wanted in asked for name in (_matching(wanted, names) if wanted else [""])]
    return tuple(dict.fromkeys(found))


def _matching(wanted: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if _plain(name) == _plain(wanted)]


def _least(one: int | None, other: int) -> int:
    return other if one is None else min(one, other)


def _narrowed(wish: Wish | None, own: Wish) -> Wish:
    """Return a caller's wish within the router's own: each limit is the narrower one."""
    if wish is None:
        return own
    return replace(
        wish,
        models=wish.models or own.models,
        quantisations=_common(wish.quantisations, own.quantisations),
        regions=_common(wish.regions, own.regions),
        sellers=_common(wish.sellers, own.sellers),
        banned=wish.banned | own.banned,
        reach=min(wish.reach, own.reach),
        most_units=wish.most_units
        if own.most_units is None
        else _least(wish.most_units, own.most_units),
        deadline_ms=min(filter(None, (wish.deadline_ms, own.deadline_ms)), default=0),
        second_units=wish.second_units or own.second_units,
        bad_units=wish.bad_units or own.bad_units,
    )


def _common(one: frozenset[str], other: frozenset[str]) -> frozenset[str]:
    """Return what both allow, where nothing named is everything."""
    if not one or not other:
        return one or other
    return one & other or frozenset({"\0"})  # A name that nobody has: both together allow none.
