"""Putting the contracts on a chain: token, factory and the token's escrow. Safe to repeat.

Each step is an effect of its own in the store, so a deployment that was cut short goes on where
it was, and what is there already is checked instead of deployed again.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from eth_abi.abi import encode as abi_encode

from coase.protocol.errors import CallReverted, ConfigurationError
from coase.protocol.types import ZERO_ADDRESS

from .abi import Abi, factory_abi, token_abi
from .artifacts import artifact
from .chain import EvmChain, Request
from .rpc import RpcFailed

if TYPE_CHECKING:
    from coase.protocol.identity import Identity

DEPLOY_GAS: Final = 12_000_000  # The factory takes 4.6 million, as it carries the escrow's code.
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
    start = (await chain.endpoint.latest()).number
    if token:
        await _require_token(chain, token)
    else:
        data = artifact("CoaseToken").bytecode + abi_encode(["address"], [identity.address])
        token = await _create(chain, identity, f"{name}/token", data, token_abi(), "CoaseToken")
    if factory:
        await _require(chain, factory, "EscrowFactory")
    else:
        code = artifact("EscrowFactory").bytecode
        effect_id = f"{name}/factory"
        factory = await _create(chain, identity, effect_id, code, factory_abi(), "EscrowFactory")
    escrow = await escrow_of(chain, factory, token)
    if not await chain.code(escrow):
        data = factory_abi().encode("deploy", token)
        request = Request(factory, data, DEPLOY_GAS)
        receipt = await chain.send(f"{name}/escrow/{token}", identity, request, factory_abi())
        start = receipt.block
    await _require(chain, escrow, "JobEscrow")
    return Deployment(chain.chain_id, token, factory, escrow, start)


async def escrow_of(chain: EvmChain, factory: str, token: str) -> str:
    """Return where the factory's escrow for ``token`` is, or will be."""
    data = factory_abi().encode("escrowOf", token)
    return "0x" + (await chain.call(factory, data, factory_abi()))[12:32].hex()


async def _create(
    chain: EvmChain, identity: Identity, effect_id: str, data: bytes, abi: Abi, what: str
) -> str:
    receipt = await chain.send(effect_id, identity, Request("", data, DEPLOY_GAS), abi)
    await _require(chain, receipt.created, what)
    return receipt.created


async def _require(chain: EvmChain, address: str, what: str) -> None:
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
