"""Endpoints that are away, lag, lie or ask absurd fees: nothing is sent twice, nothing too dear."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from coase.escrow.backends.devchain_node import DevNode
from coase.escrow.backends.evm import chain as chain_module
from coase.escrow.backends.evm import endpoints as endpoints_module
from coase.escrow.backends.evm.abi import token_abi
from coase.escrow.backends.evm.chain import EvmChain, Request, fees_of
from coase.escrow.backends.evm.endpoints import ENDPOINTS_MAX, Endpoints, Trust, parse_urls
from coase.escrow.backends.evm.settlement import EvmSettlement
from coase.escrow.ports import MemoryTxStore
from coase.protocol.errors import ChainUnavailable, ConfigurationError, FeeTooHigh
from coase.protocol.identity import Identity
from tests.escrow.liars import Busy, Liar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

START_S = 1_800_000_000
POLL_S = 0.002
CAROL = Identity(b"\x0c" * 32)
NOBODY = "0x" + "77" * 20
GWEI = 10**9


def raw_of(address: str) -> bytes:
    return bytes.fromhex(address[2:])


@dataclass
class World:
    """One chain and two endpoints of it that do as they are told."""

    node: DevNode
    first: Liar
    second: Liar

    async def connect(self, *liars: Liar, **options: Any) -> EvmChain:
        urls = [liar.url for liar in liars or (self.first, self.second)]
        store = options.pop("store", None) or MemoryTxStore()
        return await EvmChain.connect(urls, store=store, poll_s=POLL_S, wait_max_s=20, **options)

    def pay(self, units: int) -> Request:
        return Request(self.node.token, token_abi().encode("transfer", NOBODY, units), 200_000)

    def sending(self, chain: EvmChain, name: str, units: int) -> asyncio.Task[Any]:
        return asyncio.ensure_future(chain.send(name, CAROL, self.pay(units), token_abi()))

    async def waiting(self, number: int) -> None:
        async with asyncio.timeout(30):
            while len(self.node.engine.pool) != number:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)

    def units(self) -> int:
        engine = self.node.engine
        data = token_abi().encode("balanceOf", NOBODY)
        found = engine.call(engine.state(), sender=bytes(20), to=raw_of(self.node.token), data=data)
        return int.from_bytes(found.output, "big")


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(chain_module, "REPEAT_EVERY_S", 0.02)
    monkeypatch.setattr(chain_module, "RECHECK_EVERY_S", 0.05)
    monkeypatch.setattr(chain_module, "AWAY_AGAIN_S", 0.02)
    monkeypatch.setattr(chain_module, "AWAY_MAX_S", 0.1)
    node = DevNode(manual_time_s=START_S, seed=b"liars")
    assert node.manual is not None
    node.manual.automatic = False
    node.give(raw_of(CAROL.address), 10_000, 10**18)
    node.engine.seal()
    first, second = await Liar(node).open(), await Liar(node).open()
    yield World(node, first, second)
    await first.close()
    await second.close()
    await node.close()


# ---------------------------------------------------------------------------- away, busy, nonsense


@pytest.mark.anyio
async def test_the_next_endpoint_takes_over_and_the_first_is_asked_again_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = await world.connect()
    await chain.endpoint.latest()
    assert world.second.asked == []
    await world.first.close()
    sending = world.sending(chain, "pay", 1)
    await world.waiting(1)
    assert chain.endpoint.url == world.second.url
    await world.first.open()
    world.node.engine.seal()
    assert (await sending).ok
    assert world.units() == 1
    # Not at once: one that comes and goes would cost a try for each question.
    assert chain.endpoint.url == world.second.url
    for member in chain.endpoint._members:  # type: ignore[attr-defined]
        member.away_until = 0.0
    await chain.endpoint.latest()
    assert chain.endpoint.url == world.first.url
    await chain.close()


@pytest.mark.anyio
async def test_one_that_stays_away_is_asked_ever_more_seldom(world: World) -> None:
    chain = await world.connect()
    first = chain.endpoint._members[0]  # type: ignore[attr-defined]
    await world.first.close()
    pauses = []
    for _ in range(7):
        first.away_until = 0.0
        began = asyncio.get_running_loop().time()
        await chain.endpoint.latest()
        pauses.append(first.away_until - began)
    for earlier, later in itertools.pairwise(pauses[:5]):
        assert later > earlier * 1.5
    assert pauses[-1] - endpoints_module.AWAY_MAX_S < endpoints_module.AWAY_S
    await world.first.open()
    first.away_until = 0.0
    await chain.endpoint.latest()
    assert first.failures == 0
    await chain.close()


@pytest.mark.anyio
async def test_when_all_are_away_each_is_named(world: World) -> None:
    chain = await world.connect()
    await world.first.close()
    await world.second.close()
    with pytest.raises(ChainUnavailable, match="none of 2 endpoints") as caught:
        await chain.endpoint.latest()
    assert world.first.url in str(caught.value)
    assert world.second.url in str(caught.value)
    await chain.close()


@pytest.mark.anyio
async def test_an_endpoint_that_is_busy_or_gives_no_block_is_passed_over(world: World) -> None:
    def busy(params: list[Any], result: Any) -> Any:
        raise Busy(-32005, "daily request limit reached")

    world.first.twists["eth_getBalance"] = busy
    world.first.twists["eth_getBlockByNumber"] = lambda params, result: {"number": "what"}
    chain = await world.connect()
    assert await chain.coin(CAROL.address) == 10**18
    assert (await chain.endpoint.latest()).number == world.node.engine.head.number
    assert chain.endpoint.url == world.second.url
    alone = await world.connect(world.first)
    with pytest.raises(ChainUnavailable, match="tells no balance"):
        await alone.coin(CAROL.address)
    with pytest.raises(ChainUnavailable, match="gives no sensible block"):
        await alone.endpoint.latest()
    await alone.close()
    await chain.close()


def test_endpoints_are_a_list_or_a_text_with_commas() -> None:
    assert parse_urls("http://a, http://b,http://a,") == ("http://a", "http://b")
    assert parse_urls(["http://a"]) == ("http://a",)
    for wrong in ("", " , ", [f"http://{number}" for number in range(ENDPOINTS_MAX + 1)]):
        with pytest.raises(ConfigurationError, match="endpoints of the chain: give 1 to"):
            parse_urls(wrong)


# ----------------------------------------------------------------------------------- another chain


@pytest.mark.anyio
async def test_an_endpoint_of_another_chain_is_never_asked_for_anything_else(world: World) -> None:
    world.first.twists["eth_chainId"] = lambda params, result: "0x1"
    chain = await world.connect(chain_id=31337)
    sending = world.sending(chain, "pay", 1)
    await world.waiting(1)
    world.node.engine.seal()
    assert (await sending).ok
    assert set(world.first.asked) == {"eth_chainId"}
    await chain.close()
    for expected in (31337, 2):
        with pytest.raises(ConfigurationError, match=r"serves chain 1, and .* was expected: check"):
            await world.connect(world.first, chain_id=expected)


@pytest.mark.anyio
async def test_an_endpoint_that_comes_back_as_another_chain_is_found_out(world: World) -> None:
    chain = await world.connect(world.first)
    await world.first.close()
    with pytest.raises(ChainUnavailable, match="cannot be reached"):
        await chain.endpoint.latest()
    world.first.twists["eth_chainId"] = lambda params, result: "0x1"
    await world.first.open()
    with pytest.raises(ChainUnavailable, match="serves chain 1, and 31337 was expected"):
        await world.sending(chain, "pay", 1)
    assert len(world.node.engine.pool) == 0
    await chain.close()


# -------------------------------------------------------------------------------------- stale heads


def trusting(world: World, now_s: int, *liars: Liar, **changes: Any) -> Endpoints:
    urls = [liar.url for liar in liars or (world.first, world.second)]
    options = {"head_age_max_s": 60, "head_back_max_blocks": 8} | changes
    return Endpoints(urls, trust=Trust(**options), now_s=lambda: float(now_s))


def shifted(**fields: int) -> Any:
    """Twist the newest block: its number or timestamp by so much."""

    def twist(params: list[Any], block: dict[str, Any]) -> dict[str, Any]:
        if params[0] != "latest":
            return block
        return block | {name: hex(int(block[name], 16) + by) for name, by in fields.items()}

    return twist


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("by_s", "words"),
    [(-61, "is stale: its newest block .* is 61 s old"), (61, "is of 61 s from now: it lies")],
)
async def test_a_block_of_another_time_is_not_the_newest(
    world: World, by_s: int, words: str
) -> None:
    world.first.twists["eth_getBlockByNumber"] = shifted(timestamp=by_s)
    both = trusting(world, START_S)
    assert (await both.latest()).time_s == START_S
    assert both.url == world.second.url
    await both.close()
    alone = trusting(world, START_S, world.first)
    with pytest.raises(ChainUnavailable, match=words) as caught:
        await alone.latest()
    assert "timedatectl" in str(caught.value)
    world.first.twists["eth_getBlockByNumber"] = shifted(timestamp=by_s - by_s // abs(by_s))
    await alone.latest()  # At the limit it is still believed.
    await alone.close()


@pytest.mark.anyio
async def test_nothing_is_sent_by_way_of_a_stale_endpoint(world: World) -> None:
    # The time of the test's chain is not this machine's.
    chain = await world.connect(trust=Trust(head_age_max_s=60))
    with pytest.raises(ChainUnavailable, match=r"none of 2 endpoints .* (from now|is stale)"):
        await world.sending(chain, "pay", 1)
    assert len(world.node.engine.pool) == 0
    assert await chain.store.all_open() == ()
    await chain.close()


@pytest.mark.anyio
async def test_a_head_that_goes_back_further_than_a_fork_is_not_believed(world: World) -> None:
    for _ in range(10):
        world.node.engine.seal()
    both = trusting(world, START_S)
    height = (await both.latest()).number
    world.first.twists["eth_getBlockByNumber"] = shifted(number=-8)
    assert (await both.latest()).number == height - 8  # A fork may go so far.
    world.first.twists = {}
    assert (await both.latest()).number == height
    world.first.twists["eth_getBlockByNumber"] = shifted(number=-9)
    assert (await both.latest()).number == height
    assert both.url == world.second.url
    world.second.twists["eth_getBlockByNumber"] = shifted(number=-9)
    with pytest.raises(ChainUnavailable, match=f"went back from block {height} to {height - 9}"):
        await both.latest()
    await both.close()
    # One's own chain is believed whatever it says.
    own = trusting(world, START_S, head_age_max_s=0, head_back_max_blocks=0)
    world.first.twists = {}
    await own.latest()
    world.first.twists["eth_getBlockByNumber"] = shifted(number=-9)
    assert (await own.latest()).number == height - 9
    await own.close()


@pytest.mark.anyio
async def test_a_head_that_leaps_does_not_discredit_the_honest(world: World) -> None:
    both = trusting(world, START_S)
    height = (await both.latest()).number
    world.first.twists["eth_getBlockByNumber"] = shifted(number=10**9)
    assert (await both.latest()).number == height
    assert both.url == world.second.url
    assert (await both.latest()).number == height
    await both.close()


# ---------------------------------------------------------------------------------------- receipts


@pytest.mark.anyio
@pytest.mark.parametrize("lie", ["no such block", "not in its block", "of something else"])
async def test_a_receipt_that_the_chain_does_not_bear_out_is_none(world: World, lie: str) -> None:
    head = world.node.engine.head

    def made_up(params: list[Any], result: Any) -> Any:
        if result is not None or not lying:
            return result
        block_hash = "0x" + ("11" * 32 if lie == "no such block" else head.hash.hex())
        return {
            "transactionHash": "0x" + "22" * 32 if lie == "of something else" else params[0],
            "blockNumber": hex(head.number),
            "blockHash": block_hash,
            "status": "0x1",
            "gasUsed": "0x5208",
        }

    lying = True
    world.first.twists["eth_getTransactionReceipt"] = made_up
    chain = await world.connect(world.first, chain_id=31337)
    sending = world.sending(chain, "pay", 1)
    await world.waiting(1)
    async with asyncio.timeout(30):
        while world.first.asked.count("eth_getTransactionReceipt") < 5:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
    assert not sending.done()
    assert ("gives a receipt" in chain._trouble) is (lie != "of something else")
    lying = False
    world.node.engine.seal()
    assert (await sending).ok
    assert world.units() == 1
    assert len(await chain.store.load("pay")) == 1
    await chain.close()


@pytest.mark.anyio
async def test_a_receipt_that_is_lost_for_a_while_does_not_make_it_happen_twice(
    world: World,
) -> None:
    losing = True
    world.first.twists["eth_getTransactionReceipt"] = lambda params, result: (
        None if losing else result
    )
    chain = await world.connect(world.first)
    sending = world.sending(chain, "pay", 1)
    await world.waiting(1)
    world.node.engine.seal()
    async with asyncio.timeout(30):
        # The nonce is used up, the receipt is not there: the transaction itself is asked for.
        while world.first.asked.count("eth_getTransactionByHash") < 3:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
    assert len(world.node.engine.pool) == 0
    losing = False
    assert (await sending).ok
    assert world.units() == 1
    assert len(await chain.store.load("pay")) == 1
    await chain.close()


# -------------------------------------------------------------------------------------------- fees


@pytest.mark.anyio
@pytest.mark.parametrize("what", ["tip", "base fee"])
async def test_an_absurd_fee_is_not_paid(world: World, what: str) -> None:
    absurd = hex(10**15)
    if what == "tip":
        world.first.twists["eth_maxPriorityFeePerGas"] = lambda params, result: absurd
    else:
        world.first.twists["eth_getBlockByNumber"] = lambda params, block: (
            block | {"baseFeePerGas": absurd}
        )
    chain = await world.connect(world.first, fee_max_wei=100 * GWEI)
    with pytest.raises(FeeTooHigh, match=r"asks 10000\d\d\.\d\d\d gwei .* at most 100\.000 gwei"):
        await world.sending(chain, "pay", 1)
    assert len(world.node.engine.pool) == 0
    assert await chain.store.all_open() == ()
    await chain.close()


@pytest.mark.anyio
async def test_what_is_bid_never_passes_the_limit_not_even_when_stuck(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain_module, "BUMP_AFTER_S", 0.02)
    limit_wei = 3 * GWEI  # The first bid is a little below 2, so that three raises fit.
    chain = await world.connect(world.first, fee_max_wei=limit_wei)
    sending = world.sending(chain, "pay", 1)
    async with asyncio.timeout(30):
        while "offers the most that we pay for gas: 2." not in chain._trouble:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
    bids = [fees_of(tx.raw)[1] for tx in await chain.store.load("pay")]
    assert 1 < len(bids) <= 6
    assert bids == sorted(bids)
    assert bids[-1] <= limit_wei < bids[-1] * 113 // 100 + 1
    assert {tx.nonce for tx in await chain.store.load("pay")} == {0}
    world.node.engine.seal()
    assert (await sending).ok
    assert world.units() == 1
    await chain.close()


# ------------------------------------------------------------------------------------ several hands


@pytest.mark.anyio
async def test_two_nodes_with_one_key_pay_each_once(world: World) -> None:
    # Not on one state, which a lock prevents: two machines with a copy of the key.
    one, two = await world.connect(world.first), await world.connect(world.second)
    tasks = [world.sending(one, f"one-{n}", 1) for n in range(3)]
    tasks += [world.sending(two, f"two-{n}", 10) for n in range(3)]
    async with asyncio.timeout(60):
        while not all(task.done() for task in tasks):
            if len(world.node.engine.pool):
                world.node.engine.seal()
            await asyncio.sleep(POLL_S)
    assert {task.result().ok for task in tasks} == {True}
    assert world.units() == 33
    await one.close()
    await two.close()


@pytest.mark.anyio
async def test_a_log_of_another_contract_is_not_taken_for_the_escrows(world: World) -> None:
    def of_another(params: list[Any], logs: Any) -> Any:
        topics = params[0]["topics"]
        log = {"address": world.node.token, "topics": [topics[0][0], "0x" + "ff" * 32],
               "data": "0x", "blockNumber": "0x1", "logIndex": "0x0", "blockTimestamp": "0x1",
               "transactionHash": "0x" + "33" * 32}  # fmt: skip
        return [*logs, log]

    world.first.twists["eth_getLogs"] = of_another
    settlement = await EvmSettlement.connect(
        f"{world.first.url},{world.second.url}",
        escrow=world.node.escrow,
        store=MemoryTxStore(),
        poll_s=POLL_S,
    )
    with pytest.raises(ChainUnavailable, match=r"gives no sensible logs: .*not of the escrow"):
        await settlement.events(0)
    world.first.twists = {}
    assert (await settlement.events(0))[0] == []
    await settlement.close()


def test_the_pause_is_longer_than_the_question() -> None:
    # Else one that hangs would be asked first again and again.
    from coase.escrow.backends.evm.rpc import REQUEST_MAX_S

    assert endpoints_module.AWAY_S > REQUEST_MAX_S
