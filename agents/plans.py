"""Plans: work in many pieces, made by many, under one budget and one deadline.

::

    plan = Plan(worker, budget_units=20_000, within_s=60, at_once=8)
    notes = await plan.map(chunks)                       # What could be made, and what not.
    whole = await plan.reduce(notes.results, join)
    print(notes, plan.receipt().root)

A plan is a few awaits in a function of one's own; the steps here keep the promises. Nothing is
asked for before its price is set aside. A piece that takes much longer than the others is asked
for a second time, elsewhere, while there is money for it. When time or money is up, what was made
is what one gets, with a word on what it covers.
"""

from __future__ import annotations

import math
import secrets
import statistics
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import anyio

from coase.protocol.errors import BudgetExhausted, CoaseError, ConfigurationError, DealFailed

from .compute.ports import PromptRefused
from .pot import PLAN_LIMIT, Hold, Pot
from .receipt import SALT_BYTES, Part, Receipt, content_hash, make_receipt

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Hashable, Sequence

    from anyio.abc import TaskGroup

    from coase.protocol.identity import Identity

T = TypeVar("T")
R = TypeVar("R")

AT_ONCE_DEFAULT: Final = 8
AT_ONCE_MAX: Final = 256  # Each is a deal of its own, with messages and a lock on chain.
PIECES_MAX: Final = 10_000
TRIES_DEFAULT: Final = 3
WITHIN_DEFAULT_S: Final = 600
FAN_IN_DEFAULT: Final = 8
# Before so many pieces are there, nobody knows how long one takes.
HEDGE_AFTER_PIECES: Final = 3
# A piece is a straggler when it takes so many times what the median one took.
HEDGE_FACTOR: Final = 2
HEDGE_AFTER_MIN_S: Final = 1.0
WATCH_EVERY_S: Final = 0.1
RETRY_PAUSE_S: Final = 0.5  # Doubles; sellers that are full now are free in a moment.
TRIES_KNOWN_MAX: Final = 1_000  # Of one piece, over all runs of its plan.


@dataclass(frozen=True, slots=True, kw_only=True)
class Made(Generic[R]):
    """A result, by whom it was made, and what it cost."""

    result: R
    seller: str
    deal: str = ""
    paid_units: int = 0
    key: str = ""


@dataclass(slots=True, kw_only=True)
class Order(Generic[T]):
    """One piece of work for a worker, and what it may use for it."""

    key: str
    """The same after a restart of a plan that has a key: under it a purchase can go on."""
    piece: str
    task: T
    check: Callable[[Any], str | None]
    """Says what is wrong with a result; such a one must not be returned."""
    avoid: frozenset[str]
    """Sellers that failed this piece or have it in hand."""
    busy: frozenset[str]
    """Sellers that have enough from us for now: better others, if there are any."""
    left_s: float
    """Until then it must be there; after it the worker is cancelled."""
    reserve: Callable[[], Any]
    """Await it before anything is asked that may cost: gives the ``Hold`` that limits the price.

    :raises BudgetExhausted: if the plan's budget has nothing left
    """
    took: Callable[[str, str], None]
    """Tell by it which seller has the piece now, and in which deal."""


class Worker(ABC, Generic[T, R]):
    """Makes pieces, several at once: an engine here, or purchases on a market."""

    @abstractmethod
    async def make(self, order: Order[T]) -> Made[R]:
        """Return the piece, for no more than was reserved.

        Cancelled, it leaves no purchase that nobody accounts for: what it has held is bound to
        the highest price of what may still come.

        :raises CoaseError: if it cannot be made; another try may be made elsewhere
        """

    async def begin(self) -> None:
        """Get ready: called once before the first piece."""

    @property
    def sellers(self) -> int:
        """How many are known to make such pieces."""
        return 1

    def earlier(self, key: str) -> tuple[str, int]:
        """Return what came of an order with this key in an earlier run, and what it cost at most.

        That is ``made``, ``open``, ``failed``, ``nobody`` if no deal came of it, or nothing if it
        is not known.
        """
        return "", 0

    @property
    def asset(self) -> str:
        """The asset in which its work is paid, empty if it costs nothing."""
        return ""


@dataclass(frozen=True, slots=True)
class Covered(Generic[R]):
    """What a step could make, in the order of its tasks, and why the rest is missing."""

    made: tuple[Made[R] | None, ...]
    missing: dict[int, str]

    @property
    def results(self) -> list[R]:
        """The results that there are, in order."""
        return [made.result for made in self.made if made is not None]

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return not self.missing

    def __str__(self) -> str:
        return f"{len(self.made) - len(self.missing)} of {len(self.made)}"


@dataclass(frozen=True, slots=True)
class Vote(Generic[R]):
    """What most said: how many of how many voices."""

    result: R
    voices: int
    of: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a plan is, told after each piece that was made or given up."""

    done: int
    failed: int
    pieces: int
    spent_units: int
    seller: str = ""
    hedged: int = 0


@dataclass(slots=True, eq=False)
class _Race(Generic[T, R]):
    """The tries of one piece, one after the other or beside each other."""

    piece: str
    task: T
    check: Callable[[Any], str | None]
    apart: set[str]
    """Who has a sister piece, and should not have this one as well."""
    won: Made[R] | None = None
    running: dict[int, str] = field(default_factory=dict)
    """Tries that run, and who has the piece in each."""
    promised: dict[int, int] = field(default_factory=dict)
    """Tries of an earlier run, and what each costs at most."""
    tried: int = 0
    failures: int = 0
    failed: set[str] = field(default_factory=set)
    why: str = "there was no time left"
    hopeless: bool = False
    told: bool = False
    begun_s: float = 0.0
    changed: anyio.Event = field(default_factory=anyio.Event)

    def begin(
        self,
        number: int,
        group: TaskGroup,
        run: Callable[[_Race[T, R], int, float], Coroutine[Any, Any, None]],
        leave_s: float,
    ) -> None:
        """Let a try run."""
        if not self.running:
            self.begun_s = anyio.current_time()
        self.running[number] = ""
        self.tried += 1
        group.start_soon(run, self, number, leave_s)

    def end(self, number: int) -> None:
        """Note that a try is over."""
        del self.running[number]
        self.changed.set()
        self.changed = anyio.Event()


class Plan(Generic[T, R]):
    """Makes pieces by one worker, within one budget, until one deadline.

    ``key`` makes it the same plan after a crash, with a worker whose purchases have keys: what was
    bought is not bought again. In a handler the deal's id is one: ``Plan(..., key=job.deal)``.
    ``pieces`` is how many there will be in all, if it is known: each gets an equal share of the
    money that is left. ``max_units`` limits each piece, too.

    :raises ValueError: if a limit is none
    """

    def __init__(
        self,
        worker: Worker[T, R],
        *,
        key: str = "",
        budget_units: int | None = None,
        max_units: int | None = None,
        within_s: float = WITHIN_DEFAULT_S,
        at_once: int = AT_ONCE_DEFAULT,
        tries: int = TRIES_DEFAULT,
        pieces: int = 0,
        hedge: bool = True,
        hedge_after_min_s: float = HEDGE_AFTER_MIN_S,
        identity: Identity | None = None,
        on_progress: Callable[[Progress], object] = lambda progress: None,
    ) -> None:
        if not 1 <= at_once <= AT_ONCE_MAX or tries < 1 or within_s <= 0:
            raise ValueError(f"at_once is 1 to {AT_ONCE_MAX}, tries at least 1, within_s above 0")
        if budget_units is not None and budget_units < 0:
            raise ValueError("a budget is no debt")
        self.worker, self.key = worker, key or secrets.token_hex(16)
        self.pot = Pot(budget_units)
        self._resumed, self._max_units = bool(key), max_units
        self._within_s, self._at_once, self._tries = within_s, at_once, tries
        self._expected, self._begun, self._known = pieces, 0, 0
        self._hedge, self._hedge_after_min_s = hedge, hedge_after_min_s
        self._identity, self._on_progress = identity, on_progress
        self._salt = secrets.token_bytes(SALT_BYTES)
        self._parts: dict[str, Part] = {}
        self.load: Counter[str] = Counter()
        """How many pieces each seller has in hand."""
        self._took_s: list[float] = []
        self._steps = self._done = self._failed = self._hedged = 0
        self._slots: anyio.Semaphore | None = None
        self._until_s = math.inf

    # ---- Steps ---------------------------------------------------------------------------------

    async def map(
        self,
        tasks: Sequence[T],
        *,
        check: Callable[[R], str | None] = lambda result: None,
        leave_s: float = 0.0,
        name: str = "",
    ) -> Covered[R]:
        """Make all ``tasks``, as many at once as the plan allows; never raises for those that fail.

        ``check`` says what is wrong with a result, which is then made again elsewhere.
        ``leave_s`` is time to be left for the steps that follow.

        :raises ValueError: if there are too many
        """
        name = await self._step(len(tasks), name)
        races = [_Race[T, R](f"{name}/{n:05}", task, check, set()) for n, task in enumerate(tasks)]
        await self._run(races, leave_s=leave_s)
        missing = {n: race.why for n, race in enumerate(races) if race.won is None}
        return Covered(tuple(race.won for race in races), missing)

    async def reduce(
        self,
        results: Sequence[R],
        join: Callable[[Sequence[R]], T],
        *,
        fan_in: int = FAN_IN_DEFAULT,
        check: Callable[[R], str | None] = lambda result: None,
        name: str = "",
    ) -> R | None:
        """Join ``results`` by work, ``fan_in`` at a time, level by level, until one is left.

        Returns None if a level could not be made whole, or there is nothing to join.

        :raises ValueError: if ``fan_in`` joins nothing
        """
        if fan_in < 2:
            raise ValueError("fan_in is at least 2: whoever joins one thing joins nothing")
        level, depth = list(results), 0
        while len(level) > 1:
            groups = [level[start : start + fan_in] for start in range(0, len(level), fan_in)]
            alone = groups.pop() if len(groups[-1]) == 1 else []
            step = f"{name}-{depth}" if name else ""
            joined = await self.map([join(group) for group in groups], check=check, name=step)
            if not joined.complete:
                return None
            level, depth = [*joined.results, *alone], depth + 1
        return level[0] if level else None

    async def best_of(
        self,
        task: T,
        n: int,
        *,
        score: Callable[[R], float],
        check: Callable[[R], str | None] = lambda result: None,
        name: str = "",
    ) -> Made[R] | None:
        """Make ``task`` ``n`` times, each elsewhere if there are so many, and return the best.

        Of equals the first one is best. None if nothing was made.
        """
        races = await self._several(task, n, check=check, name=name)
        made = [race.won for race in races if race.won is not None]
        return max(made, key=lambda each: score(each.result), default=None)

    async def vote(
        self,
        task: T,
        n: int,
        *,
        of: Callable[[R], Hashable] = lambda result: str(result).strip(),
        check: Callable[[R], str | None] = lambda result: None,
        name: str = "",
    ) -> Vote[R] | None:
        """Make ``task`` up to ``n`` times, each elsewhere if possible, and return what most said.

        ``of`` is what is compared. Ends as soon as no voice that is missing could change it. None
        if nothing was made, or if no answer has more voices than every other.
        """

        def decided(races: Sequence[_Race[T, R]]) -> bool:
            return max(_voices(races, of).values(), default=0) > n // 2

        races = await self._several(task, n, check=check, name=name, decided=decided)
        counts = _voices(races, of)
        if not counts:
            return None
        (most, voices), *others = counts.most_common()
        if others and others[0][1] == voices:
            return None
        winner = next(r.won for r in races if r.won is not None and of(r.won.result) == most)
        return Vote(winner.result, voices, sum(counts.values()))

    # ---- What it came to -----------------------------------------------------------------------

    @property
    def spent_units(self) -> int:
        """What is gone, with what may still be gone."""
        return self.pot.spent_units

    @property
    def left_s(self) -> float:
        """The time that is left."""
        return self._within_s if self._until_s == math.inf else self._until_s - anyio.current_time()

    def expect(self, pieces: int) -> None:
        """Note how many pieces will come: each gets an equal share of the money."""
        self._expected = max(self._expected, self._known + pieces)

    def receipt(self) -> Receipt:
        """Return the receipt for all that was made or may have to be paid."""
        return make_receipt(
            self.key,
            list(self._parts.values()),
            pieces=self._known,
            asset=self.worker.asset,
            salt=self._salt,
            identity=self._identity,
        )

    # ---- How ------------------------------------------------------------------------------------

    async def _step(self, count: int, name: str) -> str:
        if self._known + count > PIECES_MAX:
            raise ValueError(f"a plan has at most {PIECES_MAX} pieces")
        if self._slots is None:
            self._until_s = anyio.current_time() + self._within_s
            self._slots = anyio.Semaphore(self._at_once)
            await self.worker.begin()
        self._known += count
        self._steps += 1
        return name or f"step-{self._steps:02}"

    async def _several(
        self,
        task: T,
        n: int,
        *,
        check: Callable[[R], str | None],
        name: str,
        decided: Callable[[Sequence[_Race[T, R]]], bool] = lambda races: False,
    ) -> list[_Race[T, R]]:
        """Make one task several times, each by somebody else if there are so many."""
        name, apart = await self._step(n, name), set[str]()
        races = [_Race[T, R](f"{name}/{number:05}", task, check, apart) for number in range(n)]
        await self._run(races, decided=decided)
        return races

    async def _run(
        self,
        races: list[_Race[T, R]],
        *,
        leave_s: float = 0.0,
        decided: Callable[[Sequence[_Race[T, R]]], bool] = lambda races: False,
    ) -> None:
        """Make pieces beside each other until all are over, it is decided, or time is up."""
        try:
            async with anyio.create_task_group() as group:
                group.cancel_scope.deadline = self._until_s - leave_s

                async def run(race: _Race[T, R]) -> None:
                    await self._piece(race, leave_s)
                    self._tell(race)
                    if decided(races):
                        group.cancel_scope.cancel()

                for race in races:
                    group.start_soon(run, race)
        except BaseExceptionGroup as several:
            raise first_cause(several) from None
        for race in races:
            if not race.told:
                self._tell(race)

    def _tell(self, race: _Race[T, R]) -> None:
        race.told = True
        self._done += race.won is not None
        self._failed += race.won is None
        self._on_progress(
            Progress(
                done=self._done,
                failed=self._failed,
                pieces=max(self._known, self._expected),
                spent_units=self.spent_units,
                seller=race.won.seller if race.won is not None else "",
                hedged=self._hedged,
            )
        )

    async def _piece(self, race: _Race[T, R], leave_s: float) -> None:
        """Make one piece, by as many tries as it takes and is allowed."""
        slots = self._slots
        assert slots is not None
        async with slots:
            self._begun += 1
            race.why = "it was not there in time"
            numbers = self._numbers(race)
            async with anyio.create_task_group() as group:
                while race.won is None and not race.hopeless and numbers:
                    if race.tried:
                        await anyio.sleep(RETRY_PAUSE_S * 2 ** min(race.tried - 1, 4))
                    race.begin(numbers.pop(0), group, self._try, leave_s)
                    await self._watch(race, numbers, group, leave_s)
                group.cancel_scope.cancel()

    def _numbers(self, race: _Race[T, R]) -> list[int]:
        """Return the tries of a piece in their order, first the one that an earlier run began."""
        fresh = self._tries + 1  # One of them is for a second try beside another.
        if not self._resumed:
            return list(range(fresh))
        begun: list[int] = []
        unknown: list[int] = []
        costs: dict[int, int] = {}
        for n in range(TRIES_KNOWN_MAX):
            state, costs[n] = self.worker.earlier(self._order_key(race, n))
            if state == "made":
                begun.insert(0, n)
            elif state == "open":
                begun.append(n)
            elif state == "failed":
                self._count_lost(race, n, costs[n])
            elif not state:
                unknown.append(n)
                if len(unknown) == fresh:
                    break
        for n in begun[1:]:  # It was, or may be, paid for beside the one that is used.
            self._count_lost(race, n, costs[n])
        race.promised = {n: costs[n] for n in begun[:1]}
        return [*begun[:1], *unknown]

    def _count_lost(self, race: _Race[T, R], number: int, units: int) -> None:
        if units:
            self.pot.promised(units).spend(units)
            self._note_lost(race, number, "", "", units)

    async def _watch(
        self,
        race: _Race[T, R],
        numbers: list[int],
        group: TaskGroup,
        leave_s: float,
    ) -> None:
        """Wait for the try that runs, and begin one beside it when it takes too long."""
        slots = self._slots
        assert slots is not None
        beside = False
        while race.won is None and race.running:
            with anyio.move_on_after(WATCH_EVERY_S):
                await race.changed.wait()
            if race.won is not None or beside or not numbers or not self._is_late(race):
                continue
            try:
                slots.acquire_nowait()
            except anyio.WouldBlock:
                continue
            beside = True
            self._hedged += 1
            race.begin(numbers.pop(0), group, self._beside, leave_s)

    async def _beside(self, race: _Race[T, R], number: int, leave_s: float) -> None:
        """Try a piece that somebody has in hand already; never wait for money to do so."""
        assert self._slots is not None
        try:
            await self._try(race, number, leave_s, hedge=True)
        finally:
            self._slots.release()

    def _is_late(self, race: _Race[T, R]) -> bool:
        if not self._hedge or len(self._took_s) < HEDGE_AFTER_PIECES or not race.running:
            return False
        if race.hopeless or not any(race.running.values()):
            return False  # Nobody has it: who else should, whom the first try did not find?
        usual_s = statistics.median(self._took_s)
        patience_s = max(HEDGE_FACTOR * usual_s, self._hedge_after_min_s)
        return anyio.current_time() - race.begun_s > patience_s

    async def _try(
        self, race: _Race[T, R], number: int, leave_s: float, *, hedge: bool = False
    ) -> None:
        hand = _Hand[T, R](self, race, number, hedge=hedge)
        order = Order(
            key=self._order_key(race, number),
            piece=race.piece,
            task=race.task,
            check=race.check,
            avoid=frozenset((race.failed | set(race.running.values())) - {""}),
            busy=self._busy(race),
            left_s=self._until_s - leave_s - anyio.current_time(),
            reserve=hand.reserve,
            took=hand.took,
        )
        begun_s = anyio.current_time()
        won = False
        try:
            made = await self.worker.make(order)
            if fault := race.check(made.result):
                raise DealFailed("settled", f"the result was refused: {fault}", deal_id=made.deal)
            if race.won is None:
                self._took_s.append(anyio.current_time() - begun_s)
                race.won, won = replace(made, key=race.piece), True
                self._note(race, race.won)
        except (BudgetExhausted, PromptRefused) as error:
            race.why = str(error)
            # Other limits than the plan's have room again when what others locked comes back.
            waits = isinstance(error, BudgetExhausted) and error.limit != PLAN_LIMIT
            race.hopeless = not hedge and not waits
        except CoaseError as error:
            race.why = error.why if isinstance(error, DealFailed) else str(error)
        finally:
            hand.close()
            race.failures += race.won is None
            if not won:
                race.failed |= {hand.seller} - {""}
                if hand.cost_units:
                    self._note_lost(race, number, hand.seller, hand.deal, hand.cost_units)
            race.end(number)

    def _busy(self, race: _Race[T, R]) -> frozenset[str]:
        """Return who has enough from us, so that the others get some as well."""
        most = max(-(-self._at_once // max(self.worker.sellers, 1)), 1)
        full = {seller for seller, count in self.load.items() if count >= most}
        return frozenset(full | race.apart)

    def wanted_units(self, race: _Race[T, R]) -> int:
        """Return what a try may cost at most: its share of what is free, more if it failed."""
        free = self.pot.free_units
        if self._max_units is not None:
            return self._max_units
        if free is None:
            raise ConfigurationError("a plan that buys needs a budget, or a most for each piece")
        ahead = max(self._expected, self._known) - self._begun
        return (free // (max(ahead, 0) + 1)) << race.failures

    def _order_key(self, race: _Race[T, R], number: int) -> str:
        return f"{self.key}/{race.piece}/{number}"

    def _note(self, race: _Race[T, R], made: Made[R]) -> None:
        self._parts[race.piece] = Part(
            key=race.piece,
            seller=made.seller,
            deal=made.deal,
            task_hash=content_hash(self._salt, race.piece, race.task),
            result_hash=content_hash(self._salt, race.piece, made.result),
            price_units=made.paid_units,
        )

    def _note_lost(
        self, race: _Race[T, R], number: int, seller: str, deal: str, units: int
    ) -> None:
        key = f"{race.piece}#{number}"
        task_hash = content_hash(self._salt, key, race.task)
        self._parts[key] = Part(
            key=key, seller=seller, deal=deal, task_hash=task_hash, price_units=units, used=False
        )


class _Hand(Generic[T, R]):
    """One try's view of the plan's money and of who works for it."""

    def __init__(self, plan: Plan[T, R], race: _Race[T, R], number: int, *, hedge: bool) -> None:
        self._plan, self._race, self._number, self._hedge = plan, race, number, hedge
        self._holds: list[Hold] = []
        self.seller = self.deal = ""

    @property
    def cost_units(self) -> int:
        """What the try cost, or may have cost."""
        return sum(hold.cost_units for hold in self._holds)

    async def reserve(self) -> Hold:
        """Set aside what this try may cost."""
        pot, race = self._plan.pot, self._race
        hold: Hold | None
        if self._number in race.promised:
            hold = pot.promised(race.promised[self._number])
        elif self._hedge:
            units = self._plan.wanted_units(race)
            hold = pot.try_hold(units)
            if hold is None:
                raise BudgetExhausted(
                    limit=PLAN_LIMIT, asked_units=max(units, 1), left_units=pot.free_units or 0
                )
        else:
            hold = await pot.hold(lambda: self._plan.wanted_units(race))
        self._holds.append(hold)
        return hold

    def took(self, seller: str, deal: str) -> None:
        """Note who has the piece now; who had it before has it no more."""
        if self.seller:
            self._plan.load[self.seller] -= 1
        self._plan.load[seller] += 1
        self.seller, self.deal = seller, deal
        self._race.running[self._number] = seller
        self._race.apart.add(seller)

    def close(self) -> None:
        """Give back what is left."""
        if self.seller:
            self._plan.load[self.seller] -= 1
        for hold in self._holds:
            with hold:
                pass


def _voices(races: Sequence[_Race[T, R]], of: Callable[[R], Hashable]) -> Counter[Hashable]:
    return Counter(of(race.won.result) for race in races if race.won is not None)


def first_cause(error: BaseException) -> BaseException:
    """Return what is inside of a group of errors, however often it is wrapped."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
