"""``coase gateway keys`` and ``usage`` as they are typed, without a gateway that runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from coase.agents.runtime import clock_ms
from coase.tools.gateway.keys import KeyFile
from coase.tools.gateway.usage import UsageJournal, Used
from tests.tools.commands import Home

if TYPE_CHECKING:
    from pathlib import Path


def test_a_key_is_shown_once_changed_and_taken_back(tmp_path: Path) -> None:
    home = Home(tmp_path)
    made = home.call("gateway", "keys", "add", "alice", "--budget", "1.50", "--per-day", "0.2")
    key = made.stdout.strip()
    assert "shown this once" in made.stderr
    assert KeyFile(tmp_path / "gateway").callers()[0].find(key) is not None
    listed = home.call("gateway", "keys", "list").stdout
    assert key not in listed
    assert key[:12] in listed
    home.call("gateway", "keys", "change", "alice", "--per-day", "none", "--per-hour", "0.1")
    (told,) = home.json("gateway", "keys", "list")
    assert told["limits"] == {"per_hour": {"limit": "0.1"}, "total": {"limit": "1.50"}}
    home.call("gateway", "keys", "remove", "alice")
    assert home.json("gateway", "keys", "list") == []
    assert "coase gateway keys add" in home.call("gateway", "keys", "list").stdout


def test_a_key_without_a_limit_is_warned_of(tmp_path: Path) -> None:
    said = Home(tmp_path).call("gateway", "keys", "add", "bob", "--json")
    assert json.loads(said.stdout)["name"] == "bob"
    assert "no limit" not in said.stderr, "a program is told by the list"
    assert "no limit of its own" in Home(tmp_path).call("gateway", "keys", "add", "c").stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("keys", "add", "a b"), "is no name for a key"),
        (("keys", "add", "a", "--budget", "1e3"), "plain decimal"),
        (("keys", "change", "a"), "say which limit"),
        (("keys", "change", "a", "--budget", "1"), "there is no key 'a'; there is: none"),
        (("keys", "remove", "a"), "there is no key 'a'"),
    ],
)
def test_what_is_typed_wrongly_is_said(tmp_path: Path, args: tuple[str, ...], says: str) -> None:
    done = Home(tmp_path).call("gateway", *args, code=2)
    assert says in done.stderr.replace("\n", " ")


def test_usage_is_shown_by_whatever_is_asked_for(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert "nothing was asked" in home.call("gateway", "usage").stdout
    journal = UsageJournal(tmp_path / "gateway")
    for number, tag in enumerate(("[/b]", "[/b]", "mail")):
        used = Used(
            call=str(number),
            at_ms=clock_ms(),
            key="alice",
            tag=tag,
            model="echo",
            made="local",
            input_tokens=5,
            output_tokens=7,
        )
        journal.call(used)
    journal.call(Used(call="old", at_ms=1, key="alice"))
    journal.close()
    shown = home.call("gateway", "usage", "--by", "tag,key").stdout
    assert "[/b]" in shown
    rows = home.json("gateway", "usage", "--by", "tag")
    told = [(row["tag"], row["calls"], row["input_tokens"], row["output_tokens"]) for row in rows]
    assert told == [("[/b]", 2, 10, 14), ("mail", 1, 5, 7)]
    assert [row["calls"] for row in home.json("gateway", "usage", "--by", "key")] == [3]
    assert "not 'moon'" in home.call("gateway", "usage", "--by", "moon", code=2).stderr
