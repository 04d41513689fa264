"""``coase identity``: who an agent is in the registries of the chain (ERC-8004)."""

from __future__ import annotations

import secrets
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from coase.protocol.errors import ConfigurationError

from .app import Json, app, emit, out, perform
from .wallet_commands import State, places_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from coase.agents.config import Network
    from coase.agents.profile import Profile
    from coase.agents.wallet import Place
    from coase.escrow.backends.evm.settlement import EvmSettlement
    from coase.escrow.feedback import AgentRecord
    from coase.escrow.ports import Registries
    from coase.protocol.identity import Identity
    from coase.protocol.terms import Domain

GRANTED_MAX_S: Final = 150.0  # Longer than a chain client waits for a block.
POLL_S: Final = 0.1
URI_SHOWN: Final = 60
NAME_SHOWN: Final = 40
SAYS_SHOWN: Final = 200

identity = typer.Typer(
    help="Register an agent on the chain, show who one is, and link its wallet (ERC-8004).",
    no_args_is_help=True,
)
app.add_typer(identity, name="identity")

Mine = Annotated[str, typer.Argument(help="Your agent's name or address.")]


@identity.command("register")
def register(
    agent: Mine,
    uri: Annotated[
        str,
        typer.Option(help="Where you publish the file yourself (https); else the chain has it."),
    ] = "",
    description: Annotated[str, typer.Option(help="What the agent does.")] = "",
    image: Annotated[str, typer.Option(help="A picture's address.")] = "",
    service: Annotated[
        list[str] | None,
        typer.Option(help="An endpoint, as A2A=https://…, MCP=… or web=…; repeatable."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Write the registration file here, to publish it.")
    ] = None,
    state: State = None,
    json_: Json = False,
) -> None:
    """Give an agent its number in the identity registry, and publish its file.

    Costs gas, once. Repeated, it changes what is to be changed and goes on with what was cut short.
    Works beside the agent that has the key, and when it does not run.

    Example: [b]coase identity register oracle --description 'Answers questions.'[/b]
    """
    from coase.agents.profile import Profile

    profile = Profile(
        description=description, image=image, services=_services(service or []), uri=_web(uri)
    )
    document = perform(lambda: _register(agent, profile, file, state))
    _tell(document, as_json=json_)


@identity.command("show")
def show(
    agent: Annotated[
        str, typer.Argument(help="Number, address or name; without it all of yours.")
    ] = "",
    state: State = None,
    json_: Json = False,
) -> None:
    """Show what the registry says of an agent: its number, owner, wallet and file.

    Example: [b]coase identity show 7[/b]
    """
    found = perform(lambda: _show(agent, state))
    if json_:
        emit({"agents": found})
        return
    if not found:
        out.print("none of your agents is registered: coase identity register NAME does it")
    for document in found:
        _tell(document, as_json=False)


@identity.command("link")
def link(
    agent: Mine,
    wallet: Annotated[str, typer.Argument(help="Who is paid: an address, or a key of yours.")],
    signature: Annotated[
        str, typer.Option(help="The wallet's signature, where its key is not yours here.")
    ] = "",
    deadline: Annotated[
        int, typer.Option(min=0, help="The deadline that was signed, in seconds since 1970.")
    ] = 0,
    state: State = None,
    json_: Json = False,
) -> None:
    """Say to whom an agent is paid. The wallet signs that it agrees (EIP-712).

    So a key that is kept elsewhere can own the agent, and the key that sells be its wallet: deals
    are paid to that key, and only what is paid to the wallet counts for the agent's reputation.
    For a wallet whose key is not here it first prints what is to be signed.

    Example: [b]coase identity link treasury oracle[/b]
    """
    signed = _signature(signature, deadline)
    document = perform(lambda: _link(agent, wallet, signed, state))
    if "sign" in document:
        emit(document["sign"])
        return
    _tell(document, as_json=json_)


# ---- what they do ------------------------------------------------------------------------------


async def _register(
    agent: str, profile: Profile, file: Path | None, state: Path | None
) -> dict[str, Any]:
    from coase.agents.config import load_network
    from coase.agents.profile import Directory, Registrar

    from .journals import held_by

    network = load_network()
    place, address = own_key(network, agent, state)
    name = place.names.get(address, agent)
    if holder := held_by(place.path):
        _require_registries(network)
        await _by_node(place.path, address, profile, holder)
        async with looking(network) as (_, registries):
            directory = Directory(registries, from_block=network.from_block)
            made = await directory.owned_by(address)
            if made is None:
                raise ConfigurationError(f"{name} is not registered: see the log of {holder}")
            if file is not None:
                data = profile.file(registries, made.agent_id, name=name, key=address)
                _write(file, data)
            return _document(registries.domain, made) | {"name": name}
    async with _signing(network, place, address) as (settlement, registries, key):
        await _require_coin(settlement, network, key.address)
        directory = Directory(registries, from_block=network.from_block)
        record = await Registrar(registries, directory).register(key, profile, name=name)
        data = profile.file(registries, record.agent_id, name=name, key=key.address)
        if file is not None:
            _write(file, data)
        return _document(registries.domain, record) | {"name": name}


async def _by_node(place: Path, address: str, profile: Profile, holder: str) -> None:
    """Lay the wish down for the node that has the key, and wait until it is granted.

    :raises ConfigurationError: if it is refused, or nobody takes it
    """
    import anyio

    from coase.agents.wishes import Wish

    wish = Wish(secrets.token_hex(8), address, profile)
    wish.place(place)
    with anyio.move_on_after(GRANTED_MAX_S):
        while (why := wish.answer(place)) is None:  # noqa: ASYNC110 - another process writes it
            await anyio.sleep(POLL_S)
        if why:
            raise ConfigurationError(f"it was refused: {why}")
        return
    wish.take_back(place)
    raise ConfigurationError(
        f"{holder} runs this agent ({place}) and does not answer: stop it first, or let its program"
        " say Agent(…, profile=Profile(register=True))"
    )


async def _show(agent: str, state: Path | None) -> list[dict[str, Any]]:
    from coase.agents.config import load_network
    from coase.agents.profile import Directory

    network = load_network()
    async with looking(network) as (_, registries):
        if agent:
            record = await find(network, registries, agent, state)
            return [_document(registries.domain, record)]
        directory = Directory(registries, from_block=network.from_block)
        found = []
        for place in _places(network, state):
            for address, name in sorted(place.names.items()):
                if (mine := await directory.owned_by(address)) is not None:
                    found.append(_document(registries.domain, mine) | {"name": name})
        return found


async def _link(
    agent: str, wallet: str, signed: tuple[bytes, int] | None, state: Path | None
) -> dict[str, Any]:
    from coase.agents.config import load_network
    from coase.agents.profile import LINK_LIFE_S, Directory, Registrar
    from coase.agents.wiring import unlock_keys
    from coase.agents.withdrawal import checked_address, identity_in

    network = load_network()
    place, address = own_key(network, agent, state)
    theirs = _key_named(network, wallet, state)
    target = theirs[1] if theirs is not None else checked_address(wallet)
    async with _signing(network, place, address) as (settlement, registries, key):
        directory = Directory(registries, from_block=network.from_block)
        record = await directory.owned_by(key.address)
        if record is None:
            raise ConfigurationError(
                f"{agent} is not registered yet: coase identity register {agent} does it"
            )
        registrar = Registrar(registries, directory)
        now_s = (await settlement.head()).time_s
        if signed is not None:
            await _require_coin(settlement, network, key.address)
            record = await registrar.link_signed(
                record, key, target, deadline_s=signed[1], signature=signed[0]
            )
        elif theirs is not None:
            await _require_coin(settlement, network, key.address)
            ring = unlock_keys(network, theirs[0].path)
            other = identity_in(ring, theirs[0].path, target)
            record = await registrar.link(record, key, other, now_s=now_s)
        elif record.wallet != target:
            return {"sign": _typed_data(registries, record, target, now_s + LINK_LIFE_S)}
        return _document(registries.domain, record)


# ---- finding -----------------------------------------------------------------------------------


async def find(
    network: Network, registries: Registries, agent: str, state: Path | None
) -> AgentRecord:
    """Return the agent that somebody means: by number, address, or as a name of one's own.

    :raises ConfigurationError: if it is not registered; says what to do
    """
    from coase.agents.profile import Directory
    from coase.agents.withdrawal import checked_address
    from coase.escrow.feedback import registry_name

    where = registry_name(network.chain_id, registries.domain.contract)
    if agent.isdecimal():
        number = int(agent)
        record = await registries.agent(number) if number < 2**256 else None
        if record is None:
            raise ConfigurationError(f"no agent {agent} is registered at {where}")
        return record
    mine = _key_named(network, agent, state)
    if mine is None and not agent.startswith("0x"):
        raise ConfigurationError(
            f"{agent!r} is no agent's number or address, and no key of yours: see coase keys list"
        )
    address = mine[1] if mine is not None else checked_address(agent)
    directory = Directory(registries, from_block=network.from_block)
    record = await directory.paid_to(address) or await directory.owned_by(address)
    if record is None:
        hint = f"; coase identity register {agent} does it" if mine is not None else ""
        raise ConfigurationError(f"{address} is not registered as an agent at {where}{hint}")
    return record


def _places(network: Network, state: Path | None) -> list[Place]:
    from coase.agents.wallet import read_places

    return read_places(places_of(network, state))


def _key_named(network: Network, name: str, state: Path | None) -> tuple[Place, str] | None:
    """Return the key that a user calls by name or address, and where it lies."""
    found = [
        (place, address)
        for place in _places(network, state)
        for address, known in place.names.items()
        if name.lower() in (known.lower(), address)
    ]
    if len(found) > 1:
        listed = ", ".join(address for _, address in found)
        raise ConfigurationError(f"several keys are called {name!r}: name one of {listed}")
    return found[0] if found else None


def own_key(network: Network, name: str, state: Path | None) -> tuple[Place, str]:
    """Return a key of the user's, and where it lies.

    :raises ConfigurationError: if there is none of that name
    """
    found = _key_named(network, name, state)
    if found is None:
        raise ConfigurationError(
            f"you have no key called {name!r} on this network: see coase keys list, or make one"
            f" with coase keys new {name}"
        )
    return found


def known_to(network: Network, state: Path | None = None) -> set[str]:
    """Return whom this user can tell from strangers: those he has dealt with, and his own keys."""
    from .journals import deals_below, node_home

    met = {str(row["counterparty"]) for row in deals_below(state or node_home(network))}
    return met | {address for place in _places(network, state) for address in place.names}


# ---- connections -------------------------------------------------------------------------------


@asynccontextmanager
async def looking(network: Network) -> AsyncIterator[tuple[EvmSettlement, Registries]]:
    """Yield the network's settlement and registries, to look at.

    :raises ConfigurationError: if the network has none
    """
    from coase.agents.wiring import view_settlement

    _require_registries(network)
    settlement = await view_settlement(network)
    try:
        yield settlement, await _registries(network, settlement)
    finally:
        await settlement.close()


@asynccontextmanager
async def _signing(
    network: Network, place: Place, address: str
) -> AsyncIterator[tuple[EvmSettlement, Registries, Identity]]:
    """Yield the same to act with one key, whose node must not run: its journal keeps what is sent.

    :raises ConfigurationError: if it runs
    """
    from coase.agents.wiring import instead_of_node
    from coase.agents.withdrawal import identity_in

    from .journals import held_by

    _require_registries(network)
    if holder := held_by(place.path):
        raise ConfigurationError(
            f"this agent runs ({holder}, {place.path}), and nobody else may use its key: stop it"
            " first"
        )
    async with instead_of_node(network, place.path) as (_, keys, settlement):
        key = identity_in(keys, place.path, address)
        yield settlement, await _registries(network, settlement), key


async def _registries(network: Network, settlement: EvmSettlement) -> Registries:
    from coase.agents.beside import open_beside

    registries = (await open_beside(network, settlement)).registries
    assert registries is not None
    return registries


def _require_registries(network: Network) -> None:
    if not network.identity_registry or not network.reputation_registry:
        raise ConfigurationError(
            "this network names no registries of agents: coase deploy --registries puts them on its"
            " chain and into the file, or start a fresh network with coase up"
        )


async def _require_coin(settlement: EvmSettlement, network: Network, address: str) -> None:
    """See to it that a key can pay for gas; test coin on a local chain."""
    from coase.escrow.backends.evm.deploy import give
    from coase.escrow.chains import name_of_chain

    if await settlement.chain.coin(address):
        return
    if not network.faucet:
        raise ConfigurationError(
            f"{address} has none of the coin of {name_of_chain(network.chain_id)} to pay for gas:"
            " send it a little; nothing was sent"
        )
    await give(settlement.chain, address, token=network.token, units=0)


# ---- telling -----------------------------------------------------------------------------------


def _document(domain: Domain, record: AgentRecord) -> dict[str, Any]:
    from pydantic_core import from_json

    from coase.escrow.feedback import from_data_uri, registry_name

    data = from_data_uri(record.uri)
    try:
        file = from_json(data) if data is not None else None
    except ValueError:
        file = None
    return {
        "agent_id": record.agent_id,
        "registry": registry_name(domain.chain_id, domain.contract),
        "owner": record.owner,
        "wallet": record.wallet,
        "paid_to": record.paid_to,
        "uri": record.uri,
        "file": file if isinstance(file, dict) else None,
    }


def _tell(document: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        emit(document)
        return
    file = document["file"] or {}
    name = document.get("name") or _shown(file.get("name"), NAME_SHOWN) or "?"
    uri = _shown(document["uri"], URI_SHOWN) or "none"
    lines = [
        f"{name} is agent {document['agent_id']} of {document['registry']}",
        f"  owner   {document['owner']}",
        f"  paid to {document['paid_to']}",
        f"  file    {uri}",
    ]
    if says := _shown(file.get("description"), SAYS_SHOWN):
        lines.append(f"  says    {says}")
    out.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _shown(text: object, most: int) -> str:
    """Return what a stranger wrote as one line, no longer than ``most``."""
    line = " ".join(str(text or "").split())
    return line if len(line) <= most else f"{line[:most]}…"


def _typed_data(
    registries: Registries, record: AgentRecord, wallet: str, deadline_s: int
) -> dict[str, Any]:
    """Return what a wallet signs to be paid for an agent, as eth_signTypedData_v4 takes it."""
    domain = registries.domain
    fields = {"agentId": "uint256", "newWallet": "address", "owner": "address"}
    fields["deadline"] = "uint256"
    about = {"name": "string", "version": "string", "chainId": "uint256"}
    about["verifyingContract"] = "address"

    def typed(names: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "type": kind} for name, kind in names.items()]

    return {
        "types": {"EIP712Domain": typed(about), "AgentWalletSet": typed(fields)},
        "primaryType": "AgentWalletSet",
        "domain": {
            "name": domain.name,
            "version": domain.version,
            "chainId": domain.chain_id,
            "verifyingContract": domain.contract,
        },
        "message": {
            "agentId": str(record.agent_id),
            "newWallet": wallet,
            "owner": record.owner,
            "deadline": str(deadline_s),
        },
    }


def _services(told: list[str]) -> dict[str, str]:
    services = {}
    for one in told:
        kind, found, where = one.partition("=")
        if not found or not kind or not where:
            raise typer.BadParameter(f"{one!r}: say it as KIND=ADDRESS, such as A2A=https://…")
        services[kind] = where
    return services


def _web(uri: str) -> str:
    if uri and not uri.startswith(("https://", "ipfs://")):
        raise typer.BadParameter(f"{uri!r} is no address that others can open: https:// or ipfs://")
    return uri


def _signature(signature: str, deadline: int) -> tuple[bytes, int] | None:
    if not signature and not deadline:
        return None
    try:
        data = bytes.fromhex(signature.removeprefix("0x"))
    except ValueError:
        data = b""
    if not data or not deadline:
        raise typer.BadParameter("--signature is 0x and hex digits, and comes with --deadline")
    return data, deadline


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from error
