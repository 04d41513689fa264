"""Receipts: what they commit to, and everything that they must not let pass."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from coase.agents.compute.ports import Prompt
from coase.agents.receipt import (
    Part,
    Receipt,
    ReceiptWrong,
    belongs,
    content_hash,
    make_receipt,
    spelt,
)
from coase.protocol.identity import Identity

if TYPE_CHECKING:
    from collections.abc import Callable

SALT = b"\x07" * 32
ME = Identity(b"\x05" * 32)


def part(number: int, **changes: Any) -> Part:
    key = f"p/{number:05}"
    return replace(
        Part(
            key=key,
            seller=f"0x{number:040x}",
            deal=f"{number:032x}",
            task_hash=content_hash(SALT, key, f"task {number}"),
            result_hash=content_hash(SALT, key, f"result {number}"),
            price_units=number,
        ),
        **changes,
    )


def receipt(count: int = 5) -> Receipt:
    parts = [part(number) for number in range(count)]
    return make_receipt("plan", parts, pieces=count, asset="x", salt=SALT, identity=ME)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 13])
def test_it_commits_to_all_parts_and_each_can_be_shown_alone(count: int) -> None:
    whole = receipt(count)
    whole.check()
    assert whole.total_units == sum(range(count))
    for each in whole.parts:
        path = whole.path(each.key)
        assert belongs(each, path, root=whole.root)
        assert not belongs(replace(each, price_units=99), path, root=whole.root)
        assert not belongs(each, path[:-1], root=whole.root)
        assert not belongs(each, ("?00", *path), root=whole.root)
        assert not belongs(each, (">zz",), root=whole.root)


def test_it_goes_through_text() -> None:
    whole = receipt()
    again = Receipt.from_json(whole.to_json())
    assert again == whole
    again.check(tasks={"p/00001": "task 1"}, results={"p/00001": "result 1"})
    assert SALT.hex() not in whole.public().to_json()
    whole.public().check()
    with pytest.raises(ReceiptWrong, match="salt"):
        whole.public().check(results={"p/00001": "result 1"})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda r: replace(r, parts=r.parts[1:]), "root"),
        (lambda r: replace(r, parts=(part(0, price_units=7), *r.parts[1:])), "root"),
        (lambda r: replace(r, parts=(part(0, result_hash="0x00"), *r.parts[1:])), "root"),
        (lambda r: replace(r, parts=(part(0, used=False), *r.parts[1:])), "root"),
        (lambda r: replace(r, parts=(r.parts[1], r.parts[0], *r.parts[2:])), "order"),
        (lambda r: replace(r, parts=(r.parts[0], *r.parts)), "twice"),
        (lambda r: replace(r, parts=(*r.parts[:-1], part(4, deal=f"{3:032x}"))), "one deal"),
        (lambda r: replace(r, parts=(part(0, price_units=-1), *r.parts[1:])), "below"),
        (lambda r: replace(r, plan="another"), "root"),
        (lambda r: replace(r, pieces=4), "root"),
        (lambda r: replace(r, asset="y"), "root"),
        (lambda r: replace(r, signer=Identity(b"\x06" * 32).address), "signature"),
        (lambda r: replace(r, signature="0x12"), "signature"),
        (lambda r: replace(r, signature="0xzz"), "signature"),
        (lambda r: replace(r, signer=""), "signature"),
    ],
)
def test_what_was_changed_is_seen(change: Callable[[Receipt], Receipt], why: str) -> None:
    with pytest.raises(ReceiptWrong, match=why):
        change(receipt()).check()


def test_another_task_or_result_is_seen() -> None:
    whole = receipt()
    with pytest.raises(ReceiptWrong, match="the result of part"):
        whole.check(results={"p/00001": "result 2"})
    with pytest.raises(ReceiptWrong, match="the task of part"):
        whole.check(tasks={"p/00001": "task 2"})
    with pytest.raises(ReceiptWrong, match="no part"):
        whole.check(tasks={"q": "task 2"})
    with pytest.raises(ReceiptWrong, match="no part"):
        whole.path("q")


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"plan": 1}'])
def test_what_is_no_receipt_is_said(text: str) -> None:
    with pytest.raises(ReceiptWrong, match="no receipt"):
        Receipt.from_json(text)


def test_short_answers_cannot_be_guessed_and_long_ones_have_one_spelling() -> None:
    assert content_hash(SALT, "a", "yes") != content_hash(SALT, "b", "yes")
    assert spelt(Prompt.ask("Why?")) == spelt(Prompt.ask("Why?"))
    assert spelt(Prompt.ask("Why?")) != spelt(Prompt.ask("Why?", seed=1))
    assert spelt({"b": (1, b"\x01"), "a": None}) == '{"a":null,"b":[1,"0x01"]}'
