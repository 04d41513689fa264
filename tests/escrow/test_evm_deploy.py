"""Contracts at addresses that follow from their code, found again, checked, and made only once."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from coase.escrow.backends.devchain_engine import Account
from coase.escrow.backends.devchain_node import DevNode
from coase.escrow.backends.evm.artifacts import artifact
from coase.escrow.backends.evm.chain import EvmChain
from coase.escrow.backends.evm.deploy import (
    GAS_MEASURED,
    Piece,
    created_by_proxy,
    deploy,
    deploy_beside,
    escrow_address,
    escrow_of,
    first_block_of,
    has_proxy,
    plan,
)
from coase.escrow.backends.evm.rpc import RpcFailed
from coase.escrow.backends.evm.settlement import EvmSettlement
from coase.escrow.backends.evm.stake import EvmStakeRegistry
from coase.escrow.ports import MemoryTxStore
from coase.escrow.presets import DEPLOYER_PROXY, DEPLOYER_PROXY_CODE
from coase.protocol.errors import ConfigurationError
from coase.protocol.identity import Identity

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

START_S = 1_800_000_000
MAKER, OTHER = (Identity(bytes((n,)) * 32) for n in (0x41, 0x42))
PROXY = {DEPLOYER_PROXY: Account(code=DEPLOYER_PROXY_CODE)}


async def new_node(**options: Any) -> DevNode:
    node = DevNode(manual_time_s=START_S, seed=b"deploy", **options)
    await node.serve()
    for who in (MAKER, OTHER):
        node.give(bytes.fromhex(who.address[2:]), 0, 10**18)
    node.engine.seal()
    return node


async def client(node: DevNode, store: MemoryTxStore | None = None) -> EvmChain:
    return await EvmChain.connect(node.url, store=store or MemoryTxStore(), poll_s=0.002)


@pytest.fixture
async def node() -> AsyncIterator[DevNode]:
    node = await new_node(place=PROXY)
    yield node
    await node.close()


@pytest.fixture
async def chain(node: DevNode) -> AsyncIterator[EvmChain]:
    chain = await client(node)
    yield chain
    await chain.close()


def nonce_of(node: DevNode, who: Identity) -> int:
    return int(node.engine.state().get_nonce(bytes.fromhex(who.address[2:])))


@pytest.mark.anyio
async def test_addresses_follow_from_the_code_alone(node: DevNode, chain: EvmChain) -> None:
    assert await has_proxy(chain)
    told = await plan(chain, MAKER.address)
    assert [(piece.what, piece.there) for piece in told] == [
        ("token", False), ("factory", False), ("escrow", False),
    ]  # fmt: skip
    made = await deploy(chain, MAKER)
    assert [piece.address for piece in told] == [made.token, made.factory, made.escrow]
    assert made.factory == created_by_proxy(artifact("EscrowFactory").bytecode)
    assert made.escrow == escrow_address(made.factory, made.token)
    assert made.escrow == await escrow_of(chain, made.factory, made.token)
    assert node.engine.head.number == made.block
    # What was planned for gas is what was used, within a tenth.
    used = [done.gas_used for block in node.engine.blocks[-3:] for done in block.transactions]
    for piece, gas in zip(told, used, strict=True):
        assert gas <= piece.gas <= gas * 1.1, piece.what
        assert gas <= GAS_MEASURED[piece.what] <= gas * 1.25, piece.what
    # Somebody else finds the same, and its own token elsewhere.
    theirs = await deploy(chain, OTHER, token=made.token)
    assert theirs == made
    assert nonce_of(node, OTHER) == 0
    mine, his = [(await plan(chain, who.address))[0] for who in (MAKER, OTHER)]
    assert mine == Piece("token", made.token, there=True, gas=0)
    assert (his.address != made.token, his.there) == (True, False)


@pytest.mark.anyio
@pytest.mark.parametrize("proxy", [True, False])
async def test_what_stands_beside_an_escrow_serves_it_and_is_made_once(proxy: bool) -> None:
    node = await new_node(place=PROXY if proxy else {})
    chain = await client(node)
    told = await plan(chain, MAKER.address, token=node.token, factory=node.factory, beside=True)
    assert [(piece.what, piece.there) for piece in told[3:]] == [
        ("vault", False),
        ("panels", False),
    ]
    made = await deploy(chain, MAKER, token=node.token, factory=node.factory)
    vault, panels = await deploy_beside(chain, MAKER, made)
    assert await deploy_beside(chain, MAKER, made) == (vault, panels)
    assert nonce_of(node, MAKER) == 2
    used = [done.gas_used for block in node.engine.blocks[-2:] for done in block.transactions]
    for piece, gas in zip(told[3:], used, strict=True):
        assert gas <= piece.gas <= gas * 1.4, piece.what
    if proxy:
        assert [piece.address for piece in told[3:]] == [vault, panels]
        found = await plan(
            chain, OTHER.address, token=node.token, factory=node.factory, beside=True
        )
        assert {piece.there for piece in found} == {True}
    settlement = await EvmSettlement.connect(
        node.url, escrow=made.escrow, store=MemoryTxStore(), poll_s=0.002
    )
    stakes = await EvmStakeRegistry.connect(settlement, vault=vault)
    assert stakes.asset == settlement.asset
    await settlement.close()
    await chain.close()
    await node.close()


@pytest.mark.anyio
async def test_who_is_late_by_a_moment_finds_it_made(node: DevNode, chain: EvmChain) -> None:
    real, other = chain.code, await client(node)

    async def blind(address: str) -> bytes:
        """Look just before somebody else deploys the same."""
        found = await real(address)
        factory = created_by_proxy(artifact("EscrowFactory").bytecode)
        if address == factory and not found:
            await deploy(other, OTHER, token=node.token)
        return found

    chain.code = blind  # type: ignore[method-assign]
    made = await deploy(chain, MAKER, token=node.token)
    assert await deploy(other, OTHER, token=node.token) == made
    assert nonce_of(node, MAKER) == 0  # It was tried first, so that it cost nothing.
    await other.close()


@pytest.mark.anyio
@pytest.mark.parametrize("proxy", [True, False])
@pytest.mark.parametrize("crash_after", [0, 1, 2])
async def test_a_deployment_killed_after_any_step_goes_on(proxy: bool, crash_after: int) -> None:
    node = await new_node(place=PROXY if proxy else {})
    store = MemoryTxStore()
    first = await client(node, store)
    asked = first.endpoint.ask
    sent = 0

    async def ask(method: str, *params: Any) -> Any:
        """Die just after the endpoint has taken one of the transactions."""
        nonlocal sent
        result = await asked(method, *params)
        if method == "eth_sendRawTransaction":
            sent += 1
            if sent > crash_after:
                raise KeyboardInterrupt
        return result

    first.endpoint.ask = ask  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        await deploy(first, MAKER)
    await first.close()
    again = await client(node, store)
    made = await deploy(again, MAKER)
    assert nonce_of(node, MAKER) == 3  # Each step once.
    assert await deploy(again, MAKER) == made
    assert nonce_of(node, MAKER) == 3
    await again.close()
    await node.close()


@pytest.mark.anyio
async def test_other_code_at_the_address_is_never_taken_for_ours() -> None:
    factory = created_by_proxy(artifact("EscrowFactory").bytecode)
    ours = artifact("EscrowFactory").runtime
    node = await new_node(place=PROXY | {factory: Account(code=ours[:-1] + b"\1")})
    chain = await client(node)
    for attempt in (deploy(chain, MAKER, token=node.token), plan(chain, MAKER.address)):
        with pytest.raises(ConfigurationError, match=f"at {factory} .* is no EscrowFactory"):
            await attempt
    assert nonce_of(node, MAKER) == 0
    await chain.close()
    await node.close()


@pytest.mark.anyio
async def test_a_proxy_with_other_code_is_not_used() -> None:
    node = await new_node(place={DEPLOYER_PROXY: Account(code=DEPLOYER_PROXY_CODE + b"\0")})
    chain = await client(node)
    assert not await has_proxy(chain)
    told = await plan(chain, MAKER.address, token=node.token)
    assert [piece.address for piece in told] == [node.token, "", ""]
    made = await deploy(chain, MAKER, token=node.token)
    assert made.factory != created_by_proxy(artifact("EscrowFactory").bytecode)
    assert made.escrow == escrow_address(made.factory, made.token)
    await chain.close()
    await node.close()


@pytest.mark.anyio
async def test_a_factory_that_names_another_address_is_not_believed(
    node: DevNode, chain: EvmChain
) -> None:
    made = await deploy(chain, MAKER, token=node.token)
    real = chain.call

    async def call(to: str, data: bytes, *rest: Any, **more: Any) -> bytes:
        found = await real(to, data, *rest, **more)
        return bytes(12) + b"\x66" * 20 if to == made.factory else found

    chain.call = call  # type: ignore[method-assign]
    with pytest.raises(ConfigurationError, match="does not follow from the factory's code: it lie"):
        await deploy(chain, MAKER, token=node.token)


@pytest.mark.anyio
async def test_the_first_block_of_an_escrow_is_found_or_said_to_be_later(
    node: DevNode, chain: EvmChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(5):
        node.engine.seal()
    made = await deploy(chain, MAKER, token=node.token)
    for _ in range(20):
        node.engine.seal()
    assert made.block == node.engine.head.number - 20
    assert await deploy(chain, OTHER, token=node.token) == made
    real, head = chain.endpoint.ask, node.engine.head.number

    async def forgetful(method: str, *params: Any) -> Any:
        if method == "eth_getCode" and params[1] != "latest" and int(params[1], 16) < head - 9:
            raise RpcFailed(method, -32000, "missing trie node")
        return await real(method, *params)

    monkeypatch.setattr(chain.endpoint, "ask", forgetful)
    assert await first_block_of(chain, made.escrow, head) == head - 9
    late = await deploy(chain, OTHER, token=node.token)
    assert late == replace(made, block=head - 9)
