"""A network file's words for its chain, and a token that is not what it should be."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest

from coase.agents.caution import (
    CONFIRMATIONS,
    HEAD_AGE_MAX_S,
    HEAD_BACK_MAX_BLOCKS,
    check_token,
    connect_options,
)
from coase.agents.config import NatsAddress, Network, load_network, save_network
from coase.escrow.backends.devchain_node import DevNode
from coase.escrow.backends.evm.chain import EvmChain
from coase.escrow.backends.evm.deploy import deploy
from coase.escrow.backends.evm.endpoints import Trust
from coase.escrow.backends.evm.settlement import EvmSettlement
from coase.escrow.ports import FundingKind, MemoryTxStore
from coase.escrow.presets import preset_named
from coase.protocol.errors import ChainUnavailable, ConfigurationError
from coase.protocol.identity import Identity
from tests.escrow.odd_tokens import PLAIN, SEED, odd_tokens

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

START_S = 1_800_000_000
BANK = Identity(b"\x33" * 32)
USDC = preset_named("base").token


def network(**changes: Any) -> Network:
    fields: dict[str, Any] = {
        "nats": NatsAddress(url="nats://127.0.0.1:4222"),
        "rpc": "http://127.0.0.1:8545",
        "chain_id": 31337,
        "token": "0x" + "11" * 20,
        "factory": "0x" + "22" * 20,
        "escrow": "0x" + "33" * 20,
    }
    return Network(**fields | changes)


def test_endpoints_may_be_a_list_and_come_back_as_they_were(tmp_path: Path) -> None:
    several = network(rpc=["http://one:1", "http://two:2"])
    assert several.rpc == "http://one:1,http://two:2"
    assert load_network(save_network(several, tmp_path / "network.json")) == several


def test_an_old_file_without_the_new_words_is_still_one(tmp_path: Path) -> None:
    told = network().model_dump(mode="json")
    for name in (
        "from_block",
        "block_ms",
        "confirmations",
        "head_age_max_s",
        "fee_max_wei",
        "funding",
    ):
        del told[name]
    assert Network.model_validate(told) == network()


def test_one_s_own_chain_is_believed_and_others_are_not() -> None:
    own = connect_options(network(faucet=True))
    assert (own["confirmations"], own["trust"], own["funding"]) == (0, Trust(), None)
    base = preset_named("base")
    public = connect_options(network(chain_id=base.chain_id))
    assert public["confirmations"] == base.confirmations > 0
    assert public["fee_max_wei"] == base.fee_max_wei
    assert public["trust"] == Trust(base.head_age_max_s, HEAD_BACK_MAX_BLOCKS)
    unknown = connect_options(network(chain_id=5))
    assert unknown["confirmations"] == CONFIRMATIONS
    assert unknown["trust"] == Trust(HEAD_AGE_MAX_S, HEAD_BACK_MAX_BLOCKS)


def test_the_file_has_the_last_word() -> None:
    said = connect_options(
        network(
            chain_id=8453,
            confirmations=0,
            head_age_max_s=7,
            fee_max_wei=9,
            funding="permit",
            from_block=11,
        )
    )
    assert (said["confirmations"], said["trust"].head_age_max_s, said["fee_max_wei"]) == (0, 7, 9)
    assert (said["funding"], said["from_block"]) == (FundingKind.PERMIT, 11)
    with pytest.raises(ConfigurationError, match="write one of allowance, permit, authorization"):
        connect_options(network(funding="cash"))


@pytest.fixture(scope="module")
async def node() -> AsyncIterator[DevNode]:
    """A chain that says to be Base, with something else where USDC should be."""
    assert USDC is not None
    odd = odd_tokens(BANK)
    place = odd | {USDC.address: odd[PLAIN]}
    node = DevNode(manual_time_s=START_S, seed=SEED, chain_id=8453, place=place)
    await node.serve()
    node.give(bytes.fromhex(BANK.address[2:]), 0, 10**18)
    node.engine.seal()
    yield node
    await node.close()


async def settle_in(node: DevNode, token: str) -> EvmSettlement:
    chain = await EvmChain.connect(node.url, store=MemoryTxStore(), poll_s=0.002)
    made = await deploy(chain, BANK, token=token, factory=node.factory)
    await chain.close()
    return await EvmSettlement.connect(node.url, escrow=made.escrow, store=MemoryTxStore())


@pytest.mark.anyio
async def test_a_token_that_is_not_what_it_should_be_is_refused(
    node: DevNode, caplog: pytest.LogCaptureFixture
) -> None:
    assert USDC is not None
    usdc = await settle_in(node, USDC.address)
    with pytest.raises(ConfigurationError, match=r"USDC on chain 8453 is 'USD Coin' .* says 'Odd'"):
        check_token(usdc, network(chain_id=8453, token=USDC.address))
    with pytest.raises(ConfigurationError, match=r"the network file says 0x1111.*; check the file"):
        check_token(usdc, network(chain_id=8453))
    await usdc.close()
    plain = await settle_in(node, PLAIN)
    with pytest.raises(ConfigurationError, match="has 6 decimals, and the network file says 18"):
        check_token(plain, network(chain_id=8453, token=PLAIN, decimals=18))
    with caplog.at_level(logging.WARNING):
        check_token(plain, network(chain_id=8453, token=PLAIN))
    assert "takes no signatures" in caplog.text
    await plain.close()


@pytest.mark.anyio
async def test_nothing_is_begun_on_a_stale_chain_or_another_one(node: DevNode) -> None:
    # The clock of the test's chain is not this machine's: the endpoint counts as stale.
    options = connect_options(network(chain_id=8453))
    settlement = await EvmSettlement.connect(
        node.url, escrow=node.escrow, store=MemoryTxStore(), **options
    )
    with pytest.raises(ChainUnavailable, match=r"is stale|from now"):
        await settlement.head()
    await settlement.close()
    with pytest.raises(ConfigurationError, match="serves chain 8453, and 84532 was expected"):
        await EvmSettlement.connect(
            node.url,
            escrow=node.escrow,
            store=MemoryTxStore(),
            **connect_options(network(chain_id=84532)),
        )
