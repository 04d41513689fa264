"""From a network file to the real parts: broker, chain and keys."""

from __future__ import annotations

from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from coase.escrow.backends.evm.deploy import give
from coase.escrow.backends.evm.settlement import EvmSettlement
from coase.escrow.backends.keystore import KeyRing, open_keyring
from coase.escrow.chains import ChainKind, kind_of_chain
from coase.escrow.ports import MemoryTxStore
from coase.protocol.backends.nats import NatsTransport
from coase.protocol.backends.nats_config import NatsConfig, Tls

from .backends.sqlite import SqliteJournal, SqliteTxStore, StateDirectory
from .caution import check_token, connect_options
from .pace import pace_of
from .passphrase import find_passphrase

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from coase.escrow.ports import Settlement, TxStore

    from .config import Network

FAUCET_UNITS: Final = 100_000_000  # A hundred tokens: some thousand small deals.


async def open_transport(network: Network, *, name: str = "coase") -> NatsTransport:
    """Connect to the network's broker.

    :raises TransportUnavailable: if it does not answer; says what to do
    """
    nats = network.nats
    config = NatsConfig(
        urls=tuple(nats.url.split(",")),
        net=network.net,
        name=name,
        user=nats.user,
        password=nats.password,
        token=nats.token,
        creds_file=Path(nats.creds_file) if nats.creds_file else None,
        tls=Tls(ca_file=Path(nats.ca_file)) if nats.ca_file else None,
        micro=network.faucet,
        follow_cluster=not network.faucet,
    )
    return await NatsTransport.connect(config)


async def open_settlement(network: Network, journal: SqliteJournal) -> EvmSettlement:
    """Connect to the network's chain and its escrow.

    :raises ChainUnavailable: if the endpoint does not answer
    :raises ConfigurationError: if the escrow is not there
    """
    return await _settlement(network, SqliteTxStore(journal))


async def view_settlement(network: Network) -> EvmSettlement:
    """Return the same to look at only: nothing that it sent would be remembered.

    Raises what ``open_settlement`` raises.
    """
    return await _settlement(network, MemoryTxStore())


async def _settlement(network: Network, store: TxStore) -> EvmSettlement:
    settlement = await EvmSettlement.connect(
        network.rpc,
        escrow=network.escrow,
        store=store,
        poll_s=pace_of(network).poll_s,
        **connect_options(network),
    )
    try:
        check_token(settlement, network)
    except BaseException:
        await settlement.close()
        raise
    return settlement


async def ensure_funds(
    settlement: Settlement, network: Network, address: str, *, units: int = FAUCET_UNITS
) -> int:
    """Ask the faucet of a local chain if ``address`` is empty; return what it then holds."""
    balance = await settlement.balance(address)
    if balance == 0 and network.faucet and isinstance(settlement, EvmSettlement):
        await give(settlement.chain, address, token=network.token, units=units)
        balance = await settlement.balance(address)
    return balance


def unlock_keys(network: Network, directory: Path) -> KeyRing:
    """Return the node's keys from its keystore, made if there is none.

    On a local chain the pass phrase is a random file beside the keystore; elsewhere, or where the
    keystore was made with one, it is the owner's: see ``find_passphrase``.

    :raises ConfigurationError: if the keystore cannot be opened; says what to do
    """
    return open_keyring(directory, passphrase=find_passphrase(directory, local=is_local(network)))


@asynccontextmanager
async def instead_of_node(
    network: Network, directory: Path
) -> AsyncIterator[tuple[SqliteJournal, KeyRing, EvmSettlement]]:
    """Yield journal, keys and chain of a node that does not run, to act with its keys.

    Nobody else holds ``directory`` meanwhile, and its journal keeps what is sent.

    :raises ConfigurationError: if another process holds it, or the keystore cannot be opened

    Raises what ``open_settlement`` raises.
    """
    held = StateDirectory(directory)
    try:
        journal = SqliteJournal(directory / "journal.sqlite")
        try:
            keys = unlock_keys(network, directory)
            settlement = await open_settlement(network, journal)
            try:
                yield journal, keys, settlement
            finally:
                await settlement.close()
        finally:
            await journal.close()
    finally:
        held.release()


def is_local(network: Network) -> bool:
    """Return whether nothing is lost with the keys of a network: its chain is a machine's own."""
    return network.faucet and chain_kind(network) is ChainKind.LOCAL


def chain_kind(network: Network) -> ChainKind:
    """Return what a mistake costs on the chain of ``network``."""
    return kind_of_chain(network.chain_id, own=network.faucet)
