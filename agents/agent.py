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
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from coase.protocol.errors import (
    ComputeFailed,
    ConfigurationError,
    DealFailed,
)
from coase.protocol.messages import (
    capability_id,
)
from coase.protocol.states import Role

from .asks import schemas_of
from .bargain import STYLES, SellerBargain, Style
from .declare import models_of, require_ware
from .job import Job
from .metering import cost_units
from .profile import Profile
from .purchasing import Purchasing, first_fault
from .purse import Budget, Purse
from .runtime import Done, Seat
from .seller import SellerDesk, Ware, Windows
from .waits import Wait, is_decided

if TYPE_CHECKING:
    from coase.negotiation.pricing import Price
    from coase.protocol.session import Thread
    from coase.protocol.types import AgentId

    from .buyer import BuyerDesk
    from .compute.ports import Compute
    from .dispute import Advocate
    from .node import Node
    from .steps import Notice

log = logging.getLogger(__name__)

NAME_MAX: Final = 64
DELIVER_WITHIN_MAX_S: Final = 24 * 3600
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
        return capability_id(self.name, schemas_of(self.task, self.result).digest)


class Agent(Purchasing):
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
                thread.state, f"the task does not fit its schema: {first_fault(error)}"
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
                f" {offering.result.__name__}: {first_fault(error)}",
                deal_id=thread.deal,
            ) from None

    def schemas(self, thread: Thread) -> tuple[str, str]:
        """Return the canonical schemas of a deal's capability, to show to an arbiter."""
        offering = self.offerings.get(thread.request.capability)
        if thread.side is Role.SELLER and offering is not None:
            known = schemas_of(offering.task, offering.result)
            return known.input, known.output
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
        elif thread is not None and notice.kind == "taken":
            for wait in self._waits.get(thread.request_id, ()):
                if wait.on_taken is not None:
                    wait.on_taken()
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
