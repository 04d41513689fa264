"""Who makes the pieces of a plan: an engine of this process, purchases on the market, or both."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from contextlib import aclosing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import anyio
from pydantic import BaseModel

from coase.protocol.errors import BudgetExhausted, ComputeFailed, DealFailed
from coase.protocol.states import State
from coase.protocol.types import units_to_text

from .asks import AskState
from .compute.blame import NoOffer
from .compute.market import BoughtChunk
from .compute.ports import ComputeBusy, PromptRefused
from .compute.purchase import TOKENS_PER_S_MIN
from .inference import features_of, input_tokens_max, task_of
from .node import DISCOVER_WAIT_S
from .past import recall
from .plans import Made, Order, Worker
from .pot import PLAN_LIMIT
from .purse import spent_in
from .wares import Completion

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coase.protocol.session import Thread

    from .agent import Agent
    from .compute.ports import Compute, Prompt
    from .pot import Hold
    from .purchasing import Purchase

T = TypeVar("T")
R = TypeVar("R")
Task = TypeVar("Task", bound=BaseModel)
Result = TypeVar("Result", bound=BaseModel)

# A deal needs some seconds to be agreed and locked before its time to deliver begins.
DEAL_S: Final = 5
DELIVER_WITHIN_DEFAULT_S: Final = 120
# What a market gives a seller of text before its tokens are counted.
TEXT_WITHIN_S: Final = 60
DECIDE_AFTER_MS: Final = 300
# Who was found when the plan began answers in a moment, or has gone.
AIMED_REPLY_MS: Final = 2_000
# Within a firm nothing is paid; else in the escrow, where a deal goes on after a crash by itself.
SETTLEMENTS: Final = ("none", "escrow")
_STATES: Final = ("made", "open", "failed", "nobody", "")  # What counts before what.
OPEN_STATES: Final = (AskState.ACCEPTING, AskState.BOUND)


class EngineWorker(Worker["Prompt", str]):
    """Pieces of text by an engine: of this machine, or whatever a router or a market finds.

    What it says that was paid counts against the plan; ``max_units`` is the most that it may take
    for one prompt, 0 for an engine that costs nothing. With ``at_once`` no more are asked of it
    beside each other; the others wait here, where no engine grows tired of them.
    """

    def __init__(
        self, compute: Compute, *, max_units: int = 0, asset: str = "", at_once: int = 0
    ) -> None:
        self.compute, self._max_units, self._asset = compute, max_units, asset
        self._at_once = at_once
        self._slots: anyio.Semaphore | None = None

    async def begin(self) -> None:
        """Make the places, in the event loop of the plan."""
        if self._at_once and self._slots is None:
            self._slots = anyio.Semaphore(self._at_once)

    @property
    def asset(self) -> str:
        """The asset in which its work is paid, empty if it costs nothing."""
        return self._asset

    @property
    def free(self) -> bool:
        """Whether it takes another piece now without a queue."""
        return self._slots is None or self._slots.value > 0

    async def make(self, order: Order[Prompt]) -> Made[str]:
        """Return the text that the engine writes.

        :raises ComputeFailed: if it writes none, or only half of it
        """
        async with self._slots or nullcontext():
            if not self._max_units:
                return await self._write(order, None)
            with await order.reserve() as hold:
                if hold.units < self._max_units:
                    raise BudgetExhausted(
                        limit=PLAN_LIMIT, asked_units=self._max_units, left_units=hold.units
                    )
                hold.bind(self._max_units)  # From its first word on the market may have bought.
                return await self._write(order, hold)

    async def _write(self, order: Order[Prompt], hold: Hold | None) -> Made[str]:
        texts: list[str] = []
        seller, deal, paid = self.compute.name, "", 0
        order.took(seller, "")
        try:
            async with aclosing(self.compute.stream(order.task)) as chunks:
                async for chunk in chunks:
                    texts.append(chunk.text)
                    if isinstance(chunk, BoughtChunk) and chunk.bought:
                        last = chunk.bought[-1]
                        seller, deal = last.seller, last.deal
                        paid = sum(
                            _cost(each.price_units, each.paid_units) for each in chunk.bought
                        )
        except (BudgetExhausted, NoOffer):
            if hold is not None and not paid:
                hold.spend(0)
            raise
        if hold is not None:
            hold.spend(min(paid, hold.units))
        text = "".join(texts)
        if fault := order.check(text):
            raise ComputeFailed(f"{seller} gave no good answer: {fault}")
        return Made(result=text, seller=seller, deal=deal, paid_units=paid)


def _cost(price_units: int, paid_units: int | None) -> int:
    return price_units if paid_units is None else paid_units


class MarketWorker(Worker[T, R]):
    """Pieces bought on the market, each a deal of its own; after a crash the same deals go on.

    ``wish`` is what ``Agent.purchase`` takes besides price, key and check.
    """

    def __init__(
        self,
        agent: Agent,
        capability: str,
        *,
        returns: type[BaseModel],
        look_s: float = DISCOVER_WAIT_S,
        **wish: Any,
    ) -> None:
        self.agent, self.capability, self._returns = agent, capability, returns
        self._look_s = look_s
        self._wish = {"decide_after_ms": DECIDE_AFTER_MS, "settlements": SETTLEMENTS, **wish}
        self._known: frozenset[str] = frozenset()
        self._hands: Counter[str] = Counter()

    @abstractmethod
    def order_of(self, task: T) -> tuple[BaseModel, dict[str, Any]]:
        """Return the task as it is bought, and what else is wished for it."""

    @abstractmethod
    def result_of(self, bought: Any) -> R:
        """Return the piece out of what was bought."""

    async def begin(self) -> None:
        """See who sells it, so that the work can be spread."""
        if self.agent.node is not None:
            found = await self.agent.node.discover(self.agent, self.capability, wait_s=self._look_s)
            self._known = frozenset(seller for seller, _ in found) - {self.agent.address}

    @property
    def sellers(self) -> int:
        """How many sold it when the plan began."""
        return max(len(self._known), 1)

    @property
    def asset(self) -> str:
        """Chain and token in which it pays."""
        if self.agent.node is None:
            return ""
        asset = self.agent.node.settlement.asset
        return f"eip155:{asset.chain_id}/erc20:{asset.token}"

    async def make(self, order: Order[T]) -> Made[R]:
        """Buy the piece, from somebody who is not busy with others if there is anybody.

        :raises DealFailed: if nobody sells it so, or what was delivered is not good
        """
        with await order.reserve() as hold, self._aim(order) as aims:
            ways = [(order.key, aims), (f"{order.key}/any", frozenset[str]())]
            # What an earlier run began goes on, whichever way it was.
            begun = [way for way in ways if self._earlier(way[0])[0]]
            ways = begun or (ways if aims else ways[1:])
            for key, allowed in ways:
                try:
                    bought = await self._buy(order, key, hold, allowed)
                except DealFailed as error:
                    if error.deal_id or key == ways[-1][0]:
                        raise
                else:
                    hold.spend(bought.paid_units)
                    return Made(
                        result=self.result_of(bought.result),
                        seller=bought.seller,
                        deal=bought.deal,
                        paid_units=bought.paid_units,
                    )
        raise AssertionError  # The loop returns or raises.

    @contextmanager
    def _aim(self, order: Order[T]) -> Iterator[frozenset[str]]:
        """Choose whom to ask, so that pieces asked for at once do not all go to the cheapest.

        Those who have least in hand; none if nobody is known.
        """
        pool = self._known - order.avoid
        pool = pool - order.busy or pool
        # Two compete for each piece where that leaves enough for the others.
        count = 2 if len(pool) > 3 else 1
        ranked = sorted(pool, key=lambda seller: (self._hands[seller], seller))
        aims = frozenset(ranked[:count])
        self._hands.update(aims)
        try:
            yield aims
        finally:
            self._hands.subtract(aims)

    async def _buy(
        self, order: Order[T], key: str, hold: Hold, allowed: frozenset[str]
    ) -> Purchase[Any]:
        def agreed(thread: Thread) -> None:
            hold.bind(thread.agreed_terms.price_units)
            order.took(thread.counterparty, thread.deal)

        agent = self.agent
        assert agent.node is not None
        task, wish = self.order_of(order.task)
        wish = {**wish, **self._wish}
        within_s = int(wish.get("deliver_within", DELIVER_WITHIN_DEFAULT_S))
        left_s = int(min(order.left_s, 24 * 3600)) - DEAL_S
        wish["deliver_within"] = max(min(within_s, left_s), 1)
        if allowed:  # No more offers than theirs are waited for.
            wish |= {
                "allowed": allowed,
                "bids_max": len(allowed),
                "reply_within_ms": AIMED_REPLY_MS,
            }
        try:
            return await agent.purchase(
                self.capability,
                task,
                returns=self._returns,
                max_price=units_to_text(hold.units, agent.node.settlement.asset.decimals),
                check=lambda made: order.check(self.result_of(made)),
                key=key,
                blocked=order.avoid,
                on_agreed=agreed,
                **wish,
            )
        except DealFailed as error:
            if error.deal_id and error.state in (State.REFUNDED, State.LAPSED):
                hold.spend(0)
            raise
        except anyio.get_cancelled_exc_class():
            self._leave(key, hold)
            raise

    def _leave(self, key: str, hold: Hold) -> None:
        """Give up a purchase that nobody waits for, or note what it may cost if it is too late."""
        agent = self.agent
        if agent.buying is None or agent.node is None or agent.seat is None:
            return
        request = agent.request_of(key)
        step = agent.buying.give_up(request, now_ms=agent.node.runtime.now_ms())
        agent.node.runtime.apply(agent.seat, step)
        ask = agent.buying.asks.get(request)
        if ask is not None and ask.state in OPEN_STATES and not hold.bound:
            hold.bind(hold.units)  # The accept is under way, and the seller may agree to it.

    def earlier(self, key: str) -> tuple[str, int]:
        """Return what came of an order in an earlier run, and what it cost at most."""
        found = (self._earlier(key), self._earlier(f"{key}/any"))
        return min(found, key=lambda each: _STATES.index(each[0]))

    def _earlier(self, key: str) -> tuple[str, int]:
        agent = self.agent
        if agent.buying is None or agent.node is None:
            return "", 0
        request = agent.request_of(key)
        ask = agent.buying.asks.get(request)
        if ask is None:
            summaries = agent.node.journal.past(agent.buying.desk.me, request)
            past = recall(summaries) if summaries is not None else None
            if past is None:
                return "", 0
            if not past.deal:
                return "nobody", 0
            return "made" if past.failure is None else "failed", past.paid_units
        if ask.state in OPEN_STATES:
            thread = agent.buying.desk.threads.get(ask.chosen)
            return ("open", thread.agreed_terms.price_units) if thread is not None else ("", 0)
        if ask.outcome is None:
            return ("nobody" if ask.state is AskState.ENDED else ""), 0
        return "made" if ask.outcome.verdict == "good" else "failed", spent_in(ask.outcome)


class HireWorker(MarketWorker[Task, Result], Generic[Task, Result]):
    """Pieces of any capability: tasks and results are its pydantic models."""

    def order_of(self, task: Task) -> tuple[BaseModel, dict[str, Any]]:
        """Return the task as it is."""
        return task, {}

    def result_of(self, bought: Any) -> Result:
        """Return what was bought as it is."""
        made: Result = bought
        return made


class InferenceWorker(MarketWorker["Prompt", str]):
    """Pieces of text, bought as ``inference``."""

    def __init__(self, agent: Agent, **wish: Any) -> None:
        super().__init__(agent, "inference", returns=Completion, **wish)

    def order_of(self, task: Prompt) -> tuple[BaseModel, dict[str, Any]]:
        """Return the prompt as the ware has it.

        :raises PromptRefused: if the ware has no words for it
        """
        # One seed for all tries: whoever makes the piece, the same engine gives the same text.
        bought = task_of(task, seed=task.seed or 0)
        return bought, {
            "model": bought.model,
            "input_max": input_tokens_max(bought),
            "output_max": bought.max_tokens,
            "features": features_of(bought),
            "deliver_within": TEXT_WITHIN_S + bought.max_tokens // TOKENS_PER_S_MIN,
        }

    def result_of(self, bought: Any) -> str:
        """Return the text."""
        return str(bought.text)


class EitherWorker(Worker["Prompt", str]):
    """Pieces of text by the engine here while it has a place, the others bought."""

    def __init__(self, here: EngineWorker, market: Worker[Prompt, str]) -> None:
        self.here, self.market = here, market

    async def begin(self) -> None:
        """Get both ready."""
        await self.here.begin()
        await self.market.begin()

    @property
    def sellers(self) -> int:
        """How many sellers there are, and ourselves."""
        return self.market.sellers + 1

    @property
    def asset(self) -> str:
        """In which it pays for what it buys."""
        return self.market.asset

    def earlier(self, key: str) -> tuple[str, int]:
        """Return what was bought in an earlier run; what was made here is made again."""
        return self.market.earlier(key)

    async def make(self, order: Order[Prompt]) -> Made[str]:
        """Make it here if there is a place, else buy it; if that is not to be had, wait here.

        :raises CoaseError: if neither can be done
        """
        bought_before = self.market.earlier(order.key)[0] in ("made", "open")
        if not bought_before and self.here.free and self.here.compute.name not in order.avoid:
            try:
                return await self.here.make(order)
            except (ComputeBusy, PromptRefused):
                pass  # Somebody else may have a place, or a model that can do it.
        try:
            return await self.market.make(order)
        except (BudgetExhausted, PromptRefused):
            return await self.here.make(order)
        except DealFailed as error:
            if error.deal_id:
                raise
            return await self.here.make(order)
