"""Stakes and panels, in memory and in the contracts, pass one suite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from coase.escrow.backends.evm.abi import panels_abi
from coase.escrow.backends.evm.deploy import deploy
from coase.escrow.backends.evm.deploy_stakes import deploy_stakes
from coase.escrow.backends.evm.panel import EvmPanel
from coase.escrow.backends.evm.settlement import EvmSettlement
from coase.escrow.backends.evm.stake import EvmStakeRegistry
from coase.escrow.backends.memory import MemorySettlement
from coase.escrow.backends.memory_panel import MemoryPanel, MemoryPanels
from coase.escrow.backends.memory_stake import MemoryStakeRegistry, MemoryVault
from coase.escrow.panel import MEMBERS_MAX, Constitution
from coase.escrow.ports import MemoryTxStore
from coase.protocol.errors import ConfigurationError
from tests.conformance.stake_suite import StakeSuite, StakeWorld
from tests.conformance.test_settlement_evm import GATE, TREASURY, EvmWorld
from tests.conformance.test_settlement_memory import ASSET, ESCROW, START_S, MemoryWorld

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from coase.escrow.ports import Panel
    from coase.protocol.types import AgentId, Asset

VAULT: Final = "0x" + "7a" * 20
PANELS: Final = "0x" + "9a" * 20
PANEL_CODE: Final = "0x" + "9c" * 20


class MemoryStakeWorld(MemoryWorld, StakeWorld):
    """The chain in memory, with a vault and a factory of panels."""

    def __init__(
        self,
        *,
        start_s: int = START_S,
        asset: Asset = ASSET,
        escrow: str = ESCROW,
        vault: AgentId = VAULT,
        panels: AgentId = PANELS,
        code: AgentId = PANEL_CODE,
        kind: type[MemoryVault] = MemoryVault,
    ) -> None:
        super().__init__(start_s=start_s, asset=asset, escrow=escrow)
        assert isinstance(self.settlement, MemorySettlement)
        self.port = self.settlement
        self.registry = MemoryStakeRegistry(kind(self.chain, vault), self.port)
        self.panels = MemoryPanels(self.chain, panels, code=code)

    async def panel(self, constitution: Constitution) -> Panel:
        return MemoryPanel(self.panels, self.port, constitution)


class EvmStakeWorld(EvmWorld, StakeWorld):
    """The embedded chain, with the contracts."""

    code: AgentId = ""
    """The code that panels share, once somebody has asked for it."""

    async def start(self) -> None:
        await super().start()
        assert isinstance(self.settlement, EvmSettlement)
        self.port = self.settlement
        self.clock.automatic = True
        self.made = await deploy_stakes(
            self.port.chain, TREASURY, factory=self.node.factory, token=GATE
        )
        self.clock.automatic = False
        self.registry = await EvmStakeRegistry.connect(self.port, vault=self.made.vault)

    async def panel(self, constitution: Constitution) -> Panel:
        return await EvmPanel.connect(self.port, panels=self.made.panels, constitution=constitution)


class TestMemoryStakes(StakeSuite):
    """Every promise of the ports, kept in memory."""

    @pytest.fixture
    async def world(self) -> AsyncIterator[StakeWorld]:
        world = MemoryStakeWorld()
        yield world
        await world.close()


@pytest.fixture(scope="module")
async def evm_world() -> AsyncIterator[EvmStakeWorld]:
    """One chain for all tests here: each has people of its own and only moves time forward."""
    world = EvmStakeWorld()
    await world.start()
    yield world
    await world.close()


class TestEvmStakes(StakeSuite):
    """Every promise of the ports, kept by the contracts."""

    @pytest.fixture
    def world(self, evm_world: EvmStakeWorld) -> Iterator[EvmStakeWorld]:
        yield evm_world
        evm_world.clock.automatic = False

    async def test_a_vault_is_what_it_should_be_or_none(self, world: EvmStakeWorld) -> None:
        for wrong in (world.made.panels, world.escrow, TREASURY.address):
            with pytest.raises(ConfigurationError, match="no vault"):
                await EvmStakeRegistry.connect(world.port, vault=wrong)
        # One for the escrows of another factory: ours could never reserve there.
        world.clock.automatic = True
        chain = world.port.chain
        other = await deploy(chain, TREASURY, token=GATE, name="other")
        made = await deploy_stakes(chain, TREASURY, factory=other.factory, token=GATE, name="other")
        with pytest.raises(ConfigurationError, match="does not serve"):
            await EvmStakeRegistry.connect(world.port, vault=made.vault)
        two = Constitution.of(1, [TREASURY.address, GATE])
        with pytest.raises(ConfigurationError, match="no factory of panels"):
            await EvmPanel.connect(world.port, panels=made.vault, constitution=two)
        with pytest.raises(ConfigurationError, match="does not serve"):
            await EvmPanel.connect(world.port, panels=made.panels, constitution=two)

    async def test_a_deployment_that_was_cut_short_goes_on(self, world: EvmStakeWorld) -> None:
        world.clock.automatic = True
        factory, vault = world.node.factory, world.made.vault
        again = await deploy_stakes(world.port.chain, TREASURY, factory=factory, token=GATE)
        assert again == world.made
        given = await deploy_stakes(
            world.port.chain, TREASURY, factory=factory, token=GATE, vault=vault, name="more"
        )
        assert given.vault == vault
        assert given.panels != world.made.panels
        with pytest.raises(ConfigurationError, match="no StakeVault"):
            await deploy_stakes(
                world.port.chain, TREASURY, factory=factory, token=GATE, vault=factory
            )

    async def test_addresses_are_the_factorys_own(self, world: EvmStakeWorld) -> None:
        chain = world.port.chain
        members = [f"0x{number:040x}" for number in range(1, MEMBERS_MAX + 1)]
        for size in (1, 2, 3, MEMBERS_MAX):
            constitution = Constitution.of((size + 1) // 2, reversed(members[:size]))
            panel = await world.panel(constitution)
            data = panels_abi().encode("panelOf", constitution.threshold, constitution.members)
            told = await chain.call(world.made.panels, data, panels_abi())
            assert panel.address == "0x" + told[12:32].hex()

    async def test_the_embedded_chain_has_them_from_its_first_block(
        self, world: EvmStakeWorld
    ) -> None:
        node = world.node
        facts = node.facts()
        assert (facts["vault"], facts["panels"]) == (node.vault, node.panels)
        own = await EvmSettlement.connect(node.url, escrow=node.escrow, store=MemoryTxStore())
        world.opened.append(own)
        registry = await EvmStakeRegistry.connect(own, vault=node.vault)
        assert registry.asset == own.asset
        assert await registry.held() == 0
        one = Constitution.of(1, [TREASURY.address])
        panel = await EvmPanel.connect(own, panels=node.panels, constitution=one)
        assert not await panel.is_deployed()
