"""Subjects name one inbox or one shard, and nothing else can be smuggled into them."""

from __future__ import annotations

import hashlib

import pytest

from coase.protocol.errors import ConfigurationError, LocalProtocolError
from coase.protocol.identity import keccak256
from coase.protocol.subjects import (
    LEVELS,
    WHOLE,
    chain_subject,
    inbox_subject,
    lan_subject,
    level_above,
    prefix_from,
    prefixes,
    request_subject,
    served_subjects,
)

AGENT = "0x" + "a1" * 20
CAPABILITY = "inference-0123abcd"


def test_an_inbox_is_named_by_the_address_without_0x() -> None:
    assert inbox_subject("local", AGENT) == "coase.v1.local.inbox." + "a1" * 20


def test_a_seller_serves_one_shard_at_each_level() -> None:
    digits = keccak256(bytes.fromhex("a1" * 20)).hex()
    assert prefixes(AGENT) == ((0, "-"), (4, digits[:1]), (8, digits[:2]), (12, digits[:3]))
    assert served_subjects("local", CAPABILITY, AGENT) == (
        f"coase.v1.local.req.{CAPABILITY}.0.-",
        f"coase.v1.local.req.{CAPABILITY}.4.{digits[:1]}",
        f"coase.v1.local.req.{CAPABILITY}.8.{digits[:2]}",
        f"coase.v1.local.req.{CAPABILITY}.12.{digits[:3]}",
    )


@pytest.mark.parametrize("level", LEVELS)
def test_every_prefix_of_a_level_can_be_picked_and_is_one_that_sellers_serve(level: int) -> None:
    picked = {prefix_from(chance, level=level) for chance in range(2**level)}
    assert len(picked) == 2**level
    assert prefix_from(2**64 + 5, level=level) in picked
    agents = ("0x" + hashlib.sha256(bytes((n,))).hexdigest()[:40] for n in range(200))
    assert {dict(prefixes(agent))[level] for agent in agents} <= picked
    for prefix in picked:
        request_subject("local", CAPABILITY, level, prefix)


def test_a_buyer_widens_from_12_bits_to_everybody_and_then_stops() -> None:
    climb: list[int | None] = [12]
    while (level := climb[-1]) is not None:
        climb.append(level_above(level))
    assert climb == [12, 8, 4, 0, None]


@pytest.mark.parametrize("net", ["", "a.b", "*", ">", "UPPER", "-x", "a b", "x" * 33, "local\n"])
def test_a_network_name_cannot_reach_other_subjects(net: str) -> None:
    with pytest.raises(ConfigurationError):
        inbox_subject(net, AGENT)
    with pytest.raises(ConfigurationError):
        request_subject(net, CAPABILITY, 0, WHOLE)


@pytest.mark.parametrize(
    "agent", ["", "a1" * 20, "0x" + "A1" * 20, "0x" + "a1" * 19, "0x*", "0x" + "a1" * 20 + "\n"]
)
def test_what_is_no_address_has_no_inbox_and_no_shard(agent: str) -> None:
    with pytest.raises(LocalProtocolError):
        inbox_subject("local", agent)
    with pytest.raises(LocalProtocolError):
        prefixes(agent)


@pytest.mark.parametrize("capability", ["", "Inference", "any.", "*", "a.b-0123abcd", "x-0123ABCD"])
def test_what_is_no_capability_has_no_subject(capability: str) -> None:
    with pytest.raises(ConfigurationError):
        request_subject("local", capability, 0, WHOLE)


@pytest.mark.parametrize(
    ("level", "prefix"),
    [
        (0, "a"),
        (0, ""),
        (4, "-"),
        (4, "*"),
        (4, "ab"),
        (8, "a"),
        (12, "AB1"),
        (16, "abcd"),
        (3, ""),
    ],
)
def test_a_prefix_must_fit_its_level(level: int, prefix: str) -> None:
    with pytest.raises(LocalProtocolError):
        request_subject("local", CAPABILITY, level, prefix)


def test_levels_and_chance_are_checked() -> None:
    with pytest.raises(LocalProtocolError):
        prefix_from(1, level=16)
    with pytest.raises(LocalProtocolError):
        prefix_from(-1, level=4)
    with pytest.raises(LocalProtocolError):
        level_above(5)


def test_machines_are_asked_on_subjects_of_their_own() -> None:
    assert chain_subject("lan-1") == "coase.v1.lan-1.chain.rpc"
    assert lan_subject("lan-1", "hello") == "coase.v1.lan-1.lan.hello"
    assert lan_subject("lan-1", "view", node="0" * 16) == "coase.v1.lan-1.lan.view." + "0" * 16
    for node in ("*", "a.b", "0" * 15, "G" * 16):
        with pytest.raises(LocalProtocolError):
            lan_subject("lan-1", "view", node=node)
    with pytest.raises(ConfigurationError):
        chain_subject(">")
