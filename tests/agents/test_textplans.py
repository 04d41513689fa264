"""Ready plans: what is cut, what is joined, and what is said when something is missing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.ports import Prompt
from coase.agents.plans import Made, Order, Plan, Worker
from coase.agents.textplans import (
    CHUNK_MIN_CHARS,
    chunks_of,
    classify,
    label_in,
    pieces_in,
    require_labels,
    summarise,
)
from coase.agents.workers import EngineWorker
from coase.protocol.errors import ComputeFailed
from tests.agents.jumping import jumping_backend

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.timeout(60)]

PARAGRAPH = "A sentence about sheep. Another one about wool, which is longer. A third.\n\n"
TEXT = PARAGRAPH * 40


@pytest.fixture(scope="module")
def anyio_backend() -> Any:
    return jumping_backend()


class Writer(Worker[Prompt, str]):
    """Writes what a function says about the question."""

    def __init__(self, answer: Callable[[str], str], *, price: int = 0) -> None:
        self.answer, self.price, self.asked = answer, price, list[str]()

    async def make(self, order: Order[Prompt]) -> Made[str]:
        question = order.task.messages[-1].content
        self.asked.append(question)
        if self.price:
            with await order.reserve() as hold:
                if hold.units < self.price:
                    raise ComputeFailed("too little money")
                hold.spend(self.price)
        text = self.answer(question)
        if fault := order.check(text):
            raise ComputeFailed(fault)
        return Made(result=text, seller="writer", paid_units=self.price)


# ---- Cutting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [200, 333, 1_000, 100_000])
def test_chunks_keep_every_word(size: int) -> None:
    chunks = chunks_of(TEXT, size_max_chars=size)
    assert " ".join(chunks).split() == TEXT.split()
    assert max(map(len, chunks)) <= size
    assert all(chunk.endswith(".") for chunk in chunks)


def test_chunks_of_what_has_no_gaps() -> None:
    assert "".join(chunks_of("x" * 1_001, size_max_chars=200)) == "x" * 1_001
    assert chunks_of(" \n ") == []
    with pytest.raises(ValueError, match="at least"):
        chunks_of("x", size_max_chars=CHUNK_MIN_CHARS - 1)


# ---- Summaries ---------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("count", [1, 2, 8, 9, 17, 40, 65])
async def test_a_long_text_is_digested_in_as_many_pieces_as_were_told(count: int) -> None:
    writer = Writer(lambda question: f"({question.count('sheep') or question.count('(')})")
    plan = Plan(writer)
    text = "\n\n".join(f"{number} sheep " + "x" * 180 for number in range(count))
    digest = await summarise(plan, text, chunk_chars=200)
    assert digest.complete
    assert len(digest.notes.made) == count
    assert len(writer.asked) == pieces_in(count) == len(plan.receipt().parts)
    assert digest.covers == f"{count} of {count} parts"


@pytest.mark.anyio
async def test_what_could_not_be_read_is_said() -> None:
    def answer(question: str) -> str:
        if "7 sheep" in question:
            raise ComputeFailed("no")
        return "(note)"

    text = "\n\n".join(f"{number} sheep " + "x" * 180 for number in range(10))
    digest = await summarise(Plan(Writer(answer)), text, chunk_chars=200)
    assert not digest.complete
    assert digest.joined
    assert digest.covers == "9 of 10 parts, without part 8"


@pytest.mark.anyio
async def test_without_money_to_join_the_notes_are_the_digest() -> None:
    text = "\n\n".join(f"{number} sheep " + "x" * 180 for number in range(3))
    writer = Writer(lambda question: "a note", price=10)
    digest = await summarise(Plan(writer, budget_units=35, max_units=10), text, chunk_chars=200)
    assert digest.text == "a note\n\na note\n\na note"
    assert "could not be joined" in digest.covers
    assert not digest.complete
    with pytest.raises(ValueError, match="no text"):
        await summarise(Plan(writer), "  ")


@pytest.mark.anyio
async def test_chunks_are_shorter_where_characters_are_longer() -> None:
    writer = Writer(lambda question: "a note")
    plain = await summarise(Plan(writer), "sheep " * 200, chunk_chars=600)
    dense = await summarise(Plan(writer), "绵羊走路 " * 240, chunk_chars=600)
    assert len(dense.notes.made) > 2 * len(plain.notes.made)
    with pytest.raises(ValueError, match="at least"):
        await summarise(Plan(writer), "sheep", chunk_chars=10)


@pytest.mark.anyio
async def test_an_empty_summary_is_none() -> None:
    digest = await summarise(Plan(Writer(lambda question: " ")), "one text")
    assert (digest.text, digest.joined) == ("", False)
    assert digest.notes.missing == {0: "it is empty"}


@pytest.mark.anyio
async def test_an_engine_makes_it() -> None:
    digest = await summarise(Plan(EngineWorker(EchoCompute())), "short text", words=40)
    assert "short text" in digest.text


# ---- Labels ------------------------------------------------------------------------------------

LABELS = ("good", "bad", "very good")


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ('{"label": "good"}', "good"),
        ('"bad"', "bad"),
        ("Very Good", "very good"),
        ("It is very good.", "very good"),
        ("The label is: bad!", "bad"),
        ("good or bad", ""),
        ("very good and good", ""),
        ("goodness", ""),
        ('{"label": "ugly"}', ""),
        ('{"label": null}', ""),
        ("[" * 100_000, ""),
        ("", ""),
    ],
)
def test_an_answer_is_read(answer: str, label: str) -> None:
    assert label_in(answer, LABELS) == label


@pytest.mark.anyio
async def test_texts_get_their_labels_and_those_without_one_say_why() -> None:
    def answer(question: str) -> str:
        text = question.partition("Text: ")[2]
        return json.dumps({"label": "good" if "sun" in text else "bad" if "rain" in text else "?"})

    found = await classify(Plan(Writer(answer)), ["sun", "rain", "fog"], ["good", " bad "])
    assert [each.label for each in found] == ["good", "bad", ""]
    assert "names none" in found[2].why


@pytest.mark.anyio
async def test_votes_decide() -> None:
    answers = iter(["good", "bad", "bad", "good", "bad", "very good"])
    plan = Plan(Writer(lambda question: next(answers)), at_once=1)
    found = await classify(plan, ["first", "second"], LABELS, votes=3)
    assert [(each.label, each.voices) for each in found] == [("bad", 2), ("", 0)]
    assert found[1].why == "there was no majority"


@pytest.mark.parametrize("labels", [["one"], ["a", "A"], ["a", " "], ["a", "b" * 101], []])
def test_labels_that_cannot_be_told_apart(labels: list[str]) -> None:
    with pytest.raises(ValueError, match="label"):
        require_labels(labels)
