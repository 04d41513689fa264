"""``coase plan`` on a machine alone: what it prints, and what it says to what cannot be."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from coase.agents.receipt import Receipt
from tests.tools.commands import Home

if TYPE_CHECKING:
    from pathlib import Path

ECHO = ("--engine", "echo")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    (tmp_path / "lines.txt").write_text("The sun is out.\n\n[b]Rain[/b] \x1b[2J again.\n")
    (tmp_path / "long.txt").write_text("\n\n".join("A line about sheep. " * 40 for _ in range(12)))
    return Home(tmp_path / "home")


def test_lines_are_classified(home: Home, tmp_path: Path) -> None:
    lines = str(tmp_path / "lines.txt")
    arguments = ("plan", "classify", lines, "--labels", "good,bad", *ECHO)
    said = home.call(*arguments, "--receipt", str(tmp_path / "receipt.json"))
    assert "[b]Rain[/b]" in said.stdout
    assert "\x1b[2J" not in said.stdout
    assert "2 pieces, 0 sellers, at most 0" in said.stderr
    receipt = Receipt.from_json((tmp_path / "receipt.json").read_text())
    receipt.check()
    assert receipt.pieces == 2
    found = home.json(*arguments)
    assert found["labels"][0]["text"] == "The sun is out."
    assert {row["label"] for row in found["labels"]} <= {"good", "bad"}
    Receipt.from_json(json.dumps(found["receipt"])).check()


def test_a_json_list_is_classified_by_votes(home: Home, tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps(["one\nline", "two"]))
    found = home.json("plan", "classify", str(path), "--labels", "a, b", "--votes", "3", *ECHO)
    assert [row["text"] for row in found["labels"]] == ["one\nline", "two"]
    assert all(row["voices"] >= 2 for row in found["labels"])


def test_a_long_text_is_summarised(home: Home, tmp_path: Path) -> None:
    found = home.json("plan", "summarise", str(tmp_path / "long.txt"), "--words", "10", *ECHO)
    assert found["covers"] == "3 of 3 parts"
    assert found["spent_units"] == "0"
    assert found["missing"] == {}
    assert found["text"]
    said = home.call("plan", "summarise", "-", *ECHO, stdin=b"Some words.")
    assert "Some words." in said.stdout
    assert "covers 1 of 1 parts" in said.stderr


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("summarise", "nowhere.txt"), "nowhere.txt does not exist"),
        (("summarise", "."), "is a directory"),
        (("summarise", "-"), "is empty"),
        (("summarise", "LINES", "--budget", "0.1"), "coase up"),
        (("summarise", "LINES", "--max-price", "0.1"), "--max-price needs --budget"),
        (("summarise", "LINES", "--engine", "none"), "without an engine, a budget or a firm"),
        (("summarise", "LINES", "--engine", "abacus"), "no engine 'abacus'"),
        (("classify", "LINES", "--labels", "one"), "--labels: there are 2"),
        (("classify", "LINES", "--labels", "a,A"), "--labels: two labels"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    home: Home, tmp_path: Path, arguments: tuple[str, ...], why: str
) -> None:
    lines = str(tmp_path / "lines.txt")
    said = home.call("plan", *(lines if a == "LINES" else a for a in arguments), code=2)
    assert why in said.stderr
    assert len(said.stderr.splitlines()) == 1


def test_a_list_of_something_else_is_refused(home: Home) -> None:
    said = home.call("plan", "classify", "-", "--labels", "a,b", stdin=b"[1, 2]", code=2)
    assert "not of texts" in said.stderr
