"""What stands on the chain beside the escrow: channels, registries and a vault, where there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from coase.protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from coase.escrow.backends.evm.settlement import EvmSettlement
    from coase.escrow.ports import Channels, Panel, Registries, StakeRegistry

    from .config import Network

BESIDE: Final = ("vault", "panels", "channels", "identity_registry", "reputation_registry")
"""The fields of a network that name it."""


@dataclass(frozen=True, slots=True)
class Beside:
    """The ports to it, None where the network has nothing of the kind."""

    channels: Channels | None = None
    registries: Registries | None = None
    stake: StakeRegistry | None = None
    panel: Panel | None = None


async def open_beside(network: Network, settlement: EvmSettlement) -> Beside:
    """Return the ports to what the network names, over the connection of ``settlement``.

    One client for all of them keeps the order of each key's transactions.

    :raises ConfigurationError: if something else is at one of the addresses
    :raises ChainUnavailable: if the endpoint does not answer
    """
    channels: Channels | None = None
    registries: Registries | None = None
    stake: StakeRegistry | None = None
    # Each loads an ABI: a network without one need not wait for that.
    if network.channels:
        from coase.escrow.backends.evm.channels import EvmChannels

        channels = await EvmChannels.beside(settlement, contract=network.channels)
    if network.identity_registry and network.reputation_registry:
        from coase.escrow.backends.evm.registries import EvmRegistries
        from coase.escrow.voucher import CHANNELS

        registries = await EvmRegistries.beside(
            settlement,
            factory=network.factory,
            identity=network.identity_registry,
            reputation=network.reputation_registry,
            channels=network.channels or CHANNELS,
        )
    if network.vault:
        from coase.escrow.backends.evm.stake import EvmStakeRegistry

        stake = await EvmStakeRegistry.connect(settlement, vault=network.vault)
    panel = await open_panel(network, settlement) if network.panel is not None else None
    return Beside(channels, registries, stake, panel)


async def open_panel(network: Network, settlement: EvmSettlement) -> Panel:
    """Return the panel of arbiters that a network names.

    :raises ConfigurationError: if its address is not that of its members
    """
    from coase.escrow.backends.evm.panel import EvmPanel
    from coase.escrow.panel import Constitution

    assert network.panel is not None
    named = network.panel
    panel = await EvmPanel.connect(
        settlement,
        panels=network.panels,
        constitution=Constitution.of(named.threshold, named.members),
    )
    if panel.address != named.address:
        raise ConfigurationError(
            f"the panel of {named.threshold} of {len(named.members)} is at {panel.address} and not"
            f" at {named.address}: make the network file anew with: coase panel"
        )
    return panel
