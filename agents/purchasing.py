"""How an agent buys: it asks, bargains, waits for the result, checks it, and tries others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import anyio
from pydantic import BaseModel, ValidationError

from coase.protocol.errors import (
    BudgetExhausted,
    ConfigurationError,
    DealFailed,
    LocalProtocolError,
)
from coase.protocol.identity import keccak256
from coase.protocol.messages import BIDS_MAX, STAKE_PERMILLE_MAX, STREAMED
from coase.protocol.types import AgentId, units_to_text

from .arbiter import worth_units
from .asks import Ask, AskState, Schemas, Wish, schemas_of, wish_of
from .bargain import BuyerBargain, Style
from .charges import charged_to
from .checks import fault_in_time
from .job import Shown
from .metering import is_counted, usage_units
from .past import Past, recall
from .standing import CALL_REFUSED
from .steps import Notice, Step
from .waits import Eyes, Wait, why_not

if TYPE_CHECKING:
    from coase.protocol.session import Thread

    from .buyer import BuyerDesk
    from .node import Node
    from .runtime import Runtime, Seat

HOPE_PERMILLE: Final = 700  # Of the highest price: where a buyer's bargain begins.
ROUNDS: Final = 3
SHORTLIST: Final = 3
TEXT_MAX_BYTES: Final = 8 * 1024 * 1024

Made = TypeVar("Made", bound=BaseModel)
Check = Callable[[Any], str | None]


@dataclass(frozen=True, slots=True)
class Purchase(Generic[Made]):
    """What was bought: the result, from whom, and what it cost."""

    result: Made
    seller: AgentId
    deal: str
    request: str
    price_units: int
    """What was locked at most."""
    paid_units: int
    usage: dict[str, int]
    symbol: str
    decimals: int

    @property
    def paid(self) -> str:
        """What was paid, for people."""
        return f"{units_to_text(self.paid_units, self.decimals)} {self.symbol}"


class CallRefused(DealFailed):
    """A call under a rate contract was not begun, and cost nothing: it may be bought as usual."""


class Purchasing:
    """The part of an agent that buys."""

    name: str
    by_rounds: bool
    node: Node | None
    seat: Seat | None
    buying: BuyerDesk | None
    _waits: dict[str, list[Wait]]
    _faults: dict[str, Callable[[str], str | None]]

    async def hire(
        self, capability: str, task: BaseModel, *, returns: type[Made], max_price: str, **wish: Any
    ) -> Made:
        """Buy a piece of work on the market and return its checked result.

        Takes what ``purchase`` takes.
        """
        bought = await self.purchase(capability, task, returns=returns, max_price=max_price, **wish)
        return bought.result

    async def purchase(
        self,
        capability: str,
        task: BaseModel,
        *,
        returns: type[Made],
        max_price: str,
        check: Check | None = None,
        **wish: Any,
    ) -> Purchase[Made]:
        """Buy a piece of work whose task and result are pydantic models.

        Takes what ``buy`` takes, and raises what it raises. ``check`` gets the result and returns
        what is wrong with it, or None.
        """

        bought = await self.buy(
            capability,
            task.model_dump(mode="json"),
            schemas=schemas_of(type(task), returns),
            fault=_fault_by(returns, check),
            max_price=max_price,
            **wish,
        )
        return replace(bought, result=returns.model_validate_json(bought.result))

    async def buy(
        self,
        capability: str,
        task: Mapping[str, Any],
        *,
        schemas: Schemas | tuple[Mapping[str, Any], Mapping[str, Any]],
        max_price: str,
        fault: Callable[[str], str | None] | None = None,
        deliver_within: int = 60,
        strategy: Style = "linear",
        hope_permille: int = HOPE_PERMILLE,
        quality_min: int = 0,
        model: str = "",
        input_max: int = 0,
        output_max: int = 0,
        features: dict[str, int] | None = None,
        reply_within_ms: int = 5_000,
        decide_after_ms: int = 1_000,
        bids_min: int = 1,
        bids_max: int = 16,
        shortlist: int = SHORTLIST,
        rounds: int = ROUNDS,
        blocked: Collection[AgentId] = (),
        allowed: Collection[AgentId] = (),
        tries: int = 1,
        settlements: Collection[str] = ("none", "escrow"),
        stake_permille: int = 0,
        key: str = "",
        on_text: Callable[[str], None] | None = None,
        on_agreed: Callable[[Thread], None] | None = None,
        on_taken: Callable[[], None] | None = None,
    ) -> Purchase[Any]:
        """Ask for offers, bargain, lock, wait for the result, check it, and let it be settled.

        Returns the result as JSON text that fits the second of ``schemas``. The same ``key`` is the
        same purchase, also after a crash. ``tries`` is how many sellers may fail. ``on_text`` gets
        what a seller shows while it works, ``on_agreed`` the deal; ``on_taken`` is called when its
        seller has the task. Cancelled before there is a deal, it ends.
        :raises DealFailed: if nobody offered, or there was no good result: locked money comes back
        :raises BudgetExhausted: if a limit does not cover it; nothing was signed or promised
        :raises ConfigurationError: if the price or the agent's own set-up cannot work
        """
        self._require_numbers(bids_min, bids_max)
        known = schemas if isinstance(schemas, Schemas) else Schemas.of(*schemas)
        methods = self._methods(settlements, stake_permille)
        max_units = 0 if methods == ("none",) else self._highest_units(max_price)
        wish = replace(
            wish_of(capability, task, known, features),
            deliver_within_s=self._node().pace.within_s(deliver_within),
            quality_min=quality_min,
            input_max=input_max,
            output_max=output_max,
            model=model,
            reply_within_ms=reply_within_ms,
            decide_after_ms=decide_after_ms,
            bids_min=bids_min,
            bids_max=bids_max,
            blocked=frozenset(blocked),
            allowed=frozenset(allowed),
            settlements=methods,
            stake_permille=stake_permille,
            kept=bool(key),
            most_units=max_units,
            charge=charged_to(),
        )

        bargain = partial(self._bargain, wish, strategy, hope_permille, rounds, shortlist)
        eyes = Eyes(fault, on_text, on_agreed, on_taken)
        return await self._try(wish, bargain, eyes, tries=tries, key=key)

    def _methods(self, settlements: Collection[str], stake_permille: int) -> tuple[str, ...]:
        """Return those of the methods of payment that there are here, in their order."""
        buying, vault = self._buying(), self._node().stake
        if not 0 <= stake_permille <= STAKE_PERMILLE_MAX:
            raise ConfigurationError(f"stake_permille is 0 to {STAKE_PERMILLE_MAX}")
        if stake_permille and (vault is None or "escrow" not in settlements):
            raise ConfigurationError(
                "a stake is asked for where there is a vault, and of deals of the escrow only"
            )
        there = {
            "escrow": True,
            "channel": buying.desk.streams.enabled and not stake_permille,
            "none": buying.firm() is not None and not stake_permille,
        }
        found = tuple(name for name in settlements if there.get(name))
        if not found:
            raise ConfigurationError(
                f"nothing here settles by {' or '.join(settlements) or 'no method'}: escrow always"
                " does, channel where the network has channels, none within a firm (coase firm)"
            )
        return found

    @staticmethod
    def _require_numbers(bids_min: int, bids_max: int) -> None:
        if not 1 <= bids_min <= bids_max <= BIDS_MAX:
            raise ConfigurationError(
                f"bids_min {bids_min} and bids_max {bids_max} cannot be: 1 <= bids_min <= bids_max"
                f" <= {BIDS_MAX} must hold"
            )

    def _bargain(
        self, wish: Wish, style: Style, hope_permille: int, rounds: int, shortlist: int
    ) -> BuyerBargain:
        buying = self._buying()
        return BuyerBargain(
            max_price_units=wish.most_units,
            hope_permille=hope_permille,
            deliver_within_s=wish.deliver_within_s,
            quality_min=wish.quality_min,
            style=style,
            arbiters=self._node().network.arbiters,
            settlements=wish.settlements,
            rounds=rounds,
            shortlist=shortlist,
            by_rounds=self.by_rounds,
            salt=wish.task.encode(),
            purse=_AccountRooms(buying, wish.charge.account),
            experience=buying.experience,
        )

    def _highest_units(self, max_price: str) -> int:
        units = self._node().settlement.asset.money(max_price).units
        if units == 0:
            raise ConfigurationError("the highest price is 0: name what the work is worth to you")
        return units

    async def _try(
        self,
        wish: Wish,
        bargain: Callable[[], BuyerBargain],
        eyes: Eyes,
        *,
        tries: int,
        key: str,
    ) -> Purchase[Any]:
        """Buy, and again from others if it fails, each time with a new bargain."""
        last = DealFailed("lapsed", "no try was allowed")
        for number in range(max(tries, 1)):
            request_id = self.request_of(key, number) if key else ""
            past = self._past(request_id)
            try:
                if past is not None:
                    return self._bought(past, request_id, eyes.fault)
                return await self._buy(wish, bargain(), request_id, eyes)
            except DealFailed as error:
                last = error
                seller = past.seller if past is not None else self.seller_of(error.deal_id)
                wish = replace(wish, blocked=wish.blocked | ({seller} if seller else set()))
        raise last

    async def _buy(
        self,
        wish: Wish,
        bargain: BuyerBargain,
        request_id: str,
        eyes: Eyes,
    ) -> Purchase[Any]:
        node, keyed = self._node(), bool(request_id)
        request_id = request_id or self._buying().desk.chance.take(16).hex()

        async def begin() -> tuple[Ask, Step]:
            await node.runtime.look_at_means(self._seat())
            return self._ask(wish, bargain, request_id, now_ms=node.runtime.now_ms())

        return await self._bought_by(begin, request_id, eyes, keyed=keyed)

    async def _bought_by(
        self,
        begin: Callable[[], Awaitable[tuple[Ask, Step]]],
        request_id: str,
        eyes: Eyes,
        *,
        keyed: bool,
    ) -> Purchase[Any]:
        """Begin a purchase, wait for its end, and return what was bought."""
        node, buying, seat = self._node(), self._buying(), self._seat()
        node.budgets.refresh()
        fault, on_text = eyes.fault, eyes.on_text
        shown = Shown(on_text) if on_text is not None else None
        wait = Wait(shown=shown, on_agreed=eyes.on_agreed, on_taken=eyes.on_taken)
        # Several may wait for one purchase: who calls again with the same key joins in.
        self._waits.setdefault(request_id, []).append(wait)
        if fault is not None:
            self._faults[request_id] = fault
        try:
            ask, step = await begin()
            node.runtime.apply(seat, step)
            node.runtime.nudge()
            if ask.state is AskState.ENDED:
                wait.end(ask)
            elif ask.state is AskState.BOUND:
                wait.resume(buying.desk.threads.get(ask.chosen))
            await wait.done.wait()
        except anyio.get_cancelled_exc_class():
            if not keyed:  # With a key, whoever asks again may still want it.
                step = buying.give_up(request_id, now_ms=node.runtime.now_ms())
                node.runtime.apply(seat, step)
                self._stop(wait.deal)
            raise
        finally:
            waits = self._waits[request_id]
            waits.remove(wait)
            if not waits:
                del self._waits[request_id]
                self._faults.pop(request_id, None)
        thread = wait.thread
        if thread is None and ask.unpaid is not None:
            raise ask.unpaid
        if thread is None or thread.verdict != "good" or thread.result is None:
            refused = thread is not None and CALL_REFUSED in thread.why
            raise (CallRefused if refused else DealFailed)(
                thread.state if thread is not None else "lapsed",
                why_not(wait, thread, sized=bool(ask.wish.input_max or ask.wish.output_max)),
                deal_id=thread.deal if thread is not None else "",
            )
        asset = node.settlement.asset
        return Purchase(
            result=thread.result.result,
            seller=thread.counterparty,
            deal=thread.deal,
            request=request_id,
            price_units=thread.agreed_terms.price_units,
            paid_units=int(thread.result.to_seller_units),
            usage=dict(thread.result.usage),
            symbol=asset.symbol,
            decimals=asset.decimals,
        )

    async def agree(
        self,
        capability: str,
        task: type[BaseModel],
        returns: type[BaseModel],
        *,
        most_units: int,
        deliver_within: int,
        input_max: int,
        output_max: int,
        model: str = "",
        features: dict[str, int] | None = None,
        sellers: Collection[AgentId] = (),
        settlements: Collection[str] = ("none", "channel"),
        reply_within_ms: int = 1_500,
    ) -> Thread:
        """Agree with one of ``sellers`` on rates, under which it can be called for a while.

        Of calls, ``input_max`` and ``output_max`` are the largest, and ``most_units`` what such a
        one may cost. Nothing is owed or held by that. Returns the contract, for ``call``.

        :raises DealFailed: if nobody agreed to that
        :raises ConfigurationError: if neither a channel nor a firm is here to be paid by
        """
        node, buying, seat = self._node(), self._buying(), self._seat()
        wish = replace(
            wish_of(capability, {}, schemas_of(task, returns), None),
            task="",
            features=features or {},
            deliver_within_s=node.pace.within_s(deliver_within),
            input_max=input_max,
            output_max=output_max,
            model=model,
            reply_within_ms=reply_within_ms,
            decide_after_ms=reply_within_ms,
            bids_max=len(sellers) or BIDS_MAX,
            allowed=frozenset(sellers),
            settlements=self._methods([m for m in settlements if m in STREAMED], 0),
            kept=False,
            most_units=most_units,
        )
        request_id = buying.desk.chance.take(16).hex()
        agreed: list[Thread] = []

        def take(thread: Thread) -> None:
            agreed.append(thread)
            wait.done.set()

        wait = Wait(on_agreed=take)
        self._waits[request_id] = [wait]
        now_ms = node.runtime.now_ms
        try:
            bargain = self._bargain(wish, "linear", HOPE_PERMILLE, ROUNDS, SHORTLIST)
            _, step = self._ask(wish, bargain, request_id, now_ms=now_ms())
            node.runtime.apply(seat, step)
            node.runtime.nudge()
            await wait.done.wait()
        except anyio.get_cancelled_exc_class():
            node.runtime.apply(seat, buying.give_up(request_id, now_ms=now_ms()))
            raise
        finally:
            del self._waits[request_id]
        if not agreed:
            raise DealFailed("lapsed", why_not(wait, None))
        return agreed[0]

    async def call(
        self,
        contract: Thread,
        task: BaseModel,
        *,
        returns: type[Made],
        input_max: int,
        output_max: int,
        check: Check | None = None,
        on_text: Callable[[str], None] | None = None,
        on_agreed: Callable[[Thread], None] | None = None,
        on_taken: Callable[[], None] | None = None,
    ) -> Purchase[Made]:
        """Buy a piece of work under rates that were agreed: it begins at once.

        ``on_taken`` is told when its seller has the task. All else is as with ``purchase``.

        :raises CallRefused: if the rates are over or do not cover it, or the seller does not begin
            it now; it may be bought as usual
        :raises DealFailed: if there was no good result
        :raises BudgetExhausted: if a limit does not cover it; nothing was signed or promised
        """
        buying, node = self._buying(), self._node()
        request_id = buying.desk.chance.take(16).hex()
        schemas = schemas_of(type(task), returns)
        wish = replace(
            wish_of(contract.request.capability, task.model_dump(mode="json"), schemas, None),
            input_max=input_max,
            output_max=output_max,
            kept=False,
            charge=charged_to(),
        )

        async def begin() -> tuple[Ask, Step]:
            try:
                return buying.call(contract, wish, request_id, now_ms=node.runtime.now_ms())
            except LocalProtocolError as error:
                raise CallRefused("lapsed", str(error)) from error

        eyes = Eyes(_fault_by(returns, check), on_text, on_agreed, on_taken)
        bought = await self._bought_by(begin, request_id, eyes, keyed=False)
        return replace(bought, result=returns.model_validate_json(bought.result))

    def _stop(self, deal: str) -> None:
        """End a deal that is paid as it comes and that nobody waits for any more."""
        node, seat = self._node(), self._seat()
        if deal:
            now_ms = node.runtime.now_ms()
            node.runtime.apply(seat, seat.desk.stop(deal, "not wanted any more", now_ms=now_ms))

    def _ask(
        self, wish: Wish, bargain: BuyerBargain, request_id: str, *, now_ms: int
    ) -> tuple[Ask, Step]:
        """Ask the market, or tell that nothing more may be spent.

        :raises BudgetExhausted: with the limit that is spent
        """
        buying = self._buying()
        try:
            return buying.ask(wish, bargain, now_ms=now_ms, request_id=request_id)
        except BudgetExhausted as error:
            why = buying.reserve.paused(now_ms=now_ms) or str(error)
            paused = Step(effects=[Notice("paused", request_id, detail=why)])
            self._running().apply(self._seat(), paused)
            raise

    def request_of(self, key: str, number: int = 0) -> str:
        """Return the id of the request that a purchase with this key makes in its first try."""
        me = self._buying().desk.me
        return keccak256(f"{me}/{key}/{number}".encode())[:16].hex()

    def _past(self, request_id: str) -> Past | None:
        """Return what came of a request that is over, if only the journal still knows of it."""
        buying = self._buying()
        if not request_id or request_id in buying.asks:
            return None
        summaries = self._node().journal.past(buying.desk.me, request_id)
        return recall(summaries) if summaries is not None else None

    def _bought(
        self, past: Past, request_id: str, fault: Callable[[str], str | None] | None
    ) -> Purchase[Any]:
        """Return what was bought in the past.

        :raises DealFailed: if it came to nothing then, or does not please now
        """
        if past.failure is not None:
            raise past.failure
        if fault is not None and (wrong := fault(past.result)):
            raise DealFailed("settled", f"the result was refused: {wrong}", deal_id=past.deal)
        asset = self._node().settlement.asset
        return Purchase(
            result=past.result,
            seller=past.seller,
            deal=past.deal,
            request=request_id,
            price_units=past.price_units,
            paid_units=past.paid_units,
            usage=past.usage,
            symbol=asset.symbol,
            decimals=asset.decimals,
        )

    async def check(self, thread: Thread) -> str:
        """Return ``good``, or what is wrong with the result of a deal that we bought."""
        if thread.result is None:
            return "there is no result"
        terms, result = thread.agreed_terms, thread.result
        if int(result.to_seller_units) > terms.price_units:
            return "it costs more than was agreed"
        if not is_counted(terms):  # What is counted from its text was counted chunk by chunk.
            if int(result.to_seller_units) > usage_units(thread, dict(result.usage)):
                return "it costs more than its own usage at the agreed rates"
            if int(result.to_seller_units) > worth_units(terms, result.result):
                return "it costs more than the tokens that it says to hold, or than there can be"
        if len(result.result.encode()) > TEXT_MAX_BYTES:
            return "it is too large"
        fault = self._faults.get(thread.request_id)
        if fault is None:
            return await self._check_by_schema(thread)
        return fault(result.result) or "good"

    async def _check_by_schema(self, thread: Thread) -> str:
        """Check a result of an earlier life of this process, whose models are not at hand."""
        ask = self._buying().asks.get(thread.request_id)
        if ask is None or thread.result is None:
            return "the request is not known any more"
        return await fault_in_time(thread.result.result, ask.wish.output_schema) or "good"

    def seller_of(self, deal: str) -> AgentId:
        """Return from whom a deal of ours was bought, or nothing if it is not known here."""
        for ask in self._buying().asks.values():
            if ask.outcome is not None and ask.outcome.deal == deal:
                return ask.outcome.counterparty
        thread = self._buying().desk.threads.get(deal)
        return thread.counterparty if thread is not None else ""

    def _node(self) -> Node:
        if self.node is None:
            raise ConfigurationError(f"{self.name} has no place in a node yet: add it to one first")
        return self.node

    def _running(self) -> Runtime:
        return self._node().runtime

    def _buying(self) -> BuyerDesk:
        self._node()
        if self.buying is None:
            raise ConfigurationError(f"{self.name} cannot buy")
        return self.buying

    def _seat(self) -> Seat:
        self._node()
        if self.seat is None:
            raise ConfigurationError(f"{self.name} has no place in a node yet")
        return self.seat


@dataclass(frozen=True, slots=True)
class _AccountRooms:
    """What limits a buyer that charges one account."""

    buying: BuyerDesk
    account: str

    @property
    def limited(self) -> bool:
        return self.buying.limited

    def rooms(self, counterparty: AgentId, *, now_ms: int) -> dict[str, int]:
        return self.buying.rooms(counterparty, now_ms=now_ms, account=self.account)


def _fault_by(returns: type[BaseModel], check: Check | None) -> Callable[[str], str | None]:
    """Return what finds fault with a result as text: its model, and then the buyer's check."""

    def fault(text: str) -> str | None:
        try:
            made = returns.model_validate_json(text)
        except ValidationError as error:
            return f"it does not fit its schema: {first_fault(error)}"
        return check(made) if check is not None else None

    return fault


def first_fault(error: ValidationError) -> str:
    """Return the first thing that a document's schema finds wrong with it, for people."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where or 'document'}: {first['msg']}"
