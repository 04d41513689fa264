"""``coase up``: a local network of one's own."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import anyio
import typer

from coase.agents.config import Network, load_network, network_path, save_network
from coase.protocol.errors import ConfigurationError

from .app import Json, app, err, perform

log = logging.getLogger(__name__)


@app.command()
def up(
    state: Annotated[
        Path | None,
        typer.Option(help="Directory that keeps chain, keys and journal; without it all is lost."),
    ] = None,
    net: Annotated[str, typer.Option(help="Name of the network.")] = "local",
    nats_port: Annotated[int, typer.Option(help="Port of the broker; 0 takes a free one.")] = 0,
    rpc_port: Annotated[int, typer.Option(help="Port of the chain; 0 takes a free one.")] = 0,
    json_: Json = False,
) -> None:
    """Run a market on this machine: broker, chain, contracts, faucet and an arbiter.

    Prints one line of JSON when it is ready, and runs until it is interrupted. Every other
    command finds it by itself.

    Example: [b]coase up --state ~/market[/b]
    """
    perform(lambda: _up(state, net, nats_port, rpc_port, json_))


def require_free_place() -> None:
    """Return if no network of this user runs already.

    :raises ConfigurationError: if one does
    """
    try:
        known = load_network()
    except ConfigurationError:
        return
    if known.pid and alive(known.pid):
        raise ConfigurationError(
            f"a network runs already (process {known.pid}, {network_path()}); stop it first, or"
            " set COASE_NETWORK to another file for a second one"
        )


def alive(pid: int) -> bool:
    """Return whether a process runs, as far as we may know."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def ready_line(network: Network) -> dict[str, object]:
    """Return what ``coase up`` prints when it is ready: no secrets."""
    return {
        "nats": network.nats.url,
        "rpc": network.rpc,
        "chain_id": network.chain_id,
        "token": network.token,
        "contracts": {"factory": network.factory, "escrow": network.escrow},
        "arbiters": list(network.arbiters),
        "state": network.state,
        "network": str(network_path()),
    }


async def _up(state: Path | None, net: str, nats_port: int, rpc_port: int, as_json: bool) -> None:
    from coase.agents.backends.sqlite import SqliteJournal, StateDirectory
    from coase.agents.local import local_market
    from coase.agents.node import Node, running
    from coase.agents.wiring import ensure_funds, open_settlement, open_transport
    from coase.escrow.backends.keystore import open_keystore

    require_free_place()
    keep = state is not None
    path = state or Path(tempfile.mkdtemp(prefix="coase-up-"))
    directory = StateDirectory(path)
    try:
        seed = open_keystore(path)
        arbiter = seed.derive("arbiter")
        async with local_market(
            path, net=net, arbiter=arbiter, nats_port=nats_port, rpc_port=rpc_port, keep=keep
        ) as network:
            journal = SqliteJournal(path / "journal.sqlite")
            transport = await open_transport(network, name="coase-up")
            settlement = await open_settlement(network, journal)
            try:
                node = Node(network, transport, settlement, journal, seed=seed)
                async with running(node):
                    await ensure_funds(settlement, network, arbiter.address)
                    await node.add_arbiter(arbiter)
                    await _serve(network, as_json)
            finally:
                with anyio.CancelScope(shield=True):
                    await settlement.close()
                    await transport.close()
                    await journal.close()
    finally:
        directory.release()
        if not keep:
            shutil.rmtree(path, ignore_errors=True)


async def _serve(network: Network, as_json: bool) -> None:
    """Say that we are ready, and wait to be told to stop."""
    where = save_network(network)
    try:
        sys.stdout.write(json.dumps(ready_line(network)) + "\n")
        sys.stdout.flush()
        if not as_json:
            err.print(
                "[green]ready[/]: in other terminals: [b]coase agent run FILE[/b], "
                "[b]coase ask PROMPT --max-price 0.01[/b], [b]coase status[/b]"
            )
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                break
    finally:
        with suppress(OSError, ConfigurationError):
            if load_network(where).pid == os.getpid():
                where.unlink()
