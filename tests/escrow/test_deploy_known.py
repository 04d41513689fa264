"""Channels and registries: used where everybody knows them, made once where they are missing."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from coase.escrow.backends import devchain_node
from coase.escrow.backends.devchain_engine import Account
from coase.escrow.backends.devchain_node import DevNode
from coase.escrow.backends.evm.chain import EvmChain
from coase.escrow.backends.evm.channels import EvmChannels, collectors_of
from coase.escrow.backends.evm.deploy_known import (
    CHANNEL_PIECES,
    REGISTRY_PIECES,
    Wanted,
    deploy_known,
    plan_known,
    require_made,
)
from coase.escrow.backends.evm.fixed import (
    AUTHORIZATION_COLLECTOR,
    IDENTITY_REGISTRY,
    REPUTATION_REGISTRY,
)
from coase.escrow.backends.evm.registries import EvmRegistries
from coase.escrow.backends.evm.settlement import EvmSettlement
from coase.escrow.ports import MemoryTxStore
from coase.escrow.presets import DEPLOYER_PROXY, DEPLOYER_PROXY_CODE
from coase.escrow.voucher import CHANNELS, ChannelConfig, Fund
from coase.protocol.errors import ChainUnavailable, ConfigurationError
from coase.protocol.identity import Identity

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MAKER, OTHER = (Identity(bytes((n,)) * 32) for n in (0x41, 0x42))
PROXY = {DEPLOYER_PROXY: Account(code=DEPLOYER_PROXY_CODE)}
START_S = 1_800_000_000
ALL = Wanted(channels=True, registries=True)


@asynccontextmanager
async def chain_with(place: dict[str, Account]) -> AsyncIterator[tuple[DevNode, EvmChain]]:
    node = DevNode(manual_time_s=START_S, seed=b"known", place=place)
    await node.serve()
    for who in (MAKER, OTHER):
        node.give(bytes.fromhex(who.address[2:]), 1_000, 10**18)
    node.engine.seal()
    chain = await EvmChain.connect(node.url, store=MemoryTxStore(), poll_s=0.002)
    try:
        yield node, chain
    finally:
        await chain.close()
        await node.close()


def sent_by(node: DevNode, who: Identity) -> int:
    return int(node.engine.state().get_nonce(bytes.fromhex(who.address[2:])))


@pytest.mark.anyio
async def test_what_everybody_knows_is_found_and_nothing_is_made() -> None:
    async with chain_with({}) as (node, chain):
        places = await deploy_known(chain, MAKER, ALL)
        assert places["channels"] == CHANNELS
        assert places["erc3009_collector"] == AUTHORIZATION_COLLECTOR
        assert places["identity_registry"] == IDENTITY_REGISTRY
        assert places["reputation_registry"] == REPUTATION_REGISTRY
        # It is found as well by who wants nothing made.
        assert {piece.what for piece in await plan_known(chain, Wanted())} == places.keys()
        assert sent_by(node, MAKER) == 0


@pytest.mark.anyio
async def test_something_else_at_an_address_is_said() -> None:
    liar = {CHANNELS: Account(code=b"\x00"), REPUTATION_REGISTRY: Account(code=b"\x00")}
    async with chain_with(liar) as (_, chain):
        with pytest.raises(ConfigurationError, match="are no payment channels"):
            await plan_known(chain, Wanted())
    async with chain_with({REPUTATION_REGISTRY: Account(code=b"\x00")}) as (_, chain):
        with pytest.raises(ConfigurationError, match="is no reputation registry"):
            await plan_known(chain, Wanted())


@pytest.mark.anyio
async def test_what_is_missing_is_made_once_whoever_makes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devchain_node, "code_at_fixed_addresses", dict)
    async with chain_with(PROXY) as (node, chain):
        assert await plan_known(chain, Wanted()) == ()
        told = await plan_known(chain, ALL)
        assert [piece.what for piece in told] == [*CHANNEL_PIECES, *REGISTRY_PIECES]
        begun = node.engine.head.number
        # Cut short after two steps, before what was sent is known to be in a block.
        sends = chain.send
        left = [2]

        async def send(*args: Any) -> Any:
            left[0] -= 1
            made = await sends(*args)
            if left[0] == 0:
                raise ChainUnavailable("the endpoint is away")
            return made

        monkeypatch.setattr(chain, "send", send)
        with pytest.raises(ChainUnavailable):
            await deploy_known(chain, MAKER, ALL)
        assert sent_by(node, MAKER) == 2
        places = await deploy_known(chain, MAKER, ALL)
        assert sent_by(node, MAKER) == len(told)
        assert {piece.what: piece.address for piece in told} == places
        made = node.engine.blocks[begun + 1 :]
        used = [done.gas_used for block in made for done in block.transactions]
        for piece, gas in zip(told, used, strict=True):
            assert gas <= piece.gas <= gas * 1.25, piece.what
        # Another key, another journal: the same contracts, and nothing more is sent.
        assert await deploy_known(chain, OTHER, ALL, name="other") == places
        assert sent_by(node, OTHER) == 0
        found = await plan_known(chain, Wanted())
        assert all(piece.there and piece.gas == 0 for piece in found)
        assert {piece.what: piece.address for piece in found} == places

        settlement = await EvmSettlement.connect(
            node.url, escrow=node.escrow, store=MemoryTxStore(), poll_s=0.002
        )
        # They work: a deposit goes through their own collector, and an agent is registered.
        channels = await EvmChannels.beside(settlement, contract=places["channels"])
        assert collectors_of(places["channels"])[0] == places["erc3009_collector"]
        config = ChannelConfig(
            *(OTHER.address, OTHER.address, MAKER.address, MAKER.address, node.token), 900
        )
        await channels.perform("fund", Fund(config, 7, bytes(32), START_S + 10_000), OTHER)
        assert await channels.held() == 7
        names = {"identity": "identity_registry", "reputation": "reputation_registry"}
        registries = await EvmRegistries.beside(
            settlement, factory=node.factory, **{key: places[names[key]] for key in names}
        )
        agent_id = await registries.register("register", "data:,", OTHER)
        record = await registries.agent(agent_id)
        assert record is not None
        assert record.owner == OTHER.address
        await settlement.close()


@pytest.mark.anyio
async def test_without_the_deployer_registries_follow_from_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devchain_node, "code_at_fixed_addresses", dict)
    async with chain_with({}) as (node, chain):
        told = await plan_known(chain, ALL)
        assert [(piece.what, piece.address) for piece in told] == [
            ("identity_registry", ""),
            ("reputation_registry", ""),
        ]
        with pytest.raises(ConfigurationError, match="deterministic deployer is not there"):
            require_made(told, "channels")
        places = await deploy_known(chain, MAKER, ALL)
        # The same store: what was cut short goes on, and what is done is done.
        assert await deploy_known(chain, MAKER, ALL) == places
        assert sent_by(node, MAKER) == 2
        identity, reputation = (places[name] for name in REGISTRY_PIECES)
        given = Wanted(identity_registry=identity, reputation_registry=reputation)
        assert [piece.address for piece in await plan_known(chain, given)] == list(places.values())
