"""Answers within a budget, for programs that want no more than that.

::

    async with Buyer(budget="0.50", max_price="0.01") as buyer:
        async for chunk in buyer.chat("Why is the sky blue?"):
            print(chunk.text, end="")
        print(buyer.spent, buyer.explain())

Each prompt is answered by the engine of this machine or bought on the network that runs here or
that this machine joined, whichever is expected to cost less, time and failures counted. Within a
firm nothing is paid at all.
"""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack, aclosing, closing
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias, TypeVar

import anyio

from coase.protocol.errors import ComputeFailed, ConfigurationError, WorldError
from coase.protocol.messages import canonical_json
from coase.protocol.types import units_to_text

from .agent import Agent
from .checks import fault_in_time
from .compute.calllog import CallLog
from .compute.explain import told
from .compute.gate import CONCURRENCY_DEFAULT, QUEUE_MAX_DEFAULT, Limits
from .compute.market import MarketCompute
from .compute.ports import Compute, Message, Prompt, whole
from .compute.router import RouterCompute
from .config import load_network, network_path
from .firm import FirmFile
from .forms import find_form
from .node import CLOSE_WAIT_MAX_S, SETTLE_WAIT_MAX_S, open_node
from .plans import AT_ONCE_DEFAULT, TRIES_DEFAULT, WITHIN_DEFAULT_S, Plan
from .purse import Budget
from .workers import (
    DELIVER_WITHIN_DEFAULT_S,
    EitherWorker,
    EngineWorker,
    HireWorker,
    InferenceWorker,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from pydantic import BaseModel

    from coase.protocol.messages import Description
    from coase.protocol.types import AgentId

    from .compute.find import Kind
    from .compute.ports import Chunk, Completion, Embeddings
    from .compute.routing import Wish
    from .config import Network
    from .node import Node
    from .plans import Progress, Worker
    from .purchasing import Purchase

log = logging.getLogger(__name__)

NAME: Final = "buyer"

Result = TypeVar("Result", bound="BaseModel")
Question: TypeAlias = "str | Prompt | Sequence[Message | Mapping[str, Any]]"


class Buyer:
    """Asks for answers, work and vectors, and never spends more than its budget.

    The budget holds over all runs of a buyer of this name, since the journal remembers; without a
    ``budget`` nothing is ever bought. ``max_price`` is the most for one answer. With ``engine``
    None everything is bought; else it is an engine of the caller's, or the kind of one that is
    looked for here. ``wish`` says what else counts: models, sellers, regions, deadline, and who may
    see a prompt. A ``node`` of the caller's takes the place of one that joins the network.

    :raises ConfigurationError: if name, budget or price cannot be used
    """

    def __init__(
        self,
        name: str = NAME,
        *,
        budget: Budget | str | None = None,
        max_price: str = "",
        engine: Compute | Kind | None = "auto",
        url: str = "",
        model: str = "",
        network: Network | None = None,
        state: Path | None = None,
        node: Node | None = None,
        wish: Wish | None = None,
    ) -> None:
        self._buys = budget is not None
        limit = Budget.of(budget if self._buys else "0")
        self.max_price = max_price or limit.per_deal or limit.total or ""
        if not self.max_price:
            raise ConfigurationError("name the most for one answer: max_price, such as '0.01'")
        self.agent = Agent(name, budget=limit)
        self._wish = wish
        self._engine, self._config = engine, (url, model)
        self._network, self._state, self._node = network, state, node
        self._local: Compute | None = None
        self._market: MarketCompute | None = None
        self._router: RouterCompute | None = None
        self._calls: CallLog | None = None
        self._why = ""
        self._told: dict[str, Any] | None = None
        self._stack: AsyncExitStack | None = None

    # ---- Begin and end -------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Join the network and find the engine, as far as they are here.

        :raises ConfigurationError: if neither is, or the state directory is another's
        :raises WorldError: if there is no engine, and broker or chain do not answer
        """
        async with AsyncExitStack() as stack:
            failure = await self._find_engine(stack)
            failure = await self._join(stack) or failure
            if self._local is None and self._market is None:
                raise failure or ConfigurationError(
                    "there are no answers without an engine, a budget or a firm"
                )
            self._router = RouterCompute(
                local=self._local, market=self._market, wish=self._wish, calls=self._calls
            )
            if not isinstance(self._engine, Compute):
                stack.push_async_callback(_close, self._router)  # Keeps what was learnt.
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stack, self._stack = self._stack, None
        if stack is None:
            return
        if kind is None and self._node is None and self.agent.node is not None:
            with anyio.move_on_after(SETTLE_WAIT_MAX_S):  # What was bought is also to be settled.
                await self.agent.node.at_rest()
        self._local = self._market = self._router = self._calls = None
        await stack.__aexit__(kind, error, trace)

    async def _find_engine(self, stack: AsyncExitStack) -> Exception | None:
        if self._engine is None:
            return None
        if isinstance(self._engine, Compute):
            self._local = self._engine  # Whoever made it closes it.
            return None
        from .compute.find import ComputeConfig, find_compute  # Slow to load.

        url, model = self._config
        # Where everything can be bought nobody need wait.
        queue_max = 0 if self._buys else QUEUE_MAX_DEFAULT
        limits = Limits(concurrency=CONCURRENCY_DEFAULT, queue_max=queue_max)
        config = ComputeConfig(kind=self._engine, url=url, model=model, limits=limits)
        try:
            self._local = await find_compute(config)
        except ComputeFailed as error:
            if self._engine != "auto":
                raise
            log.info("no engine here: %s", error)
            return error
        stack.push_async_callback(_close, self._local)
        return None

    async def _join(self, stack: AsyncExitStack) -> Exception | None:
        """Take a place in the network; without one, say why, if there is an engine instead."""
        from .wiring import ensure_funds

        if not self._buys:
            self._why = "no budget was given"
            if not (self._node or (FirmFile().current() and network_path().exists())):
                return None
        try:
            node = self._node or await self._open(stack)
        except (_NoNetwork, WorldError) as error:
            if self._local is None:
                raise
            self._why = str(error)
            log.warning("nothing can be bought: %s", error)
            return error
        if self.agent.node is None:
            await node.add(self.agent)
        if not self._buys:
            if node.firm.current() is not None:
                self._market = MarketCompute(self.agent, max_price="0", settlements=("none",))
            return None
        await ensure_funds(node.settlement, node.network, self.agent.address)
        if node.settlement.asset.money(self.max_price).units == 0:
            raise ConfigurationError("max_price is 0: name what an answer is worth to you")
        self._market = MarketCompute(self.agent, max_price=self.max_price)
        return None

    async def _open(self, stack: AsyncExitStack) -> Node:
        network = self._network
        if network is None:
            try:
                network = load_network()
            except ConfigurationError as error:
                raise _NoNetwork(str(error)) from None
        opened = open_node(network=network, state=self._state, name=self.agent.name)
        node = await stack.enter_async_context(opened)
        if node.budgets.directory is not None:
            self._calls = stack.enter_context(closing(CallLog(node.budgets.directory)))
        return node

    # ---- Answers -------------------------------------------------------------------------------

    async def chat(
        self, question: Question, *, system: str = "", wish: Wish | None = None, **options: Any
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the answer as it is written; what ``Prompt`` takes can be given by name.

        ``wish`` narrows the buyer's own for this answer.

        :raises BudgetExhausted: if it had to be bought and no limit covers it
        :raises ComputeFailed: if nobody answers
        """
        prompt = _prompt(question, system, options)
        async with aclosing(self._routed().stream(prompt, wish)) as chunks:
            async for chunk in chunks:
                if chunk.explanation is not None:
                    self._told = chunk.explanation.shown()
                yield chunk

    async def complete(
        self, question: Question, *, system: str = "", wish: Wish | None = None, **options: Any
    ) -> Completion:
        """Return the whole answer; raises what ``chat`` raises."""
        answer = self.chat(question, system=system, wish=wish, **options)
        return await whole(answer, name=self._routed().name)

    async def embed(self, texts: Sequence[str], model: str | None = None) -> Embeddings:
        """Return a vector for each text; raises what ``chat`` raises.

        :raises Unsupported: if neither the engine here nor anybody in reach makes vectors
        """
        return await self._routed().embed(texts, model)

    def explain(self, call: str = "") -> str:
        """Return in words why the last answer came from where it came, and what it cost.

        An id of an earlier call tells of that one, as ``coase explain`` does.

        :raises ConfigurationError: if there was none
        """
        return "\n".join(told(self.explained(call)))

    def explained(self, call: str = "") -> dict[str, Any]:
        """Return the same as a JSON document."""
        found = self._told
        if call:
            found = self._calls.find(call) if self._calls is not None else None
        if found is None:
            raise ConfigurationError(f"no call {call} is known" if call else "nothing was answered")
        return found

    # ---- Work ----------------------------------------------------------------------------------

    async def hire(
        self,
        capability: str,
        task: BaseModel,
        *,
        returns: type[Result],
        max_price: str = "",
        **wish: Any,
    ) -> Result:
        """Buy a piece of work and return its checked result.

        Takes what ``Agent.purchase`` takes, and raises what that raises.
        """
        self._require_market()
        price = max_price or self.max_price
        return await self.agent.hire(capability, task, returns=returns, max_price=price, **wish)

    async def sellers(self, capability: str = "") -> list[tuple[AgentId, Description]]:
        """Return who sells a capability, or anything at all, and what they say of it.

        Buys nothing, and is asked of nobody but those who answer.
        """
        self._require_market()
        assert self.agent.node is not None
        return await self.agent.node.discover(self.agent, capability)

    async def order(
        self, capability: str, task: Mapping[str, Any], *, max_price: str = "", **wish: Any
    ) -> Purchase[Any]:
        """Buy a piece of work whose schemas are those of whoever sells it; the result is JSON text.

        Never pays more than the buyer's own ``max_price``. Takes what ``Agent.buy`` takes.

        :raises DealFailed: if nobody sells it, or there was no good result
        :raises ConfigurationError: if the task does not fit, or there are several forms of it
        :raises BudgetExhausted: if the budget does not cover it
        """
        self._require_market()
        node = self.agent.node
        assert node is not None
        form, _ = await find_form(node, self.agent, capability)
        fault = await fault_in_time(canonical_json(task), canonical_json(form.schemas[0]))
        if fault:
            fields = ", ".join(form.schemas[0].get("properties", {})) or "none"
            wrong = fault.removeprefix("the result ")
            raise ConfigurationError(f"the task cannot be bought: {wrong}; its fields: {fields}")
        asset = node.settlement.asset
        most = asset.money(self.max_price)
        price = min(asset.money(max_price), most) if max_price else most
        return await self.agent.buy(
            form.capability,
            task,
            schemas=form.schemas,
            max_price=units_to_text(price.units, asset.decimals),
            **{"deliver_within": DELIVER_WITHIN_DEFAULT_S, **wish},
        )

    def market(
        self, capability: str, *, returns: type[Result], **wish: Any
    ) -> HireWorker[Any, Result]:
        """Return whoever sells a capability as the worker of a plan."""
        self._require_market()
        return HireWorker(self.agent, capability, returns=returns, **wish)

    def plan(
        self,
        worker: Worker[Any, Any] | None = None,
        *,
        budget: str = "",
        max_price: str = "",
        within_s: float = WITHIN_DEFAULT_S,
        at_once: int = AT_ONCE_DEFAULT,
        tries: int = TRIES_DEFAULT,
        key: str = "",
        on_progress: Callable[[Progress], object] = lambda progress: None,
    ) -> Plan[Any, Any]:
        """Return a plan of this buyer's: of prompts, made here and bought, unless it has a worker.

        ``budget`` is the most for all of it, without one what this buyer has left; ``max_price``
        the most for one piece, without one an equal share. With a ``key`` it goes on after a crash.
        """
        asset = self.agent.node.settlement.asset if self.agent.node is not None else None
        budget_units = asset.money(budget).units if asset is not None and budget else None
        left = self._left_units()
        if left is not None:
            budget_units = left if budget_units is None else min(budget_units, left)
        return Plan(
            worker if worker is not None else self._text_worker(),
            key=key,
            budget_units=budget_units if self._market is not None else 0,
            max_units=asset.money(max_price).units if asset is not None and max_price else None,
            within_s=within_s,
            at_once=at_once,
            tries=tries,
            identity=self.agent.seat.identity if self.agent.seat is not None else None,
            on_progress=on_progress,
        )

    def _text_worker(self) -> Worker[Prompt, str]:
        self._routed()
        if self._local is None and self._market is not None and not self._buys:
            return EngineWorker(self._market)
        if self._local is None:
            return InferenceWorker(self.agent)
        here = EngineWorker(self._local, at_once=CONCURRENCY_DEFAULT)
        if self._market is None:
            return here
        free = EngineWorker(self._market) if not self._buys else None
        return EitherWorker(here, free or InferenceWorker(self.agent))

    # ---- Money ---------------------------------------------------------------------------------

    @property
    def spent_units(self) -> int:
        """What is gone or promised, over all runs of this buyer."""
        if self.agent.node is None:
            return 0
        return self.agent.purse.balance.spent_units + self.agent.purse.open_units

    @property
    def spent(self) -> str:
        """The same, for people."""
        return self.money(self.spent_units)

    @property
    def left(self) -> str:
        """What may still be spent, for people; nothing if there is no limit to it."""
        left = self._left_units()
        return "" if left is None else self.money(left)

    def _left_units(self) -> int | None:
        if self._market is None or self.agent.node is None:
            return 0
        now_ms = self.agent.node.runtime.now_ms()
        rooms = self.agent.purse.rooms("", now_ms=now_ms)
        return max(min(rooms.values()), 0) if rooms else None

    def money(self, units: int) -> str:
        """Return an amount for people."""
        if self.agent.node is None:
            return "0"
        asset = self.agent.node.settlement.asset
        return f"{units_to_text(units, asset.decimals)} {asset.symbol}"

    # ---- What it stands on ---------------------------------------------------------------------

    def _routed(self) -> RouterCompute:
        if self._router is None:
            raise ConfigurationError("a buyer answers within its block: async with Buyer(...)")
        return self._router

    def _require_market(self) -> None:
        self._routed()
        if self._market is None or not self._buys:
            raise ConfigurationError(f"nothing can be bought: {self._why}")


class _NoNetwork(ConfigurationError):
    """There is no network, which is no fault where there is an engine."""


async def _close(compute: Compute) -> None:
    with anyio.move_on_after(CLOSE_WAIT_MAX_S, shield=True):
        await compute.close()


def _prompt(question: Question, system: str, options: dict[str, Any]) -> Prompt:
    match question:
        case Prompt():
            return question
        case str():
            return Prompt.ask(question, system=system, **options)
    messages = [m if isinstance(m, Message) else Message(**m) for m in question]
    head = [Message("system", system)] if system else []
    return Prompt(messages=(*head, *messages), **options)
