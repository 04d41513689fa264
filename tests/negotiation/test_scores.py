"""Scores: they fade, they are per capability, and silence in a row means a longer rest."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coase.negotiation import scores as scores_module
from coase.negotiation.scores import (
    FAILURE_MAX_PERMILLE,
    HALF_LIFE_MS,
    HEARD_MAX,
    REST_FIRST_MS,
    REST_MAX_MS,
    WHOLE,
    Outcome,
    Scorebook,
    decayed,
)

SELLER, RIVAL = "0x" + "11" * 20, "0x" + "22" * 20
CAP, OTHER = "inference-0123abcd", "summarise-0123abcd"


def book_of(*outcomes: Outcome, step_ms: int = 0) -> Scorebook:
    book = Scorebook()
    for index, outcome in enumerate(outcomes):
        book = book.record(SELLER, CAP, outcome, now_ms=index * step_ms)
    return book


def test_a_stranger_fails_once_in_twenty_until_it_is_known() -> None:
    assert Scorebook().failure_permille(SELLER, CAP, now_ms=0) == 50
    good = book_of(*[Outcome.DELIVERED] * 9)
    assert good.failure_permille(SELLER, CAP, now_ms=0) == 5
    assert book_of(Outcome.SILENT).failure_permille(SELLER, CAP, now_ms=0) == 525
    worst = book_of(*[Outcome.DISPUTE_LOST] * 50)
    assert worst.failure_permille(SELLER, CAP, now_ms=0) == FAILURE_MAX_PERMILLE


def test_worse_outcomes_weigh_more() -> None:
    order = (
        Outcome.DELIVERED,
        Outcome.DECLINED,
        Outcome.SILENT,
        Outcome.UNDELIVERED,
        Outcome.DISPUTE_LOST,
    )
    found = [book_of(outcome).failure_permille(SELLER, CAP, now_ms=0) for outcome in order]
    assert found == sorted(set(found))


def test_a_record_is_for_one_seller_and_one_capability() -> None:
    book = book_of(Outcome.SILENT)
    assert book.failure_permille(SELLER, OTHER, now_ms=0) == 50
    assert book.failure_permille(RIVAL, CAP, now_ms=0) == 50
    assert book.rests_until_ms(SELLER, OTHER) == 0


def test_records_fade_by_half_and_then_are_gone() -> None:
    assert decayed(1_000, 0) == 1_000
    assert decayed(1_000, HALF_LIFE_MS) == 500
    assert decayed(1_000, HALF_LIFE_MS // 2) == 750
    assert decayed(1_000, 2 * HALF_LIFE_MS) == 250
    assert decayed(10**30, 1_000 * HALF_LIFE_MS) == 0
    book = book_of(Outcome.UNDELIVERED)
    later = [book.failure_permille(SELLER, CAP, now_ms=n * HALF_LIFE_MS) for n in range(12)]
    assert later == sorted(later, reverse=True)
    assert later[-1] == 50


@given(st.integers(0, 10**12), st.integers(0, 10**9), st.integers(0, 10**9))
def test_decay_never_turns_back(weight: int, age_ms: int, more_ms: int) -> None:
    assert 0 <= decayed(weight, age_ms + more_ms) <= decayed(weight, age_ms) <= weight


def test_each_silence_in_a_row_doubles_the_rest_and_an_answer_ends_it() -> None:
    rests = []
    book = Scorebook()
    for _ in range(20):
        book = book.record(SELLER, CAP, Outcome.SILENT, now_ms=0)
        rests.append(book.rests_until_ms(SELLER, CAP))
    assert rests[:3] == [REST_FIRST_MS, 2 * REST_FIRST_MS, 4 * REST_FIRST_MS]
    assert rests[-1] == REST_MAX_MS
    answered = book.record(SELLER, CAP, Outcome.DECLINED, now_ms=0)
    assert answered.rests_until_ms(SELLER, CAP) == 0
    again = answered.record(SELLER, CAP, Outcome.SILENT, now_ms=0)
    assert again.rests_until_ms(SELLER, CAP) == REST_FIRST_MS


def test_a_book_is_a_value_and_survives_being_written_down() -> None:
    empty = Scorebook()
    book = empty.record(SELLER, CAP, Outcome.SILENT, now_ms=7)
    assert empty.rows() == ()
    assert Scorebook.of(book.rows()).rows() == book.rows()
    assert Scorebook.of(book.rows()).rests_until_ms(SELLER, CAP) == 7 + REST_FIRST_MS


def test_a_clock_that_is_set_back_changes_nothing() -> None:
    book = Scorebook().record(SELLER, CAP, Outcome.SILENT, now_ms=10 * HALF_LIFE_MS)
    assert book.failure_permille(SELLER, CAP, now_ms=0) == 525
    back = book.record(SELLER, CAP, Outcome.SILENT, now_ms=0)
    assert back.rows()[0].at_ms == 10 * HALF_LIFE_MS
    assert back.rows()[0].bad == 2 * WHOLE


def test_a_flood_of_sellers_pushes_out_the_oldest_records_only(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(scores_module, "RECORDS_MAX", 3)
    book = Scorebook()
    for index in range(5):
        book = book.record(f"0x{index:040x}", CAP, Outcome.DECLINED, now_ms=index)
    assert [row.at_ms for row in book.rows()] == [2, 3, 4]


def test_what_others_say_tells_strangers_apart_and_weighs_less_than_one_job() -> None:
    stranger = Scorebook().failure_permille(SELLER, CAP, now_ms=0)
    praised = Scorebook().hear(SELLER, good=10 * WHOLE, bad=0)
    blamed = Scorebook().hear(SELLER, good=0, bad=10 * WHOLE)
    assert praised.heard(SELLER) == (HEARD_MAX, 0)
    told = [one.failure_permille(SELLER, CAP, now_ms=0) for one in (praised, blamed)]
    assert told[0] < stranger < told[1]
    # One job of our own says more than all of them, in both directions.
    own = Scorebook().record(SELLER, CAP, Outcome.DELIVERED, now_ms=0)
    assert own.failure_permille(SELLER, CAP, now_ms=0) < told[0]
    bad = Scorebook().record(SELLER, CAP, Outcome.UNDELIVERED, now_ms=0)
    assert bad.failure_permille(SELLER, CAP, now_ms=0) > told[1]
    # It is replaced and not added to, outlives our own records, and is gone when nothing is said.
    twice = blamed.hear(SELLER, good=0, bad=10 * WHOLE).record(
        SELLER, CAP, Outcome.DELIVERED, now_ms=0
    )
    assert twice.heard(SELLER) == (0, HEARD_MAX)
    assert twice.hear(SELLER, good=0, bad=0).heard(SELLER) == (0, 0)
