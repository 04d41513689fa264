"""Putting the vault of stakes and the factory of panels on a chain that has a factory of escrows.

Each is an effect of its own in the store, as in ``deploy``: what was cut short goes on where it
was, and what is there already is checked instead of deployed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from eth_abi.abi import encode as abi_encode

from coase.protocol.errors import ConfigurationError

from .abi import Abi, panels_abi, vault_abi
from .artifacts import artifact
from .chain import EvmChain, Request

if TYPE_CHECKING:
    from coase.protocol.identity import Identity

DEPLOY_GAS: Final = 4_000_000  # Each takes about 1.3 million.


@dataclass(frozen=True, slots=True)
class StakeDeployment:
    """Where the vault of stakes and the factory of panels are."""

    vault: str
    panels: str


async def deploy_stakes(
    chain: EvmChain,
    identity: Identity,
    *,
    factory: str,
    token: str,
    vault: str = "",
    panels: str = "",
    name: str = "deploy",
) -> StakeDeployment:
    """Put on the chain what is missing: a vault of stakes in ``token``, a factory of panels.

    Both serve the escrows of ``factory``. ``vault`` and ``panels`` name ones that exist. ``name``
    tells apart several deployments in one store.

    :raises ConfigurationError: if at a given address is something else
    :raises CallReverted: if the chain refuses the code
    """
    await _require(chain, factory, "EscrowFactory")
    if vault:
        await _require(chain, vault, "StakeVault")
    else:
        data = artifact("StakeVault").bytecode + abi_encode(["address"] * 2, [factory, token])
        effect_id = f"{name}/vault/{token}"
        vault = await _create(chain, identity, effect_id, data, vault_abi(), "StakeVault")
    if panels:
        await _require(chain, panels, "PanelFactory")
    else:
        data = artifact("PanelFactory").bytecode + abi_encode(["address"], [factory])
        effect_id = f"{name}/panels"
        panels = await _create(chain, identity, effect_id, data, panels_abi(), "PanelFactory")
    return StakeDeployment(vault, panels)


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
