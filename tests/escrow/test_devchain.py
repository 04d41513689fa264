"""The embedded chain: what it takes, what it answers, and what it still knows after a crash."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from eth.constants import BLANK_ROOT_HASH
from eth.vm.forks.cancun.blocks import CancunBlockHeader
from eth_account import Account as EthAccount
from eth_utils.address import to_checksum_address
from web3 import AsyncHTTPProvider, AsyncWeb3

from coase.escrow.backends.devchain import DevChain, start_devchain
from coase.escrow.backends.devchain_engine import BLOCK_GAS_MAX, Account, Block
from coase.escrow.backends.devchain_node import FAUCET_UNITS_MAX, DevNode
from coase.escrow.backends.evm.abi import token_abi
from coase.escrow.backends.evm.transaction import created_address, sign_transaction
from coase.protocol.errors import ConfigurationError, JournalFailed
from coase.protocol.identity import Identity, keccak256

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

START_S = 1_800_000_000
ANNA, BERT = Identity(b"\x0a" * 32), Identity(b"\x0b" * 32)
CHAIN = 31337
# PUSH1 7, PUSH1 0, MSTORE, PUSH1 32, PUSH1 0, RETURN
SEVEN = bytes.fromhex("600760005260206000f3")


def raw_of(address: str) -> bytes:
    return bytes.fromhex(address[2:])


class Chain:
    """One manual chain in this process, spoken to as a client does, without the network."""

    def __init__(self, state: Path | None = None, **options: Any) -> None:
        options.setdefault("manual_time_s", START_S)
        self.node = DevNode(state=state, seed=b"tests", **options)
        assert self.node.manual is not None
        self.clock = self.node.manual
        self.nonces: dict[str, int] = {}

    def ask(self, method: str, *params: Any) -> Any:
        """Return the result, or the error if there is one."""
        body = {"jsonrpc": "2.0", "id": 7, "method": method, "params": params}
        answer = json.loads(self.node.rpc.answer(json.dumps(body).encode()))
        assert answer["id"] == 7
        return answer["error"] if "error" in answer else answer["result"]

    def give(self, who: Identity, units: int = 1000) -> None:
        self.ask("coase_faucet", who.address, hex(units), hex(10**18))
        self.seal()

    def seal(self) -> Block:
        return self.node.engine.seal()

    def sign(self, who: Identity, to: str, data: bytes = b"", **changes: Any) -> str:
        fields: dict[str, Any] = {
            "chain_id": CHAIN,
            "nonce": changes.get("nonce", self.nonces.get(who.address, 0)),
            "gas": 200_000,
            "fee_max": 10**10,
            "tip_max": 10**9,
        }
        fields |= changes
        if "nonce" not in changes:
            self.nonces[who.address] = fields["nonce"] + 1
        return "0x" + sign_transaction(who, to=to, data=data, **fields).raw.hex()

    def send(self, who: Identity, to: str, data: bytes = b"", **changes: Any) -> Any:
        return self.ask("eth_sendRawTransaction", self.sign(who, to, data, **changes))

    def transfer(self, who: Identity, to: str, units: int, **changes: Any) -> Any:
        return self.send(who, self.node.token, token_abi().encode("transfer", to, units), **changes)

    def units(self, who: str) -> int:
        data = token_abi().encode("balanceOf", who)
        return int(self.ask("eth_call", {"to": self.node.token, "input": "0x" + data.hex()}), 16)


@pytest.fixture
def chain() -> Iterator[Chain]:
    chain = Chain()
    chain.clock.automatic = False
    chain.give(ANNA)
    chain.give(BERT)
    yield chain
    chain.node.close_disk()


# ------------------------------------------------------------------------------- blocks and time


def test_a_block_hashes_as_a_cancun_header_does(chain: Chain) -> None:
    chain.transfer(ANNA, BERT.address, 5)
    full, empty = chain.seal(), chain.seal()
    for block in (chain.node.engine.blocks[0], full, empty):
        header_class: Any = CancunBlockHeader
        header = header_class(
            difficulty=0,
            block_number=block.number,
            gas_limit=BLOCK_GAS_MAX,
            timestamp=block.time_s,
            parent_hash=block.parent_hash,
            state_root=block.state_root,
            transaction_root=block.tx_root,
            receipt_root=block.receipts_root,
            bloom=block.bloom,
            gas_used=block.gas_used,
            mix_hash=block.parent_hash,
            nonce=bytes(8),
            base_fee_per_gas=block.base_fee,
            withdrawals_root=BLANK_ROOT_HASH,
        )
        assert header.hash == block.hash == keccak256(block.header())
    assert full.bloom != 0
    assert full.gas_used > 21_000
    assert empty.state_root == full.state_root


def test_time_stands_still_until_the_test_moves_it(chain: Chain) -> None:
    assert [chain.seal().time_s for _ in range(3)] == [START_S] * 3
    assert chain.ask("coase_setTime", hex(START_S + 9)) == hex(START_S + 9)
    assert chain.seal().time_s == START_S + 9
    assert "already" in chain.ask("coase_setTime", START_S)["message"]


def test_a_transaction_is_sealed_at_once_unless_told_otherwise(chain: Chain) -> None:
    before = chain.node.engine.head.number
    chain.ask("coase_setAutomatic", True)
    chain.transfer(ANNA, BERT.address, 5)
    assert chain.node.engine.head.number == before + 1
    chain.ask("coase_setAutomatic", False)
    chain.transfer(ANNA, BERT.address, 5)
    assert chain.node.engine.head.number == before + 1
    assert chain.ask("coase_mine", "0x3") == hex(before + 4)
    assert chain.units(BERT.address) == 1010


# ------------------------------------------------------------------------------ what it may take


def test_one_senders_transactions_go_by_nonce_and_a_gap_holds_back(chain: Chain) -> None:
    last = chain.transfer(ANNA, BERT.address, 1, nonce=2)
    first = chain.transfer(ANNA, BERT.address, 1, nonce=0)
    assert chain.ask("eth_getTransactionCount", ANNA.address, "pending") == "0x1"
    assert [done.tx_hash.hex() for done in chain.seal().transactions] == [first[2:]]
    middle = chain.transfer(ANNA, BERT.address, 1, nonce=1)
    assert chain.ask("eth_getTransactionCount", ANNA.address, "pending") == "0x3"
    assert chain.ask("eth_getTransactionCount", ANNA.address, "latest") == "0x1"
    sealed = [done.tx_hash.hex() for done in chain.seal().transactions]
    assert sealed == [middle[2:], last[2:]]


def test_the_better_tip_goes_first_but_never_before_a_lower_nonce(chain: Chain) -> None:
    chain.transfer(ANNA, BERT.address, 1, nonce=0, tip_max=1)
    chain.transfer(ANNA, BERT.address, 2, nonce=1, tip_max=10**9)
    chain.transfer(BERT, ANNA.address, 3, nonce=0, tip_max=10**6)
    senders = [(done.sender, done.index) for done in chain.seal().transactions]
    bert, anna = raw_of(BERT.address), raw_of(ANNA.address)
    assert senders == [(bert, 0), (anna, 1), (anna, 2)]


def test_a_higher_fee_replaces_and_a_slightly_higher_one_does_not(chain: Chain) -> None:
    old = chain.transfer(ANNA, BERT.address, 1, nonce=0, fee_max=10**10, tip_max=1000)
    for fee, tip in ((10**10 * 11 // 10, 1099), (10**10 * 109 // 100, 2000)):
        refused = chain.transfer(ANNA, BERT.address, 2, nonce=0, fee_max=fee, tip_max=tip)
        assert refused["message"] == "replacement transaction underpriced"
    new = chain.transfer(ANNA, BERT.address, 2, nonce=0, fee_max=10**10 * 11 // 10, tip_max=1100)
    assert chain.ask("eth_getTransactionByHash", old) is None
    chain.seal()
    assert chain.ask("eth_getTransactionReceipt", new)["status"] == "0x1"
    assert chain.units(BERT.address) == 1002


def test_what_no_block_can_take_is_refused_with_the_words_of_public_nodes(chain: Chain) -> None:
    raw = chain.sign(ANNA, BERT.address, value=1)
    assert chain.ask("eth_sendRawTransaction", raw).startswith("0x")
    poor = Identity(b"\x0c" * 32)
    send = "eth_sendRawTransaction"
    cases = [
        (chain.ask(send, raw), "already known"),
        (chain.send(ANNA, BERT.address, nonce=2000), "nonce too high"),
        (chain.send(poor, BERT.address, value=1), "insufficient funds"),
        (chain.send(ANNA, BERT.address, nonce=1, chain_id=1), "invalid chain id"),
        (chain.send(ANNA, BERT.address, nonce=1, gas=20_999), "intrinsic gas too low"),
        (chain.send(ANNA, BERT.address, nonce=1, gas=2**24 + 1), "exceeds block gas limit"),
        (chain.send(ANNA, BERT.address, nonce=1, tip_max=10**11), "max priority fee"),
        (chain.send(ANNA, BERT.address, bytes(131_100), nonce=1), "oversized data"),
        (chain.ask(send, "0x03" + "00" * 50), "transaction type not supported"),
        (chain.send(ANNA, "", bytes(49_153), nonce=1, gas=10**7), "max initcode size"),
        (chain.ask(send, "0x02c0"), "no transaction"),
        (chain.ask(send, "0x"), "was empty"),
        (chain.ask(send, raw[:-2]), "no transaction"),
    ]
    for answer, words in cases:
        assert isinstance(answer, dict), (answer, words)
        assert answer["code"] == -32000
        assert words in answer["message"]
    chain.seal()
    assert "already known" in chain.ask(send, raw)["message"]
    assert "nonce too low" in chain.send(ANNA, BERT.address, nonce=0, value=2)["message"]
    assert len(chain.node.engine.pool) == 0


def test_a_sender_who_spent_the_money_meanwhile_is_dropped_and_nobody_else(chain: Chain) -> None:
    coin = int(chain.ask("eth_getBalance", ANNA.address), 16)
    cost = 21_000 * 10**10
    chain.send(ANNA, BERT.address, nonce=0, value=coin - cost, gas=21_000)
    chain.send(ANNA, BERT.address, nonce=1, value=coin - cost, gas=21_000)
    chain.transfer(BERT, ANNA.address, 1)
    assert len(chain.seal().transactions) == 2
    assert len(chain.node.engine.pool) == 0


def test_other_kinds_of_transactions_are_taken_too(chain: Chain) -> None:
    key = "0x" + "0a" * 32
    old: dict[str, Any] = {
        "nonce": 0,
        "gasPrice": 10**10,
        "gas": 21_000,
        "to": to_checksum_address(BERT.address),
        "value": 5,
    }
    listed = old | {"nonce": 1, "gas": 30_000, "type": 1, "accessList": []}
    for fields in (old, listed):
        raw = EthAccount.sign_transaction(fields | {"chainId": CHAIN}, key).raw_transaction
        tx_hash = chain.ask("eth_sendRawTransaction", "0x" + raw.hex())
        chain.seal()
        found = chain.ask("eth_getTransactionByHash", tx_hash)
        assert found["type"] == hex(fields.get("type", 0))
        assert found["from"] == ANNA.address
        assert chain.ask("eth_getTransactionReceipt", tx_hash)["status"] == "0x1"
    unbound = EthAccount.sign_transaction(old | {"nonce": 2}, key).raw_transaction
    assert "chain id" in chain.ask("eth_sendRawTransaction", "0x" + unbound.hex())["message"]


# -------------------------------------------------------------------------------- what it answers


def test_a_refused_call_gives_its_reason_as_error_code_three(chain: Chain) -> None:
    data = token_abi().encode("transfer", BERT.address, 10**15)
    call = {"from": ANNA.address, "to": chain.node.token, "input": "0x" + data.hex()}
    for method in ("eth_call", "eth_estimateGas"):
        error = chain.ask(method, call)
        assert error["code"] == 3
        reason = token_abi().reverted(bytes.fromhex(error["data"][2:]))
        assert (reason.error, reason.values[1:]) == ("ERC20InsufficientBalance", (1000, 10**15))
    tx_hash = chain.transfer(ANNA, BERT.address, 10**15)
    chain.seal()
    receipt = chain.ask("eth_getTransactionReceipt", tx_hash)
    assert (receipt["status"], receipt["revertReason"]) == ("0x0", error["data"])
    assert receipt["logs"] == []


def test_a_call_changes_nothing_and_sees_the_time_of_its_block(chain: Chain) -> None:
    call = {"to": chain.node.token, "input": "0x" + token_abi().encode("clock").hex()}
    assert int(chain.ask("eth_call", call), 16) == START_S
    chain.ask("coase_setTime", START_S + 60)
    assert int(chain.ask("eth_call", call, "latest"), 16) == START_S
    assert int(chain.ask("eth_call", call, "pending"), 16) == START_S + 60
    transfer = "0x" + token_abi().encode("transfer", BERT.address, 7).hex()
    paid = {"from": ANNA.address, "to": chain.node.token, "input": transfer}
    assert int(chain.ask("eth_call", paid), 16) == 1
    assert (chain.units(ANNA.address), chain.units(BERT.address)) == (1000, 1000)
    assert "insufficient funds" in chain.ask("eth_call", paid | {"value": hex(10**30)})["message"]
    assert "intrinsic" in chain.ask("eth_call", paid | {"gas": "0x5000"})["message"]
    assert "OutOfGas" in chain.ask("eth_call", paid | {"gas": "0x7000"})["message"]


def test_an_estimate_is_enough_and_not_far_too_much(chain: Chain) -> None:
    data = token_abi().encode("transfer", "0x" + "77" * 20, 7)
    call = {"from": ANNA.address, "to": chain.node.token, "input": "0x" + data.hex()}
    enough = int(chain.ask("eth_estimateGas", call), 16)
    tx_hash = chain.transfer(ANNA, "0x" + "77" * 20, 7, gas=enough)
    chain.seal()
    receipt = chain.ask("eth_getTransactionReceipt", tx_hash)
    assert receipt["status"] == "0x1"
    assert enough < int(receipt["gasUsed"], 16) * 12 // 10


def test_the_past_can_be_asked(chain: Chain) -> None:
    before = hex(chain.node.engine.head.number)
    chain.transfer(ANNA, BERT.address, 400)
    block = chain.seal()
    data = "0x" + token_abi().encode("balanceOf", ANNA.address).hex()
    call = {"to": chain.node.token, "input": data}
    assert int(chain.ask("eth_call", call, before), 16) == 1000
    assert int(chain.ask("eth_call", call, {"blockHash": "0x" + block.hash.hex()}), 16) == 600
    assert chain.ask("eth_getTransactionCount", ANNA.address, before) == "0x0"
    assert "not found" in chain.ask("eth_call", call, hex(10**6))["message"]
    assert chain.ask("eth_getBlockByNumber", hex(10**6), False) is None
    assert chain.ask("eth_getBlockByHash", "0x" + "11" * 32, False) is None


def test_logs_are_found_by_address_topic_and_block(chain: Chain) -> None:
    transfer = "0x" + token_abi().topic("Transfer").hex()
    first = chain.node.engine.head.number + 1
    chain.transfer(ANNA, BERT.address, 1)
    chain.transfer(BERT, ANNA.address, 2)
    block = chain.seal()
    chain.transfer(ANNA, BERT.address, 3)
    chain.seal()
    anna = "0x" + raw_of(ANNA.address).rjust(32, b"\0").hex()

    def found(**query: Any) -> list[int]:
        query = {"fromBlock": hex(first), "toBlock": "latest"} | query
        logs = chain.ask("eth_getLogs", {k: v for k, v in query.items() if v is not None})
        return [int(log["data"], 16) for log in logs]

    assert found() == [1, 2, 3]
    assert found(address=chain.node.token) == [1, 2, 3]
    assert found(address=[chain.node.escrow]) == []
    assert found(topics=[transfer, anna]) == [1, 3]
    assert found(topics=[None, None, [anna]]) == [2]
    assert found(topics=[[transfer, "0x" + "00" * 32]]) == [1, 2, 3]
    assert found(topics=[transfer, None, None, None]) == []
    assert found(fromBlock=hex(first + 1)) == [3]
    assert found(toBlock=hex(first)) == [1, 2]
    by_hash = {"blockHash": "0x" + block.hash.hex()}
    assert found(fromBlock=None, toBlock=None, **by_hash) == [1, 2]
    unknown = chain.ask("eth_getLogs", {"blockHash": "0x" + "11" * 32})
    assert unknown["message"] == "unknown block"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", -32700),
        (b"{", -32700),
        (b"\xff\xfe", -32700),
        (b"[" * 100_000, -32700),
        (b"[]", -32600),
        (b"1", -32600),
        (b'"eth_chainId"', -32600),
        (b'{"method": 1}', -32600),
        (b'{"method": "no_such"}', -32601),
        (b'{"method": "eth_chainId", "params": {}}', -32602),
        (b'{"method": "eth_chainId", "params": [1]}', -32602),
        (b'{"method": "eth_getBalance", "params": []}', -32602),
        (b'{"method": "eth_getBalance", "params": ["0x12"]}', -32602),
        (b'{"method": "eth_getBalance", "params": [null]}', -32602),
        (b'{"method": "eth_getBlockByNumber", "params": ["0xzz", false]}', -32602),
        (b'{"method": "eth_getBlockByNumber", "params": [true, false]}', -32602),
        (b'{"method": "eth_call", "params": [[]]}', -32602),
        (b'{"method": "eth_getLogs", "params": [{"topics": "x"}]}', -32602),
        (b'{"method": "eth_getLogs", "params": [{"address": [5]}]}', -32602),
        (b'{"method": "eth_feeHistory", "params": ["0x1", []]}', -32602),
    ],
)
def test_nonsense_gets_an_error_and_does_no_harm(chain: Chain, body: bytes, code: int) -> None:
    answer = json.loads(chain.node.rpc.answer(body))
    assert answer["error"]["code"] == code
    assert chain.ask("eth_chainId") == hex(CHAIN)


def test_a_batch_is_answered_item_by_item(chain: Chain) -> None:
    batch = [
        {"jsonrpc": "2.0", "id": 1, "method": "eth_chainId", "params": []},
        {"jsonrpc": "2.0", "id": 2, "method": "no_such"},
        3,
    ]
    answers = json.loads(chain.node.rpc.answer(json.dumps(batch).encode()))
    assert [answer.get("id") for answer in answers] == [1, 2, None]
    assert answers[0]["result"] == hex(CHAIN)
    assert [answer["error"]["code"] for answer in answers[1:]] == [-32601, -32600]
    huge = json.dumps([batch[0]] * 1001).encode()
    assert json.loads(chain.node.rpc.answer(huge))["error"]["code"] == -32600


def test_the_clock_of_a_real_chain_cannot_be_moved() -> None:
    chain = Chain.__new__(Chain)
    chain.node = DevNode(seed=b"tests")
    for method in ("coase_mine", "coase_setTime", "coase_reorg", "coase_setAutomatic"):
        assert chain.ask(method)["code"] == -32601


# -------------------------------------------------------------------------------------- the faucet


def test_the_faucet_gives_both_kinds_of_money_and_not_for_ever(chain: Chain) -> None:
    who = "0x" + "55" * 20
    sent = chain.ask("coase_faucet", who)
    assert sorted(sent) == ["units_tx", "wei_tx"]
    chain.seal()
    assert chain.units(who) == 1000 * 10**6
    assert int(chain.ask("eth_getBalance", who), 16) == 10 * 10**18
    # What is on its way counts as much as what has arrived.
    left = FAUCET_UNITS_MAX - 1000 * 10**6
    chain.ask("coase_faucet", who, hex(left), "0x0")
    assert chain.ask("coase_faucet", who, "0x1", "0x0")["code"] == -32005
    chain.seal()
    assert chain.ask("coase_faucet", who, "0x1", "0x0")["code"] == -32005
    assert sorted(chain.ask("coase_faucet", who, "0x0", "0x1")) == ["wei_tx"]
    assert chain.ask("coase_faucet", "0x" + "56" * 20, "0x1")["units_tx"].startswith("0x")


# ------------------------------------------------------------------------------------ forks, disk


def test_a_fork_takes_blocks_off_and_their_transactions_wait_again(chain: Chain) -> None:
    kept = chain.transfer(ANNA, BERT.address, 10)
    chain.seal()
    dropped = chain.transfer(BERT, ANNA.address, 1)
    chain.seal()
    head = chain.node.engine.head.number
    assert chain.ask("coase_reorg", "0x2", [dropped]) == [kept]
    assert chain.node.engine.head.number == head - 2
    assert chain.units(BERT.address) == 1000
    assert chain.ask("eth_getTransactionReceipt", kept) is None
    assert chain.ask("eth_getTransactionByHash", dropped) is None
    chain.ask("coase_setTime", START_S + 5)
    chain.seal()
    assert chain.units(BERT.address) == 1010
    assert chain.ask("eth_getTransactionReceipt", kept)["blockNumber"] == hex(head - 1)
    assert "above the first" in chain.ask("coase_reorg", hex(head))["message"]


def test_a_chain_on_disk_goes_on_where_it_was(tmp_path: Path) -> None:
    chain = Chain(tmp_path / "chain")
    chain.give(ANNA)
    chain.transfer(ANNA, BERT.address, 1)
    chain.ask("coase_setTime", START_S + 100)
    chain.transfer(ANNA, BERT.address, 2)
    chain.ask("coase_mine", "0x5")
    chain.ask("coase_reorg", "0x2")
    chain.transfer(ANNA, BERT.address, 3)
    head, deployed = chain.node.engine.head, (chain.node.token, chain.node.escrow)
    logs = chain.ask("eth_getLogs", {"fromBlock": "0x0"})
    promised = chain.ask("coase_faucet", ANNA.address, hex(FAUCET_UNITS_MAX))["message"]
    chain.node.close_disk()

    again = Chain(tmp_path / "chain")
    assert again.node.engine.head == head
    assert (again.node.token, again.node.escrow) == deployed
    assert again.units(BERT.address) == 6
    assert again.ask("eth_getLogs", {"fromBlock": "0x0"}) == logs
    assert again.ask("coase_faucet", ANNA.address, hex(FAUCET_UNITS_MAX))["message"] == promised
    assert again.clock.time_s == START_S + 100
    again.nonces = chain.nonces
    again.transfer(ANNA, BERT.address, 4)
    assert again.units(BERT.address) == 10
    again.node.close_disk()
    for path in (tmp_path / "chain").iterdir():
        assert path.stat().st_mode & 0o077 == 0


def test_at_every_byte_a_cut_file_opens_as_some_earlier_chain(tmp_path: Path) -> None:
    chain = Chain(tmp_path / "chain")
    chain.give(ANNA)
    chain.transfer(ANNA, BERT.address, 1)
    hashes = [block.hash for block in chain.node.engine.blocks]
    chain.node.close_disk()
    path = tmp_path / "chain" / "chain.jsonl"
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in (last, last + 1, len(whole) - 20, len(whole) - 1):
        path.write_bytes(whole[:cut])
        again = Chain(tmp_path / "chain")
        assert [block.hash for block in again.node.engine.blocks] == hashes[:-1]
        again.transfer(ANNA, BERT.address, 7, nonce=0)
        assert again.units(BERT.address) == 7
        again.node.close_disk()
        path.write_bytes(whole)


def damaged(content: list[str]) -> list[str]:
    return [*content[:1], content[1][:-9], *content[2:]]


def other_root(content: list[str]) -> list[str]:
    entry = json.loads(content[1])
    return [*content[:1], json.dumps(entry | {"root": "11" * 32}), *content[2:]]


def missing_transaction(content: list[str]) -> list[str]:
    entry = json.loads(content[1])
    return [*content[:1], json.dumps(entry | {"tx": entry["tx"][1:]}), *content[2:]]


def other_genesis(content: list[str]) -> list[str]:
    return [json.dumps(json.loads(content[0]) | {"hash": "11" * 32}), *content[1:]]


def other_version(content: list[str]) -> list[str]:
    return [json.dumps(json.loads(content[0]) | {"coase_devchain": 99}), *content[1:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damaged, "line 2, is damaged"),
        (other_root, "the state after block 1 differs"),
        (missing_transaction, "block 1 fails"),
        (other_genesis, "the first block differs"),
        (other_version, "another version"),
    ],
)
def test_a_file_that_does_not_fit_is_an_error_that_says_what_to_do(
    tmp_path: Path, change: Any, message: str
) -> None:
    chain = Chain(tmp_path)
    chain.give(ANNA)
    chain.node.close_disk()
    path = tmp_path / "chain.jsonl"
    content = path.read_text().splitlines()
    path.write_text("\n".join(change(content)) + "\n")
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match=message) as caught:
        Chain(tmp_path)
    assert "remove" in str(caught.value)
    assert path.read_bytes() == before


def test_another_chain_id_or_a_lost_key_is_an_error(tmp_path: Path) -> None:
    Chain(tmp_path).node.close_disk()
    with pytest.raises(ConfigurationError, match="has chain id 31337, not 5"):
        Chain(tmp_path, chain_id=5)
    (tmp_path / "deployer.key").unlink()
    with pytest.raises(ConfigurationError, match=r"deployer\.key is missing"):
        Chain(tmp_path)


def test_two_processes_do_not_write_one_chain(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    with pytest.raises(ConfigurationError, match="another process runs the chain"):
        Chain(tmp_path)
    chain.node.close_disk()
    Chain(tmp_path).node.close_disk()


def test_a_block_that_cannot_be_kept_never_was(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    chain.clock.automatic = False
    chain.give(ANNA)
    head = chain.node.engine.head
    chain.transfer(ANNA, BERT.address, 1)
    file = chain.node._file
    assert file is not None
    real, file._file = file._file, os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(JournalFailed):
        chain.seal()
    assert chain.node.engine.head is head
    assert chain.units(BERT.address) == 0
    os.close(file._file)
    file._file = real
    chain.seal()
    assert chain.units(BERT.address) == 1
    chain.node.close_disk()


def test_code_can_be_placed_at_fixed_addresses(tmp_path: Path) -> None:
    where = "0x" + "c0de" * 10
    place = {where: Account(code=SEVEN, balance=5, storage=((1, 2),))}
    chain = Chain(tmp_path, place=place)
    assert int(chain.ask("eth_call", {"to": where}), 16) == 7
    assert chain.ask("eth_getCode", where) == "0x" + SEVEN.hex()
    assert int(chain.ask("eth_getStorageAt", where, "0x1"), 16) == 2
    assert chain.ask("eth_getBalance", where) == "0x5"
    chain.node.close_disk()
    Chain(tmp_path, place=place).node.close_disk()
    with pytest.raises(ConfigurationError, match="the first block differs"):
        Chain(tmp_path)


# ------------------------------------------------------------------------------------ the process


@pytest.fixture(scope="module")
async def devchain() -> AsyncIterator[DevChain]:
    chain = await start_devchain()
    yield chain
    await chain.close()
    assert chain.process.returncode == 0


async def http(url: str, head: str, body: bytes = b"") -> bytes:
    """Send raw bytes and return the status line; nothing if it hung up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    try:
        writer.write(head.encode() + b"\r\n\r\n" + body)
        async with asyncio.timeout(20):
            return (await reader.readline()).strip()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


@pytest.mark.anyio
async def test_the_endpoint_takes_json_from_this_machine_and_nothing_else(
    devchain: DevChain,
) -> None:
    body = b'{"jsonrpc":"2.0","id":1,"method":"eth_chainId","params":[]}'
    json_type, length = "Content-Type: application/json", f"Content-Length: {len(body)}"
    good = f"POST / HTTP/1.1\r\nHost: localhost:1\r\n{json_type}\r\n{length}"
    assert await http(devchain.rpc, good, body) == b"HTTP/1.1 200 OK"
    cases = [
        (good.replace("localhost", "[::1]"), b"200"),
        (good.replace("localhost", "rebound.example"), b"403"),
        (good.replace("localhost", "127.0.0.1.example"), b"403"),
        (good.replace("application/json", "text/plain"), b"415"),
        (good.replace(json_type + "\r\n", ""), b"415"),
        (good.replace("POST", "GET"), b"405"),
        (good.replace("\r\n" + length, ""), b"411"),
        (good.replace(length, "Content-Length: 2097153"), b"413"),
        (good.replace(length, "Content-Length: " + "9" * 5000), b"413"),
        (good.replace(length, "Content-Length: -5"), b"411"),
        (good.replace(length, f"{length}\r\n{length}"), b"400"),
        (good.replace(length, "Transfer-Encoding: chunked"), b"411"),
        (good.replace("HTTP/1.1", "HTTP/9"), b"400"),
        ("garbage", b"400"),
    ]
    for head, status in cases:
        assert (await http(devchain.rpc, head, body))[9:12] == status, head
    assert await http(devchain.rpc, good + "\r\nX: " + "y" * 20_000, body) == b""
    assert await http(devchain.rpc, good, body) == b"HTTP/1.1 200 OK"


@pytest.mark.anyio
async def test_a_stock_client_finds_what_it_asks_for(devchain: DevChain) -> None:
    provider = AsyncHTTPProvider(devchain.rpc)
    w3: Any = AsyncWeb3(provider)
    try:
        assert await w3.is_connected()
        assert await w3.eth.chain_id == devchain.chain_id
        assert await w3.client_version == "coase-devchain/1"
        assert await w3.net.version == str(devchain.chain_id)
        assert await w3.eth.syncing is False
        block = await w3.eth.get_block(1, True)
        assert len(block["transactions"]) == 5
        for tag in ("earliest", "latest", "pending", "safe", "finalized"):
            assert (await w3.eth.get_block(tag))["timestamp"] > 0
        history = await w3.eth.fee_history(2, "latest", [50.0])
        assert len(history["baseFeePerGas"]) == len(history["gasUsedRatio"]) + 1
        account = EthAccount.from_key(keccak256(b"a stock client"))
        given = await provider.make_request("coase_faucet", [account.address])
        await w3.eth.wait_for_transaction_receipt(given["result"]["units_tx"])
        token = w3.eth.contract(
            address=w3.to_checksum_address(devchain.token),
            abi=json.loads(json.dumps(list(artifact_abi()))),
        )
        call = token.functions.transfer(w3.to_checksum_address(BERT.address), 5)
        # Nothing given: it estimates gas, asks for fees, nonce and chain by itself.
        filled = await call.build_transaction({"from": account.address, "nonce": 0})
        signed = account.sign_transaction(filled)
        sent = await w3.eth.send_raw_transaction(signed.raw_transaction)
        receipt = await w3.eth.wait_for_transaction_receipt(sent)
        assert receipt["status"] == 1
        events = token.events.Transfer().process_receipt(receipt)
        assert events[0]["args"]["value"] == 5
        assert (await w3.eth.get_transaction(sent))["blockNumber"] == receipt["blockNumber"]
        assert await token.functions.balanceOf(account.address).call() == 1000 * 10**6 - 5
        async with w3.batch_requests() as batch:
            batch.add(w3.eth.get_block("latest"))
            batch.add(token.functions.symbol())
            newest, symbol = await batch.async_execute()
        assert (newest["number"] >= receipt["blockNumber"], symbol) == (True, "COASE")
    finally:
        await provider.disconnect()


def artifact_abi() -> Any:
    from coase.escrow.backends.evm.artifacts import artifact

    return artifact("CoaseToken").abi


async def ask(url: str, method: str, *params: Any) -> Any:
    provider = AsyncHTTPProvider(url, exception_retry_configuration=None)
    try:
        return (await provider.make_request(method, list(params)))["result"]
    finally:
        await provider.disconnect()


async def block_of(url: str, tag: str) -> tuple[int, int, str]:
    block = await ask(url, "eth_getBlockByNumber", tag, False)
    return int(block["number"], 16), int(block["timestamp"], 16), block["hash"]


@pytest.mark.anyio
async def test_blocks_come_by_themselves_and_never_ahead_of_the_wall(devchain: DevChain) -> None:
    first, first_s, _ = await block_of(devchain.rpc, "latest")
    number = first
    async with asyncio.timeout(60):
        while number < first + 2:
            number, time_s, _ = await block_of(devchain.rpc, "latest")
            clock = subprocess.run(["date", "+%s"], capture_output=True, check=True)  # noqa: ASYNC221
            assert time_s <= int(clock.stdout)
            await asyncio.sleep(0.05)
    assert time_s - first_s >= number - first


@pytest.mark.anyio
async def test_killed_without_warning_it_forgets_nothing_that_it_showed(tmp_path: Path) -> None:
    chain = await start_devchain(state=tmp_path, manual=True)
    await ask(chain.rpc, "coase_faucet", ANNA.address)
    await ask(chain.rpc, "coase_mine", "0x3")
    seen = await block_of(chain.rpc, "latest")
    os.kill(chain.process.pid, signal.SIGKILL)
    await chain.close()
    again = await start_devchain(state=tmp_path, manual=True)
    assert await block_of(again.rpc, "latest") == seen
    assert (again.token, again.factory, again.escrow) == (chain.token, chain.factory, chain.escrow)
    # The port that a client knows can be had again, and a taken one is said to be taken.
    port = int(again.rpc.rsplit(":", 1)[1])
    with pytest.raises(ConfigurationError, match=f"port {port} "):
        await start_devchain(port=port)
    await again.close()
    await again.close()


@pytest.mark.anyio
async def test_it_ends_with_its_parent_however_that_ends() -> None:
    code = (
        "import asyncio\n"
        "from coase.escrow.backends.devchain import start_devchain\n"
        "async def main():\n"
        "    chain = await start_devchain(manual=True)\n"
        "    print(chain.process.pid, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    child = int(await parent.stdout.readline())
    os.kill(child, 0)
    parent.kill()
    await parent.wait()
    async with asyncio.timeout(30):
        while True:
            try:
                os.kill(child, 0)
            except ProcessLookupError:
                break
            await asyncio.sleep(0.05)


def test_the_address_of_a_contract_follows_from_its_maker() -> None:
    # From EIP-1014's neighbour, the yellow paper's rule: the first four of a well-known maker.
    maker = "0x6ac7ea33f8831ea9dcc53393aaa88b25a785dbf0"
    assert created_address(maker, 0) == "0xcd234a471b72ba2f1ccf0a70fcaba648a5eecd8d"
    assert created_address(maker, 1) == "0x343c43a37d37dff08ae8c4a11544c718abb4fcf8"
