"""``coase up``: a local network of one's own."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from coase.protocol.errors import ConfigurationError

from .app import Json, app, emit, err, perform, say
from .lan_host import Hosted, Interfaces, LanPort, LanWish, Peers
from .scratch import alive, scratch

if TYPE_CHECKING:
    from coase.agents.config import Network, PanelOfArbiters

SCRATCH: Final = "coase-up-"
PORTS_FILE: Final = "ports.json"


@app.command()
def up(
    state: Annotated[
        Path | None,
        typer.Option(help="Directory that keeps chain, keys and journal; without it all is lost."),
    ] = None,
    net: Annotated[str, typer.Option(help="Name of the network (local, or lan-…).")] = "",
    nats_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the broker; 0 takes a free one.")
    ] = 0,
    rpc_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the chain; 0 takes a free one.")
    ] = 0,
    lan: Annotated[
        bool, typer.Option("--lan", help="Let machines with the join code in, over the local net.")
    ] = False,
    new_code: Annotated[
        bool, typer.Option("--new-code", help="Make another join code: the old one ends.")
    ] = False,
    open_: Annotated[
        bool, typer.Option("--open", help="Let everybody in, without a code or encryption.")
    ] = False,
    lan_port: LanPort = 0,
    interface: Interfaces = None,
    peer: Peers = None,
    json_: Json = False,
) -> None:
    """Run a market on this machine: broker, chain, contracts, faucet and an arbiter.

    Prints one line of JSON when it is ready, and runs until it is interrupted. Every other
    command finds it by itself. With --lan it shows a join code: [b]coase join CODE[/b] on another
    machine is all that it takes there.

    Example: [b]coase up --state ~/market[/b]
    """
    wish = LanWish(
        lan=lan,
        new_code=new_code,
        open=open_,
        port=lan_port,
        interfaces=tuple(interface or ()),
        peers=tuple(peer or ()),
    )
    wish.require_sense()

    async def work() -> None:
        require_free_place()
        with place(state, SCRATCH) as path:
            await _up(path, Ports(nats_port, rpc_port), net, wish, state is not None, json_)

    perform(work)


def require_free_place() -> None:
    """Return if no network of this user runs already.

    :raises ConfigurationError: if one runs, or the network file is not one of ours
    """
    from coase.agents.config import load_network, network_path

    if not network_path().exists():
        return
    known = load_network()
    if not known.pid:
        raise ConfigurationError(
            f"{network_path()} describes a network that coase up did not start: move it away, or"
            " set COASE_NETWORK to another file"
        )
    if alive(known.pid):
        raise ConfigurationError(
            f"a network runs already (process {known.pid}, {network_path()}); stop it first, or"
            " set COASE_NETWORK to another file for a second one"
        )


def known_network() -> Network | None:
    """Return the network that the network file describes, or None if it does not."""
    from coase.agents.config import load_network

    try:
        return load_network()
    except ConfigurationError:
        return None


def starts_again(network: Network) -> str:
    """Return the command that starts a network of this machine again."""
    from coase.agents.card import LanStateFile

    kept = LanStateFile(Path(network.state)).load()
    command = "coase up"
    if kept is not None:
        command = "coase join" if kept.card else "coase up --lan"
    keep = "" if Path(network.state).name.startswith(SCRATCH) else f" --state {network.state}"
    return command + keep


def ready_line(network: Network) -> dict[str, object]:
    """Return what ``coase up`` prints when it is ready: no secrets."""
    from coase.agents.beside import BESIDE
    from coase.agents.config import network_path

    names = ("factory", "escrow", *BESIDE)
    contracts = {name: getattr(network, name) for name in names}
    return {
        "nats": network.nats.url,
        "rpc": network.rpc,
        "chain_id": network.chain_id,
        "token": network.token,
        "contracts": {name: address for name, address in contracts.items() if address},
        "arbiters": list(network.arbiters),
        "state": network.state,
        "network": str(network_path()),
    }


@contextmanager
def place(state: Path | None, prefix: str) -> Iterator[Path]:
    """Yield the directory for the network's state: the user's, or one that is lost at the end."""
    if state is not None:
        yield state.absolute()
        return
    with scratch(prefix) as path:
        yield path


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports that the user asked for; 0 leaves the choice to us."""

    broker: int
    chain: int

    def choose(self, path: Path, name: str) -> int:
        """Return the port to use: the one asked for, the last one if it is free, or any."""
        if asked := getattr(self, name):
            return int(asked)
        try:
            last = int(json.loads((path / PORTS_FILE).read_text())[name])
        except (OSError, ValueError, LookupError, TypeError):
            return 0
        if not is_free(last):
            say(f"port {last} is taken: the {name} gets another, so start your agents again")
            return 0
        return last


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Return whether somebody could listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError):
            return False
    return True


def keep_ports(path: Path, network: Network) -> None:
    """Remember the ports, so that agents find a network that is started again."""
    ports = {
        name: int(url.rpartition(":")[2])
        for name, url in (("broker", network.nats.url), ("chain", network.rpc))
    }
    (path / PORTS_FILE).write_text(json.dumps(ports) + "\n")


async def _up(path: Path, ports: Ports, net: str, wish: LanWish, keep: bool, as_json: bool) -> None:
    import anyio

    from coase.agents.backends.sqlite import SqliteJournal, StateDirectory
    from coase.agents.beside import open_beside
    from coase.agents.local import local_market
    from coase.agents.node import Node, running
    from coase.agents.panels import follow_panel, keep_panel, with_panel
    from coase.agents.wiring import ensure_funds, open_settlement, open_transport
    from coase.escrow.backends.keystore import open_keystore

    def seated(panel: PanelOfArbiters) -> None:
        keep_panel(path, panel)
        say(f"the panel {panel.address} is known: {panel.threshold} of {len(panel.members)}")

    directory = StateDirectory(path)
    try:
        hosted = wish.host(path, net, ports.choose(path, "broker"))
        seed = open_keystore(path)
        arbiter = seed.derive("arbiter")
        async with local_market(
            path,
            net=hosted.net,
            arbiter=arbiter,
            nats_port=ports.choose(path, "broker"),
            rpc_port=ports.choose(path, "chain"),
            keep=keep,
            broker=hosted.broker,
        ) as network:
            network = with_panel(path, network)
            keep_ports(path, network)
            journal = SqliteJournal(path / "journal.sqlite")
            transport = await open_transport(network, name="coase-up")
            settlement = await open_settlement(network, journal)
            try:
                beside = await open_beside(network, settlement)
                node = Node(network, transport, settlement, journal, seed=seed, beside=beside)
                async with running(node), hosted.running(network, seed):
                    await ensure_funds(settlement, network, arbiter.address)
                    await node.add_arbiter(arbiter)

                    def ready() -> None:
                        _say_ready(network, hosted, keep, as_json)
                        node.runtime.start(partial(follow_panel, node, settlement, seated=seated))

                    await serve(network, ready)
            finally:
                with anyio.CancelScope(shield=True):
                    await settlement.close()
                    await transport.close()
                    await journal.close()
    finally:
        directory.release()


def _say_ready(network: Network, hosted: Hosted, keep: bool, as_json: bool) -> None:
    emit(ready_line(network) | hosted.ready_line(), indent=None)
    if as_json:
        return
    say_ready()
    hosted.say_code()
    if not keep:
        say("nothing is kept when this ends; --state DIR would keep it")


def say_ready() -> None:
    """Tell a person what can be done now."""
    err.print(
        "[green]ready[/]; in other terminals: [b]coase agent run FILE[/b],"
        " [b]coase ask PROMPT --max-price 0.01[/b], [b]coase status[/b]",
        soft_wrap=True,
    )


async def serve(network: Network, announce: Callable[[], None]) -> None:
    """Write the network file, say that we are ready, and wait to be told to stop."""
    import anyio

    from coase.agents.config import load_network, save_network

    require_free_place()  # Somebody else may have been quicker.
    where = save_network(network)
    try:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            announce()
            async for _ in signals:
                break
    finally:
        with suppress(OSError, ConfigurationError):
            if load_network(where).pid == os.getpid():
                where.unlink()
