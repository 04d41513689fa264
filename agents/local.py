"""A whole market on one machine: broker, chain with contracts and faucet, and an arbiter."""

from __future__ import annotations

import logging
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import anyio

from coase.escrow.backends.devchain import EXIT_JOURNAL, DevChain, start_devchain
from coase.protocol.backends.broker import EmbeddedBroker

from .beside import BESIDE
from .config import NatsAddress, Network
from .room import wait_for_room
from .supervisor import supervise

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from coase.protocol.identity import Identity

log = logging.getLogger(__name__)

BROKER_DIRECTORY: Final = "broker"
CHAIN_DIRECTORY: Final = "chain"
ROOM_LOOK_S: Final = 2


@asynccontextmanager
async def local_market(
    state: Path,
    *,
    net: str = "local",
    arbiter: Identity | None = None,
    nats_port: int = 0,
    rpc_port: int = 0,
    keep: bool = True,
    broker: EmbeddedBroker | None = None,
) -> AsyncIterator[Network]:
    """Run broker and chain as children of this process and yield the network that they make.

    Both end with this process, however it ends. With ``keep`` the chain continues where it was.
    A ``broker`` of the caller's, not started yet, takes the place of one for this machine alone.

    :raises ConfigurationError: if a port is taken or the state cannot be used
    """
    await anyio.Path(state).mkdir(parents=True, exist_ok=True, mode=0o700)
    if broker is None:
        broker = EmbeddedBroker(net=net, port=nats_port, state_dir=state / BROKER_DIRECTORY)
    with (state / "chain.log").open("ab") as chain_log:
        chain: DevChain | None = None

        async def keep_chain() -> None:
            """Start the chain again, on the same port and from the same blocks, when it dies."""
            nonlocal chain
            while chain is not None:
                code = await chain.process.wait()
                if code == EXIT_JOURNAL:
                    await room(state / CHAIN_DIRECTORY)
                log.warning("the chain ended with %s and is started again", code)
                port = int(chain.rpc.rpartition(":")[2].strip("/"))
                chain = await start_devchain(
                    state=state / CHAIN_DIRECTORY, port=port, log=chain_log
                )

        try:
            await broker.start()
            chain = await start_devchain(
                state=state / CHAIN_DIRECTORY if keep else None, port=rpc_port, log=chain_log
            )
            network = Network(
                net=net,
                nats=address_of(broker),
                rpc=chain.rpc,
                chain_id=chain.chain_id,
                token=chain.token,
                factory=chain.factory,
                escrow=chain.escrow,
                **{name: getattr(chain, name) for name in BESIDE},
                arbiters=(arbiter.address,) if arbiter is not None else (),
                faucet=True,
                bank=chain.deployer,
                pid=os.getpid(),
                state=str(state),
            )
            async with anyio.create_task_group() as group:
                group.start_soon(supervise, "broker", lambda: keep_broker(broker))
                if keep:
                    group.start_soon(supervise, "chain", keep_chain)
                try:
                    yield network
                finally:
                    group.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                if chain is not None:
                    await chain.close()
                await broker.stop()


async def room(directory: Path) -> None:
    """Say that the disk refused the chain, and return when it may take its blocks again.

    What was not written was shown to nobody: nothing is lost, and nothing goes on meanwhile.
    """
    log.error(
        "the chain stands still: %s cannot be written, its disk is full or refuses. Nothing is"
        " lost; make room, and it goes on by itself",
        directory,
    )
    await wait_for_room(directory, every_s=ROOM_LOOK_S)
    log.error("there is room again at %s: the chain goes on", directory)


def address_of(broker: EmbeddedBroker) -> NatsAddress:
    """Return how programs of this machine reach a broker that was started."""
    config = broker.client_config()
    return NatsAddress(url=broker.url, user=config.user, password=config.password)


async def keep_broker(broker: EmbeddedBroker) -> None:
    """Start the broker again, on the same port, whenever it dies."""
    while True:
        code = await broker.wait()
        log.warning("the broker ended with %s and is started again", code)
        await broker.start()
