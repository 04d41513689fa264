"""What the doctor says of a local network: each trouble by its name, with what mends it."""

from __future__ import annotations

from typing import Any

import pytest

from coase.tools.cli.lan_checkup import SETTLING_S, findings_of
from coase.tools.cli.lan_host import picture_of

NOW_S = 1_800_000_000
OTHER = {
    "node": "b" * 16,
    "name": "desk",
    "version": "0.1.0",
    "chain": True,
    "rtt_ms": 2.0,
    "skew_ms": 40,
}


def view(**changes: Any) -> dict[str, Any]:
    """A healthy member's view, with changes."""
    healthy: dict[str, Any] = {
        "node": "a" * 16,
        "mesh": "lan-0123456789ab",
        "open": False,
        "version": "0.1.0",
        "chain": False,
        "addresses": ["10.0.0.2"],
        "port": 4248,
        "met": [OTHER],
        "heard": [],
        "peers": {},
        "clash": "",
        "full": "",
        "running_s": SETTLING_S,
        "certificate_ends_s": NOW_S + 7 * 24 * 3600,
        "mdns": {"announced": True, "heard_self": True, "last_complaint": ""},
    }
    return healthy | changes


def heard(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "node": "c" * 16,
        "name": "attic",
        "ours": True,
        "announced": True,
        "joined": False,
        "addresses": ["10.0.0.9:5000"],
        "why": "nobody answers at 10.0.0.9:5000",
    }
    return row | changes


def test_a_healthy_member_has_one_line() -> None:
    (only,) = findings_of(view(), now_s=NOW_S)
    assert (only.level, only.what) == ("ok", "lan")
    assert only.text == "lan-0123456789ab at 10.0.0.2 port 4248, joined with desk"


STRANGE = "10.0.0.3:1 is no node of this network: it has another join code (self-signed)"
SILENT = {"announced": True, "heard_self": False, "last_complaint": ""}
TROUBLES = [
    ({"met": []}, "note", "joined with nobody yet: check that the others run"),
    ({"open": True}, "note", "open to everybody"),
    ({"clash": "another node goes by our id"}, "bad", "another node goes by our id"),
    ({"full": "has 32 machines"}, "bad", "has 32 machines"),
    ({"mdns": SILENT}, "bad", "ufw allow 5353/udp"),
    ({"mdns": {**SILENT, "heard_self": True, "last_complaint": "x"}}, "note", "x"),
    ({"met": [OTHER | {"chain": False}]}, "bad", "the machine that holds the chain is away"),
    ({"met": [OTHER | {"skew_ms": -4_000}]}, "note", "4.0 s apart: set the clock"),
    ({"met": [OTHER | {"skew_ms": 40_000}]}, "bad", "refuse each other's messages"),
    ({"met": [OTHER | {"version": "0.2.0"}]}, "note", "desk runs Coase 0.2.0"),
    ({"heard": [heard()]}, "bad", "sudo ufw allow 5000/tcp"),
    ({"heard": [heard(why=STRANGE)]}, "note", "is no node of this network"),
    ({"heard": [heard()], "running_s": 1}, "note", "attic was heard and is not joined"),
    ({"peers": {"10.0.0.9:1": "nobody there"}}, "bad", "10.0.0.9:1: nobody there"),
    ({"certificate_ends_s": NOW_S + 60}, "bad", "certificate ends within a day"),
]


@pytest.mark.parametrize(("changes", "level", "text"), TROUBLES)
def test_a_trouble_is_named_with_what_mends_it(
    changes: dict[str, Any], level: str, text: str
) -> None:
    found = findings_of(view(**changes), now_s=NOW_S)
    assert [finding.level for finding in found if text in finding.text] == [level]


@pytest.mark.parametrize(
    "row", [heard(ours=False), heard(joined=True), heard(announced=False), heard(node="b" * 16)]
)
def test_who_is_no_trouble_is_not_named(row: dict[str, Any]) -> None:
    assert len(findings_of(view(heard=[row]), now_s=NOW_S)) == 1


def test_the_picture_of_a_code_fits_a_small_terminal() -> None:
    lines = picture_of("0123-4567-89AB-CDEF-GHJK-MNPQ-RSTV").splitlines()
    assert len(lines) <= 20
    assert max(map(len, lines)) <= 40
