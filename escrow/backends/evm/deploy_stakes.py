"""Putting the vault of stakes and the factory of panels on a chain that has a factory of escrows.

As in ``deploy``: where the deterministic deployer proxy is, the addresses follow from the code, and
with it from factory and token, so that there is one vault for both whoever deploys; elsewhere from
the deployer's nonce. Each is an effect of its own in the store, so what was cut short goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from eth_abi.abi import encode as abi_encode

from coase.escrow.presets import DEPLOYER_PROXY
from coase.protocol.errors import CallReverted, ConfigurationError

from .abi import Abi, panels_abi, vault_abi
from .artifacts import artifact
from .chain import EvmChain, Request
from .deploy import SALT, created_by_proxy, has_proxy

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
    """Put a contract there, unless it is, and return its address."""
    if not await has_proxy(chain):
        receipt = await chain.send(effect_id, identity, Request("", data, DEPLOY_GAS), abi)
        await _require(chain, receipt.created, what)
        return receipt.created
    address = created_by_proxy(data)
    if not await chain.code(address):
        try:
            request = Request(DEPLOYER_PROXY, SALT + data, DEPLOY_GAS)
            await chain.send(effect_id, identity, request, abi)
        except CallReverted:
            # The proxy refuses what is there: somebody else was quicker with the same code.
            if not await chain.code(address):
                raise
    await _require(chain, address, what)
    return address


async def _require(chain: EvmChain, address: str, what: str) -> None:
    if not artifact(what).same_code(await chain.code(address)):
        raise ConfigurationError(
            f"at {address} on chain {chain.chain_id} is no {what} of this version"
        )
