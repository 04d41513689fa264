"""Each effect happens once, whatever the endpoint, the process or the pool does in between."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
from eth_account import Account as EthAccount
from eth_utils.address import to_checksum_address
from hypothesis import given
from hypothesis import strategies as st

from coase.escrow.backends.devchain_node import DevNode
from coase.escrow.backends.evm import chain as chain_module
from coase.escrow.backends.evm.abi import Abi, token_abi
from coase.escrow.backends.evm.artifacts import artifact
from coase.escrow.backends.evm.chain import EvmChain, Request, fees_of
from coase.escrow.backends.evm.rpc import Endpoint, Shared
from coase.escrow.backends.evm.transaction import sign_transaction
from coase.escrow.ports import MemoryTxStore
from coase.protocol.errors import CallReverted, ChainUnavailable, ConfigurationError
from coase.protocol.identity import Identity, keccak256

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

START_S = 1_800_000_000
POLL_S = 0.002
CAROL = Identity(b"\x0c" * 32)
NOBODY = "0x" + "77" * 20
_names = count(1)


def raw_of(address: str) -> bytes:
    return bytes.fromhex(address[2:])


@dataclass
class World:
    """A chain whose blocks are the test's, and a client of it."""

    node: DevNode
    chain: EvmChain
    store: MemoryTxStore

    @property
    def pool(self) -> Any:
        return self.node.engine.pool

    def transfer(self, units: int, to: str = NOBODY) -> Request:
        data = token_abi().encode("transfer", to, units)
        return Request(self.node.token, data, 200_000)

    def units(self, who: str) -> int:
        engine = self.node.engine
        outcome = engine.call(
            engine.state(),
            sender=bytes(20),
            to=raw_of(self.node.token),
            data=token_abi().encode("balanceOf", who),
        )
        return int.from_bytes(outcome.output, "big")

    def send(self, effect_id: str, units: int, who: Identity = CAROL) -> Awaitable[Any]:
        sending = self.chain.send(effect_id, who, self.transfer(units), token_abi())
        return asyncio.ensure_future(sending)

    async def waiting(self, number: int) -> None:
        """Return once that many transactions wait for a block."""
        async with asyncio.timeout(30):
            while len(self.pool) != number:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)

    async def again(self) -> EvmChain:
        """Return another client on the same store, as after a crash of the first."""
        return await EvmChain.connect(self.node.url, store=self.store, poll_s=POLL_S)

    def foreign(self, nonce: int, *, tip: int = 10**9, who: Identity = CAROL) -> bytes:
        """Put something with ``nonce`` into the pool that the client knows nothing of."""
        signed = sign_transaction(
            who, chain_id=31337, nonce=nonce, to=NOBODY, data=b"", gas=21_000,
            fee_max=10**11, tip_max=tip,
        )  # fmt: skip
        self.node.engine.submit(signed.raw)
        return signed.raw


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    # The times are those of public chains; here nobody waits for one.
    monkeypatch.setattr(chain_module, "REPEAT_EVERY_S", 0.02)
    monkeypatch.setattr(chain_module, "RECHECK_EVERY_S", 0.05)
    monkeypatch.setattr(chain_module, "AWAY_AGAIN_S", 0.02)
    node = DevNode(manual_time_s=START_S, seed=b"chain")
    assert node.manual is not None
    node.manual.automatic = False
    await node.serve()
    node.give(raw_of(CAROL.address), 10_000, 10**18)
    node.engine.seal()
    store = MemoryTxStore()
    chain = await EvmChain.connect(node.url, store=store, poll_s=POLL_S, wait_max_s=20)
    yield World(node, chain, store)
    await chain.close()
    await node.close()


# ------------------------------------------------------------------------------------ signing


@given(
    st.integers(1, 2**250),
    st.integers(1, 2**64),
    st.integers(0, 2**63),
    st.binary(min_size=20, max_size=20),
    st.binary(max_size=300),
    st.integers(0, 2**128),
    st.integers(21_000, 2**40),
    st.integers(0, 2**60),
)
def test_transactions_are_signed_as_the_library_signs_them(
    secret: int, chain_id: int, nonce: int, to: bytes, data: bytes, value: int, gas: int, tip: int
) -> None:
    key = secret.to_bytes(32, "big")
    signed = sign_transaction(
        Identity(key), chain_id=chain_id, nonce=nonce, to="0x" + to.hex(), data=data,
        value=value, gas=gas, fee_max=tip * 2, tip_max=tip,
    )  # fmt: skip
    fields = {
        "type": 2,
        "chainId": chain_id,
        "nonce": nonce,
        "to": to_checksum_address(to),
        "data": data,
        "value": value,
        "gas": gas,
        "maxFeePerGas": tip * 2,
        "maxPriorityFeePerGas": tip,
    }
    library = EthAccount.sign_transaction(fields, key)
    assert signed.raw == bytes(library.raw_transaction)
    assert signed.tx_hash == "0x" + bytes(library.hash).hex()


# ------------------------------------------------------------------------------ the happy paths


@pytest.mark.anyio
async def test_many_at_once_by_one_key_take_one_nonce_each(world: World) -> None:
    sends = [world.send(f"pay-{number}", 1) for number in range(40)]
    await world.waiting(40)
    world.node.engine.seal()
    receipts = await asyncio.gather(*sends)
    assert len({receipt.tx_hash for receipt in receipts}) == 40
    assert {receipt.ok for receipt in receipts} == {True}
    assert world.units(NOBODY) == 40
    assert world.node.engine.pending_nonce(raw_of(CAROL.address)) == 40
    assert await world.store.all_open() == ()


@pytest.mark.anyio
async def test_many_keys_do_not_wait_for_each_other(world: World) -> None:
    keys = [CAROL.derive(str(number)) for number in range(10)]
    for key in keys:
        world.node.give(raw_of(key.address), 5, 10**17)
    world.node.engine.seal()
    sends = [world.send(f"pay-{key.address}", 5, key) for key in keys]
    await world.waiting(10)
    world.node.engine.seal()
    await asyncio.gather(*sends)
    assert world.units(NOBODY) == 50


@pytest.mark.anyio
async def test_the_bytes_are_kept_before_they_are_sent(world: World) -> None:
    class Watched(MemoryTxStore):
        async def save(self, effect_id: str, *rest: Any) -> None:
            assert len(world.pool) == 0
            raise ConfigurationError("the disk is full")

    world.chain.store = Watched()
    with pytest.raises(ConfigurationError, match="the disk is full"):
        await world.send("pay", 1)
    assert len(world.pool) == 0


@pytest.mark.anyio
async def test_the_same_effect_at_the_same_time_is_sent_once(world: World) -> None:
    first, second = world.send("pay", 1), world.send("pay", 1)
    await world.waiting(1)
    world.node.engine.seal()
    assert await first == await second
    assert world.units(NOBODY) == 1


@pytest.mark.anyio
async def test_a_refusal_is_found_before_anything_is_sent(world: World) -> None:
    with pytest.raises(CallReverted) as caught:
        await world.send("pay", 10**9)
    assert caught.value.error == "ERC20InsufficientBalance"
    assert caught.value.values == (CAROL.address, 10_000, 10**9)
    assert await world.store.load("pay") == ()


@pytest.mark.anyio
async def test_a_refusal_in_the_block_itself_is_told_by_its_name(world: World) -> None:
    # Both are fine by themselves; together they ask for more than there is.
    first, second = world.send("a", 6_000), world.send("b", 6_000)
    await world.waiting(2)
    world.node.engine.seal()
    results = await asyncio.gather(first, second, return_exceptions=True)
    failed = [result for result in results if isinstance(result, CallReverted)]
    assert [failure.error for failure in failed] == ["ERC20InsufficientBalance"]
    assert world.units(NOBODY) == 6_000
    # Its time may come: the same effect is tried again, with new bytes.
    failed_id = "a" if isinstance(results[0], CallReverted) else "b"
    world.node.give(raw_of(CAROL.address), 5_000, 0)
    world.node.engine.seal()
    again = world.send(failed_id, 6_000)
    await world.waiting(1)
    world.node.engine.seal()
    assert (await again).ok
    assert world.units(NOBODY) == 12_000


# ------------------------------------------------------------------------------- crash and loss


@pytest.mark.anyio
@pytest.mark.parametrize("mined", [False, True])
async def test_after_a_crash_the_same_bytes_are_found_or_sent(world: World, mined: bool) -> None:
    sending = world.send("pay", 1)
    await world.waiting(1)
    (sent,) = await world.store.load("pay")
    sending.cancel()  # type: ignore[attr-defined]
    await world.chain.close()
    if mined:
        world.node.engine.seal()
    else:
        world.pool.drop(world.pool.all()[0])  # The endpoint was restarted as well.
    chain = await world.again()
    repeated = asyncio.ensure_future(chain.send("pay", CAROL, world.transfer(1), token_abi()))
    if not mined:
        await world.waiting(1)
        assert world.pool.all()[0].raw == sent.raw
        world.node.engine.seal()
    assert (await repeated).tx_hash == sent.tx_hash
    assert world.units(NOBODY) == 1
    assert await world.store.all_open() == ()
    await chain.close()


@pytest.mark.anyio
async def test_what_was_kept_and_never_sent_keeps_its_nonce(world: World) -> None:
    # Killed between the store and the network.
    lost = sign_transaction(
        CAROL, chain_id=31337, nonce=0, to=world.node.token, data=world.transfer(5).data,
        gas=200_000, fee_max=10**11, tip_max=1,
    )  # fmt: skip
    await world.store.save("lost", CAROL.address, 0, lost.raw, lost.tx_hash)
    other = world.send("other", 1)
    # The second waits for the first: the client sends that again by itself.
    await world.waiting(2)
    world.node.engine.seal()
    assert (await other).ok
    assert (await world.send("lost", 5)).tx_hash == lost.tx_hash
    assert world.units(NOBODY) == 6


@pytest.mark.anyio
async def test_an_endpoint_that_lost_its_pool_gets_everything_again(world: World) -> None:
    sends = [world.send(f"pay-{number}", 1) for number in range(10)]
    await world.waiting(10)
    before = {item.raw for item in world.pool.all()}
    for item in world.pool.all():
        world.pool.drop(item)
    await world.waiting(10)
    assert {item.raw for item in world.pool.all()} == before
    world.node.engine.seal()
    await asyncio.gather(*sends)
    assert world.units(NOBODY) == 10


@pytest.mark.anyio
async def test_a_nonce_that_something_else_took_is_replaced_by_a_new_one(world: World) -> None:
    sending = world.send("pay", 1)
    await world.waiting(1)
    world.pool.drop(world.pool.all()[0])
    stranger = world.foreign(0, tip=10**12 // 100)
    world.node.engine.seal()
    assert world.node.engine.find(keccak256(stranger)) is not None
    await world.waiting(1)
    world.node.engine.seal()
    receipt = await sending
    assert receipt.ok
    first, second = await world.store.load("pay")
    assert (first.nonce, second.nonce) == (0, 1)
    assert second.tx_hash == receipt.tx_hash
    assert world.units(NOBODY) == 1


@pytest.mark.anyio
async def test_what_others_sent_with_the_key_is_not_overwritten(world: World) -> None:
    world.foreign(0)
    sending = world.send("pay", 1)
    await world.waiting(2)
    world.node.engine.seal()
    await sending
    assert [sent.nonce for sent in await world.store.load("pay")] == [1]


@pytest.mark.anyio
async def test_what_is_stuck_is_sent_with_a_higher_fee_and_happens_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain_module, "BUMP_AFTER_S", 0.1)
    sending = world.send("pay", 1)
    await world.waiting(1)
    old = world.pool.all()[0]
    async with asyncio.timeout(30):
        while world.pool.all()[0] is old:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
    new = world.pool.all()[0]
    assert (new.nonce, len(world.pool)) == (old.nonce, 1)
    for higher, lower in zip(fees_of(new.raw), fees_of(old.raw), strict=True):
        assert higher * 100 >= lower * 110
    world.node.engine.seal()
    await sending
    assert world.units(NOBODY) == 1
    sent = await world.store.load("pay")
    assert {old.raw, new.raw} <= {tx.raw for tx in sent}


@pytest.mark.anyio
async def test_after_a_fork_the_same_effect_gives_the_same_bytes(world: World) -> None:
    sending = world.send("pay", 1)
    await world.waiting(1)
    world.node.engine.seal()
    receipt = await sending
    world.node.engine.rewind(1)
    assert world.units(NOBODY) == 0
    again = world.send("pay", 1)
    await world.waiting(1)
    world.node.engine.seal()
    assert (await again).tx_hash == receipt.tx_hash
    assert world.units(NOBODY) == 1


@pytest.mark.anyio
async def test_a_nonce_lost_in_a_fork_does_not_hold_up_what_follows(world: World) -> None:
    sending = world.send("first", 1)
    await world.waiting(1)
    world.node.engine.seal()
    await sending
    world.node.engine.rewind(1)  # And its sender never asks for it again.
    follower = world.send("second", 2)
    await world.waiting(2)
    world.node.engine.seal()
    assert (await follower).ok
    # Whoever repeats the first finds its nonce gone and takes a new one.
    again = world.send("first", 1)
    await world.waiting(1)
    world.node.engine.seal()
    assert (await again).ok
    assert world.units(NOBODY) == 3


# ------------------------------------------------------------------------------------- trouble


@pytest.mark.anyio
async def test_a_key_without_coin_is_told_so_and_its_nonce_is_given_back(world: World) -> None:
    poor = Identity(b"\x0d" * 32)
    world.node.give(raw_of(poor.address), 100, 0)
    world.node.engine.seal()
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="too little of the chain's coin"):
            await world.send("pay", 1, poor)
    assert await world.store.load("pay") == ()
    world.node.give(raw_of(poor.address), 0, 10**18)
    world.node.engine.seal()
    sending = world.send("pay", 1, poor)
    await world.waiting(1)
    world.node.engine.seal()
    assert (await sending).ok
    assert [sent.nonce for sent in await world.store.load("pay")] == [0]


@pytest.mark.anyio
async def test_without_blocks_the_caller_is_told_after_a_while(world: World) -> None:
    world.chain._wait_max_s = 0.3
    with pytest.raises(ChainUnavailable, match=r"in no block after .* no blocks are made"):
        await world.send("pay", 1)
    assert len(world.pool) == 1
    world.node.engine.seal()
    assert (await world.send("pay", 1)).ok
    assert world.units(NOBODY) == 1


@pytest.mark.anyio
async def test_an_endpoint_that_is_away_is_named_with_the_cause(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain_module, "AWAY_MAX_S", 0.2)
    port = int(world.node.url.rsplit(":", 1)[1])
    await world.node._http.close()
    with pytest.raises(ChainUnavailable, match="is the chain's process running"):
        await world.send("pay", 1)
    monkeypatch.setattr(chain_module, "AWAY_MAX_S", 20.0)
    sending = world.send("pay", 1)
    await asyncio.sleep(0.1)
    assert not sending.done()  # type: ignore[attr-defined]
    await world.node.serve(port)
    await world.waiting(1)
    world.node.engine.seal()
    assert (await sending).ok


@pytest.mark.anyio
async def test_an_endpoint_that_goes_away_while_we_wait_is_waited_for(world: World) -> None:
    sending = world.send("pay", 1)
    await world.waiting(1)
    port = int(world.node.url.rsplit(":", 1)[1])
    await world.node._http.close()
    await asyncio.sleep(0.1)
    world.node.engine.seal()
    await world.node.serve(port)
    assert (await sending).ok


@pytest.mark.anyio
async def test_another_chain_or_no_chain_is_refused_at_the_door(world: World) -> None:
    with pytest.raises(ConfigurationError, match="serves chain 31337, and 1 was expected"):
        await EvmChain.connect(world.node.url, store=world.store, chain_id=1)
    with pytest.raises(ConfigurationError, match="no http or https endpoint"):
        await EvmChain.connect("ws://localhost:1", store=world.store)
    with pytest.raises(ChainUnavailable, match="cannot be reached"):
        await EvmChain.connect("http://127.0.0.1:1", store=world.store)


async def answering(*answers: bytes) -> tuple[str, asyncio.Server]:
    """Serve these HTTP answers one after the other, then the last for ever."""
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length")
        )
        await reader.readexactly(length)
        answer = left.pop(0) if len(left) > 1 else left[0]
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", server


def ok(body: Any) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (
        len(content),
        content,
    )


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n", "limit of requests"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", "answered 503"),
        (ok(b"<html>"), "cannot be reached"),
        (ok([1]), "something else than JSON-RPC"),
        (ok({"jsonrpc": "2.0", "id": 0, "result": None}), "is no endpoint"),
        (ok({"jsonrpc": "2.0", "id": 0, "error": {"code": -1, "message": "no"}}), "no endpoint"),
        (b"", "cannot be reached"),
    ],
)
async def test_an_endpoint_that_talks_nonsense_is_unavailable(answer: bytes, words: str) -> None:
    url, server = await answering(answer)
    try:
        with pytest.raises(ChainUnavailable, match=words):
            await EvmChain.connect(url, store=MemoryTxStore())
    finally:
        server.close()
        await server.wait_closed()


@pytest.mark.anyio
async def test_closing_tells_those_who_wait(world: World) -> None:
    sending = world.send("pay", 1)
    await world.waiting(1)  # Its sender may not know yet that it was taken.
    await world.chain.close()
    with pytest.raises(ChainUnavailable, match="closed"):
        await sending
    await world.chain.close()


# ------------------------------------------------------------------------------------- the parts


@pytest.mark.anyio
async def test_a_shared_request_never_answers_who_asked_after_it_began() -> None:
    begun, release = 0, asyncio.Event()

    async def fetch() -> int:
        nonlocal begun
        begun += 1
        number = begun
        await release.wait()
        return number

    shared = Shared(fetch)
    first = asyncio.ensure_future(shared.get())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    later = [asyncio.ensure_future(shared.get()) for _ in range(5)]
    await asyncio.sleep(0)
    release.set()
    assert await first == 1
    assert await asyncio.gather(*later) == [2] * 5
    assert begun == 2
    await shared.close()


@pytest.mark.anyio
async def test_a_failed_shared_request_does_not_spoil_the_next() -> None:
    outcomes: Any = iter([ChainUnavailable("away"), 5])

    async def fetch() -> int:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        number: int = outcome
        return number

    shared = Shared(fetch)
    with pytest.raises(ChainUnavailable):
        await shared.get()
    assert await shared.get() == 5


def test_revert_data_is_read_by_name_and_never_trusted() -> None:
    abi = token_abi()
    word = (7).to_bytes(32, "big")
    text = (
        keccak256(b"Error(string)")[:4]
        + bytes.fromhex("20".rjust(64, "0"))
        + ((2).to_bytes(32, "big") + b"no".ljust(32, b"\0"))
    )
    assert (abi.reverted(text).error, abi.reverted(text).values) == ("Error", ("no",))
    panic = abi.reverted(keccak256(b"Panic(uint256)")[:4] + word)
    assert (panic.error, panic.values) == ("Panic", (7,))
    assert abi.reverted(b"").error == "NoReason"
    assert abi.reverted(b"\x01\x02\x03\x04\x05").values == ("0x0102030405",)
    cut = keccak256(b"ERC20InsufficientBalance(address,uint256,uint256)")[:4] + word
    assert (abi.reverted(cut).error, abi.reverted(cut).values) == ("ERC20InsufficientBalance", ())


def test_overloaded_functions_are_told_apart_by_their_signature() -> None:
    names = [n for n in token_abi().functions if n.startswith("receiveWithAuthorization(")]
    assert len({token_abi().functions[name].selector for name in names}) == 2
    odd = {"type": "function", "name": "f", "outputs": [], "inputs": [
        {"name": "x", "type": "tuple[2]", "components": [{"name": "y", "type": "uint8[]"}]}
    ]}  # fmt: skip
    assert Abi([odd]).functions["f((uint8[])[2])"].inputs == ("(uint8[])[2]",)


def test_immutable_values_are_left_out_when_code_is_compared() -> None:
    made = artifact("JobEscrow")
    assert made.holes
    code = bytearray(made.runtime)
    start, length = made.holes[0]
    code[start : start + length] = b"\xff" * length
    assert made.same_code(bytes(code))
    code[-60] ^= 1
    assert not made.same_code(bytes(code))
    assert not made.same_code(b"")
    assert not made.same_code(made.runtime + b"\0")


def test_an_unknown_contract_is_a_broken_installation() -> None:
    with pytest.raises(ConfigurationError, match="lacks the contract Nothing"):
        artifact("Nothing")


def test_the_client_does_not_load_the_machine() -> None:
    # Each takes a good part of a second of every command, and they raise Python's limit of
    # recursion, which makes deep JSON deadly.
    code = (
        "import sys, coase.escrow.backends.evm.settlement, coase.escrow.backends.devchain;"
        "import coase.escrow.backends.keystore;"
        "heavy = ('eth', 'eth_tester', 'web3', 'eth_account', 'py_ecc');"
        "print([name for name in heavy if name in sys.modules],"
        "sys.getrecursionlimit())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout == "[] 1000\n"


@pytest.mark.anyio
async def test_the_endpoint_offers_web3_on_its_own_connections(world: World) -> None:
    w3 = world.chain.endpoint.web3
    assert await w3.eth.chain_id == 31337
    assert isinstance(world.chain.endpoint, Endpoint)
