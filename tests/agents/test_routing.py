"""Make or buy, and from whom: what the decision rests on, and that it is the one it claims."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest

from coase.agents.compute.routing import (
    HEARD_MAX_MS,
    HERE,
    NEAR_PERMILLE,
    RouteBook,
    Wish,
)
from coase.agents.compute.ways import COOL_FIRST_MS, HALF_LIFE_MS, Listing, Place, Size

SIZE = Size(200, 100)
MODEL = "m"


def listing(seller: str, **more: Any) -> Listing:
    given: dict[str, Any] = {
        "place": Place.MARKET,
        "model": MODEL,
        "input_units": 1_000_000,
        "output_units": 4_000_000,
        "first_us": 200_000,
        "token_us": 20_000,
        **more,
    }
    return Listing(seller=seller, **given)


def book_of(*listings: Listing) -> RouteBook:
    book = RouteBook()
    for each in listings:
        book.learn(each, now_ms=0)
    return book


def first(book: RouteBook, wish: Wish | None = None, *, now_ms: int = 0, chance: int = 1) -> str:
    ranking = book.decide(wish or Wish(), SIZE, now_ms=now_ms, chance=chance).ranking
    return ranking[0].seller if ranking else ""


def why_not(book: RouteBook, wish: Wish) -> dict[str, int]:
    decision = book.decide(wish, SIZE, now_ms=0, chance=1)
    assert decision.ranking == ()
    assert decision.why_none().startswith(f"of {len(book)} known none")
    return dict(decision.refused)


def answered(book: RouteBook, seller: str, *, first_ms: int, token_ms: int, now_ms: int) -> None:
    took_us = first_ms * 1_000 + (SIZE.output - 1) * token_ms * 1_000
    book.delivered(seller, MODEL, SIZE, first_us=first_ms * 1_000, took_us=took_us, now_ms=now_ms)


# ---- What counts -----------------------------------------------------------------------------


def test_what_a_second_is_worth_decides_between_quick_and_cheap() -> None:
    book = book_of(
        listing("cheap", output_units=1_000_000, token_us=100_000),
        listing("quick", output_units=9_000_000, token_us=5_000),
    )
    assert first(book, Wish(second_units=1)) == "cheap"
    assert first(book, Wish(second_units=1_000)) == "quick"


def test_made_here_until_the_queue_costs_more_than_buying() -> None:
    here = listing(HERE, place=Place.HERE, input_units=0, output_units=0, token_us=20_000, slots=1)
    book = book_of(here, listing("seller", token_us=20_000))
    wish = Wish(second_units=200)
    assert first(book, wish) == HERE
    for _ in range(6):
        book.began(HERE, MODEL, now_ms=0)
    assert first(book, wish) == "seller"
    for _ in range(6):
        book.left(HERE, MODEL, now_ms=0)
    assert first(book, wish) == HERE


def test_the_firm_costs_nothing_and_is_left_when_it_is_too_slow() -> None:
    free = {"input_units": 0, "output_units": 0}
    book = book_of(listing("ours", place=Place.FIRM, token_us=60_000, **free), listing("theirs"))
    assert first(book, Wish(second_units=10)) == "ours"
    assert first(book, Wish(second_units=10, deadline_ms=4_000)) == "theirs"
    assert first(book, Wish(second_units=10, deadline_ms=4_000, reach=Place.FIRM)) == ""


def test_what_was_seen_counts_more_than_what_is_said() -> None:
    book = book_of(listing("boasts", token_us=1_000), listing("plain", token_us=20_000))
    wish = Wish(second_units=500)
    assert first(book, wish) == "boasts"
    answered(book, "boasts", first_ms=3_000, token_ms=90, now_ms=10)
    assert first(book, wish, now_ms=10) == "plain"


def test_what_is_asked_counts_more_than_the_list() -> None:
    book = book_of(listing("lures", output_units=2_000_000), listing("plain"))
    assert first(book) == "lures"
    for _ in range(8):
        book.offered("lures", MODEL, 2_000, SIZE, now_ms=1)
    assert first(book, now_ms=1) == "plain"


def test_a_spread_of_offers_is_a_price() -> None:
    book = book_of(listing("steady"), listing("moody"))
    listed = (SIZE.input * 1_000_000 + SIZE.output * 4_000_000) // 1_000_000
    for n in range(12):
        book.offered("steady", MODEL, listed, SIZE, now_ms=n)
        book.offered("moody", MODEL, listed * (5 + 10 * (n % 2)) // 10, SIZE, now_ms=n)
    steady, moody = book.way("steady", MODEL), book.way("moody", MODEL)
    assert steady is not None
    assert moody is not None
    assert moody.price_millionths(SIZE) > steady.price_millionths(SIZE) * 11 // 10


def test_cached_input_costs_its_own_rate() -> None:
    way = book_of(listing("a", cached_units=100_000)).way("a", MODEL)
    assert way is not None
    assert way.price_millionths(Size(0, 0, 1_000)) == 100_000_000
    assert way.price_millionths(Size(1_000, 0)) == 1_000_000_000


def test_distance_counts() -> None:
    book = book_of(listing("far"), listing("near"))
    book.measured("far", 900_000, now_ms=0)
    book.measured("near", 1_000, now_ms=0)
    wish = Wish(second_units=2_000)
    assert {first(book, wish, chance=n) for n in range(20)} == {"near"}


def test_failures_and_bad_answers_cost_what_they_cost() -> None:
    book = book_of(listing("fails", output_units=2_000_000), listing("plain"))
    for n in range(4):
        book.failed("fails", MODEL, lost_us=4_000_000, now_ms=n)
    later_ms = book.cools_until_ms("fails") + 1
    assert first(book, Wish(second_units=100), now_ms=later_ms) == "plain"
    book = book_of(listing("bad", output_units=2_000_000), listing("plain"))
    assert first(book) == "bad"
    for n in range(4):
        book.checked("bad", MODEL, good=False, now_ms=n)
    assert first(book, now_ms=4) == "plain"


def test_old_failures_fade() -> None:
    book = book_of(listing("a"))
    for n in range(4):
        book.failed("a", MODEL, lost_us=1, now_ms=n)
    way = book.way("a", MODEL)
    assert way is not None
    assert way.failure_ppm(4) > 500_000
    assert way.failure_ppm(20 * HALF_LIFE_MS) == 50_000


# ---- What must not be ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "why"),
    [
        (Wish(reach=Place.HERE), "outside of the data policy"),
        (Wish(reach=Place.FIRM), "outside of the data policy"),
        (Wish(banned=frozenset({"a"})), "banned"),
        (Wish(sellers=frozenset({"b"})), "not among the sellers allowed"),
        (Wish(quantisations=frozenset({"Q8_0"})), "another quantisation"),
        (Wish(regions=frozenset({"eu"})), "another region"),
        (Wish(needs=frozenset({"tools"})), "not able to do what the prompt needs"),
        (Wish(models=("other",)), "another model"),
        (Wish(most_units=599), "too dear"),
        (Wish(most_units=0), "too dear"),
        (Wish(deadline_ms=2_000), "expected too late"),
    ],
)
def test_who_must_not_be_taken_is_not(wish: Wish, why: str) -> None:
    able = ("completion", "vision")
    book = book_of(listing("a", quantisation="Q4_0", region="us", abilities=able))
    assert why_not(book, wish) == {why: 1}
    fits = Wish(most_units=600, deadline_ms=4_000, needs=frozenset({"vision"}))
    assert first(book, fits) == "a"


def test_a_prompt_that_is_too_long_goes_nowhere_but_where_that_is_not_known() -> None:
    book = book_of(listing("small", context_tokens=SIZE.input - 1), listing("untold"))
    assert first(book) == "untold"
    book.drop("untold")
    assert why_not(book, Wish()) == {"of too small a context": 1}


def test_a_policy_holds_whatever_it_costs_and_whoever_else_fails() -> None:
    """No sequence of events brings a seller into a ranking that the wish excludes."""
    chance = random.Random(5)
    book = book_of(*(listing(f"s{n}", output_units=n + 1) for n in range(40)))
    allowed = frozenset({"s30", "s31", "s32"})
    for now_ms in range(400):
        seller = f"s{chance.randrange(40)}"
        chance.choice(
            (
                lambda s=seller, t=now_ms: book.failed(s, MODEL, lost_us=5, now_ms=t),
                lambda s=seller, t=now_ms: book.loaded(s, chance.randrange(9), now_ms=t),
                lambda s=seller, t=now_ms: answered(book, s, first_ms=5, token_ms=1, now_ms=t),
                lambda s=seller, t=now_ms: book.learn(listing(s, region="x"), now_ms=t),
                lambda s=seller: book.drop(s),
            )
        )()
        wish = Wish(sellers=allowed, banned=frozenset({"s31"}))
        decision = book.decide(wish, SIZE, now_ms=now_ms, chance=chance.getrandbits(64))
        assert {choice.seller for choice in decision.ranking} <= {"s30", "s32"}
        assert set(decision.asked) <= {"s30", "s32"}


def test_who_failed_cools_down_twice_as_long_each_time_until_it_delivers() -> None:
    book, waits, now_ms = book_of(listing("a"), listing("b", output_units=10**9)), [], 0
    for _ in range(3):
        book.failed("a", MODEL, lost_us=1, now_ms=now_ms)
        until_ms = book.cools_until_ms("a")
        waits.append(until_ms - now_ms)
        assert first(book, now_ms=until_ms - 1) == "b"
        assert first(book, now_ms=until_ms) == "a"
        now_ms = until_ms
    assert waits == [COOL_FIRST_MS, 2 * COOL_FIRST_MS, 4 * COOL_FIRST_MS]
    answered(book, "a", first_ms=5, token_ms=1, now_ms=now_ms)
    book.failed("a", MODEL, lost_us=1, now_ms=now_ms)
    assert book.cools_until_ms("a") - now_ms == COOL_FIRST_MS


def test_who_cools_down_is_better_than_nobody() -> None:
    book = book_of(listing("a"))
    book.failed("a", MODEL, lost_us=1, now_ms=0)
    (choice,) = book.decide(Wish(), SIZE, now_ms=1, chance=1).ranking
    assert (choice.seller, choice.why.partition(",")[0]) == ("a", "cooling down after a failure")


def test_who_was_not_heard_of_for_long_is_left_until_it_is_heard_again() -> None:
    book = book_of(listing("a"))
    later_ms = HEARD_MAX_MS + 1
    assert first(book, now_ms=HEARD_MAX_MS) == "a"
    assert first(book, now_ms=later_ms) == ""
    book.learn(listing("a"), now_ms=later_ms)
    assert first(book, now_ms=later_ms) == "a"


def test_the_longest_answer_must_be_within_the_highest_price() -> None:
    book = book_of(listing("a"))
    wish, long = Wish(most_units=1_000), Size(200, 100, output_max=250)
    assert book.decide(wish, SIZE, now_ms=0, chance=1).ranking
    assert not book.decide(wish, long, now_ms=0, chance=1).ranking


def test_a_better_one_far_down_the_list_is_found_when_all_before_it_are_excluded() -> None:
    book = book_of(*(listing(f"s{n:03}", output_units=1_000_000 + n) for n in range(300)))
    for n in range(299):
        book.failed(f"s{n:03}", MODEL, lost_us=1, now_ms=0)
    assert first(book, now_ms=1) == "s299"


# ---- Models ----------------------------------------------------------------------------------


def test_models_are_tried_in_the_order_of_the_wish() -> None:
    book = book_of(
        listing("a", model="dear", output_units=90_000_000),
        listing("b", model="cheap", output_units=1),
    )
    wish = Wish(models=("dear", "missing", "cheap"))
    ranking = book.decide(wish, SIZE, now_ms=0, chance=1).ranking
    assert [(choice.model, choice.seller) for choice in ranking] == [("dear", "a"), ("cheap", "b")]
    book.failed("a", "dear", lost_us=1, now_ms=0)
    assert first(book, wish, now_ms=1) == "b"


# ---- Herds, newcomers and hedges -------------------------------------------------------------


def known(count: int) -> RouteBook:
    """Return a book with so many sellers, all alike and all seen."""
    book = book_of(*(listing(f"s{n}") for n in range(count)))
    for n in range(count):
        for now_ms in range(4):
            answered(book, f"s{n}", first_ms=300, token_ms=20, now_ms=now_ms)
    return book


def test_equals_share_the_calls() -> None:
    book, chance, taken = known(8), random.Random(3), dict[str, int]()
    for _ in range(800):
        seller = first(book, Wish(second_units=100), now_ms=5, chance=chance.getrandbits(64))
        taken[seller] = taken.get(seller, 0) + 1
    assert len(taken) == 8
    assert max(taken.values()) < 800 // 2


def test_only_those_as_good_as_the_best_are_drawn_and_asked() -> None:
    book = known(6)
    for _ in range(10):
        book.offered("s5", MODEL, 6_000, SIZE, now_ms=5)
    for chance in range(100):
        decision = book.decide(Wish(), SIZE, now_ms=5, chance=chance)
        totals = [choice.total_units for choice in decision.ranking]
        assert decision.ranking[0].total_units * 1_000 <= min(totals) * (NEAR_PERMILLE + 5)
        assert "s5" not in decision.asked


def test_newcomers_are_tried_now_and_then() -> None:
    book = known(3)
    book.learn(listing("new", output_units=9_000_000), now_ms=5)
    taken = [first(book, now_ms=5, chance=chance) for chance in range(1_000)]
    assert 5 <= taken.count("new") <= 100


def test_a_second_request_is_due_only_where_there_is_somebody_else() -> None:
    one, two = book_of(listing("a")), book_of(listing("a"), listing("b"))
    assert one.decide(Wish(), SIZE, now_ms=0, chance=1).hedge_after_ms == 0
    decision = two.decide(Wish(), SIZE, now_ms=0, chance=1)
    assert decision.hedge_after_ms > 2 * decision.ranking[0].first_ms


# ---- The same again --------------------------------------------------------------------------


def random_book(chance: random.Random, *, count: int = 120) -> RouteBook:
    book = RouteBook()
    for n in range(count):
        book.learn(
            listing(
                f"s{n}",
                place=chance.choice(list(Place)),
                output_units=chance.randrange(9_000_000),
                token_us=chance.randrange(5_000, 60_000),
                slots=chance.randrange(1, 5),
            ),
            now_ms=0,
        )
    for now_ms in range(3 * count):
        seller = f"s{chance.randrange(count)}"
        match chance.randrange(4):
            case 0:
                book.loaded(seller, chance.randrange(12), now_ms=now_ms)
            case 1:
                answered(book, seller, first_ms=chance.randrange(2_000), token_ms=9, now_ms=now_ms)
            case 2:
                book.failed(seller, MODEL, lost_us=chance.randrange(9_000_000), now_ms=now_ms)
            case _:
                book.checked(seller, MODEL, good=chance.random() < 0.5, now_ms=now_ms)
        if now_ms % 7 == 0:  # So that there is something sorted out to be kept up to date.
            book.decide(Wish(second_units=50), SIZE, now_ms=now_ms, chance=now_ms)
    return book


@pytest.mark.parametrize("seed", range(5))
def test_the_quick_look_finds_what_weighing_each_one_finds(seed: int) -> None:
    chance = random.Random(seed)
    book = random_book(chance)
    wish, now_ms = Wish(second_units=50, models=(MODEL,)), 10_000
    quick = book.decide(wish, SIZE, now_ms=now_ms, chance=7).ranking
    totals = []
    for way in book:
        alone = Wish(second_units=50, sellers=frozenset({way.listing.seller}))
        ranking = book.decide(alone, SIZE, now_ms=now_ms, chance=7).ranking
        totals += [choice.total_units for choice in ranking]
    # Rounding a line to whole millionths for each token may swap equals, and nothing more.
    best = min(totals)
    assert min(choice.total_units for choice in quick) <= best + best // 100 + 1


@pytest.mark.parametrize("seed", range(3))
def test_saved_and_restored_it_decides_the_same(seed: int) -> None:
    book = random_book(random.Random(seed))
    other = RouteBook()
    saved = json.loads(json.dumps(book.saved()))
    now_ms = 100_000  # Queues are not kept: by then none is left.
    assert other.restore(saved, now_ms=now_ms) == len(book)
    wish = Wish(second_units=50)
    for chance in range(len(book)):  # Until every way was brought up to date, a few at a time.
        book.decide(wish, SIZE, now_ms=now_ms, chance=chance)
    for chance in range(20):
        ours, theirs = (
            each.decide(wish, Size(20 * chance, 40), now_ms=now_ms, chance=chance)
            for each in (book, other)
        )
        assert ours == theirs
    assert other.saved() == book.saved()


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"ways": 5, "cool": [], "strikes": {"a": "b"}},
        {"ways": [{}, 7, {"listing": {"seller": "a"}}, {"listing": None}]},
    ],
)
def test_what_cannot_be_read_is_left(document: dict[str, Any]) -> None:
    book = RouteBook()
    assert book.restore(document, now_ms=5) == 0
    assert first(book) == ""


def test_a_row_with_a_foreign_number_is_left() -> None:
    book = book_of(listing("a"), listing("b"))
    saved = book.saved()
    saved["ways"][0]["token_us"] = -1
    saved["ways"][1]["good"] = "many"
    assert RouteBook().restore(saved, now_ms=5) == 0


def test_a_listing_that_changes_keeps_what_was_seen() -> None:
    book = book_of(listing("a"))
    answered(book, "a", first_ms=300, token_ms=9, now_ms=1)
    assert first(book, Wish(regions=frozenset({"eu"}))) == ""
    way = book.learn(replace(listing("a"), region="eu"), now_ms=2)
    assert way.seen == 1
    assert first(book, Wish(regions=frozenset({"eu"})), now_ms=2) == "a"
    book.drop("a")
    assert len(book) == 0
    assert first(book) == ""
