"""Putting the vault of stakes and the factory of panels on a chain that has a factory of escrows.

As in ``deploy``: where the deterministic deployer proxy is, the addresses follow from the code, and
with it from factory and token, so that there is one vault for both whoever deploys; elsewhere from
the deployer's nonce. Each is an effect of its own in the store, so what was cut short goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from eth_abi.abi import encode as abi_encode

from .artifacts import artifact
from .deploy import put, require_code

if TYPE_CHECKING:
    from coase.protocol.identity import Identity

    from .chain import EvmChain


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
    await require_code(chain, factory, "EscrowFactory")
    if vault:
        await require_code(chain, vault, "StakeVault")
    else:
        data = artifact("StakeVault").bytecode + abi_encode(["address"] * 2, [factory, token])
        vault = await put(chain, identity, f"{name}/vault/{token}", data, "vault")
    if panels:
        await require_code(chain, panels, "PanelFactory")
    else:
        data = artifact("PanelFactory").bytecode + abi_encode(["address"], [factory])
        panels = await put(chain, identity, f"{name}/panels", data, "panels")
    return StakeDeployment(vault, panels)
