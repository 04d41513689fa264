"""A panel that is named while arbiters run: they follow the network file, and keep it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from coase.agents import panels
from coase.agents.config import PanelOfArbiters, save_network
from coase.agents.panels import PANEL_FILE, follow_panel, keep_panel, with_panel
from coase.escrow.backends.evm.panel import EvmPanel
from coase.escrow.backends.evm.settlement import EvmSettlement
from coase.escrow.panel import Constitution
from coase.protocol.errors import ConfigurationError
from tests.agents.realmarket import ARBITER, real_market

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.anyio
async def test_a_running_arbiter_sits_on_the_panel_that_the_file_names_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(panels, "LOOK_S", 0.02)
    path = tmp_path / "followed.json"
    named: list[PanelOfArbiters] = []
    async with (
        real_market(tmp_path) as place,
        place.node() as node,
        anyio.create_task_group() as group,
    ):
        assert isinstance(node.settlement, EvmSettlement)
        told = anyio.Event()

        def seated(panel: PanelOfArbiters) -> None:
            named.append(panel)
            told.set()

        async def follow() -> None:
            assert isinstance(node.settlement, EvmSettlement)
            await follow_panel(node, node.settlement, seated=seated, path=path)

        group.start_soon(follow)
        constitution = Constitution.of(1, [ARBITER.address])
        panel = await EvmPanel.connect(
            node.settlement, panels=place.network.panels, constitution=constitution
        )
        known = PanelOfArbiters(address=panel.address, threshold=1, members=(ARBITER.address,))
        path.write_text("{ half")
        arbiters = (panel.address, ARBITER.address)
        changed = place.network.model_copy(update={"panel": known, "arbiters": arbiters})
        save_network(changed, path)
        with anyio.fail_after(60):
            await told.wait()
        assert node.panel is not None
        assert node.panel.address == panel.address
        ((arbiter, _),) = node._arbiters
        assert panel.address in arbiter.benches
        assert named == [known]
        keep_panel(tmp_path, known)
        assert with_panel(tmp_path, place.network) == changed
        group.cancel_scope.cancel()


def test_what_was_kept_of_a_panel_is_read_or_said_to_be_damaged(tmp_path: Path) -> None:
    (tmp_path / PANEL_FILE).write_text("{")
    with pytest.raises(ConfigurationError, match="is damaged"):
        with_panel(tmp_path, None)  # type: ignore[arg-type]
