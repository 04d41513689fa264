"""Arbiters that run learn of the panel that their network names: at once, and after a restart.

``coase panel`` writes it into the network file; whoever runs an arbiter follows that file. A deal
that names a panel of whose members none knows it would end by the default of its terms.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Final

import anyio

from coase.protocol.errors import ChainUnavailable, ConfigurationError

from .beside import open_panel
from .config import PanelOfArbiters, load_network, network_path, write_private

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coase.escrow.backends.evm.settlement import EvmSettlement

    from .config import Network
    from .node import Node

log = logging.getLogger(__name__)

PANEL_FILE: Final = "panel.json"
LOOK_S: Final = 1.0  # Long before the first dispute of a deal that is made now can be ruled.


async def follow_panel(
    node: Node,
    settlement: EvmSettlement,
    *,
    seated: Callable[[PanelOfArbiters], object],
    path: Path | None = None,
) -> None:
    """Give the arbiters of ``node`` their seats on whatever panel the network file names.

    ``seated`` hears of each new one. Runs until cancelled.
    """
    path = path or network_path()
    seen: tuple[int, int] | None = None
    while True:
        try:
            stamp = path.stat().st_mtime_ns, path.stat().st_ino
            if stamp != seen:
                await _sit(node, settlement, load_network(path), seated)
                seen = stamp
        except FileNotFoundError:
            pass  # Whoever runs the network is about to end.
        except (OSError, ConfigurationError, ChainUnavailable) as error:
            log.warning("the panel of the network file is not known: %s", error)
        await anyio.sleep(LOOK_S)


async def _sit(
    node: Node,
    settlement: EvmSettlement,
    network: Network,
    seated: Callable[[PanelOfArbiters], object],
) -> None:
    named = network.panel
    ours = network.escrow == node.network.escrow and network.chain_id == node.network.chain_id
    if named is None or not ours or named == node.network.panel:
        return
    node.sit(await open_panel(network, settlement), network)
    seated(named)


def keep_panel(directory: Path, named: PanelOfArbiters) -> None:
    """Keep which panel a network of ours has, for when it is started again.

    :raises ConfigurationError: if the disk refuses
    """
    write_private(directory / PANEL_FILE, json.dumps(named.model_dump(mode="json")) + "\n")


def with_panel(directory: Path, network: Network) -> Network:
    """Return the network with the panel that was kept, which goes first among the arbiters.

    :raises ConfigurationError: if what was kept cannot be read
    """
    path = directory / PANEL_FILE
    try:
        named = PanelOfArbiters.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return network
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{path} is damaged: move it away, and name the panel again with coase panel"
        ) from error
    others = [one for one in network.arbiters if one != named.address]
    return network.model_copy(update={"panel": named, "arbiters": (named.address, *others)})
