"""``coase deploy``: the contracts on any EVM chain, and a network file for everybody else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from coase.protocol.errors import ConfigurationError

from .app import Json, app, emit, out, perform, say

if TYPE_CHECKING:
    from coase.agents.config import Network
    from coase.escrow.backends.evm.chain import EvmChain
    from coase.escrow.backends.evm.deploy import Deployment, Piece
    from coase.escrow.backends.evm.deploy_known import Wanted
    from coase.escrow.chains import ChainKind
    from coase.escrow.presets import Preset
    from coase.protocol.identity import Identity

DEPLOYER: Final = "deployer"
NATS_DEFAULT: Final = "nats://127.0.0.1:4222"
JOURNAL: Final = "journal.sqlite"
_OWNERS: Final = ("token", "escrow", "vault", "panels")
"""Where these are follows from who makes the token."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asked for."""

    rpc: str
    preset: str
    token: str
    new_token: bool
    stakes: bool
    channels: bool
    registries: bool
    network: Path | None
    state: Path | None
    net: str
    nats: str
    arbiters: tuple[str, ...]
    dry_run: bool


@app.command()
def deploy(
    rpc: Annotated[
        str, typer.Option(help="JSON-RPC endpoint of the chain; several with commas between.")
    ],
    preset: Annotated[
        str, typer.Option(help="local, base or base-sepolia; any other chain needs none.")
    ] = "",
    token: Annotated[
        str, typer.Option(help="Address of an ERC-20 that is there: the money of the network.")
    ] = "",
    new_token: Annotated[
        bool, typer.Option("--new-token", help="Make a token, all yours: on test chains only.")
    ] = False,
    stakes: Annotated[
        bool, typer.Option("--stakes", help="Also the vault of stakes and the factory of panels.")
    ] = False,
    channels: Annotated[
        bool, typer.Option("--channels", help="Also payment channels, where x402's are missing.")
    ] = False,
    registries: Annotated[
        bool, typer.Option("--registries", help="Also ERC-8004's registries, where missing.")
    ] = False,
    network: Annotated[
        Path | None, typer.Option(help="Write what others need to this file (mode 0600).")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Directory of the deployer's key and journal.")
    ] = None,
    net: Annotated[str, typer.Option(help="Name of the market in the file.")] = "main",
    nats: Annotated[str, typer.Option(help="Broker of the market in the file.")] = NATS_DEFAULT,
    arbiter: Annotated[
        list[str] | None, typer.Option(help="Address of an arbiter in the file; repeatable.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is there, what is missing, and its cost.")
    ] = False,
    json_: Json = False,
) -> None:
    """Put the contracts on a chain: factory and escrow, and on a test chain a token.

    Payment channels and ERC-8004's registries are found where everybody knows them; on a
    development chain, or if you say so, they are put there where they are missing.
    Where the deterministic deployer is, the addresses follow from the code alone. Killed at any
    moment it goes on when it is started again, and what is there is compared byte for byte.

    Example: [b]coase deploy --rpc https://rpc.example --preset base-sepolia --dry-run[/b]
    """
    wish = Wish(
        rpc=rpc,
        preset=preset,
        token=token.lower(),
        new_token=new_token,
        stakes=stakes,
        channels=channels,
        registries=registries,
        network=network,
        state=state,
        net=net,
        nats=nats,
        arbiters=tuple(address.lower() for address in arbiter or ()),
        dry_run=dry_run,
    )
    document = perform(lambda: _deploy(wish))
    if json_:
        emit(document)
    else:
        _show(document)


async def _deploy(wish: Wish) -> dict[str, Any]:
    from coase.agents.backends.sqlite import SqliteJournal, SqliteTxStore, StateDirectory
    from coase.agents.config import state_home
    from coase.escrow.chains import kind_of_chain
    from coase.escrow.ports import MemoryTxStore

    chain = await _connect(wish, MemoryTxStore())
    try:
        known = _preset(wish, chain.chain_id)
        kind = kind_of_chain(chain.chain_id)
        token = _token(wish, known, kind)
        if token:
            await _require_money(chain, token, known)
        home = wish.state or state_home() / "deploy" / str(chain.chain_id)
        file = _earlier(wish)  # Before anything is paid for: may the file be written at all?
        wanted = _wanted(wish, known, file, kind)
        if wish.dry_run:
            return await _plan(chain, home, token, kind, wish, wanted)
        directory = StateDirectory(home)
        try:
            journal = SqliteJournal(home / JOURNAL)
            try:
                chain.store = SqliteTxStore(journal)
                key = _key(home, kind)
                return await _perform(chain, key, token, known, wish, file, kind, wanted)
            finally:
                await journal.close()
        finally:
            directory.release()
    finally:
        await chain.close()


async def _connect(wish: Wish, store: Any) -> EvmChain:
    """Return the chain, believed as far as its preset says; one that nobody knows, with care."""
    from coase.agents.caution import HEAD_AGE_MAX_S
    from coase.escrow.backends.evm.chain import FEE_MAX_WEI, EvmChain
    from coase.escrow.backends.evm.endpoints import Trust
    from coase.escrow.chains import ChainKind, kind_of_chain
    from coase.escrow.presets import preset_named

    known = preset_named(wish.preset) if wish.preset else None
    if known is not None:
        return await EvmChain.connect(
            wish.rpc,
            store=store,
            chain_id=known.chain_id,
            fee_max_wei=known.fee_max_wei,
            trust=Trust(head_age_max_s=known.head_age_max_s),
        )
    chain = await EvmChain.connect(wish.rpc, store=store, fee_max_wei=FEE_MAX_WEI)
    if kind_of_chain(chain.chain_id) is ChainKind.LOCAL:
        return chain
    await chain.close()
    trust = Trust(head_age_max_s=HEAD_AGE_MAX_S)
    return await EvmChain.connect(wish.rpc, store=store, chain_id=chain.chain_id, trust=trust)


def _preset(wish: Wish, chain_id: int) -> Preset | None:
    from coase.escrow.presets import preset_of

    known = preset_of(chain_id)
    if known is not None and not wish.preset and known.kind != "local":
        raise ConfigurationError(
            f"{wish.rpc} serves chain {chain_id}, which is {known.name}: say --preset {known.name}"
            " if that is meant, so that no mistyped endpoint is paid for"
        )
    return known


def _token(wish: Wish, known: Preset | None, kind: ChainKind) -> str:
    """Return the token to use; empty stands for one that is to be made."""
    from coase.escrow.chains import ChainKind

    if wish.token and wish.new_token:
        raise ConfigurationError("--token and --new-token: give one of them")
    if wish.new_token:
        if kind is ChainKind.MAIN:
            raise ConfigurationError(
                "--new-token makes a token of no worth: on a chain with real money name one that"
                " people hold, with --token"
            )
        return ""
    if wish.token:
        if len(wish.token) != 42 or not wish.token.startswith("0x"):
            raise ConfigurationError(f"{wish.token!r} is no address: 0x and 40 hex digits")
        return wish.token
    if known is not None and known.token is not None:
        return known.token.address
    if kind is ChainKind.LOCAL:
        return ""
    raise ConfigurationError(
        "which money? Name an ERC-20 of the chain with --token"
        + ("" if kind is ChainKind.MAIN else ", or make one of no worth with --new-token")
    )


async def _require_money(chain: EvmChain, token: str, known: Preset | None) -> None:
    """Return if there is a token at that address, and if it is the one that the preset knows.

    :raises ConfigurationError: otherwise
    """
    from coase.escrow.backends.evm.settlement import token_facts

    facts = await token_facts(chain, token)
    expected = known.token if known is not None else None
    if expected is None or expected.address != token:
        return
    told = (facts.domain.name, facts.domain.version, facts.asset.decimals)
    if told != (expected.name, expected.version, expected.decimals):
        raise ConfigurationError(
            f"at {token} should be {expected.name!r}, version {expected.version!r}, with"
            f" {expected.decimals} decimals, and the endpoint says {told[0]!r}, {told[1]!r},"
            f" {told[2]}: it lies, or the token has changed; try another endpoint"
        )


def _key(home: Path, kind: ChainKind) -> Identity:
    from coase.agents.passphrase import find_passphrase
    from coase.escrow.backends.keystore import open_keyring
    from coase.escrow.chains import ChainKind

    phrase = find_passphrase(home, local=kind is ChainKind.LOCAL)
    return open_keyring(home, passphrase=phrase).derive(DEPLOYER)


def _known_address(home: Path) -> str:
    """Return the deployer's address if there is one, without opening any key."""
    from coase.escrow.backends.keystore import names_in

    return names_in(home).get(DEPLOYER, "")


def _earlier(wish: Wish) -> Network | None:
    """Return the network file that is there already.

    :raises ConfigurationError: if it is none
    """
    from coase.agents.config import load_network

    if wish.network is None or not wish.network.exists():
        return None
    return load_network(wish.network)


def _wanted(wish: Wish, known: Preset | None, file: Network | None, kind: ChainKind) -> Wanted:
    """Return what is to stand beside the escrow that everybody knows by its address."""
    from coase.escrow.backends.evm.deploy_known import Wanted
    from coase.escrow.chains import ChainKind

    own = kind is ChainKind.LOCAL
    wanted = Wanted(channels=wish.channels or own, registries=wish.registries or own)
    for place in (file, known):
        if place is not None and place.identity_registry and place.reputation_registry:
            return replace(
                wanted,
                identity_registry=place.identity_registry,
                reputation_registry=place.reputation_registry,
            )
    return wanted


async def _pieces(
    chain: EvmChain, owner: str, token: str, wish: Wish, wanted: Wanted
) -> tuple[Piece, ...]:
    """Return what is there and what is missing, of all that was asked for."""
    from coase.escrow.backends.evm.deploy import plan
    from coase.escrow.backends.evm.deploy_known import plan_known, require_made

    beside = await plan_known(chain, wanted)
    if wish.channels:
        require_made(beside, "channels")
    return (*await plan(chain, owner, token=token, beside=wish.stakes), *beside)


async def _plan(
    chain: EvmChain, home: Path, token: str, kind: ChainKind, wish: Wish, wanted: Wanted
) -> dict[str, Any]:
    """Return what is there and what the rest costs; nothing is written anywhere."""
    from coase.protocol.types import ZERO_ADDRESS

    owner = _known_address(home)
    pieces = await _pieces(chain, owner or ZERO_ADDRESS, token, wish, wanted)
    if not owner and not token:  # All others follow from the owner of the new token.
        pieces = tuple(
            replace(piece, address="") if piece.what in _OWNERS else piece for piece in pieces
        )
    price_wei, _ = await chain.fees()
    return {
        "chain_id": chain.chain_id,
        "kind": kind.value,
        "deployer": owner,
        "pieces": [_row(piece) for piece in pieces],
        "gas": sum(piece.gas for piece in pieces),
        "gas_price_max_wei": str(price_wei),
        "cost_max_wei": str(price_wei * sum(piece.gas for piece in pieces)),
        "notes": await _notes(chain, token),
        "dry_run": True,
    }


def _row(piece: Piece) -> dict[str, Any]:
    return {
        "what": piece.what,
        "address": piece.address,
        "there": piece.there,
        "gas": piece.gas,
    }


async def _notes(chain: EvmChain, token: str) -> list[str]:
    """Return what one should know of the token and the chain."""
    from coase.escrow.backends.evm.deploy import has_proxy
    from coase.escrow.backends.evm.settlement import token_facts
    from coase.escrow.ports import FundingKind

    notes = []
    if token:
        facts = await token_facts(chain, token)
        if facts.kinds == (FundingKind.ALLOWANCE,):
            notes.append(
                f"{facts.asset.symbol} takes no signatures (neither EIP-3009 nor EIP-2612): each"
                " wallet's first deal costs one transaction more, which approves the escrow"
            )
        notes.append(
            "a token that takes a fee when it is moved cannot be used: the first lock would be"
            " refused, before it costs anything"
        )
    if not await has_proxy(chain):
        notes.append(
            "the deterministic deployer is not on this chain: addresses follow from the"
            " deployer's key, and others must be told them"
        )
    return notes


async def _perform(
    chain: EvmChain,
    key: Identity,
    token: str,
    known: Preset | None,
    wish: Wish,
    file: Network | None,
    kind: ChainKind,
    wanted: Wanted,
) -> dict[str, Any]:
    from coase.agents.beside import BESIDE
    from coase.escrow.backends.evm import deploy as deploying
    from coase.escrow.backends.evm.deploy_known import deploy_known
    from coase.escrow.backends.evm.settlement import token_facts

    pieces = await _pieces(chain, key.address, token, wish, wanted)
    _refuse_other(wish, file, chain.chain_id, pieces)
    await _require_coin(chain, key.address, pieces, kind)
    before_wei = await chain.coin(key.address)
    for piece in pieces:
        if not piece.there:
            say(f"putting the {piece.what} on chain {chain.chain_id} …")
    made = await deploying.deploy(chain, key, token=token)
    places = await deploy_known(chain, key, wanted)
    if wish.stakes:
        places["vault"], places["panels"] = await deploying.deploy_beside(chain, key, made)
    beside = {name: places.get(name, "") for name in BESIDE}
    facts = await token_facts(chain, made.token)
    written = ""
    if wish.network is not None:
        written = str(_write(wish, wish.network, file, made, known, facts.asset, beside))
    return {
        "chain_id": made.chain_id,
        "kind": kind.value,
        "deployer": key.address,
        "token": made.token,
        "symbol": facts.asset.symbol,
        "decimals": facts.asset.decimals,
        "factory": made.factory,
        "escrow": made.escrow,
        **beside,
        "from_block": made.block,
        "pieces": [_row(piece) for piece in pieces],
        "paid_wei": str(before_wei - await chain.coin(key.address)),
        "notes": await _notes(chain, token),
        "network": written,
        "dry_run": False,
    }


def _refuse_other(
    wish: Wish, file: Network | None, chain_id: int, pieces: tuple[Piece, ...]
) -> None:
    """Return if the network file is not another network's."""
    if file is None:
        return
    escrow = next(piece.address for piece in pieces if piece.what == "escrow")
    if file.chain_id != chain_id or (escrow and file.escrow != escrow):
        raise ConfigurationError(
            f"{wish.network} describes another network (escrow {file.escrow} on chain"
            f" {file.chain_id}): move it away or name another file; nothing was sent"
        )


async def _require_coin(
    chain: EvmChain, address: str, pieces: tuple[Piece, ...], kind: ChainKind
) -> None:
    """See to it that the deployer can pay: on a local chain by its faucet."""
    from coase.escrow.backends.evm.chain import coin_text
    from coase.escrow.backends.evm.deploy import DEPLOY_GAS
    from coase.escrow.chains import ChainKind, name_of_chain

    missing = [piece for piece in pieces if not piece.there]
    if not missing:
        return
    price_wei, _ = await chain.fees()
    # The last one reserves its whole limit for a moment.
    need_wei = price_wei * (sum(piece.gas for piece in missing[:-1]) + DEPLOY_GAS)
    if await chain.coin(address) >= need_wei:
        return
    if kind is ChainKind.LOCAL and await _fill(chain, address, need_wei):
        return
    raise ConfigurationError(
        f"{address} needs {coin_text(need_wei)} of the coin of {name_of_chain(chain.chain_id)}"
        f" and has {coin_text(await chain.coin(address))}: send it the rest and repeat the command."
        " On a rollup add as much for the data; what is not used stays"
    )


async def _fill(chain: EvmChain, address: str, need_wei: int) -> bool:
    """Get test coin from a development chain; return whether it gave some."""
    from coase.escrow.backends.evm.deploy import FAUCET_COIN, give
    from coase.escrow.backends.evm.rpc import RpcFailed

    wei = max(FAUCET_COIN, 2 * need_wei)
    try:
        await give(chain, address, token="", units=0, coin=wei)
        return True
    except ConfigurationError:
        pass
    try:
        await chain.endpoint.ask("anvil_setBalance", address, hex(wei))
    except RpcFailed:
        return False
    return await chain.coin(address) >= need_wei


def _write(
    wish: Wish,
    path: Path,
    file: Network | None,
    made: Deployment,
    known: Preset | None,
    asset: Any,
    beside: dict[str, Any],
) -> Path:
    """Write the network file; what an earlier one says of broker and arbiters stays."""
    from coase.agents.config import NatsAddress, Network, save_network

    fields: dict[str, Any] = {
        "net": wish.net,
        "nats": NatsAddress(url=wish.nats),
        "arbiters": wish.arbiters,
    }
    if file is not None:
        fields = {"net": file.net, "nats": file.nats, "arbiters": wish.arbiters or file.arbiters}
        beside = {name: beside[name] or getattr(file, name) for name in beside}
    if known is not None:
        fields["confirmations"] = known.confirmations
    network = Network(
        rpc=wish.rpc,
        chain_id=made.chain_id,
        token=made.token,
        symbol=asset.symbol,
        decimals=asset.decimals,
        factory=made.factory,
        escrow=made.escrow,
        from_block=made.block,
        **beside,
        **fields,
    )
    return save_network(network, path)


def _show(document: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    from coase.escrow.backends.evm.chain import coin_text

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("what")
    for column in ("address", "state"):
        table.add_column(column, no_wrap=True)
    table.add_column("gas", justify="right")
    for row in document["pieces"]:
        state = "there, checked" if row["there"] else "missing"
        if not document["dry_run"]:
            state = "there, checked" if row["there"] else "made, checked"
        address = document.get(row["what"]) or row["address"] or "(follows from the key)"
        name = row["what"].replace("_", " ")
        table.add_row(name, address, state, f"{row['gas']:,}" if row["gas"] else "")
    out.print(table)
    if document["dry_run"]:
        cost = coin_text(int(document["cost_max_wei"]))
        text = f"nothing was sent; the missing parts cost at most {cost} of the chain's coin"
        out.print(f"{text} (and on a rollup the fee for their data)", soft_wrap=True)
    else:
        paid = coin_text(int(document["paid_wei"]))
        out.print(f"paid {paid} of the chain's coin by {document['deployer']}", soft_wrap=True)
    for note in document["notes"]:
        out.print(f"note: {note}", soft_wrap=True, highlight=False)
    if document.get("network"):
        out.print(
            f"written: {document['network']}; look at nats and arbiters in it, then: "
            f"COASE_NETWORK={document['network']} coase status",
            soft_wrap=True,
            highlight=False,
        )
