"""Real multicast DNS: on loopback, between two network namespaces, and under fire."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import random
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import pytest

from coase.protocol.advert import SERVICE_TYPE, Gone, Heard, Malformed
from coase.protocol.backends import mdns
from coase.protocol.backends.interfaces import local_addresses, watch_addresses
from coase.protocol.backends.mdns import NAMES_MAX, MdnsNeighbours, require_port
from coase.protocol.errors import ConfigurationError
from coase.protocol.mesh import Membership
from tests.conformance.neighbours_suite import Ear, advert

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from coase.protocol.advert import Advert

# One at a time: they share one port of the machine, and one of them floods it.
pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("mdns")]

HAS_IPV6: Final = Path("/proc/net/if_inet6").exists()
NODE: Final = Path(__file__).with_name("mdns_node.py")
IP_MULTICAST_ALL: Final = 49  # Linux: off, it hears only the groups that it joined itself.
GROUP: Final = ("224.0.0.251", 5353)
_DEADLINE_S: Final = 60


class Make(Protocol):
    def __call__(self, *, ttl_s: int = 2, ask_every_s: float = 0.5) -> MdnsNeighbours: ...


@pytest.fixture
async def make(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    monkeypatch.setattr(mdns, "RESOLVE_WAIT_MS", 500)
    monkeypatch.setattr(mdns, "LOOK_EVERY_S", 0.3)
    made: list[MdnsNeighbours] = []

    def make_one(*, ttl_s: int = 2, ask_every_s: float = 0.5) -> MdnsNeighbours:
        made.append(
            MdnsNeighbours(
                interfaces=("127.0.0.1",), loopback=True, ttl_s=ttl_s, ask_every_s=ask_every_s
            )
        )
        return made[-1]

    yield make_one
    await asyncio.gather(*(one.close() for one in made))


@contextlib.asynccontextmanager
async def process(
    said: Advert, *, speak_on: str, prefix: tuple[str, ...] = ()
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a node of its own; what it hears is read line by line from its output."""
    started = await asyncio.create_subprocess_exec(
        *(*prefix, sys.executable, str(NODE), speak_on, json.dumps(asdict(said))),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            started.kill()
        await started.wait()


async def hears(node: asyncio.subprocess.Process, kind: str, node_id: str) -> dict[str, Any]:
    """Read what a process says until it heard this; fails when it ends."""
    assert node.stdout is not None
    async with asyncio.timeout(_DEADLINE_S):
        while line := await node.stdout.readline():
            news: dict[str, Any] | None = json.loads(line).get(kind)
            if news and (news.get("node_id") or news["advert"]["node_id"]) == node_id:
                return news
    raise AssertionError(f"the node ended without {kind} of {node_id}")


async def _until(done: Callable[[], bool], again: Callable[[], None] = lambda: None) -> None:
    """Wait for something that no event tells, and do something now and then."""
    async with asyncio.timeout(_DEADLINE_S):
        while not done():
            again()
            await asyncio.sleep(0.05)


# ---- Coming and going --------------------------------------------------------------------------


async def test_a_node_of_another_network_is_heard_and_not_joined(make: Make) -> None:
    ours, theirs, ear = advert(), advert(name="next door"), Ear()
    membership = Membership(ours, loopback=True)
    await make().open(ours, ear)
    await make().open(theirs, Ear())
    await ear.hears(Heard(theirs))
    for news in ear.of(theirs.node_id):
        membership.note(news, 0)
    (line,) = membership.rows(0)
    assert (line.name, line.joined, line.why) == ("next door", False, "it has another join code")
    assert membership.routes(0) == ()


async def test_a_killed_node_is_gone_when_its_advertisement_runs_out(make: Make) -> None:
    ear, said = Ear(), advert(name="doomed")
    await make().open(advert(), ear)
    async with process(said, speak_on="127.0.0.1") as node:
        await ear.hears(Heard(said))
        node.send_signal(signal.SIGKILL)
        await node.wait()
    await ear.until(lambda: ear.of(said.node_id)[-1] == Gone(said.node_id))


async def test_new_addresses_replace_the_old_ones(make: Make) -> None:
    ear, there = Ear(), make()
    before = advert(addresses=("127.0.0.1",))
    after = replace(before, addresses=("127.0.0.2", "127.0.0.3"))
    await make().open(advert(), ear)
    await there.open(before, Ear())
    await ear.hears(Heard(before))
    await there.update(after)

    def holds() -> bool:
        news = ear.of(before.node_id)[-1]
        return isinstance(news, Heard) and set(news.advert.addresses) == set(after.addresses)

    await ear.until(holds)


@pytest.mark.parametrize("asked", [False, True])
async def test_lost_sockets_are_opened_again(
    make: Make, monkeypatch: pytest.MonkeyPatch, *, asked: bool
) -> None:
    """An interface that goes and comes back is no longer in the group; nothing says so."""
    monkeypatch.setattr(mdns, "ANSWER_WAIT_S", 0.8)
    ear, there, said = Ear(), make(ttl_s=3600, ask_every_s=3600 if asked else 0.3), advert()
    await there.open(said, Ear())
    session = there._session
    assert session is not None
    deaf = session._mdns
    assert deaf is not None
    membership = socket.inet_aton(GROUP[0]) + socket.inet_aton("127.0.0.1")
    listener = deaf.zeroconf.engine._listen_transport
    assert listener is not None
    listener.sock.setsockopt(socket.IPPROTO_IP, IP_MULTICAST_ALL, 0)
    listener.sock.setsockopt(socket.IPPROTO_IP, socket.IP_DROP_MEMBERSHIP, membership)
    await _until(
        lambda: session._mdns is not deaf and there.health().announced,
        lambda: session.ask(check=asked),
    )
    await make().open(advert(), ear)
    await ear.hears(Heard(said))


async def test_it_hears_itself_when_nothing_is_in_the_way(make: Make) -> None:
    here = make()
    await here.open(advert(), Ear())
    await _until(lambda: here.health().heard_self)


async def test_a_close_that_is_cancelled_says_goodbye_all_the_same(make: Make) -> None:
    here, ear, said = make(ttl_s=3600), Ear(), advert()
    await make().open(advert(), ear)
    await here.open(said, Ear())
    await ear.hears(Heard(said))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0):
            await here.close()
    await ear.hears(Gone(said.node_id))
    assert not here.health().announced


def test_a_loop_that_ends_during_the_goodbye_leaves_no_socket_open() -> None:
    async def die() -> None:
        neighbours = MdnsNeighbours(interfaces=("127.0.0.1",))
        await neighbours.open(advert(), Ear())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0):
                await neighbours.close()

    asyncio.run(die())
    gc.collect()  # A socket that was left open would be told here, as a warning.


# ---- Under fire --------------------------------------------------------------------------------


@pytest.fixture
def shout() -> Iterator[Callable[[bytes], None]]:
    """Multicast raw bytes to the port of mDNS from loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))

        def send(packet: bytes) -> None:
            with contextlib.suppress(BlockingIOError):
                sender.sendto(packet, GROUP)

        yield send


def _dns_name(name: str) -> bytes:
    return b"".join(bytes([len(p)]) + p for p in name.encode().rstrip(b".").split(b".")) + b"\0"


def _record(name: str, kind: int, data: bytes, *, ttl_s: int = 120) -> bytes:
    return _dns_name(name) + struct.pack(">HHIH", kind, 1, ttl_s, len(data)) + data


def _response(*records: bytes) -> bytes:
    return struct.pack(">HHHHHH", 0, 0x8400, 0, len(records), 0, 0) + b"".join(records)


def _pointer(label: str, *, ttl_s: int = 4500) -> bytes:
    return _record(SERVICE_TYPE, 12, _dns_name(f"{label}.{SERVICE_TYPE}"), ttl_s=ttl_s)


def _forged(said: Advert, *, text: bytes | None = None) -> bytes:
    """Every record of a node, as anybody on the network can send it."""
    name, host = f"{said.node_id}.{SERVICE_TYPE}", f"coase-{said.node_id}.local."
    pairs = (f"{key}={value}".encode() for key, value in said.properties().items())
    text = b"".join(bytes([len(p)]) + p for p in pairs) if text is None else text
    return _response(
        _pointer(said.node_id),
        _record(name, 33, struct.pack(">HHH", 0, 0, said.port) + _dns_name(host)),
        _record(name, 16, text),
        *(_record(host, 1, socket.inet_aton(address)) for address in said.addresses),
    )


async def test_a_goodbye_can_be_forged_and_is_taken_back(
    make: Make, shout: Callable[[bytes], None]
) -> None:
    ear, said = Ear(), advert()
    await make().open(advert(), ear)
    await make().open(said, Ear())
    await ear.hears(Heard(said))
    goodbye = _response(_pointer(said.node_id, ttl_s=0))
    await _until(lambda: Gone(said.node_id) in ear.all, lambda: shout(goodbye))
    await ear.until(lambda: ear.of(said.node_id)[-1] == Heard(said))


async def test_garbage_is_survived_counted_and_kept_off_the_terminal(
    make: Make, shout: Callable[[bytes], None], capfd: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(5)
    here, ear, said = make(), Ear(), advert()
    await here.open(advert(), ear)
    packet = _forged(advert())
    troubles: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: troubles.append(context))
    for number in range(1500):
        shout(rng.randbytes(rng.randrange(1400)))
        cut = bytearray(packet[: rng.randrange(1, len(packet))])
        cut[rng.randrange(len(cut))] ^= 1 << rng.randrange(8)
        shout(bytes(cut))
        shout(b"\0\0\x84\0" + rng.randbytes(rng.randrange(300)))
        if number % 50 == 0:
            await asyncio.sleep(0)
    logging.getLogger("zeroconf").warning("nonsense \x1b[31m %s", "x" * 999)
    odd = advert(name="odd")
    await make().open(said, Ear())
    await ear.hears(Heard(said))
    # The kernel drops what comes too fast, so this one is said until it was heard.
    forged = _forged(odd, text=b"\x04id=1")
    await _until(
        lambda: any(isinstance(n, Malformed) for n in ear.of(odd.node_id)), lambda: shout(forged)
    )
    asyncio.get_running_loop().set_exception_handler(None)
    assert troubles == []
    assert here.health().malformed > 0
    assert here.health().complaints > 0
    assert here.health().last_complaint.isprintable()
    written = capfd.readouterr()
    assert written.out + written.err == ""


async def test_endless_names_are_followed_up_to_a_limit(
    make: Make, shout: Callable[[bytes], None]
) -> None:
    here, ear, said = make(), Ear(), advert()
    friend, late = advert(network=said.network), advert(network=said.network)
    membership = Membership(said, loopback=True)
    await here.open(said, ear)
    await make().open(friend, Ear())
    await ear.hears(Heard(friend))
    session = here._session
    assert session is not None
    async with asyncio.timeout(_DEADLINE_S):
        while here.health().dropped < 2000:  # The kernel drops some of what comes too fast.
            for _ in range(20):
                shout(_response(*(_pointer(secrets.token_hex(8)) for _ in range(20))))
                shout(_response(*(_pointer(f"odd {secrets.token_hex(4)}") for _ in range(20))))
                shout(_forged(advert(addresses=("127.0.0.9",))))
                shout(_forged(advert(addresses=("127.0.0.9",), network=said.network)))
            assert len(session._names) <= NAMES_MAX
            assert len(session._odd) <= mdns.ODD_NAMES_MAX
            assert session._resolving <= mdns.RESOLVING_MAX
            assert len(session._tasks) <= 2 * mdns.RESOLVING_MAX + 2, "some of them are done"
            await asyncio.sleep(0.01)
    await make().open(late, Ear())
    await ear.until(lambda: all(ear.of(one.node_id)[-1:] == [Heard(one)] for one in (friend, late)))
    for news in ear.all:
        membership.note(news, 0)
    assert len(membership.rows(0)) < 400
    assert len(membership.routes(0)) < 32


# ---- When it cannot work -----------------------------------------------------------------------


def test_a_port_that_is_held_is_named() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("", 0))
        port = holder.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"UDP port {port}.*ss -ulpn"):
            require_port(port)
    require_port()


async def test_no_address_of_this_machine_is_no_way_to_be_found() -> None:
    neighbours = MdnsNeighbours(interfaces=("203.0.113.77",))
    with pytest.raises(ConfigurationError, match="no network address"):
        await neighbours.open(advert(), Ear())
    assert not neighbours.health().announced
    with pytest.raises(ConfigurationError, match="no network address"):
        await neighbours.open(advert(), Ear())


# ---- The addresses of this machine -------------------------------------------------------------


def test_addresses_are_told_in_a_fixed_order() -> None:
    everywhere = local_addresses()
    assert everywhere == local_addresses()
    assert not any(a.startswith(("127.", "fe80:")) or a == "::1" for a in everywhere)
    assert "127.0.0.1" in local_addresses(loopback=True)


async def test_a_change_of_address_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([("10.0.0.1",), ("10.0.0.1",), (), ("10.0.0.2",)])
    monkeypatch.setattr(
        "coase.protocol.backends.interfaces.local_addresses", lambda **_: next(seen)
    )
    changes = watch_addresses(every_s=0)
    assert [await anext(changes) for _ in range(3)] == [("10.0.0.1",), (), ("10.0.0.2",)]


# ---- Two machines ------------------------------------------------------------------------------


def _ip(*words: str) -> None:
    subprocess.run(("ip", *words), check=True, capture_output=True, text=True)


@pytest.fixture
def two_machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them: 10.77.0.1 and 10.77.0.2."""
    if not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("two network namespaces need iproute2 and root: run as root to test it")
    tag = secrets.token_hex(3)
    here, there = f"coase-a-{tag}", f"coase-b-{tag}"
    try:
        try:
            _ip("netns", "add", here)
            _ip("netns", "add", there)
            _ip("-n", here, "link", "add", "v0", "type", "veth", "peer", "v0", "netns", there)
        except subprocess.CalledProcessError as error:
            why = error.stderr.strip()
            pytest.skip(f"no network namespaces here ({why}): they need CAP_SYS_ADMIN and veth")
        for number, name in enumerate((here, there), start=1):
            _ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "v0")
            if HAS_IPV6:
                _ip("-n", name, "address", "add", f"fd77::{number}/64", "dev", "v0", "nodad")
            _ip("-n", name, "link", "set", "v0", "up")
        yield here, there
    finally:
        for name in (here, there):
            subprocess.run(("ip", "netns", "delete", name), check=False, capture_output=True)


async def test_two_machines_find_each_other_and_again_after_the_cable_was_out(
    two_machines: tuple[str, str],
) -> None:
    has = [("10.77.0.1", "fd77::1"), ("10.77.0.2", "fd77::2")]
    one, two = (advert(addresses=both[: 1 + HAS_IPV6]) for both in has)
    here, there = (("ip", "netns", "exec", name) for name in two_machines)
    async with (
        process(one, speak_on=",".join(one.addresses), prefix=here) as first,
        process(two, speak_on=",".join(two.addresses), prefix=there) as second,
    ):
        heard = await hears(first, "Heard", two.node_id)
        assert heard["advert"]["port"] == two.port
        await hears(second, "Heard", one.node_id)
        _ip("-n", two_machines[1], "address", "flush", "dev", "v0")
        _ip("-n", two_machines[1], "link", "set", "v0", "down")
        await hears(first, "Gone", two.node_id)
        await hears(second, "Gone", one.node_id)
        _ip("-n", two_machines[1], "link", "set", "v0", "up")
        _ip("-n", two_machines[1], "address", "add", "10.77.0.2/24", "dev", "v0")
        await hears(first, "Heard", two.node_id)
        await hears(second, "Heard", one.node_id)
        assert second.stdin is not None
        second.stdin.close()
        await hears(first, "Gone", two.node_id)
