"""What an agent hears of the sellers of inference, taken into the book by which calls are routed.

It asks who sells, keeps the answers for half a minute, and listens to every offer that its agent
is made: whatever it asked for, an offer tells a price and how far away its seller is.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final

from coase.agents.inference import info_of, longest_of, region_of
from coase.agents.runtime import clock_ms
from coase.protocol.errors import ConfigurationError, WorldError
from coase.protocol.states import Role

from .gate import BYTES_PER_TOKEN
from .ports import ModelInfo, PromptTooLong, failed
from .ways import Listing, Place, Size

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from coase.agents.agent import Agent
    from coase.agents.steps import Notice
    from coase.agents.wares import Embedding
    from coase.protocol.messages import Description
    from coase.protocol.session import Thread
    from coase.protocol.types import AgentId, Asset

    from .ports import Capability, Prompt
    from .routing import RouteBook

log = logging.getLogger(__name__)

WARE: Final = "inference"
EMBEDDING: Final = "embedding"
FREE: Final = "none"
"""How what is done within a firm is paid."""
_FREE: Final[dict[str, Any]] = {
    "fixed_units": 0,
    "input_units": 0,
    "cached_units": 0,
    "output_units": 0,
    "second_units": 0,
}
MODELS_AGE_MAX_S: Final = 30
# Older than that nobody decides by it: whoever asks then waits for the answers.
MODELS_STALE_MAX_S: Final = 150
# Asking, bargaining, agreeing and locking come before the first token of what is bought.
DEAL_GUESS_US: Final = 1_500_000
_NUMBER: Final = r"(\d+(?:\.\d+)?)"
_PER_TASK: Final = re.compile(rf"{_NUMBER} a task")
_PER_SECOND: Final = re.compile(rf"{_NUMBER} a second")
_PER_MILLION: Final = re.compile(
    rf"{_NUMBER} in(?:, {_NUMBER} cached)?, {_NUMBER} out, a million tokens"
)


def told_of(descriptions: Sequence[Description]) -> dict[str, ModelInfo]:
    """Return what sellers say of the models that they sell, by name.

    What one of several says that a model can, it can, since that one may be asked.
    """
    found: dict[str, ModelInfo] = {}
    for description in descriptions:
        embeds = description.capability.startswith(f"{EMBEDDING}-")
        if not embeds and not description.capability.startswith(f"{WARE}-"):
            continue
        for name, traits in zip_longest(description.models, description.traits, fillvalue=""):
            if not name:
                continue
            info = info_of(name, traits or (EMBEDDING if embeds else ""))
            known = found.get(name)
            if known is not None:
                more = tuple(what for what in info.capabilities if what not in known.capabilities)
                widest = max(known.context_tokens, info.context_tokens)
                info = replace(
                    known, capabilities=(*known.capabilities, *more), context_tokens=widest
                )
            found[name] = info
    return found


class Scout:
    """Keeps the part of a route book that is about the market."""

    def __init__(
        self,
        agent: Agent,
        book: RouteBook,
        *,
        most_units: Callable[[], int],
    ) -> None:
        self.agent, self.book = agent, book
        self._most_units = most_units
        self._firm: set[AgentId] = set()
        """Sellers whose last offer was one of our own firm's."""
        self._offers: dict[AgentId, int] = {}
        """When sellers made an offer last, since we listen."""
        self._told: dict[str, ModelInfo] = {}
        """What sellers say of their models, those too that only make embeddings."""
        self._heard_s: float | None = None
        self._asking: asyncio.Task[None] | None = None
        self._listens = False
        self._names: tuple[int, list[str]] = (-1, [])
        """With the version of the book of which they are."""

    def place_of(self, seller: AgentId) -> Place:
        """Return whether a seller is known to be of our own firm."""
        node = self.agent.node
        ours = seller in self._firm or (node is not None and seller in node.colleagues)
        return Place.FIRM if ours else Place.MARKET

    def all_offered(self) -> bool:
        """Return whether every known seller made an offer: only that tells who is of the firm."""
        known = {way.listing.seller for way in self.book if way.listing.place is not Place.HERE}
        return known <= self._offers.keys()

    def silent(self, asked: Collection[AgentId], *, since_ms: int) -> None:
        """Take note that these were asked then, and leave those alone that did not answer.

        They have gone, or have no place: the next call must not wait for them again.
        """
        now_ms = clock_ms()
        for seller in asked:
            if self._offers.get(seller, 0) < since_ms:
                self.book.silent(seller, now_ms=now_ms)

    def names(self) -> list[str]:
        """Return the models that somebody sold when he was heard last, by name; asks nobody."""
        version, names = self._names
        if version != self.book.version:
            ways = (way.listing for way in self.book if way.listing.place is not Place.HERE)
            names = sorted({listing.model for listing in ways} - {""})
            self._names = (self.book.version, names)
        return list(names)

    async def models(self) -> list[ModelInfo]:
        """Return what sellers say they have, by name; heard at most half a minute ago.

        :raises ComputeFailed: if the agent has no place in a node
        """
        await self.look(MODELS_AGE_MAX_S)
        names = dict.fromkeys((*self.names(), *sorted(self._told)))
        return [self._told.get(name, ModelInfo(name=name)) for name in names]

    def lacks(self, prompt: Prompt) -> list[Capability]:
        """Return what a prompt needs and no seller says that its models can; asks nobody."""
        named = self._told.get(prompt.model or "")
        known = [named] if named is not None else list(self._told.values())
        return [
            need
            for need in prompt.needs()
            if known and not any(need in info.capabilities for info in known)
        ]

    def check_length(self, order: Embedding) -> None:
        """Return if it is not for their length that nobody embeds these texts; asks nobody.

        :raises PromptTooLong: if all models that do, as far as is told, have a smaller context
        """
        named = self._told.get(order.model)
        known = [named] if named is not None else list(self._told.values())
        widest = max(
            (info.context_tokens for info in known if EMBEDDING in info.capabilities), default=0
        )
        tokens = longest_of(order) // BYTES_PER_TOKEN
        if 0 < widest <= tokens:
            raise PromptTooLong(
                f"the longest text has about {tokens} tokens, and no model in reach embeds more"
                f" than {widest}. Cut it into pieces"
            )

    async def look(self, age_max_s: float = MODELS_STALE_MAX_S, *, wait: bool = True) -> None:
        """Return once the book is no older than that; what is older is asked for meanwhile.

        Without ``wait`` it returns at once.

        :raises ComputeFailed: if the agent has no place in a node
        """
        if self.agent.node is None:
            raise failed("nothing can be bought", why="the agent has no place", todo="Add it")
        self._listen()
        now_s = time.monotonic()
        age_s = now_s - self._heard_s if self._heard_s is not None else None
        if age_s is not None and age_s <= min(age_max_s, MODELS_AGE_MAX_S) and self.names():
            return
        if self._asking is None or self._asking.done():
            # Held here, and ended with ``close``.
            self._asking = asyncio.create_task(self._ask())
        if wait and (age_s is None or age_s > age_max_s or not self.names()):
            await asyncio.shield(self._asking)

    async def close(self) -> None:
        """Ask and listen no more. Safe to repeat."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait((self._asking,))
        if self._listens and self.agent.node is not None:
            self.agent.node.runtime.observers.remove(self._observe)
            self._listens = False

    async def _ask(self) -> None:
        node = self.agent.node
        assert node is not None
        try:
            answers = await asyncio.gather(
                *(node.discover(self.agent, ware) for ware in (WARE, EMBEDDING))
            )
        except WorldError as error:  # The next one to look asks again.
            log.warning("sellers could not be asked: %s", error)
            return
        now_ms, asset = clock_ms(), node.settlement.asset
        # Each hears what the other asked for as well.
        found = {(who, what.capability): what for answer in answers for who, what in answer}
        self._told = told_of(list(found.values()))
        for (seller, _), description in found.items():
            if description.capability.startswith(f"{WARE}-"):
                self._described(seller, description, asset, now_ms)
        self._heard_s = time.monotonic()

    def _described(
        self, seller: AgentId, description: Description, asset: Asset, now_ms: int
    ) -> None:
        names = set(description.models) or {""}
        for name in self.book.models(seller) - names:
            self.book.drop(seller, name)
        rates = listed_rates(description.price, asset)
        traits = dict(zip(description.models, description.traits, strict=False))
        place = self.place_of(seller)
        asked = rates if place is Place.MARKET else _FREE
        for name in names:
            way = self.book.way(seller, name)
            # Who does not tell a price, and has made no offer, is taken to ask the most.
            known = (
                way.listing
                if way is not None
                else Listing(
                    seller=seller,
                    place=Place.MARKET,
                    model=name,
                    fixed_units=0 if rates else self._most_units(),
                    first_us=DEAL_GUESS_US,
                )
            )
            told = info_of(name, traits.get(name, ""))
            listing = replace(
                known,
                place=place,
                quantisation=told.quantisation,
                context_tokens=told.context_tokens,
                region=region_of(traits.get(name, "")),
                # Who tells nothing may be able to do all of it.
                abilities=told.capabilities if traits.get(name) else (),
                **asked,
            )
            self.book.learn(listing, now_ms=now_ms)

    def _listen(self) -> None:
        if not self._listens and self.agent.node is not None:
            self.agent.node.runtime.observers.append(self._observe)
            self._listens = True

    def _observe(self, me: AgentId, notice: Notice) -> None:
        thread = notice.thread
        if notice.kind != "heard:offer" or thread is None or thread.side is not Role.BUYER:
            return
        seat = self.agent.seat
        if seat is None or me != seat.desk.me or not thread.request.capability.startswith(WARE):
            return
        self._offered(thread)

    def _offered(self, thread: Thread) -> None:
        """Learn from an offer what is asked, and from the first one of a thread how far it is."""
        terms, request, now_ms = thread.agreed_terms, thread.request, clock_ms()
        seller, work = thread.counterparty, terms.work
        free = work.settlement == FREE
        if free and self._refused(thread.deal):
            return  # Whoever offers to work for nothing, and is not of the firm.
        self._offers[seller] = now_ms
        if free != (seller in self._firm) and FREE in request.settlements:
            (self._firm.add if free else self._firm.discard)(seller)
        rates: dict[str, Any] = _FREE
        if not free:
            rates = {
                "fixed_units": terms.price_units if work.pricing == "fixed" else 0,
                "input_units": work.input_price_units,
                "cached_units": work.cached_input_price_units,
                "output_units": work.output_price_units,
                "second_units": work.second_price_units,
            }
        way, place = self.book.way(seller, work.model), self.place_of(seller)
        if way is None or way.listing.place is not place:
            known = Listing(seller=seller, place=place, model=work.model, first_us=DEAL_GUESS_US)
            known = way.listing if way is not None else known
            self.book.learn(replace(known, place=place, **rates), now_ms=now_ms)
        size = Size(request.input_max, request.output_max)
        self.book.offered(seller, work.model, terms.price_units, size, now_ms=now_ms)
        buying = self.agent.buying
        ask = buying.asks.get(thread.request_id) if buying is not None else None
        if ask is not None and ask.sent == 1 and len(thread.history) == 1:
            away_us = max(now_ms - ask.opened_ms, 1) * 1_000
            self.book.measured(seller, away_us, now_ms=now_ms)

    def _refused(self, deal: str) -> bool:
        """Return whether an offer is over already: the desk looked at it before we do."""
        seat = self.agent.seat
        thread = seat.desk.threads.get(deal) if seat is not None else None
        return thread is None or thread.over


def listed_rates(price: str, asset: Asset) -> dict[str, Any]:
    """Return the rates that a description's price says; none if it cannot be read."""
    try:
        if found := _PER_TASK.fullmatch(price):
            return {"fixed_units": asset.money(found[1]).units}
        if found := _PER_SECOND.fullmatch(price):
            return {"second_units": asset.money(found[1]).units}
        if found := _PER_MILLION.fullmatch(price):
            return {
                "input_units": asset.money(found[1]).units,
                "cached_units": asset.money(found[2] or found[1]).units,
                "output_units": asset.money(found[3]).units,
            }
    except ConfigurationError:  # Finer than the asset, or too large for it.
        return {}
    return {}
