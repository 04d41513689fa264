"""The journal's own promises, on a real file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import anyio
import pytest

from coase.agents.backends.sqlite import SqliteJournal
from coase.agents.past import recall
from coase.agents.ports import Record

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio

ME = "0x" + "ab" * 20


def summary(**more: object) -> bytes:
    row = {
        "deal": "d1",
        "side": "buyer",
        "counterparty": "0x" + "cd" * 20,
        "request": "r1",
        "job_id": "77",
        "state": "settled",
        "why": "settled",
        "price_units": 9,
        "to_seller_units": 8,
        "usage": {},
        "result": "{}",
        "verdict": "good",
    }
    return json.dumps(row | more).encode()


async def test_a_group_without_rows_is_durable_too(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "journal.sqlite")
    with anyio.fail_after(10):
        await journal.durable(journal.append(()))
        first = journal.append([Record(ME, "d1", "asked", 1, b"x")])
        await journal.durable(journal.append(()))
        assert [record.data for record in journal.open_records(ME)] == [b"x"]
        await journal.durable(first)
    await journal.close()


async def test_a_request_that_is_over_is_recalled_from_the_journal(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "journal.sqlite")
    journal.append([Record(ME, "r1", "asked", 1, b"x"), Record(ME, "r2", "asked", 1, b"x")])
    turned_down = summary(deal="d2", job_id="", state="rejected", verdict="", result="")
    await journal.durable(journal.close_deals(ME, [("d2", turned_down)]))
    assert journal.past(ME, "r1") is None, "it is not over yet"

    await journal.durable(journal.close_deals(ME, [("d1", summary()), ("r1", b"")]))
    await journal.close()

    again = SqliteJournal(tmp_path / "journal.sqlite")
    assert again.past(ME, "r1") == [turned_down, summary()]
    assert again.past(ME, "r2") is None
    assert again.past(ME, "r3") is None
    assert again.past("0x" + "ef" * 20, "r1") is None
    await again.close()


def test_what_is_recalled_is_the_one_deal_that_was_bound() -> None:
    turned_down = summary(deal="d2", job_id="", state="rejected", verdict="", result="")
    past = recall([turned_down, summary()])
    assert (past.failure, past.deal, past.paid_units, past.price_units) == (None, "d1", 8, 9)


@pytest.mark.parametrize(
    ("summaries", "why"),
    [
        ([], "the deal ended lapsed: nobody made an acceptable offer"),
        ([summary(job_id="")], "the deal ended lapsed: nobody made an acceptable offer"),
        (
            [summary(verdict="", state="refunded", why="refunded")],
            "the deal ended refunded: refunded (deal d1)",
        ),
        (
            [summary(verdict="too short")],
            "the deal ended settled: the result was refused: too short (deal d1)",
        ),
    ],
)
def test_a_failure_is_recalled_as_such(summaries: list[bytes], why: str) -> None:
    assert str(recall(summaries).failure) == why
