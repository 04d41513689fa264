"""Putting the contracts on a chain: token, factory and the token's escrow. Safe to repeat.

Where the deterministic deployer proxy is, each contract's address follows from its code, so that
everybody who deploys finds the same and nobody deploys twice; elsewhere it follows from the
deployer's nonce. Each step is an effect of its own in the store, so a deployment that was cut
short goes on where it was, and what is there already is checked instead of deployed again.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from eth_abi.abi import encode as abi_encode

from coase.escrow.presets import DEPLOYER_PROXY, DEPLOYER_PROXY_CODE
from coase.protocol.errors import CallReverted, ChainUnavailable, ConfigurationError
from coase.protocol.identity import keccak256
from coase.protocol.types import ZERO_ADDRESS

from .abi import Abi, factory_abi, token_abi
from .artifacts import artifact
from .chain import EvmChain, Request
from .rpc import RpcFailed

if TYPE_CHECKING:
    from coase.protocol.identity import Identity

DEPLOY_GAS: Final = 12_000_000  # The factory takes 4.6 million, as it carries the escrow's code.
# What each took on the embedded chain: for a plan, where the endpoint cannot estimate a step
# because an earlier one is still to be made.
GAS_MEASURED: Final = {
    "token": 2_200_000,
    "factory": 5_000_000,
    "escrow": 4_400_000,
    "vault": 1_500_000,
    "panels": 1_300_000,
    "channels": 2_100_000,
    "erc3009_collector": 250_000,
    "permit2_collector": 430_000,
    "identity_registry": 1_750_000,
    "reputation_registry": 1_750_000,
}
CONTRACTS: Final = {
    "token": "CoaseToken",
    "factory": "EscrowFactory",
    "escrow": "JobEscrow",
    "vault": "StakeVault",
    "panels": "PanelFactory",
    "channels": "PaymentChannels",
    "erc3009_collector": "ERC3009Collector",
    "permit2_collector": "Permit2Collector",
    "identity_registry": "IdentityRegistry",
    "reputation_registry": "ReputationRegistry",
}
BESIDE: Final = ("vault", "panels")
"""What may stand beside an escrow: the vault of sellers' stakes, the factory of panels."""
SALT: Final = bytes(32)
TRANSFER_GAS: Final = 120_000
COIN_GAS: Final = 21_000
FAUCET_COIN: Final = 10**18
FAUCET_WAIT_MAX_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Deployment:
    """Where the contracts are, and the block from which on the escrow may have events."""

    chain_id: int
    token: str
    factory: str
    escrow: str
    block: int


@dataclass(frozen=True, slots=True)
class Piece:
    """One contract of a deployment: where it is or will be, and what it takes to put it there."""

    what: str
    """A key of ``CONTRACTS``, or what else stands where everybody knows it."""
    address: str
    """Empty if it will follow from the deployer's nonce."""
    there: bool
    gas: int
    """An estimate; 0 if it is there."""


async def plan(
    chain: EvmChain, owner: str, *, token: str = "", factory: str = "", beside: bool = False
) -> tuple[Piece, ...]:
    """Return what ``deploy`` would do for ``owner``, in order, without doing it.

    With ``beside`` also what ``deploy_beside`` would do then.

    :raises ConfigurationError: if at one of the addresses is something else
    """
    pieces = await _plan(chain, owner, token=token, factory=factory)
    if not beside:
        return pieces
    proxy, (coin, maker, _) = await has_proxy(chain), (piece.address for piece in pieces)
    more: list[Piece] = []
    for what in BESIDE:
        address, there = "", False
        if proxy and coin and maker:
            address = created_by_proxy(_beside_code(what, maker, coin))
            there = bool(await chain.code(address))
        if there:
            await require_code(chain, address, CONTRACTS[what])
        more.append(Piece(what, address, there=there, gas=0 if there else GAS_MEASURED[what]))
    return (*pieces, *more)


async def _plan(chain: EvmChain, owner: str, *, token: str, factory: str) -> tuple[Piece, ...]:
    proxy = await has_proxy(chain)
    pieces = [
        await _piece(chain, what, given, owner, proxy=proxy)
        for what, given in (("token", token), ("factory", factory))
    ]
    coin, maker = (piece.address for piece in pieces)
    if not coin or not maker:
        return (*pieces, Piece("escrow", "", there=False, gas=GAS_MEASURED["escrow"]))
    escrow = escrow_address(maker, coin)
    if await chain.code(escrow):
        await require_code(chain, escrow, "JobEscrow")
        return (*pieces, Piece("escrow", escrow, there=True, gas=0))
    ready = all(piece.there for piece in pieces)
    data = factory_abi().encode("deploy", coin)
    gas = await _estimate(chain, owner, maker, data) if ready else 0
    return (*pieces, Piece("escrow", escrow, there=False, gas=gas or GAS_MEASURED["escrow"]))


async def _piece(chain: EvmChain, what: str, given: str, owner: str, *, proxy: bool) -> Piece:
    if given:
        if what == "token":
            await _require_token(chain, given)
        else:
            await require_code(chain, given, CONTRACTS[what])
        return Piece(what, given, there=True, gas=0)
    code = _code_of(what, owner)
    address = created_by_proxy(code) if proxy else ""
    if address and await chain.code(address):
        await require_code(chain, address, CONTRACTS[what])
        return Piece(what, address, there=True, gas=0)
    gas = await _estimate(chain, owner, *((DEPLOYER_PROXY, SALT + code) if proxy else ("", code)))
    return Piece(what, address, there=False, gas=gas or GAS_MEASURED[what])


async def _estimate(chain: EvmChain, owner: str, to: str, data: bytes) -> int:
    """Return the gas that a call takes, or 0 if the endpoint cannot say."""
    call = {"from": owner, "to": to or None, "input": "0x" + data.hex()}
    try:
        return int(await chain.endpoint.ask("eth_estimateGas", call), 16)
    except (RpcFailed, TypeError, ValueError):
        return 0


async def deploy(
    chain: EvmChain,
    identity: Identity,
    *,
    token: str = "",
    factory: str = "",
    name: str = "deploy",
) -> Deployment:
    """Put on the chain what is missing and return where everything is.

    Without ``token`` a CoaseToken is made whose whole supply is ``identity``'s. ``factory`` names
    one that exists. ``name`` tells apart several deployments in one store.

    :raises ConfigurationError: if at a given address is something else
    :raises CallReverted: if the chain refuses the code
    """
    if token:
        await _require_token(chain, token)
    else:
        token = await _create(chain, identity, "token", name)
    if factory:
        await require_code(chain, factory, "EscrowFactory")
    else:
        factory = await _create(chain, identity, "factory", name)
    escrow = await escrow_of(chain, factory, token)
    if escrow != escrow_address(factory, token):
        raise ConfigurationError(
            f"{chain.endpoint.url} says that the escrow of {token} is {escrow}, which does not"
            " follow from the factory's code: it lies; use another endpoint"
        )
    if await chain.code(escrow):
        start = await first_block_of(chain, escrow, (await chain.endpoint.latest()).number)
    else:
        data = factory_abi().encode("deploy", token)
        request = Request(factory, data, DEPLOY_GAS)
        receipt = await chain.send(f"{name}/escrow/{token}", identity, request, factory_abi())
        start = receipt.block
    await require_code(chain, escrow, "JobEscrow")
    return Deployment(chain.chain_id, token, factory, escrow, start)


async def deploy_beside(
    chain: EvmChain, identity: Identity, made: Deployment, *, name: str = "deploy"
) -> tuple[str, str]:
    """Put the vault of stakes and the factory of panels there, and return their addresses.

    :raises CallReverted: if the chain refuses the code
    """
    where = []
    for what in BESIDE:
        code = _beside_code(what, made.factory, made.token)
        effect = f"{what}/{made.token}"
        where.append(await put(chain, identity, f"{name}/{effect}", code, what))
    return where[0], where[1]


def _beside_code(what: str, factory: str, token: str) -> bytes:
    values = [factory, token] if what == "vault" else [factory]
    return artifact(CONTRACTS[what]).bytecode + abi_encode(["address"] * len(values), values)


async def has_proxy(chain: EvmChain) -> bool:
    """Return whether the deterministic deployer proxy is on the chain, byte for byte."""
    return await chain.code(DEPLOYER_PROXY) == DEPLOYER_PROXY_CODE


def created_by_proxy(code: bytes) -> str:
    """Return the address at which the proxy puts what ``code`` makes."""
    return _create2(DEPLOYER_PROXY, code)


def escrow_address(factory: str, token: str) -> str:
    """Return where our factory at that address puts the escrow of ``token``."""
    return _create2(factory, artifact("JobEscrow").bytecode + abi_encode(["address"], [token]))


def _create2(maker: str, code: bytes) -> str:
    packed = b"\xff" + bytes.fromhex(maker[2:]) + SALT + keccak256(code)
    return "0x" + keccak256(packed)[12:].hex()


async def escrow_of(chain: EvmChain, factory: str, token: str) -> str:
    """Return where the factory's escrow for ``token`` is, or will be."""
    data = factory_abi().encode("escrowOf", token)
    return "0x" + (await chain.call(factory, data, factory_abi()))[12:32].hex()


async def first_block_of(chain: EvmChain, address: str, newest: int) -> int:
    """Return the first block in which there is code at ``address``, which has some now.

    An endpoint that has forgotten old states makes it later than it was: then ``newest``, or the
    oldest that it remembers.
    """
    low, high = 0, newest  # Below low there is none, or it is not known; at high there is some.
    while low < high:
        middle = (low + high) // 2
        try:
            code = await chain.endpoint.ask("eth_getCode", address, hex(middle))
        except (RpcFailed, ChainUnavailable):
            code = "0x"
        low, high = (low, middle) if len(str(code)) > 2 else (middle + 1, high)
    return high


def _code_of(what: str, owner: str) -> bytes:
    """Return the code that makes a contract: the token's names who gets its supply."""
    code = artifact(CONTRACTS[what]).bytecode
    return code + abi_encode(["address"], [owner]) if what == "token" else code


async def _create(chain: EvmChain, identity: Identity, what: str, name: str) -> str:
    return await put(chain, identity, f"{name}/{what}", _code_of(what, identity.address), what)


async def put(chain: EvmChain, identity: Identity, effect_id: str, code: bytes, what: str) -> str:
    """Put a contract there, unless it is, and return its address.

    :raises ConfigurationError: if something else is there
    :raises CallReverted: if the chain refuses the code
    """
    abi = token_abi() if what == "token" else factory_abi()
    if not await has_proxy(chain):
        receipt = await chain.send(effect_id, identity, Request("", code, DEPLOY_GAS), abi)
        address = receipt.created
    else:
        address = created_by_proxy(code)
        if not await chain.code(address):
            await _by_proxy(chain, identity, effect_id, code, abi, address)
    await require_code(chain, address, CONTRACTS[what])
    return address


async def _by_proxy(
    chain: EvmChain, identity: Identity, effect_id: str, code: bytes, abi: Abi, address: str
) -> None:
    try:
        request = Request(DEPLOYER_PROXY, SALT + code, DEPLOY_GAS)
        await chain.send(effect_id, identity, request, abi)
    except CallReverted:
        # The proxy refuses what is there already: somebody else was quicker with the same code.
        if not await chain.code(address):
            raise


async def require_code(chain: EvmChain, address: str, what: str) -> None:
    """Return if at ``address`` is the code of the contract ``what``, byte for byte.

    :raises ConfigurationError: if not
    """
    if not artifact(what).same_code(await chain.code(address)):
        raise ConfigurationError(
            f"at {address} on chain {chain.chain_id} is no {what} of this version"
        )


async def _require_token(chain: EvmChain, token: str) -> None:
    data = token_abi().encode("balanceOf", ZERO_ADDRESS)
    try:
        if len(await chain.call(token, data, token_abi())) == 32:
            return
    except CallReverted:
        pass
    raise ConfigurationError(f"at {token} on chain {chain.chain_id} is no token")


async def give(
    chain: EvmChain,
    address: str,
    *,
    token: str,
    units: int,
    coin: int = FAUCET_COIN,
    source: Identity | None = None,
    name: str = "give",
) -> None:
    """Give ``address`` test money: token units, and coin for gas. Return once it is there.

    On the embedded chain its faucet gives; elsewhere ``source`` pays, a key that has both.

    :raises ConfigurationError: if the chain has no faucet and no ``source`` is given
    """
    if source is None:
        await _from_faucet(chain, address, units=units, coin=coin)
        return
    sends = []
    if coin:
        request = Request(address, b"", COIN_GAS, value=coin)
        sends.append(chain.send(f"{name}/{address}/coin", source, request, token_abi()))
    if units:
        request = Request(token, token_abi().encode("transfer", address, units), TRANSFER_GAS)
        sends.append(chain.send(f"{name}/{address}/units", source, request, token_abi()))
    await asyncio.gather(*sends)


async def _from_faucet(chain: EvmChain, address: str, *, units: int, coin: int) -> None:
    try:
        sent = await chain.endpoint.ask("coase_faucet", address, hex(units), hex(coin))
    except RpcFailed as error:
        raise ConfigurationError(
            f"{chain.endpoint.url} gives no test money: {error.message}"
        ) from error
    await chain.arrived(list(sent.values()), FAUCET_WAIT_MAX_S)
