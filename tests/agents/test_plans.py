"""Plans over workers that fail, stall, ask too much and answer twice."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

from coase.agents.plans import Made, Order, Plan, Progress, Worker
from coase.agents.pot import Pot
from coase.protocol.errors import BookOutOfBalance, BudgetExhausted, ComputeFailed, DealFailed
from tests.agents.jumping import jumping_backend

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]


@pytest.fixture(scope="module")
def anyio_backend() -> Any:
    return jumping_backend()


class Shop(Worker[str, str]):
    """Sells the task in capitals, at a price, by whoever is not avoided."""

    def __init__(self, *names: str, price: int = 10, paid: int | None = None) -> None:
        self.names, self.price, self.paid = names or ("anna",), price, paid
        self.asked: list[Order[str]] = []
        self.inside = self.inside_max = self.deals = 0
        self.taken = Counter[str]()
        self.spent = self.risked = 0
        self.does: Callable[[Order[str], str], Awaitable[str]] = _shout

    @property
    def sellers(self) -> int:
        return len(self.names)

    @property
    def asset(self) -> str:
        return "test"

    async def make(self, order: Order[str]) -> Made[str]:
        self.asked.append(order)
        with await order.reserve() as hold:
            if hold.units < self.price:
                raise DealFailed("lapsed", "no offer was acceptable")
            willing = [n for n in self.names if n not in order.avoid | order.busy]
            willing = willing or [n for n in self.names if n not in order.avoid]
            if not willing:
                raise DealFailed("lapsed", "nobody made an offer")
            seller, self.deals = min(willing, key=lambda n: self.taken[n]), self.deals + 1
            deal = f"deal{self.deals}"
            hold.bind(self.price)
            order.took(seller, deal)
            self.taken[seller] += 1
            self.inside += 1
            self.inside_max = max(self.inside, self.inside_max)
            self.risked += self.price
            try:
                text = await self.does(order, seller)
            except DealFailed as error:
                if error.state == "refunded":
                    hold.spend(0)
                    self.risked -= self.price
                raise
            finally:
                self.inside -= 1
            paid = self.price if self.paid is None else self.paid
            self.risked -= self.price - paid
            hold.spend(paid)
            return Made(result=text, seller=seller, deal=deal, paid_units=paid)


async def _shout(order: Order[str], seller: str) -> str:
    await anyio.lowlevel.checkpoint()
    return order.task.upper()


def plan_of(shop: Worker[str, str], **options: Any) -> Plan[str, str]:
    return Plan(shop, **({"budget_units": 1_000, "within_s": 50} | options))


LETTERS = list("abcdefghij")


async def test_a_map_keeps_the_order_and_pays_each_piece_once() -> None:
    shop, heard = Shop("anna", "bert"), list[Progress]()
    plan = plan_of(shop, at_once=3, on_progress=heard.append)
    covered = await plan.map(LETTERS)
    assert covered.results == [letter.upper() for letter in LETTERS]
    assert covered.complete
    assert str(covered) == "10 of 10"
    assert plan.spent_units == 100 == shop.risked
    assert shop.inside_max <= 3
    assert [progress.done for progress in heard] == list(range(1, 11))
    receipt = plan.receipt()
    assert receipt.total_units == 100
    receipt.check(
        tasks={part.key: letter for part, letter in zip(receipt.parts, LETTERS, strict=True)},
        results={part.key: part.key and LETTERS[n].upper() for n, part in enumerate(receipt.parts)},
    )


async def test_the_work_is_spread_over_all_sellers() -> None:
    shop, gate = Shop("anna", "bert", "cleo"), anyio.Event()

    async def wait(order: Order[str], seller: str) -> str:
        if shop.inside == 6:
            gate.set()
        await gate.wait()
        return order.task

    shop.does = wait
    shop.taken.update({"bert": 100, "cleo": 200})  # Who would always be asked is anna.
    plan = plan_of(shop, at_once=6)
    assert (await plan.map(LETTERS[:6])).complete
    assert shop.taken - Counter({"bert": 100, "cleo": 200}) == {"anna": 2, "bert": 2, "cleo": 2}


async def test_a_budget_too_small_makes_what_it_can_and_says_what_is_missing() -> None:
    shop = Shop("anna", price=10)
    plan = plan_of(shop, budget_units=47)
    covered = await plan.map(LETTERS)
    assert len(covered.results) == 4
    assert len(covered.missing) == 6
    assert all(covered.missing.values())
    assert plan.spent_units == 40
    assert plan.receipt().pieces == 10
    assert len(plan.receipt().parts) == 4


async def test_what_is_given_back_makes_further_pieces() -> None:
    shop = Shop("anna", price=10, paid=4)
    covered = await plan_of(shop, budget_units=46, max_units=10).map(LETTERS)
    assert covered.complete
    assert shop.risked == 40


async def test_many_pieces_at_once_never_overspend_by_a_unit() -> None:
    chance = random.Random(7)
    for budget in (0, 1, 9, 10, 55, 173):
        shop = Shop("anna", "bert", "cleo", price=10)

        async def mostly(order: Order[str], seller: str) -> str:
            await anyio.sleep(chance.random())
            match chance.randrange(4):
                case 0:
                    raise DealFailed("refunded", "no delivery", deal_id="x")
                case 1:
                    raise DealFailed("disputed", "the result was refused", deal_id="x")
            return order.task

        shop.does = mostly
        plan = plan_of(shop, budget_units=budget, at_once=20)
        await plan.map([str(number) for number in range(30)])
        assert shop.risked == plan.spent_units == plan.receipt().total_units
        assert plan.spent_units <= budget
        assert plan.pot.held_units == 0
        plan.receipt().check()


async def test_a_piece_that_fails_is_made_by_another_seller() -> None:
    shop = Shop("anna", "bert")

    async def anna_fails(order: Order[str], seller: str) -> str:
        if seller == "anna":
            raise DealFailed("refunded", "the price came back", deal_id="x")
        return order.task

    shop.does = anna_fails
    plan = plan_of(shop)
    covered = await plan.map(["a"])
    assert [made.seller for made in covered.made if made is not None] == ["bert"]
    assert plan.spent_units == 10


async def test_a_bad_result_is_made_again_and_its_price_is_not_forgotten() -> None:
    shop = Shop("anna", "bert")

    async def bad(order: Order[str], seller: str) -> str:
        text = "rubbish" if seller == "anna" else "fine"
        assert (order.check(text) is None) == (text == "fine")
        return text

    shop.does = bad
    plan = plan_of(shop)
    covered = await plan.map(["a"], check=lambda text: None if text == "fine" else "rubbish")
    assert covered.results == ["fine"]
    assert plan.spent_units == 20
    used = {part.seller: part.used for part in plan.receipt().parts}
    assert used == {"anna": False, "bert": True}


async def test_tries_end() -> None:
    shop = Shop("anna")

    async def never(order: Order[str], seller: str) -> str:
        raise ComputeFailed("out of order")

    shop.does = never
    covered = await plan_of(shop, tries=1, budget_units=1_000).map(["a"])
    assert covered.missing == {0: "nobody made an offer"}
    assert shop.deals == 1  # The second try is asked of others, and there are none.


async def test_a_straggler_is_overtaken_and_both_are_accounted_for() -> None:
    shop, slow = Shop("anna", "bert"), anyio.Event()

    async def first_is_slow(order: Order[str], seller: str) -> str:
        if order.task == "e" and order.key.endswith("/0"):
            slow.set()
            await anyio.sleep_forever()
        elif order.task == "e":
            assert slow.is_set()
        return order.task

    shop.does = first_is_slow
    plan = plan_of(shop, at_once=4)
    covered = await plan.map(list("abcde"))
    assert covered.complete
    assert plan.spent_units == 60
    last = covered.made[-1]
    assert last is not None
    lost = [part for part in plan.receipt().parts if not part.used]
    assert [part.price_units for part in lost] == [10]
    assert {last.seller, lost[0].seller} == {"anna", "bert"}


async def test_nothing_is_hedged_without_money_for_it() -> None:
    shop = Shop("anna", "bert")

    async def slow(order: Order[str], seller: str) -> str:
        if order.task == "e":
            await anyio.sleep(9)
        return order.task

    shop.does = slow
    plan = plan_of(shop, budget_units=50)
    assert (await plan.map(list("abcde"))).complete
    assert shop.deals == 5


async def test_at_the_deadline_there_is_what_was_made() -> None:
    shop = Shop("anna", "bert")

    async def some_never(order: Order[str], seller: str) -> str:
        if order.task in "ce":
            await anyio.sleep_forever()
        return order.task

    shop.does = some_never
    plan = plan_of(shop, within_s=20, hedge=False)
    covered = await plan.map(list("abcdef"))
    assert covered.results == list("abdf")
    assert sorted(covered.missing) == [2, 4]
    assert plan.spent_units == 60  # They may yet deliver, and will be paid if they do.
    assert sum(not part.used for part in plan.receipt().parts) == 2
    assert (await plan.map(["late"])).missing == {0: "there was no time left"}


async def test_a_defect_of_a_worker_is_no_missing_piece() -> None:
    shop = Shop()

    async def broken(order: Order[str], seller: str) -> str:
        raise KeyError("a defect")

    shop.does = broken
    with pytest.raises(KeyError, match="a defect"):
        await plan_of(shop).map(["a", "b"])


async def test_a_reduce_joins_level_by_level() -> None:
    shop = Shop()
    plan = plan_of(shop, pieces=14)
    notes = await plan.map(LETTERS)
    whole = await plan.reduce(notes.results, "".join, fan_in=3)
    assert whole == "ABCDEFGHIJ"
    assert len(shop.asked) == 10 + 3 + 2  # 10 -> 4, one of them alone; 4 -> 2, one alone; 2 -> 1
    assert await plan.reduce([], "".join) is None
    with pytest.raises(ValueError, match="joins nothing"):
        await plan.reduce(["a"], "".join, fan_in=1)


async def test_a_reduce_that_cannot_be_made_whole_is_none() -> None:
    plan = plan_of(Shop(price=10), budget_units=105)
    notes = await plan.map(LETTERS)
    assert notes.complete
    assert await plan.reduce(notes.results, "".join) is None


async def test_the_best_of_several_comes_from_several_sellers() -> None:
    shop = Shop("anna", "bert", "cleo")

    async def name(order: Order[str], seller: str) -> str:
        return seller

    shop.does = name
    best = await plan_of(shop).best_of("who?", 3, score=lambda text: text == "bert")
    assert best is not None
    assert best.result == "bert"
    assert set(shop.taken) == {"anna", "bert", "cleo"}
    nobody = Shop(price=10)
    assert await plan_of(nobody, budget_units=3).best_of("who?", 2, score=len) is None


async def test_a_vote_counts_what_most_say_and_ends_when_it_is_decided() -> None:
    shop = Shop("anna", "bert", "cleo", "dora", "emil")
    says = {"anna": "yes", "bert": "Yes ", "cleo": "yes", "dora": "no", "emil": ""}

    async def say(order: Order[str], seller: str) -> str:
        if seller == "emil":
            await anyio.sleep_forever()
        return says[seller]

    shop.does = say
    vote = await plan_of(shop).vote("true?", 5, of=lambda text: text.strip().lower())
    assert vote is not None
    assert (vote.result.strip().lower(), vote.voices) == ("yes", 3)


async def test_a_draw_is_no_vote() -> None:
    shop = Shop("anna", "bert")

    async def name(order: Order[str], seller: str) -> str:
        return seller

    shop.does = name
    assert await plan_of(shop).vote("who?", 2) is None


async def test_a_plan_with_a_key_takes_up_what_it_began() -> None:
    class Remembering(Shop):
        def earlier(self, key: str) -> tuple[str, int]:
            return known.get(key, ("", 0))

    known = {
        "p/step-01/00000/0": ("failed", 7),
        "p/step-01/00000/2": ("made", 10),
        "p/step-01/00001/0": ("made", 10),
        "p/step-01/00001/1": ("open", 9),
        **{f"p/step-01/00002/{n}": ("nobody", 0) for n in range(7)},
    }
    shop = Remembering(price=10)
    plan = plan_of(shop, key="p", budget_units=46)
    covered = await plan.map(["a", "b", "c"])
    assert covered.complete
    assert {order.piece[-1]: order.key for order in shop.asked} == {
        "0": "p/step-01/00000/2",
        "1": "p/step-01/00001/0",
        "2": "p/step-01/00002/7",
    }
    # What was lost then is lost now: 7 for nothing, 9 that may still be paid, and three pieces.
    assert plan.spent_units == 46
    assert plan.receipt().total_units == 46


async def test_a_purse_that_is_full_for_a_moment_is_waited_for() -> None:
    shop = Shop(price=10)

    async def sometimes(order: Order[str], seller: str) -> str:
        if len(shop.asked) == 1:
            raise BudgetExhausted(limit="per hour", asked_units=10, left_units=0)
        return order.task

    shop.does = sometimes
    assert (await plan_of(shop).map(["a"])).complete is False  # Its one seller has failed it.
    shop.names = ("anna", "bert")
    shop.asked.clear()
    assert (await plan_of(shop).map(["a"])).complete


async def test_whoever_had_a_piece_before_has_it_no_more() -> None:
    class Passing(Shop):
        async def make(self, order: Order[str]) -> Made[str]:
            order.took("engine", "")
            return await super().make(order)

    plan = plan_of(Passing())
    assert (await plan.map(["a", "b"])).complete
    assert set(plan.load.values()) == {0}


async def test_limits_that_are_none() -> None:
    for wrong in ({"at_once": 0}, {"tries": 0}, {"within_s": 0}, {"budget_units": -1}):
        with pytest.raises(ValueError, match=r"at_once|debt"):
            plan_of(Shop(), **wrong)
    with pytest.raises(ValueError, match="at most"):
        await plan_of(Shop()).map(["x"] * 10_001)


# ---- The pot -----------------------------------------------------------------------------------


async def test_a_pot_waits_for_what_comes_back_and_no_longer() -> None:
    pot = Pot(10)
    first, order = pot.try_hold(8), list[str]()
    assert first is not None
    assert pot.try_hold(3) is None

    async def second() -> None:
        with await pot.hold(lambda: 5) as hold:
            order.append(f"got {hold.units}")
            hold.spend(5)

    async with anyio.create_task_group() as group:
        group.start_soon(second)
        await anyio.wait_all_tasks_blocked()
        assert order == []
        first.bind(6)
        await anyio.wait_all_tasks_blocked()
        assert order == []
        first.spend(2)
    assert order == ["got 5"]
    assert (pot.spent_units, pot.free_units) == (7, 3)
    with await pot.hold(lambda: 5) as rest:
        assert rest.units == 3
        rest.spend(3)
    with pytest.raises(BudgetExhausted):
        await pot.hold(lambda: 1)


async def test_a_hold_that_ends_without_a_word_is_free_unless_a_deal_bound_it() -> None:
    pot = Pot(10)
    with await pot.hold(lambda: 4):
        pass
    assert pot.spent_units == 0
    with await pot.hold(lambda: 4) as hold:
        hold.bind(3)
    assert pot.spent_units == hold.cost_units == 3


async def test_more_than_was_held_is_a_defect_that_is_not_hidden() -> None:
    pot = Pot(10)
    with pytest.raises(BookOutOfBalance), await pot.hold(lambda: 4) as hold:
        hold.spend(5)
    assert pot.spent_units == 5
