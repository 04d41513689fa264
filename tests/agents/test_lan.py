"""One machine's part of a local network: real brokers and certificates, on a network in memory."""

from __future__ import annotations

import asyncio
import contextlib
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import coase.protocol.subjects
from coase.agents import bridge, member
from coase.agents.card import (
    OWN_FIELDS,
    Card,
    Hello,
    LanState,
    LanStateFile,
    read_card,
    read_hello,
)
from coase.agents.config import NatsAddress, Network
from coase.agents.lan import Lan, LanOptions
from coase.agents.member import member_of, watch_clash
from coase.agents.neighbours import ask_card, ask_view, greet
from coase.protocol.advert import Advert, Heard
from coase.protocol.backends.neighbours import MemoryLan, MemoryNeighbours
from coase.protocol.errors import ConfigurationError, RemoteError
from coase.protocol.identity import Identity
from coase.protocol.joincode import JoinCode
from coase.protocol.subjects import chain_subject, lan_subject

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("lan-unit")]

CODE = JoinCode.of(b"sixteen bytes ok")
ONE, TWO = "1" * 16, "2" * 16
KEY = Identity(b"\x21" * 32)
ADDRESS = "0x" + "44" * 20
PATIENCE_S = 90


def network(**more: object) -> Network:
    fields: dict[str, object] = {
        "net": "lan-x",
        "nats": NatsAddress(url="nats://127.0.0.1:1", user="u", password="secret"),
        "rpc": "http://127.0.0.1:1",
        "chain_id": 31337,
        "token": ADDRESS,
        "factory": ADDRESS,
        "escrow": ADDRESS,
        "arbiters": (ADDRESS,),
        "faucet": True,
        "bank": ADDRESS,
        "pid": 77,
        "state": "/somewhere",
    }
    return Network.model_validate(fields | more)


def sealed(identity: Identity = KEY, **more: object) -> bytes:
    card = Card.of(network(**more), node=ONE, key=KEY.address, version="1.2.3")
    return card.sealed(identity)


class World:
    """A network in memory and the machines on it."""

    def __init__(self, place: Path) -> None:
        self.place, self.air = place, MemoryLan()
        self.ends: list[MemoryNeighbours] = []

    def lan(self, node: str, *, code: JoinCode | None = CODE, where: str = "") -> Lan:
        options = LanOptions(code=code, node=node, interfaces=("127.0.0.1",), chain=node == ONE)
        self.ends.append(self.air.neighbours())
        return Lan(self.place / (where or node), options, neighbours=self.ends[-1])

    @contextlib.asynccontextmanager
    async def on(self, lan: Lan, card: bytes = b"") -> AsyncIterator[Lan]:
        await lan.broker.start()
        try:
            async with lan.running(card=lambda: card):
                yield lan
        finally:
            await lan.broker.stop()

    def forge(self, **fields: object) -> None:
        """Let everybody hear an advertisement that nobody stands behind."""
        told = {
            "node_id": "f" * 16,
            "network": CODE.network_tag,
            "addresses": ("127.0.0.1",),
            "port": 9,
            "run": "0" * 8,
        } | fields
        self.air.tell(Heard(Advert(**told)), but=self.air.neighbours())  # type: ignore[arg-type]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def until(happened: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not happened():  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # What is looked at has no event of its own.


async def test_two_machines_with_one_code_are_joined_and_tell_of_each_other(world: World) -> None:
    async with world.on(world.lan(ONE), sealed()) as one, world.on(world.lan(TWO)) as two:
        await until(lambda: one.met and two.met)
        assert (set(one.met), set(two.met)) == ({TWO}, {ONE})
        assert two.met[ONE].chain
        assert abs(two.met[ONE].skew_ms) < PATIENCE_S * 1_000
        assert await ask_card(two.calls, two.mesh) == sealed()
        assert [n.node for n in await greet(one.calls, one.mesh, but=ONE, expect=1)] == [TWO]
        view = await ask_view(two.calls, two.mesh, ONE)
        assert view["met"][0]["node"] == TWO
        assert [row["joined"] for row in view["heard"]] == [True]
        assert CODE.text not in str(view)


async def test_a_firewall_that_blocks_one_direction_hinders_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    walled = world.lan(ONE)
    own = walled._advert
    monkeypatch.setattr(walled, "_advert", lambda: replace(own(), port=9))  # None get in there.
    async with world.on(walled) as one, world.on(world.lan(TWO)) as two:
        await until(lambda: one.met and two.met)
        # The way back is used: the one that may dial has dialled.
        assert [row["joined"] for row in two.heard()] == [True]


async def test_a_named_machine_is_joined_without_having_been_heard(world: World) -> None:
    async with world.on(world.lan(ONE), sealed()) as one:
        port = one.broker.route_port
        options = LanOptions(
            code=CODE, node=TWO, interfaces=("127.0.0.1",), peers=(f"127.0.0.1:{port}",)
        )
        deaf = Lan(world.place / "deaf", options, neighbours=MemoryLan().neighbours())
        async with world.on(deaf):
            await until(lambda: one.met and deaf.met)
            assert deaf.peers() == {f"127.0.0.1:{port}": ""}
        stranger = JoinCode.of(b"another sixteen.")
        options = replace(options, code=stranger, node="3" * 16)
        other = Lan(world.place / "other", options, neighbours=MemoryLan().neighbours())
        async with world.on(other):
            await until(lambda: all(other.peers().values()))
            assert other.met == {}


async def test_other_codes_and_open_networks_stay_apart(world: World) -> None:
    other = JoinCode.of(b"another sixteen.")
    async with (
        world.on(world.lan(ONE)) as one,
        world.on(world.lan(TWO, code=other)) as two,
        world.on(world.lan("3" * 16, code=None)) as opened,
        world.on(world.lan("4" * 16, code=None)) as wide,
    ):
        await until(lambda: opened.met and wide.met)
        await until(lambda: len(one.heard()) == 3 and len(two.heard()) == 3)
        assert (one.met, two.met) == ({}, {})
        assert set(opened.met) == {"4" * 16}
        assert {row["ours"] for row in one.heard()} == {False}
        assert "another join code" in one.heard()[0]["why"]


async def test_a_forged_advertisement_is_told_and_not_joined(world: World) -> None:
    async with world.on(world.lan(ONE)) as one:
        world.forge()
        await until(lambda: one.heard() and "127.0.0.1:9" in one.heard()[0]["why"])
        assert one.met == {}
        assert one.view()["heard"][0]["joined"] is False


async def test_names_that_nobody_stands_behind_fill_no_mesh(world: World) -> None:
    async with world.on(world.lan(ONE)) as one:
        for number in range(60):
            world.forge(node_id=f"{number:016x}", port=9)
        await until(lambda: len(one.heard()) >= 60)
        member.require_place(one)
        assert one.full == ""
        async with world.on(world.lan(TWO)) as two:
            await until(lambda: two.met and one.met)
            assert (set(one.met), set(two.met)) == ({TWO}, {ONE})


async def test_a_full_mesh_takes_nobody_more(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world.on(world.lan(ONE)) as one:
        # Thirty-two brokers are for a slower test: here each address has been proven.
        monkeypatch.setattr(one._proofs, "node_at", lambda address: address.rpartition(":")[2])
        for number in range(32):
            world.forge(node_id=f"{number:016x}", port=9 + number)
        await until(lambda: one.full)
        with pytest.raises(ConfigurationError, match="has 32 machines already"):
            member.require_place(one)


async def test_who_only_says_that_he_is_us_is_not_believed(world: World) -> None:
    async with world.on(world.lan(ONE)) as one:
        world.forge(node_id=ONE)
        await until(lambda: not one._proofs.pending and one._doubles)
        assert one.clash == ""


async def test_a_copied_state_directory_is_told_and_the_newcomer_gives_way(world: World) -> None:
    async with world.on(world.lan(ONE)), world.on(world.lan(ONE, where="copy")) as copy:
        with pytest.raises(ConfigurationError, match="copy of"):
            async with asyncio.timeout(PATIENCE_S):
                await watch_clash(copy, lambda said: None)


async def test_a_member_keeps_the_card_and_can_start_without_the_holder(world: World) -> None:
    kept: list[bytes] = []
    async with world.on(world.lan(ONE), sealed()):
        async with member_of(world.lan(TWO), world.place, card=b"", keep=kept.append) as joined:
            assert joined.net == "lan-x"
            assert joined.rpc.startswith("http://127.0.0.1:")
            assert joined.rpc != "http://127.0.0.1:1"
            assert (joined.nats.password, joined.pid) != ("secret", 77)
            assert joined.arbiters == (ADDRESS,)
    assert kept[0] == sealed()
    async with member_of(world.lan(TWO), world.place, card=kept[0]) as alone:
        assert alone.escrow == ADDRESS


async def test_a_search_says_how_far_it_is(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "LOOK_MAX_S", 0.0)
    said: list[str] = []

    async def join() -> None:
        async with member_of(world.lan(TWO), world.place, card=b"", say=said.append):
            raise AssertionError("nobody has a card")

    async with world.on(world.lan("3" * 16, code=JoinCode.of(b"another sixteen."))):
        task = asyncio.create_task(join())
        await until(lambda: "looking for the network … heard 1 machine with another code" in said)
        await until(lambda: any("UDP 5353" in line for line in said))
        async with world.on(world.lan(ONE)):  # Of the network, and without a card.
            await until(lambda: any("holds the chain is not here yet" in line for line in said))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_no_address_to_use_is_said(world: World) -> None:
    with pytest.raises(ConfigurationError, match=r"192\.0\.2\.77.*there are"):
        Lan(world.place, LanOptions(code=CODE, node=ONE, interfaces=("192.0.2.77",)))


# The card itself


def test_a_card_holds_no_secret_and_nothing_of_one_machine() -> None:
    raw = sealed(fee_max_wei=5)
    assert b"secret" not in raw
    card = read_card(raw)
    assert card.net == "lan-x"
    assert not {"nats", "rpc", "pid", "state", "fee_max_wei"} & card.market.keys()


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "something else"),
        (b"x" * 20_000, "something else"),
        (b"x" * 65 + b"{}", "runs Coase another"),
        (b"x" * 65 + b'{"v": 2, "version": "9.9\\u001b[31m"}', "runs Coase 9.931m,"),
        (sealed()[:-1], "something else"),
        (sealed(Identity(b"\x22" * 32)), "not signed by the machine"),
        (sealed()[:64] + b"\x00" + sealed()[65:], "signed by nobody"),
    ],
)
def test_what_is_no_card_is_refused_in_words(raw: bytes, why: str) -> None:
    with pytest.raises(RemoteError, match=why.replace("[", r"\[")):
        read_card(raw)


@pytest.mark.parametrize("field", ["rpc", "pid", "state", "fee_max_wei", "confirmations"])
def test_a_card_cannot_choose_for_a_machine(field: str) -> None:
    good = Card.of(network(), node=ONE, key=KEY.address, version="1")
    bad = good.model_construct(**(dict(good) | {"market": good.market | {field: 1}}))
    with pytest.raises(RemoteError):
        read_card(bad.sealed(KEY))


def test_a_hello_is_checked() -> None:
    hello = Hello(node=ONE, name="a", version="1", now_ms=5, chain=True)
    assert read_hello(hello.model_dump_json().encode()) == hello
    for raw in (b"", b"{}", b"x" * 5_000, hello.model_dump_json().replace("5", '"5"').encode()):
        assert read_hello(raw) is None


def test_what_is_kept_is_read_again_and_rubbish_is_nothing(tmp_path: Path) -> None:
    file = LanStateFile(tmp_path)
    assert file.load() is None
    kept = LanState(code=CODE.text, node=ONE, net="lan-x", port=5, card="00")
    file.save(kept)
    assert file.load() == kept
    assert CODE.text not in repr(kept)
    file.path.write_text("rubbish")
    assert file.load() is None
    assert file.remove()
    assert not file.remove()


def test_the_page_of_the_protocol_names_every_field_and_limit() -> None:
    page = (Path(coase.protocol.subjects.__file__).parent / "SPEC.md").read_text()
    section = page.partition("### Questions among machines")[2]
    named = set(re.findall(r"`(\w+)`", section))
    assert {*Card.model_fields, *Hello.model_fields, *OWN_FIELDS} <= named
    for limit in (
        f"{bridge.REQUEST_SIZE_MAX_BYTES // 1024} KiB",
        f"at most {bridge.BATCH_MAX}",
        f"{bridge.PART_SIZE_MAX_BYTES // 1024} KiB",
        f"{bridge.ANSWER_SIZE_MAX_BYTES // 2**20} MiB",
    ):
        assert limit in " ".join(section.split())
    for subject in (
        *(lan_subject("m", what).replace(".m.", ".<mesh>.") for what in ("hello", "card", "view")),
        chain_subject("n").replace(".n.", ".<net>."),
    ):
        assert f"`{subject}" in section
