"""Tokens that are not as one would wish, wallets without money: said in plain words, at no loss."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from coase.escrow.advice import BY_NAME, advice, explained
from coase.escrow.backends.devchain_node import DevNode
from coase.escrow.backends.evm.abi import escrow_abi, token_abi
from coase.escrow.backends.evm.chain import EvmChain
from coase.escrow.backends.evm.deploy import deploy, give
from coase.escrow.backends.evm.settlement import EvmSettlement
from coase.escrow.ports import FundingKind, MemoryTxStore
from coase.protocol.effects import Open, Settle
from coase.protocol.errors import CallReverted, ConfigurationError
from coase.protocol.identity import Identity, keccak256
from coase.protocol.terms import Terms, Work, settlement_digest
from tests.escrow.odd_tokens import LYING, PLAIN, SEED, TAXED, odd_tokens

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

START_S = 1_800_000_000
POLL_S = 0.002
BUYER, SELLER, BANK = (Identity(bytes((n,)) * 32) for n in (0x31, 0x32, 0x33))
RESULT = keccak256(b"result")


def raw_of(address: str) -> bytes:
    return bytes.fromhex(address[2:])


def give_now(node: DevNode, who: Identity, units: int, coin: int) -> None:
    node.give(raw_of(who.address), units, coin)
    node.engine.seal()


@pytest.fixture(scope="module")
async def node() -> AsyncIterator[DevNode]:
    node = DevNode(manual_time_s=START_S, seed=SEED, place=odd_tokens(BANK))
    await node.serve()
    for who in (BUYER, SELLER, BANK):
        give_now(node, who, 0, 10**18)
    yield node
    await node.close()


async def settle_in(node: DevNode, token: str, **options: Any) -> EvmSettlement:
    """A settlement in ``token``, of which the buyer holds a thousand."""
    chain = await EvmChain.connect(node.url, store=MemoryTxStore(), poll_s=POLL_S)
    made = await deploy(chain, BANK, token=token, factory=node.factory)
    await give(chain, BUYER.address, token=token, units=1000, coin=0, source=BANK)
    await chain.close()
    return await EvmSettlement.connect(
        node.url, escrow=made.escrow, store=MemoryTxStore(), poll_s=POLL_S, **options
    )


def opening(settlement: EvmSettlement, **changes: Any) -> Open:
    terms = Terms(
        buyer=BUYER.address,
        seller=SELLER.address,
        asset=settlement.asset.token,
        price_units=100,
        work=Work("echo-00000000"),
        lock_by_s=START_S + 300,
        deliver_by_s=START_S + 600,
        dispute_s=60,
        nonce=1,
    )
    terms = replace(terms, **changes)
    return Open(terms, SELLER.sign(terms.digest(settlement.domain)))


async def purse(settlement: EvmSettlement) -> tuple[int, int]:
    return await settlement.balance(BUYER.address), await settlement.held()


@pytest.mark.anyio
async def test_a_token_without_signatures_is_paid_by_one_approval(node: DevNode) -> None:
    settlement = await settle_in(node, PLAIN)
    assert settlement.kinds == (FundingKind.ALLOWANCE,)
    before = node.engine.state().get_nonce(raw_of(BUYER.address))
    for nonce in (1, 2):
        call = opening(settlement, nonce=nonce)
        await settlement.perform(f"open-{nonce}", call, BUYER)
    assert node.engine.state().get_nonce(raw_of(BUYER.address)) == before + 3
    digest = settlement_digest(settlement.domain, call.terms.digest(settlement.domain), RESULT, 60)
    settle = Settle(call.terms, RESULT, 60, b"", SELLER.sign(digest))
    await settlement.perform("settle", settle, BUYER)
    assert await purse(settlement) == (1000 - 200 + 40, 100)
    assert await settlement.balance(SELLER.address) == 60
    await settlement.close()


@pytest.mark.anyio
async def test_a_funding_that_the_token_lacks_is_refused_at_the_door(node: DevNode) -> None:
    for wanted in (FundingKind.PERMIT, FundingKind.AUTHORIZATION):
        with pytest.raises(ConfigurationError, match=f"paid by {wanted}: it takes allowance; set"):
            await settle_in(node, PLAIN, funding=wanted)


@pytest.mark.anyio
@pytest.mark.parametrize("token", [TAXED, LYING])
async def test_a_token_that_moves_less_than_it_says_takes_no_money(
    node: DevNode, token: str
) -> None:
    settlement = await settle_in(node, token)
    before = await purse(settlement)
    with pytest.raises(CallReverted) as caught:
        await settlement.perform("open", opening(settlement, nonce=9), BUYER)
    assert caught.value.error == "WrongAmountReceived"
    assert caught.value.values[0] == 100
    assert "takes a fee" in explained(caught.value)
    assert await purse(settlement) == before
    job_id = opening(settlement, nonce=9).terms.digest(settlement.domain)
    assert not (await settlement.jobs([job_id]))[job_id].tx_hash
    await settlement.close()


@pytest.mark.anyio
@pytest.mark.parametrize("token", ["", PLAIN])
async def test_a_wallet_without_the_token_or_without_coin_is_told(
    node: DevNode, token: str
) -> None:
    if token:
        settlement = await settle_in(node, token)
    else:
        settlement = await EvmSettlement.connect(
            node.url, escrow=node.escrow, store=MemoryTxStore(), poll_s=POLL_S
        )
    poor = Identity(b"\x34" * 32)
    call = opening(settlement, buyer=poor.address, nonce=7)
    # The trial finds the token missing first, unless there is some.
    if token:
        await give(settlement.chain, poor.address, token=token, units=500, coin=0, source=BANK)
    else:
        give_now(node, poor, 500, 0)
    with pytest.raises(
        ConfigurationError, match=r"too little of the chain's coin .* at least 0\.\d{6} of it"
    ):
        await settlement.perform("open", call, poor)
    assert await settlement.balance(poor.address) == 500
    beggar = Identity(b"\x35" * 32)
    give_now(node, beggar, 0, 10**18)
    with pytest.raises(CallReverted) as caught:
        await settlement.perform("beg", opening(settlement, buyer=beggar.address, nonce=8), beggar)
    assert "holds too little of the token" in explained(caught.value)
    await settlement.close()


def test_what_a_refusal_says_names_what_to_do() -> None:
    known = {name for _, (name, _) in (*escrow_abi().errors.items(), *token_abi().errors.items())}
    assert set(BY_NAME) <= known, "advice for an error that no contract of ours has"
    usdc = CallReverted("Error", "ERC20: transfer amount exceeds balance")
    assert "too little of the token" in advice(usdc)
    assert "issuer" in advice(CallReverted("Error", "Blacklistable: account is blacklisted"))
    assert explained(CallReverted("Never", 5)) == "Never(5)"
