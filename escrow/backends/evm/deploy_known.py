"""Payment channels and ERC-8004's registries on a chain: found where everybody knows them, or made.

On public chains they stand at addresses that clients have built in, and are checked by what they
answer: their code is others'. Where they are missing, a development chain that lets its owner put
code anywhere gets ours at those same addresses; elsewhere the deterministic deployer makes ours at
addresses that follow from the code. Each step is an effect of its own, so what was cut short goes
on, and what is there is checked instead of made again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from eth_abi.abi import encode as abi_encode

from coase.escrow.chains import ChainKind, kind_of_chain
from coase.escrow.voucher import CHANNELS
from coase.protocol.errors import ConfigurationError

from .artifacts import artifact
from .channels import collector_codes, require_channels
from .deploy import CONTRACTS, GAS_MEASURED, Piece, created_by_proxy, has_proxy, put, require_code
from .fixed import (
    AUTHORIZATION_COLLECTOR,
    IDENTITY_REGISTRY,
    MULTICALL3,
    PERMIT2,
    PERMIT2_COLLECTOR,
    REPUTATION_REGISTRY,
    code_at_fixed_addresses,
)
from .registries import require_registries
from .rpc import RpcFailed

if TYPE_CHECKING:
    from coase.protocol.identity import Identity

    from .chain import EvmChain

CHANNEL_PIECES: Final = ("channels", "erc3009_collector", "permit2_collector")
REGISTRY_PIECES: Final = ("identity_registry", "reputation_registry")
_PLACED: Final = {
    "channels": CHANNELS,
    "erc3009_collector": AUTHORIZATION_COLLECTOR,
    "permit2_collector": PERMIT2_COLLECTOR,
    "permit2": PERMIT2,
    "multicall3": MULTICALL3,
    "identity_registry": IDENTITY_REGISTRY,
    "reputation_registry": REPUTATION_REGISTRY,
}
_SET_CODE: Final = "hardhat_setCode"  # Anvil has it under this name as well.


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What shall be there afterwards, and where the registries are to be looked for.

    What is not wanted is still found where it is.
    """

    channels: bool = False
    registries: bool = False
    identity_registry: str = IDENTITY_REGISTRY
    reputation_registry: str = REPUTATION_REGISTRY


async def plan_known(chain: EvmChain, wanted: Wanted) -> tuple[Piece, ...]:
    """Return what is there of channels and registries, and of what is wanted what is missing.

    Nothing is said of what is missing and not wanted, or cannot be made on this chain: channels
    without the deterministic deployer, since nobody could find their collectors.

    :raises ConfigurationError: if at one of the addresses is something else
    """
    placing = await _may_place(chain)
    proxy = await has_proxy(chain)
    pieces = await _channels(chain, wanted, placing=placing, proxy=proxy)
    return pieces + await _registries(chain, wanted, placing=placing, proxy=proxy)


async def deploy_known(
    chain: EvmChain, identity: Identity, wanted: Wanted, *, name: str = "deploy"
) -> dict[str, str]:
    """Put there what is wanted and missing, and return where everything is, by its name.

    ``name`` tells apart several deployments in one store.

    :raises ConfigurationError: if at one of the addresses is something else
    :raises CallReverted: if the chain refuses the code
    """
    places: dict[str, str] = {}
    for piece in await plan_known(chain, wanted):
        what = piece.what
        if piece.there:
            places[what] = piece.address
        elif piece.address == _PLACED.get(what):
            code = code_at_fixed_addresses()[piece.address]
            await chain.endpoint.ask(_SET_CODE, piece.address, "0x" + code.hex())
            places[what] = piece.address
        else:
            places[what] = await put(chain, identity, f"{name}/{what}", _code(what, places), what)
    return places


async def _channels(
    chain: EvmChain, wanted: Wanted, *, placing: bool, proxy: bool
) -> tuple[Piece, ...]:
    if await chain.code(CHANNELS) or (wanted.channels and placing):
        names = (*CHANNEL_PIECES, "permit2", "multicall3")
        pieces = [await _placed(chain, what) for what in names]
        if pieces[0].there:
            await require_channels(chain, CHANNELS)
        # Where nobody may put code anywhere, what is not there is no step of ours.
        return tuple(piece for piece in pieces if piece.there or (wanted.channels and placing))
    if not proxy:
        return ()
    contract = created_by_proxy(artifact("PaymentChannels").bytecode)
    if not wanted.channels and not await chain.code(contract):
        return ()
    return tuple([await _derived(chain, what, {"channels": contract}) for what in CHANNEL_PIECES])


async def _registries(
    chain: EvmChain, wanted: Wanted, *, placing: bool, proxy: bool
) -> tuple[Piece, ...]:
    identity, reputation = wanted.identity_registry, wanted.reputation_registry
    if await chain.code(reputation):
        await require_registries(chain, identity=identity, reputation=reputation)
        return (
            Piece("identity_registry", identity, there=True, gas=0),
            Piece("reputation_registry", reputation, there=True, gas=0),
        )
    if placing and wanted.registries and identity == IDENTITY_REGISTRY:
        return tuple([await _placed(chain, what) for what in REGISTRY_PIECES])
    if not proxy:
        gas = GAS_MEASURED
        missing = [Piece(what, "", there=False, gas=gas[what]) for what in REGISTRY_PIECES]
        return tuple(missing) if wanted.registries else ()
    place = created_by_proxy(artifact("IdentityRegistry").bytecode)
    if not wanted.registries and not await chain.code(place):
        return ()
    places = {"identity_registry": place}
    return tuple([await _derived(chain, what, places) for what in REGISTRY_PIECES])


async def _placed(chain: EvmChain, what: str) -> Piece:
    """Return what is at the address that everybody knows; putting code there takes no gas."""
    there = bool(await chain.code(_PLACED[what]))
    return Piece(what, _PLACED[what], there=there, gas=0)


async def _derived(chain: EvmChain, what: str, places: dict[str, str]) -> Piece:
    address = created_by_proxy(_code(what, places))
    if await chain.code(address):
        await require_code(chain, address, CONTRACTS[what])
        return Piece(what, address, there=True, gas=0)
    return Piece(what, address, there=False, gas=GAS_MEASURED[what])


def _code(what: str, places: dict[str, str]) -> bytes:
    """Return the code that makes a contract, which names those made before it."""
    match what:
        case "erc3009_collector":
            return collector_codes(places["channels"])[0]
        case "permit2_collector":
            return collector_codes(places["channels"])[1]
        case "reputation_registry":
            code = artifact(CONTRACTS[what]).bytecode
            return code + abi_encode(["address"], [places["identity_registry"]])
    return artifact(CONTRACTS[what]).bytecode


async def _may_place(chain: EvmChain) -> bool:
    """Return whether this is a development chain whose owner may put code anywhere."""
    if kind_of_chain(chain.chain_id) is not ChainKind.LOCAL:
        return False
    try:
        version = str(await chain.endpoint.ask("web3_clientVersion")).lower()
    except RpcFailed:
        return False
    return version.startswith(("anvil", "hardhat"))


def require_made(pieces: tuple[Piece, ...], what: str) -> None:
    """Return if a plan has ``what``, which was asked for.

    :raises ConfigurationError: if it cannot be made on that chain; says why
    """
    if all(piece.what != what for piece in pieces):
        raise ConfigurationError(
            f"the {what} cannot be put on this chain: the deterministic deployer is not there, and"
            " without it nobody could find what belongs to them"
        )
