"""The public face: an agent that sells what its functions do, and buys what they need.

::

    seller = Agent("summariser")

    @seller.offers("summarise", price=Price.per_task("0.02"), deliver_within=60)
    async def summarise(task: Summarise, job: Job) -> Summary: ...

    seller.run()
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import anyio
from pydantic import BaseModel, ValidationError

from coase.protocol.errors import (
    BudgetExhausted,
    ComputeFailed,
    ConfigurationError,
    DealFailed,
)
from coase.protocol.identity import keccak256
from coase.protocol.messages import (
    BIDS_MAX,
    STAKE_PERMILLE_MAX,
    canonical_json,
    capability_id,
    schemas_hash,
)
from coase.protocol.states import Role
from coase.protocol.types import AgentId, units_to_text

from .arbiter import worth_units
from .asks import Ask, AskState, Wish, wish_of
from .bargain import STYLES, BuyerBargain, SellerBargain, Style
from .charges import charged_to
from .checks import fault_in_time
from .declare import models_of, require_ware
from .job import Job, Shown
from .metering import cost_units, is_counted, usage_units
from .past import Past, recall
from .profile import Profile
from .purse import Budget, Purse
from .runtime import Done, Runtime, Seat
from .seller import SellerDesk, Ware, Windows
from .steps import Notice, Step
from .waits import Eyes, Wait, is_decided, why_not

if TYPE_CHECKING:
    from coase.negotiation.pricing import Price
    from coase.protocol.session import Thread

    from .buyer import BuyerDesk
    from .compute.ports import Compute
    from .dispute import Advocate
    from .node import Node

log = logging.getLogger(__name__)

NAME_MAX: Final = 64
DELIVER_WITHIN_MAX_S: Final = 24 * 3600
TEXT_MAX_BYTES: Final = 8 * 1024 * 1024
HIRE_SLACK_S: Final = 30

Task = TypeVar("Task", bound=BaseModel)
Made = TypeVar("Made", bound=BaseModel)
Handler = Callable[[Any, Job], Awaitable[BaseModel]]
Check = Callable[[Any], str | None]


@dataclass(frozen=True, slots=True)
class Offering:
    """One thing that an agent sells, as its author declared it."""

    name: str
    price: Price
    deliver_within_s: int
    task: type[BaseModel]
    result: type[BaseModel]
    handler: Handler
    style: Style
    capacity: int
    quality: int
    model: str
    about: str
    windows: Windows | None
    rounds: int
    models: Callable[[], tuple[str, ...]]
    shown: bool

    @property
    def capability(self) -> str:
        """The capability's id: the name and the hash of both schemas."""
        return capability_id(
            self.name,
            schemas_hash(self.task.model_json_schema(), self.result.model_json_schema()),
        )


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


class Agent:
    """An autonomous program with a key of its own, that buys and sells.

    ``budget`` is the most that it may ever spend, or a ``Budget`` with several limits. What it
    spends counts against the budget of the agent ``under`` which it works, too. With ``by_rounds``
    its bargains depend on what is said alone and not on how fast. ``profile`` is who it is in the
    registries of the chain.

    :raises ConfigurationError: if the name or the budget cannot be used
    """

    def __init__(
        self,
        name: str,
        *,
        compute: Compute | None = None,
        budget: Budget | str | None = None,
        by_rounds: bool = False,
        under: Agent | str = "",
        profile: Profile | None = None,
        stake: str = "",
    ) -> None:
        if not name or len(name) > NAME_MAX or not name.replace("-", "").isalnum():
            raise ConfigurationError(
                f"{name!r} is no name for an agent: up to {NAME_MAX} letters, digits and hyphens"
            )
        self.name, self.budget, self.by_rounds = name, Budget.of(budget), by_rounds
        self.stake = stake
        """What it keeps in the vault as a seller, for its deals to reserve; 0 takes all back."""
        self.under = under.name if isinstance(under, Agent) else under
        self.profile = profile or Profile()
        self.offerings: dict[str, Offering] = {}
        self.node: Node | None = None
        self.seat: Seat | None = None
        self.selling: SellerDesk | None = None
        self.buying: BuyerDesk | None = None
        self.advocate: Advocate | None = None
        self.bargain_class: Callable[..., SellerBargain] = SellerBargain
        """How it quotes and bargains; a subclass may choose its buyers."""
        self._compute = compute
        self._waits: dict[str, list[Wait]] = {}
        self._jobs: dict[str, Job] = {}
        self._faults: dict[str, Callable[[str], str | None]] = {}

    # ---- selling -------------------------------------------------------------------------------

    def offers(
        self,
        name: str,
        *,
        price: Price,
        deliver_within: int = 60,
        strategy: Style = "fixed",
        capacity: int = 4,
        quality: int = 50,
        model: str = "",
        about: str = "",
        windows: Windows | None = None,
        rounds: int = 4,
        models: Callable[[], tuple[str, ...]] | None = None,
        shown: bool = False,
    ) -> Callable[[Handler], Handler]:
        """Sell what the decorated function does; its annotations are the schemas.

        ``deliver_within`` is seconds from the lock, for the work; what a slow chain takes comes on
        top. Without ``windows`` they are what suits the chain. ``capacity`` is how many at once.
        ``models`` tells, when the agent takes its place, what a request may name; without, it is
        ``model``. ``shown`` says that the handler shows its text while it works (``Job.show``).

        :raises ConfigurationError: if the price, the name or the annotations cannot work
        """
        require_ware(name, price)
        if strategy not in STYLES:
            raise ConfigurationError(f"no strategy {strategy!r}; there are {', '.join(STYLES)}")
        if not 1 <= deliver_within <= DELIVER_WITHIN_MAX_S or capacity < 1:
            raise ConfigurationError("deliver_within is 1 to 86400 seconds, capacity at least 1")

        def declare(handler: Handler) -> Handler:
            task, result = models_of(handler)
            offering = Offering(
                name=name,
                price=price,
                deliver_within_s=deliver_within,
                task=task,
                result=result,
                handler=handler,
                style=strategy,
                capacity=capacity,
                quality=quality,
                model=model,
                about=about or (inspect.getdoc(handler) or "").partition("\n")[0],
                windows=windows,
                rounds=rounds,
                models=models or (lambda: (model,) if model else ()),
                shown=shown,
            )
            if offering.capability in self.offerings:
                raise ConfigurationError(f"{self.name} sells {name} with these models already")
            self.offerings[offering.capability] = offering
            return handler

        return declare

    def wares(self, node: Node) -> list[Ware]:
        """Return what the agent sells, priced in the asset of the node's network."""
        return [
            Ware(
                name=offering.name,
                input_schema=offering.task.model_json_schema(),
                output_schema=offering.result.model_json_schema(),
                strategy=self.bargain_class(
                    offering.price,
                    node.settlement.asset,
                    deliver_within_s=node.pace.within_s(offering.deliver_within_s),
                    style=offering.style,
                    quality=offering.quality,
                    model=offering.model,
                    rounds=offering.rounds,
                    by_rounds=self.by_rounds,
                    capacity=offering.capacity,
                ),
                price_text=str(offering.price),
                about=offering.about,
                models=offering.models(),
                capacity=offering.capacity,
                shown=offering.shown,
                windows=offering.windows or node.pace.windows,
            )
            for offering in self.offerings.values()
        ]

    async def work(self, thread: Thread) -> Done:
        """Run the handler that a deal bought, and say what it costs."""
        offering = self.offerings[thread.request.capability]
        if thread.task is None:
            raise DealFailed(thread.state, "there is no task", deal_id=thread.deal)
        try:
            task = offering.task.model_validate_json(thread.task.task)
        except ValidationError as error:
            raise DealFailed(
                thread.state, f"the task does not fit its schema: {_first(error)}"
            ) from None
        job = self._jobs[thread.deal] = Job(self, thread)
        started_ms = self._running().now_ms()
        try:
            made = await offering.handler(task, job)
            result = self._fitting(made, offering, thread).model_dump_json()
            await job.drain()
        finally:
            del self._jobs[thread.deal]
        usage = dict(job.usage)
        usage.setdefault("milliseconds", max(self._running().now_ms() - started_ms, 0))
        thread = self._seat().desk.threads.get(thread.deal, thread)  # With what was shown of it.
        return Done(result, cost_units(thread, result, usage), usage)

    def _fitting(self, made: object, offering: Offering, thread: Thread) -> BaseModel:
        """Return what a handler made as its declared model, so that no rubbish is defended.

        :raises DealFailed: if it does not fit; the deal is then declined and the buyer refunded
        """
        if isinstance(made, offering.result):
            return made
        try:
            return offering.result.model_validate(
                made.model_dump() if isinstance(made, BaseModel) else made
            )
        except ValidationError as error:
            raise DealFailed(
                thread.state,
                f"the handler of {self.name} returned {type(made).__name__}, which does not fit"
                f" {offering.result.__name__}: {_first(error)}",
                deal_id=thread.deal,
            ) from None

    # ---- buying --------------------------------------------------------------------------------

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

        def fault(text: str) -> str | None:
            try:
                made = returns.model_validate_json(text)
            except ValidationError as error:
                return f"it does not fit its schema: {_first(error)}"
            return check(made) if check is not None else None

        bought = await self.buy(
            capability,
            task.model_dump(mode="json"),
            schemas=(type(task).model_json_schema(), returns.model_json_schema()),
            fault=fault,
            max_price=max_price,
            **wish,
        )
        return replace(bought, result=returns.model_validate_json(bought.result))

    async def buy(
        self,
        capability: str,
        task: Mapping[str, Any],
        *,
        schemas: tuple[Mapping[str, Any], Mapping[str, Any]],
        max_price: str,
        fault: Callable[[str], str | None] | None = None,
        deliver_within: int = 60,
        strategy: Style = "linear",
        hope_permille: int = 700,
        quality_min: int = 0,
        model: str = "",
        input_max: int = 0,
        output_max: int = 0,
        features: dict[str, int] | None = None,
        reply_within_ms: int = 5_000,
        decide_after_ms: int = 1_000,
        bids_min: int = 1,
        bids_max: int = 16,
        shortlist: int = 3,
        rounds: int = 3,
        blocked: Collection[AgentId] = (),
        allowed: Collection[AgentId] = (),
        tries: int = 1,
        settlements: Collection[str] = ("none", "escrow"),
        stake_permille: int = 0,
        key: str = "",
        on_text: Callable[[str], None] | None = None,
        on_agreed: Callable[[Thread], None] | None = None,
    ) -> Purchase[Any]:
        """Ask for offers, bargain, lock, wait for the result, check it, and let it be settled.

        Returns the result as JSON text that fits the second of ``schemas``. The same ``key`` is the
        same purchase, also after a crash. ``tries`` is how many sellers may fail. ``on_text`` gets
        what a seller shows while it works, ``on_agreed`` the deal. Cancelled before that, it ends.
        :raises DealFailed: if nobody offered, or there was no good result: locked money comes back
        :raises BudgetExhausted: if a limit does not cover it; nothing was signed or promised
        :raises ConfigurationError: if the price or the agent's own set-up cannot work
        """
        self._require_numbers(bids_min, bids_max)
        methods = self._methods(settlements, stake_permille)
        max_units = 0 if methods == ("none",) else self._highest_units(max_price)
        wish = replace(
            wish_of(capability, task, schemas, features),
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
        eyes = Eyes(fault, on_text, on_agreed)
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
        node, buying, seat = self._node(), self._buying(), self._seat()
        node.budgets.refresh()
        keyed = bool(request_id)
        if not keyed:
            request_id = buying.desk.chance.take(16).hex()
        fault, on_text = eyes.fault, eyes.on_text
        shown = Shown(on_text) if on_text is not None else None
        wait = Wait(shown=shown, on_agreed=eyes.on_agreed)
        # Several may wait for one purchase: who calls again with the same key joins in.
        self._waits.setdefault(request_id, []).append(wait)
        if fault is not None:
            self._faults[request_id] = fault
        try:
            await node.runtime.look_at_means(seat)
            now_ms = node.runtime.now_ms()
            ask, step = self._ask(wish, bargain, request_id, now_ms=now_ms)
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
            raise DealFailed(
                thread.state if thread is not None else "lapsed",
                why_not(wait, thread),
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

    def schemas(self, thread: Thread) -> tuple[str, str]:
        """Return the canonical schemas of a deal's capability, to show to an arbiter."""
        offering = self.offerings.get(thread.request.capability)
        if thread.side is Role.SELLER and offering is not None:
            return (
                canonical_json(offering.task.model_json_schema()),
                canonical_json(offering.result.model_json_schema()),
            )
        ask = self._buying().asks.get(thread.request_id)
        return (ask.wish.input_schema, ask.wish.output_schema) if ask is not None else ("{}", "{}")

    def observe(self, agent: AgentId, notice: Notice) -> None:
        """Wake whoever waits for the deal that a notice is about."""
        if self.seat is None or agent != self.seat.desk.me:
            return
        thread = notice.thread
        if notice.kind in ("heard:voucher", "ended") and notice.deal in self._jobs:
            self._jobs[notice.deal].go_on()
        if notice.kind == "request_ended":
            for wait in self._waits.get(notice.deal, ()):
                wait.thread = wait.thread or thread
                wait.why = notice.detail
                wait.done.set()
        elif thread is not None and notice.kind == "agreed":
            for wait in self._waits.get(thread.request_id, ()):
                wait.deal = thread.deal
                if wait.on_agreed is not None:
                    wait.on_agreed(thread)
        elif thread is not None and notice.kind == "chunk":
            for wait in self._waits.get(thread.request_id, ()):
                if wait.shown is not None:
                    wait.shown.take(notice.number, notice.detail)
        elif thread is not None and is_decided(notice.kind, thread):
            for wait in self._waits.get(thread.request_id, ()):
                wait.thread, wait.why = thread, notice.detail
                wait.done.set()

    # ---- running -------------------------------------------------------------------------------

    @property
    def address(self) -> AgentId:
        """The agent's id, once it has its place in a node."""
        return self._seat().desk.me

    @property
    def purse(self) -> Purse:
        """What the agent may still spend, once it has its place in a node.

        :raises ConfigurationError: if it has none yet
        """
        purse = self._buying().reserve
        if not isinstance(purse, Purse):
            raise ConfigurationError(f"{self.name} spends out of a purse of another kind")
        return purse

    @property
    def compute(self) -> Compute:
        """The engine that the agent uses by itself.

        :raises ComputeFailed: if it has none
        """
        if self._compute is not None:
            return self._compute
        if self.node is not None and self.node.compute is not None:
            return self.node.compute
        raise ComputeFailed(f"{self.name} has no engine; give it one, or: coase model get")

    def run(self) -> None:
        """Join the network that ``coase up`` runs, and work until interrupted."""
        from .node import run_process  # Late: an agent that is only declared needs no runtime.

        run_process([self])

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


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where or 'document'}: {first['msg']}"
