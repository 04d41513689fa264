"""``coase firm``: made here, joined there, left again, and never by mistake."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .commands import Home

if TYPE_CHECKING:
    from pathlib import Path

ANN = "0x" + "aa" * 20


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def test_a_firm_is_made_here_and_joined_there(home: Home, tmp_path: Path) -> None:
    made = home.json("firm", "create", "office")
    assert made["name"] == "office"
    there = Home(tmp_path / "there")
    there.call("firm", "join", stdin=made["code"].lower().encode() + b"\n")
    assert there.call("firm", "code").stdout == home.call("firm", "code").stdout
    assert there.json("firm", "list")["firm"]["by_code"] is True
    # The same code again changes nothing; another firm's has to wait until this one is left.
    there.call("firm", "join", made["code"])
    other = Home(tmp_path / "other").json("firm", "create")["code"]
    assert "coase firm leave" in there.call("firm", "join", other, code=2).stderr
    assert "coase firm leave" in home.call("firm", "create", code=2).stderr
    assert "--yes" in there.call("firm", "leave", code=2).stderr
    there.call("firm", "leave", "--yes")
    assert there.json("firm", "list") == {"firm": None, "used": []}
    there.call("firm", "join", other)


def test_keys_are_listed_by_hand(home: Home) -> None:
    home.call("firm", "add", ANN.upper().replace("0X", "0x"), "--name", "ann")
    assert home.json("firm", "list")["firm"]["keys"] == {ANN: "ann"}
    assert "no code" in home.run("firm", "code", code=2).stderr
    home.call("firm", "remove", ANN)
    assert "not on" in home.call("firm", "remove", ANN, code=2).stderr
    assert "no address" in home.call("firm", "add", "ann", code=2).stderr


def test_a_code_with_a_typing_error_joins_nothing(home: Home) -> None:
    assert "letters and digits" in home.call("firm", "join", "ABC", code=2).stderr
    assert "no firm" in home.call("firm", "code", code=2).stderr
    assert "no firm to leave" in home.call("firm", "leave", "--yes", code=2).stderr
