"""Deployment, tokens of other kinds, the log in forks, and a whole deal on a chain of its own."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from coase.escrow.backends.devchain import start_devchain
from coase.escrow.backends.devchain_node import DevNode
from coase.escrow.backends.evm import jobs as jobs_module
from coase.escrow.backends.evm import settlement as settlement_module
from coase.escrow.backends.evm.abi import escrow_abi
from coase.escrow.backends.evm.artifacts import artifact
from coase.escrow.backends.evm.chain import EvmChain, Request
from coase.escrow.backends.evm.deploy import deploy, escrow_of, give
from coase.escrow.backends.evm.rpc import RpcFailed
from coase.escrow.backends.evm.settlement import EvmSettlement, call_data, same_call, token_facts
from coase.escrow.funding import (
    BY_ALLOWANCE,
    Purpose,
    authorization_nonce,
    by_authorization,
    by_permit,
    deadline_of,
)
from coase.escrow.ports import FundingKind, MemoryTxStore
from coase.protocol.effects import Call, Dispute, Open, Poke, Settle, Submit
from coase.protocol.errors import ChainUnavailable, ConfigurationError
from coase.protocol.identity import Identity, keccak256, recover
from coase.protocol.terms import Domain, Terms, Work, receive_digest, settlement_digest
from coase.protocol.types import How, JobView, Phase

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

T = TypeVar("T")

START_S = 1_800_000_000
POLL_S = 0.002
BUYER, SELLER, MAKER = (Identity(bytes((n,)) * 32) for n in (0x21, 0x22, 0x23))
RESULT = keccak256(b"result")


def raw_of(address: str) -> bytes:
    return bytes.fromhex(address[2:])


def terms_of(settlement: EvmSettlement, now_s: int, nonce: int = 1, **changes: Any) -> Terms:
    terms = Terms(
        buyer=BUYER.address,
        seller=SELLER.address,
        asset=settlement.asset.token,
        price_units=100,
        work=Work("echo-00000000"),
        lock_by_s=now_s + 300,
        deliver_by_s=now_s + 600,
        dispute_s=60,
        nonce=nonce,
    )
    return replace(terms, **changes)


def opening(settlement: EvmSettlement, terms: Terms) -> Open:
    return Open(terms, SELLER.sign(terms.digest(settlement.domain)))


def paying(settlement: EvmSettlement, terms: Terms, units: int) -> Settle:
    digest = settlement_digest(settlement.domain, terms.digest(settlement.domain), RESULT, units)
    return Settle(terms, RESULT, units, b"", SELLER.sign(digest))


async def new_node(**options: Any) -> DevNode:
    """A manual chain that seals at once, with money for all."""
    node = DevNode(manual_time_s=START_S, seed=b"settlement", **options)
    await node.serve()
    for who in (BUYER, SELLER, MAKER):
        node.give(raw_of(who.address), 10_000, 10**18)
        node.engine.seal()
    return node


@pytest.fixture
async def node() -> AsyncIterator[DevNode]:
    node = await new_node()
    yield node
    await node.close()


@pytest.fixture
async def chain(node: DevNode) -> AsyncIterator[EvmChain]:
    chain = await EvmChain.connect(node.url, store=MemoryTxStore(), poll_s=POLL_S)
    yield chain
    await chain.close()


@pytest.fixture
async def settlement(node: DevNode) -> AsyncIterator[EvmSettlement]:
    settlement = await connect(node)
    yield settlement
    await settlement.close()


async def connect(node: DevNode, **changes: Any) -> EvmSettlement:
    options: dict[str, Any] = {"escrow": node.escrow, "store": MemoryTxStore(), "poll_s": POLL_S}
    return await EvmSettlement.connect(node.url, **options | changes)


# --------------------------------------------------------------------------------- deployment


@pytest.mark.anyio
async def test_a_deployment_is_made_once_and_checked_again(chain: EvmChain, node: DevNode) -> None:
    made = await deploy(chain, MAKER)
    head = node.engine.head.number
    assert await deploy(chain, MAKER) == replace(made, block=head)
    assert node.engine.head.number == head
    assert made.escrow == await escrow_of(chain, made.factory, made.token)
    settlement = await connect(node, escrow=made.escrow, from_block=made.block)
    assert settlement.asset.token == made.token
    assert await settlement.balance(MAKER.address) == 10**15
    await settlement.close()
    # Somebody else finds the same by the factory alone.
    found = await deploy(chain, SELLER, token=made.token, factory=made.factory)
    assert found == replace(made, block=head)
    assert node.engine.head.number == head


@pytest.mark.anyio
@pytest.mark.parametrize("crash_after", [1, 2])
async def test_a_deployment_cut_short_goes_on(
    chain: EvmChain, node: DevNode, crash_after: int
) -> None:
    real, sent = chain.send, 0

    async def send(*args: Any) -> Any:
        nonlocal sent
        sent += 1
        if sent > crash_after:
            raise KeyboardInterrupt
        return await real(*args)

    chain.send = send  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        await deploy(chain, MAKER)
    chain.send = real  # type: ignore[method-assign]
    made = await deploy(chain, MAKER)
    assert node.engine.state().get_nonce(raw_of(MAKER.address)) == 3
    assert artifact("JobEscrow").same_code(await chain.code(made.escrow))


@pytest.mark.anyio
async def test_what_is_at_a_given_address_is_checked(chain: EvmChain, node: DevNode) -> None:
    with pytest.raises(ConfigurationError, match="is no EscrowFactory"):
        await deploy(chain, MAKER, token=node.token, factory=node.token)
    for nothing in (MAKER.address, node.factory):
        with pytest.raises(ConfigurationError, match="is no token"):
            await deploy(chain, MAKER, token=nothing, factory=node.factory)
        with pytest.raises(ConfigurationError, match="is no token"):
            await token_facts(chain, nothing)
        with pytest.raises(ConfigurationError, match="is no escrow of this version"):
            await connect(node, escrow=nothing)
    with pytest.raises(ConfigurationError, match="and 5 was expected"):
        await connect(node, chain_id=5)


@pytest.mark.anyio
async def test_test_money_comes_from_the_faucet_or_from_a_key(
    chain: EvmChain, node: DevNode, settlement: EvmSettlement
) -> None:
    one, two = "0x" + "61" * 20, "0x" + "62" * 20
    await give(chain, one, token=node.token, units=70)
    await give(chain, two, token=node.token, units=30, coin=5, source=MAKER)
    await give(chain, two, token=node.token, units=30, coin=5, source=MAKER)  # Once only.
    assert [await settlement.balance(who) for who in (one, two)] == [70, 30]
    assert [await chain.coin(who) for who in (one, two)] == [10**18, 5]
    with pytest.raises(ConfigurationError, match="gives no test money: the faucet gives"):
        await give(chain, one, token=node.token, units=10**15)


# ------------------------------------------------------------------------------ funding, tokens


def test_an_authorisation_is_bound_to_one_payment_of_one_deal() -> None:
    token, job_id = Domain(1, "0x" + "aa" * 20, "Coase", "1"), keccak256(b"job")
    escrow = "0x" + "ee" * 20
    nonces = {authorization_nonce(job_id, purpose) for purpose in Purpose}
    assert len(nonces) == 3
    assert authorization_nonce(job_id, Purpose.PRICE) == job_id
    expected = keccak256(job_id + (2).to_bytes(32, "big"))  # As abi.encode(jobId, 2) has it.
    assert authorization_nonce(job_id, Purpose.ANSWER_BOND) == expected
    funding = by_authorization(
        BUYER, token, escrow=escrow, units=5, job_id=job_id, purpose=Purpose.PRICE, deadline_s=9
    )
    digest = receive_digest(token, BUYER.address, escrow, 5, 0, 9, job_id)
    assert recover(digest, funding.signature) == BUYER.address
    assert funding.as_tuple() == (2, 0, 9, funding.signature)
    permit = by_permit(BUYER, token, escrow=escrow, units=5, nonce=0, deadline_s=9)
    assert permit.kind == 1
    assert BY_ALLOWANCE.as_tuple() == (0, 0, 0, b"")


def test_a_signature_for_money_lives_as_long_as_it_can_be_needed() -> None:
    terms = Terms(
        buyer=BUYER.address, seller=SELLER.address, asset="0x" + "aa" * 20, price_units=1,
        work=Work("x"), lock_by_s=10, deliver_by_s=20, dispute_s=3, answer_s=4, rule_s=5, nonce=1,
    )  # fmt: skip
    # The token wants now < deadline, the escrow allows now <= lock_by.
    assert deadline_of(terms, Purpose.PRICE) == 11
    last_dispute, last_answer = 20 + 3, 20 + 3 + 4
    assert deadline_of(terms, Purpose.DISPUTE_BOND) > last_dispute
    assert deadline_of(terms, Purpose.ANSWER_BOND) > last_answer


def test_a_call_is_the_same_however_it_is_funded() -> None:
    domain = Domain(1, "0x" + "ee" * 20)
    terms = Terms(
        buyer=BUYER.address, seller=SELLER.address, asset="0x" + "aa" * 20, price_units=1,
        work=Work("x"), lock_by_s=10, deliver_by_s=20, dispute_s=3, nonce=1,
    )  # fmt: skip
    permit = by_permit(BUYER, domain, escrow=domain.contract, units=1, nonce=0, deadline_s=9)
    for call in (Open(terms, b"\1" * 65), Dispute(terms, RESULT)):
        plain, funded = (call_data(call, domain, how) for how in (BY_ALLOWANCE, permit))
        assert plain != funded
        assert same_call(plain, funded)
        other = replace(call, terms=replace(terms, nonce=2))
        assert not same_call(funded, call_data(other, domain, permit))
    submit = call_data(Submit(terms, RESULT), domain, BY_ALLOWANCE)
    assert same_call(submit, submit)
    assert not same_call(submit, submit[:-1] + b"\1")
    assert not same_call(submit, call_data(Poke(terms), domain, BY_ALLOWANCE))


@pytest.mark.anyio
async def test_a_token_without_signatures_is_paid_by_allowance(
    chain: EvmChain, node: DevNode
) -> None:
    # The plain ERC-20 part of our own token, the rest cut off: unknown selectors revert.
    allowed = ("transfer", "transferFrom", "approve", "allowance", "balanceOf", "decimals")
    facts = await token_facts(chain, node.token)
    assert facts.kinds[-1] is FundingKind.AUTHORIZATION
    real = chain.call

    async def call(to: str, data: bytes, abi: Any, **options: Any) -> bytes:
        known = {abi.functions[name].selector for name in (*allowed, "symbol", "name")}
        if to == node.token and data[:4] not in known:
            raise abi.reverted(b"")
        return await real(to, data, abi, **options)

    chain.call = call  # type: ignore[method-assign]
    plain = await token_facts(chain, node.token)
    assert plain.kinds == (FundingKind.ALLOWANCE,)
    assert plain.asset == facts.asset


@pytest.mark.anyio
async def test_a_funding_that_the_token_does_not_take_is_refused_at_the_door(
    node: DevNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = settlement_module.token_facts

    async def plain(*args: Any) -> Any:
        return replace(await real(*args), kinds=(FundingKind.ALLOWANCE,))

    monkeypatch.setattr(settlement_module, "token_facts", plain)
    with pytest.raises(ConfigurationError, match="cannot be paid by permit: it takes allowance"):
        await connect(node, funding=FundingKind.PERMIT)


# --------------------------------------------------------------------------- the log and its forks


@pytest.mark.anyio
async def test_the_view_of_every_step_is_what_the_contract_stores(
    node: DevNode, settlement: EvmSettlement
) -> None:
    async def stored(job_id: bytes) -> tuple[int, int, int]:
        data = escrow_abi().encode("deal", int.from_bytes(job_id, "big"))
        found = await settlement.chain.call(node.escrow, data, escrow_abi())
        _, phase, _, clock, *_ = escrow_abi().functions["deal"].decode(found)
        data = escrow_abi().encode("outcome", int.from_bytes(job_id, "big"))
        found = await settlement.chain.call(node.escrow, data, escrow_abi())
        return phase, clock, escrow_abi().functions["outcome"].decode(found)[0]

    terms = terms_of(settlement, START_S)
    job_id = terms.digest(settlement.domain)
    steps: list[tuple[Call, Identity]] = [
        (opening(settlement, terms), BUYER),
        (Submit(terms, RESULT), SELLER),
        (paying(settlement, terms, 60), BUYER),
    ]
    for number, (call, who) in enumerate(steps):
        await settlement.perform(f"step-{number}", call, who)
        view = (await settlement.jobs([job_id]))[job_id]
        phase, clock, how = await stored(job_id)
        assert view.phase == (phase if phase < 16 else Phase.CLOSED)
        assert (view.clock_s, view.how) == (clock, how)
    assert (view.to_seller_units, view.to_buyer_units) == (60, 40)


@pytest.mark.anyio
async def test_a_fork_of_many_blocks_is_followed_and_told_once(
    node: DevNode, settlement: EvmSettlement
) -> None:
    all_terms = [terms_of(settlement, START_S, nonce) for nonce in range(1, 6)]
    ids = [terms.digest(settlement.domain) for terms in all_terms]
    for number, terms in enumerate(all_terms):
        await settlement.perform(f"open-{number}", opening(settlement, terms), BUYER)
        assert len(await settlement.jobs(ids)) == 5
    _, end = await settlement.events(0)
    assert node.manual is not None
    node.manual.automatic = False
    kept = node.engine.rewind(4)
    for raw in kept[:2]:
        node.engine.submit(raw)
    node.manual.time_s += 5
    node.engine.seal()  # Both in one block now, and at another time.
    for _ in range(6):
        node.engine.seal()
    views = await settlement.jobs(ids)
    assert [views[job_id].phase for job_id in ids] == [Phase.WORKING] * 3 + [Phase.NONE] * 2
    # Whoever had read on beyond the fork is given what is new since the fork.
    events, end = await settlement.events(end)
    assert [event.job_id for event in events] == ids[1:3]
    assert {event.time_s for event in events} == {START_S + 5}
    assert end == node.engine.head.number + 1
    assert (await settlement.events(end))[0] == []


@pytest.mark.anyio
async def test_a_chain_that_was_started_anew_is_read_anew(settlement: EvmSettlement) -> None:
    terms = terms_of(settlement, START_S)
    job_id = terms.digest(settlement.domain)
    await settlement.perform("open", opening(settlement, terms), BUYER)
    assert (await settlement.jobs([job_id]))[job_id].phase is Phase.WORKING
    log = settlement._log
    # Every block that it knew is gone.
    log._blocks = type(log._blocks)((number, "0x" + "00" * 32) for number in log._blocks)
    assert (await settlement.jobs([job_id]))[job_id].phase is Phase.WORKING
    assert len([event for event in log._events if event.job_id == job_id]) == 1


@pytest.mark.anyio
async def test_what_an_endpoint_left_out_is_found_by_reading_again(
    settlement: EvmSettlement, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = terms_of(settlement, START_S)
    job_id = terms.digest(settlement.domain)
    real = settlement._log._logs

    async def nothing(*args: Any) -> list[Any]:
        return []

    monkeypatch.setattr(settlement._log, "_logs", nothing)
    await settlement.perform("open", opening(settlement, terms), BUYER)
    assert (await settlement.jobs([job_id]))[job_id] == JobView()
    monkeypatch.setattr(settlement._log, "_logs", real)
    assert (await settlement.jobs([job_id]))[job_id] == JobView()
    events, end = await settlement.events(0)
    assert events == []
    settlement._log._reread_at = 0.0
    assert (await settlement.jobs([job_id]))[job_id].phase is Phase.WORKING
    # Whoever had read on beyond it is told all the same, once.
    events, end = await settlement.events(end)
    assert [event.job_id for event in events] == [job_id]
    assert (await settlement.events(end))[0] == []
    settlement._log._reread_at = 0.0
    assert (await settlement.events(end))[0] == []


@pytest.mark.anyio
async def test_an_endpoint_with_a_small_limit_is_read_in_small_steps(
    node: DevNode, settlement: EvmSettlement, monkeypatch: pytest.MonkeyPatch
) -> None:
    for nonce in range(1, 8):
        terms = terms_of(settlement, START_S, nonce)
        await settlement.perform(f"open-{nonce}", opening(settlement, terms), BUYER)
    whole, _ = await settlement.events(0)
    asked: list[Any] = []

    async def ask(method: str, *params: Any) -> Any:
        result = await real(method, *params)
        if method == "eth_getLogs":
            asked.append(params[0])
            if len(result) > 2:
                raise RpcFailed(method, -32005, "query returned more than 2 results")
            for log in result:
                del log["blockTimestamp"]  # Older nodes do not tell it.
        return result

    fresh = await connect(node)
    real = fresh.chain.endpoint.ask
    monkeypatch.setattr(fresh.chain.endpoint, "ask", ask)
    events, _ = await fresh.events(0)
    assert [replace(event, terms=None) for event in events] == [
        replace(event, terms=None) for event in whole
    ]
    assert len(asked) > 4
    await fresh.close()


@pytest.mark.anyio
async def test_many_who_ask_at_once_cost_two_questions_for_a_new_block(
    node: DevNode, settlement: EvmSettlement, monkeypatch: pytest.MonkeyPatch
) -> None:
    await settlement.jobs([bytes(32)])
    asked: list[str] = []
    real = settlement.chain.endpoint.ask

    async def ask(method: str, *params: Any) -> Any:
        asked.append(method)
        return await real(method, *params)

    monkeypatch.setattr(settlement.chain.endpoint, "ask", ask)
    node.engine.seal()
    await asyncio.gather(*(settlement.jobs([bytes(32)]) for _ in range(100)))
    assert asked == ["eth_getBlockByNumber", "eth_getLogs"]
    await asyncio.gather(*(settlement.jobs([bytes(32)]) for _ in range(100)))
    assert asked[2:] == ["eth_getBlockByNumber"]
    assert await settlement.jobs([]) == {}


@pytest.mark.anyio
async def test_plain_jobs_on_the_same_escrow_are_not_deals(
    node: DevNode, settlement: EvmSettlement
) -> None:
    abi, chain = escrow_abi(), settlement.chain
    calls = [
        (BUYER, abi.encode("createJob", SELLER.address, MAKER.address, START_S + 99, "x",
                           "0x" + "00" * 20)),
        (BUYER, abi.encode("setBudget", 1, 5, b"")),
    ]  # fmt: skip
    for number, (who, data) in enumerate(calls):
        request = Request(node.escrow, data, 400_000)
        assert (await chain.send(f"plain-{number}", who, request, abi)).ok
    assert await settlement.events(0) == ([], node.engine.head.number + 1)
    assert (await settlement.jobs([(1).to_bytes(32, "big")])).popitem()[1] == JobView()


@pytest.mark.anyio
async def test_a_log_that_cannot_be_read_is_said_to_be_so(
    settlement: EvmSettlement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "READ_AGAIN_AFTER_S", 0.001)

    async def refuse(*args: Any) -> Any:
        raise RpcFailed("eth_getLogs", -32000, "logs are switched off")

    monkeypatch.setattr(settlement._log, "_logs", refuse)
    with pytest.raises(ChainUnavailable, match="logs are switched off"):
        await settlement.jobs([bytes(32)])


@pytest.mark.anyio
async def test_somebody_who_opens_first_changes_nothing_but_who_paid_the_gas(
    node: DevNode, settlement: EvmSettlement
) -> None:
    # The buyer's calldata, copied out of the pool, with his signature added by himself earlier.
    terms = terms_of(settlement, START_S)
    job_id = terms.digest(settlement.domain)
    funding = by_authorization(
        BUYER, Domain(31337, node.token, "Coase", "1"), escrow=node.escrow, units=100,
        job_id=job_id, purpose=Purpose.PRICE, deadline_s=terms.lock_by_s + 1,
    )  # fmt: skip
    told = settlement_terms(terms)
    data = escrow_abi().encode(
        "open", told, BUYER.sign(job_id), SELLER.sign(job_id), funding.as_tuple()
    )
    request = Request(node.escrow, data, 600_000)
    await settlement.chain.send("relayed", MAKER, request, escrow_abi())
    view = (await settlement.jobs([job_id]))[job_id]
    assert (view.phase, await settlement.balance(BUYER.address)) == (Phase.WORKING, 9_900)


def settlement_terms(terms: Terms) -> tuple[Any, ...]:
    data = call_data(Poke(terms), Domain(1, "0x" + "ee" * 20), BY_ALLOWANCE)
    found: tuple[Any, ...] = escrow_abi().functions["poke"].decode_input(data)[0]
    return found


# --------------------------------------------------------------------------------- whole chains


async def again(work: Callable[[], Awaitable[T]]) -> T:
    """Repeat ``work`` while the chain is away, under the same ids, as a node does."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await work()
            except ChainUnavailable:
                await asyncio.sleep(0.05)


@pytest.mark.anyio
async def test_deals_go_on_over_the_death_of_the_chains_process(tmp_path: Path) -> None:
    devchain = await start_devchain(state=tmp_path)
    port = int(devchain.rpc.rsplit(":", 1)[1])
    settlement = await EvmSettlement.connect(
        devchain.rpc, escrow=devchain.escrow, store=MemoryTxStore(), poll_s=0.05
    )
    await asyncio.gather(
        *(
            give(settlement.chain, who.address, token=devchain.token, units=10_000)
            for who in (BUYER, SELLER)
        )
    )
    now_s = (await settlement.head()).time_s

    async def deal(nonce: int) -> JobView:
        terms = terms_of(settlement, now_s, nonce)
        job_id = terms.digest(settlement.domain)
        await again(lambda: settlement.perform(f"open-{nonce}", opening(settlement, terms), BUYER))
        assert (await again(lambda: settlement.jobs([job_id])))[job_id].phase is Phase.WORKING
        await again(
            lambda: settlement.perform(f"pay-{nonce}", paying(settlement, terms, 90), BUYER)
        )
        return (await again(lambda: settlement.jobs([job_id])))[job_id]

    deals = [asyncio.ensure_future(deal(nonce)) for nonce in range(1, 6)]
    async with asyncio.timeout(60):
        while not await settlement.held():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    os.kill(devchain.process.pid, signal.SIGKILL)
    await devchain.close()
    devchain = await start_devchain(state=tmp_path, port=port)
    views = await asyncio.gather(*deals)
    assert {(view.how, view.to_seller_units) for view in views} == {(How.SETTLED, 90)}
    assert await settlement.held() == 0
    assert await settlement.balance(SELLER.address) == 10_000 + 5 * 90
    await settlement.close()
    await devchain.close()


@pytest.mark.live
@pytest.mark.anyio
@pytest.mark.skipif(shutil.which("anvil") is None, reason="anvil is not on the PATH")
async def test_a_deal_on_anvil() -> None:
    secret = (
        "ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80"  # Its first, funded.
    )
    funded = Identity(bytes.fromhex(secret))
    process = await asyncio.create_subprocess_exec(
        "anvil", "--port", "18645", "--block-time", "1", "--silent"
    )
    store = MemoryTxStore()
    try:
        async with asyncio.timeout(60):
            while True:
                try:
                    chain = await EvmChain.connect("http://127.0.0.1:18645", store=store)
                    break
                except ChainUnavailable:
                    await asyncio.sleep(0.1)
        made = await deploy(chain, funded)
        for who in (BUYER, SELLER):
            await give(chain, who.address, token=made.token, units=1000, source=funded)
        settlement = await EvmSettlement.connect(
            chain.endpoint.url, escrow=made.escrow, store=store, from_block=made.block
        )
        terms = terms_of(settlement, (await settlement.head()).time_s)
        await settlement.perform("open", opening(settlement, terms), BUYER)
        await settlement.perform("pay", paying(settlement, terms, 70), BUYER)
        job_id = terms.digest(settlement.domain)
        assert (await settlement.jobs([job_id]))[job_id].to_seller_units == 70
        await settlement.close()
        await chain.close()
    finally:
        process.kill()
        await process.wait()
