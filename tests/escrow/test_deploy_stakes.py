"""One vault for one factory and token, whoever deploys it, where the proxy for that is."""

from __future__ import annotations

import pytest

from coase.escrow.backends.devchain_engine import Account
from coase.escrow.backends.devchain_node import DevNode
from coase.escrow.backends.evm.chain import EvmChain
from coase.escrow.backends.evm.deploy_stakes import deploy_stakes
from coase.escrow.backends.evm.settlement import EvmSettlement
from coase.escrow.backends.evm.stake import EvmStakeRegistry
from coase.escrow.ports import MemoryTxStore
from coase.escrow.presets import DEPLOYER_PROXY, DEPLOYER_PROXY_CODE
from coase.protocol.identity import Identity

MAKER, OTHER = (Identity(bytes((n,)) * 32) for n in (0x41, 0x42))


@pytest.mark.anyio
async def test_two_who_deploy_the_same_find_the_same() -> None:
    proxy = {DEPLOYER_PROXY: Account(code=DEPLOYER_PROXY_CODE)}
    node = DevNode(manual_time_s=1_800_000_000, seed=b"stakes", place=proxy)
    await node.serve()
    for who in (MAKER, OTHER):
        node.give(bytes.fromhex(who.address[2:]), 0, 10**18)
    node.engine.seal()
    chain = await EvmChain.connect(node.url, store=MemoryTxStore(), poll_s=0.002)
    settlement = await EvmSettlement.connect(
        node.url, escrow=node.escrow, store=MemoryTxStore(), poll_s=0.002
    )
    try:
        places = {"factory": node.factory, "token": node.token}
        first = await deploy_stakes(chain, MAKER, **places, name="first")
        second = await deploy_stakes(chain, OTHER, **places, name="second")
        assert first == second
        # The other found all there, and neither is the one that the chain began with.
        assert node.engine.state().get_nonce(bytes.fromhex(OTHER.address[2:])) == 0
        assert {first.vault, first.panels}.isdisjoint({node.vault, node.panels})
        registry = await EvmStakeRegistry.connect(settlement, vault=first.vault)
        assert registry.vault == first.vault
    finally:
        await settlement.close()
        await chain.close()
        await node.close()
