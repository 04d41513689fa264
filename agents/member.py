"""A machine that joins a network whose chain another machine holds."""

from __future__ import annotations

import logging
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import anyio

from coase.protocol.errors import (
    ConfigurationError,
    RemoteError,
    TransportUnavailable,
)

from .bridge import ChainWindow
from .card import Card, read_card
from .local import address_of, keep_broker
from .neighbours import ask_card, same_network
from .supervisor import supervise

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from .config import Network
    from .lan import Lan

log = logging.getLogger(__name__)

LOOK_MAX_S: Final = 30.0
"""Then it is said what to check. Multicast takes 0.1 s, a sleepy access point some seconds."""
CARD_AGAIN_S: Final = 0.5
STEADY_S: Final = 1.0  # What is said of the search has been so for this long.
NEWCOMER_S: Final = 10.0
"""So long after its start a machine gives way to another of its name."""
CARD_EVERY_S: Final = 60.0
WHAT_TO_CHECK: Final = (
    "still looking. Check that both machines are on the same network (a guest Wi-Fi often keeps"
    " its machines apart), that coase up --lan still runs on the other, and that no firewall drops"
    " UDP 5353 or the TCP port {port} of this machine. coase doctor says more; coase join --peer"
    " HOST:PORT finds a machine without mDNS"
)


@asynccontextmanager
async def member_of(
    lan: Lan,
    state: Path,
    *,
    card: bytes,
    rpc: str = "",
    rpc_port: int = 0,
    say: Callable[[str], None] = log.info,
    keep: Callable[[bytes], None] = lambda card: None,
) -> AsyncIterator[Network]:
    """Join and yield the network as programs of this machine see it.

    ``card`` is the one that is kept from an earlier time: with it nobody is waited for. Newer
    ones go to ``keep``. ``rpc`` is an endpoint of our own, in place of the holder's.

    :raises ConfigurationError: if this machine cannot take part; says what to do
    """
    current = card
    try:
        await lan.broker.start()
        async with anyio.create_task_group() as group:
            group.start_soon(supervise, "broker", lambda: keep_broker(lan.broker))
            async with lan.running(card=lambda: current):
                group.start_soon(watch_clash, lan, say)
                if not current:
                    current = await _find_card(lan, say)
                    keep(current)
                known = read_card(current)
                group.start_soon(supervise, "card", lambda: _keep_card(lan, known, say, keep))
                window = ChainWindow(lan.calls, known.net, node=lan.node, holder=known.key)
                if rpc:
                    await _require_chain(rpc, known)
                    yield _network(known, lan, state, rpc)
                else:
                    async with window.open(rpc_port) as url:
                        yield _network(known, lan, state, url)
            group.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await lan.broker.stop()


def _network(card: Card, lan: Lan, state: Path, rpc: str) -> Network:
    return card.network(nats=address_of(lan.broker), rpc=rpc, pid=os.getpid(), state=str(state))


async def _find_card(lan: Lan, say: Callable[[str], None]) -> bytes:
    """Return the network's card as soon as a machine that has it is joined."""
    clock = anyio.current_time
    began, told, hinted, seen, seen_at = clock(), "", False, "", clock()
    while True:
        require_place(lan)
        if lan.met:
            try:
                if found := await ask_card(lan.calls, lan.mesh):
                    return found
            except RemoteError as error:
                raise ConfigurationError(str(error)) from error
            except TransportUnavailable as error:
                log.warning("%s", error)
        if (line := progress(lan)) != seen:
            seen, seen_at = line, clock()
        if line != told and (not told or clock() - seen_at >= STEADY_S):
            say(line)
            told = line
        if not hinted and clock() - began > LOOK_MAX_S:
            say(WHAT_TO_CHECK.format(port=lan.broker.route_port))
            hinted = True
        with anyio.move_on_after(CARD_AGAIN_S):
            await lan.changed()


def require_place(lan: Lan) -> None:
    """Return if nothing is known that keeps this machine out for good.

    :raises ConfigurationError: if another machine runs on a copy of this state, or the mesh has
        as many machines as it may
    """
    if trouble := lan.clash or lan.full:
        raise ConfigurationError(trouble)


async def watch_clash(lan: Lan, say: Callable[[str], None]) -> None:
    """Say it when another machine turns out to run on a copy of this state.

    :raises ConfigurationError: if that shows soon after the start: who came later gives way
    """
    with anyio.move_on_after(NEWCOMER_S):
        while True:
            require_place(lan)
            await lan.changed()
    while not lan.clash:
        await lan.changed()
    say(lan.clash)


def progress(lan: Lan) -> str:
    """Return how far the search for the network is, in a line."""
    if lan.met:
        names = ", ".join(sorted(neighbour.name or node for node, neighbour in lan.met.items()))
        return f"joined {names}; the machine that holds the chain is not here yet"
    heard = lan.heard()
    ours = [row for row in heard if row["ours"]]
    others = len(heard) - len(ours)
    parts = ["looking for the network"]
    if ours:
        why = ours[0]["why"].partition("; next try")[0]
        parts.append(f"heard {_machines(len(ours))} of it, not joined" + (why and f": {why}"))
    if others:
        parts.append(f"heard {_machines(others)} with another code")
    parts += [f"{peer}: {why}" for peer, why in lan.peers().items() if why]
    return " … ".join(parts)


def _machines(count: int) -> str:
    return "1 machine" if count == 1 else f"{count} machines"


async def _keep_card(
    lan: Lan, known: Card, say: Callable[[str], None], keep: Callable[[bytes], None]
) -> None:
    """Keep the holder's newest card for the next start, and say if the chain is another one."""
    told = False
    while True:
        with anyio.move_on_after(CARD_EVERY_S):
            await lan.changed()
        try:
            found = await ask_card(lan.calls, lan.mesh)
        except (RemoteError, TransportUnavailable):
            continue
        if found is None:
            continue
        card = read_card(found)
        if same_network(card, known):
            keep(found)
        elif not told:
            say("a machine of this network speaks of another chain; what is known here stays")
            told = True


async def _require_chain(rpc: str, card: Card) -> None:
    """Return if ``rpc`` serves the network's chain.

    :raises ConfigurationError: if it serves another, or has not the network's escrow
    :raises ChainUnavailable: if it does not answer
    """
    # Loading it takes longer than joining a network, and few have an endpoint of their own.
    from coase.escrow.backends.evm.chain import EvmChain
    from coase.escrow.ports import MemoryTxStore

    chain = await EvmChain.connect(rpc, store=MemoryTxStore(), chain_id=card.chain_id)
    try:
        if not await chain.code(card.escrow):
            raise ConfigurationError(
                f"{rpc} has no contract at {card.escrow}: not the network's chain"
            )
    finally:
        await chain.close()
