"""The embedded chain's JSON-RPC: what web3 asks for, the faucet, and a clock for tests.

Errors carry the codes of public nodes: 3 with the revert data, -32000 for what the pool refuses.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from eth.constants import BLANK_ROOT_HASH, EMPTY_UNCLE_HASH
from eth.exceptions import PyEVMError
from eth.vm.forks.cancun.transactions import CancunTransactionBuilder
from eth_abi.abi import decode as abi_decode
from eth_abi.exceptions import DecodingError
from eth_utils.exceptions import ValidationError
from trie.exceptions import MissingTrieNode

from .devchain_engine import BLOCK_GAS_MAX, Block, Engine, Log, Mined, Outcome
from .devchain_http import has_hung_up
from .devchain_pool import Pooled, PoolRefused
from .devchain_turns import CpuLimit, Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

# A view of ours takes below 200,000 and the trial of an opening 600,000. Nobody pays for it.
CALL_GAS_MAX: Final = 5_000_000
BATCH_TIME_MAX_S: Final = 2.0
BATCH_SIZE_MAX: Final = 1000  # Of quick requests; this is some hundred milliseconds.
# Of the processor. The trial of an opening takes a fortieth of it.
CALL_CPU_MAX_S: Final = 0.8
TURN_MIN_S: Final = 0.005  # Quick requests of a batch go on for so long before others may.
LOGS_MAX: Final = 20_000  # About 10 MB of answer; ask for fewer blocks at a time.
FEE_HISTORY_MAX: Final = 1024
NESTING_MAX: Final = 32  # A batch of filters with choices of topics has six.
_BRACKETS: Final = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{}]')
_STEPS: Final = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}
CLIENT: Final = "coase-devchain/1"
PARSE_ERROR, INVALID_REQUEST, NO_METHOD, INVALID_PARAMS = -32700, -32600, -32601, -32602
REFUSED, LIMIT_EXCEEDED, REVERTED, INTERNAL = -32000, -32005, 3, -32603
_ERROR_STRING: Final = bytes.fromhex("08c379a0")


class RpcError(Exception):
    """An answer that is an error, with its code and data."""

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        super().__init__(message)
        self.code, self.message, self.data = code, message, data

    def body(self) -> dict[str, Any]:
        """Return the ``error`` member of the answer."""
        body: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.data is not None:
            body["data"] = self.data
        return body


def number(value: Any) -> int:
    """Read a quantity: ``0x`` and hex digits, or a JSON integer."""
    if isinstance(value, bool):
        raise RpcError(INVALID_PARAMS, "a number is 0x and hex digits")
    if isinstance(value, int) and 0 <= value < 2**256:
        return value
    if isinstance(value, str) and value.startswith("0x") and 2 < len(value) <= 66:
        try:
            return int(value, 16)
        except ValueError:
            pass
    raise RpcError(INVALID_PARAMS, f"{str(value)[:80]!r} is no number: 0x and hex digits")


def blob(value: Any, size: int | None = None) -> bytes:
    """Read bytes: ``0x`` and an even number of hex digits, of ``size`` bytes if it is given."""
    try:
        if isinstance(value, str) and value.startswith("0x"):
            data = bytes.fromhex(value[2:])
            if size is None or len(data) == size:
                return data
    except ValueError:
        pass
    wanted = "bytes" if size is None else f"{size} bytes"
    raise RpcError(INVALID_PARAMS, f"{str(value)[:80]!r} is not {wanted} in hex")


def _hex(data: bytes) -> str:
    return "0x" + data.hex()


@dataclass(slots=True)
class Extras:
    """What the process adds to the engine. Without ``manual`` the clock methods do not exist."""

    faucet: Callable[[bytes, int | None, int | None], dict[str, str]] | None = None
    manual: Manual | None = None
    submitted: Callable[[], None] = lambda: None
    rewound: Callable[[int], None] = lambda depth: None


@dataclass(slots=True)
class Manual:
    """The clock of a chain that seals on demand. Time stands still until it is set."""

    time_s: int
    automatic: bool = True
    """Seal a block as soon as a transaction comes."""

    def next_time(self, parent_s: int) -> int:
        """Return the next block's time: the clock's, which never runs backwards."""
        return max(self.time_s, parent_s)


class Rpc:
    """Answers JSON-RPC requests, one by one or in batches. Never raises on what it is sent."""

    def __init__(self, engine: Engine, extras: Extras) -> None:
        self._engine = engine
        self._extras = extras
        self._turns = Turns()
        self._methods: dict[str, Callable[..., Any]] = {
            "web3_clientVersion": lambda: CLIENT,
            "net_version": lambda: str(engine.chain_id),
            "net_listening": lambda: True,
            "net_peerCount": lambda: "0x0",
            "eth_chainId": lambda: hex(engine.chain_id),
            "eth_syncing": lambda: False,
            "eth_accounts": lambda: [],
            "eth_blockNumber": lambda: hex(engine.head.number),
            "eth_gasPrice": lambda: hex(engine.head.base_fee + 1),
            "eth_maxPriorityFeePerGas": lambda: "0x1",
            "eth_feeHistory": self._fee_history,
            "eth_getBalance": lambda who, at="latest": hex(
                self._state(at).get_balance(blob(who, 20))
            ),
            "eth_getCode": lambda who, at="latest": _hex(self._state(at).get_code(blob(who, 20))),
            "eth_getStorageAt": lambda who, slot, at="latest": _hex(
                self._state(at).get_storage(blob(who, 20), number(slot)).to_bytes(32, "big")
            ),
            "eth_getTransactionCount": self._transaction_count,
            "eth_getBlockByNumber": self._block_by_number,
            "eth_getBlockByHash": self._block_by_hash,
            "eth_getTransactionByHash": self._transaction_by_hash,
            "eth_getTransactionReceipt": self._receipt,
            "eth_getBlockReceipts": self._block_receipts,
            "eth_getLogs": self._logs,
            "eth_call": self._call,
            "eth_estimateGas": self._estimate,
            "eth_sendRawTransaction": self._send,
        }
        if extras.faucet is not None:
            self._methods["coase_faucet"] = self._faucet
        if extras.manual is not None:
            self._methods |= {
                "coase_mine": self._mine,
                "coase_setTime": self._set_time,
                "coase_setAutomatic": self._set_automatic,
                "coase_reorg": self._reorg,
            }

    def answer(self, body: bytes) -> bytes:
        """Return the answer to one HTTP body, in one go."""
        steps = self.steps(body)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return bytes(end.value)

    async def answer_in_turn(self, body: bytes) -> bytes:
        """Return the answer to one HTTP body; others have their turns between its requests.

        :raises EOFError: if whoever asked is gone
        """
        steps = self.steps(body)
        while True:
            async with self._turns.turn():
                if has_hung_up():
                    raise EOFError("nobody is there to read the answer")
                until_s = time.monotonic() + TURN_MIN_S
                try:
                    next(steps)
                    while time.monotonic() < until_s:
                        next(steps)
                except StopIteration as end:
                    return bytes(end.value)

    def steps(self, body: bytes) -> Generator[None, None, bytes]:
        """Answer one HTTP body step by step, and return the answer."""
        try:
            if _too_deep(body):
                raise ValueError("nested too deep")
            request = json.loads(body)
        except ValueError:
            return _dump(_failed(None, RpcError(PARSE_ERROR, "this is not JSON")))
        if not isinstance(request, list):
            return _dump(self._one(request))
        if not 0 < len(request) <= BATCH_SIZE_MAX:
            problem = RpcError(INVALID_REQUEST, f"a batch has 1 to {BATCH_SIZE_MAX} requests")
            return _dump(_failed(None, problem))
        answers, spent_s = [], 0.0
        for item in request:
            if spent_s < BATCH_TIME_MAX_S:
                began_s = time.monotonic()
                answers.append(self._one(item))
                spent_s += time.monotonic() - began_s
            else:
                ident = item.get("id") if isinstance(item, dict) else None
                answers.append(_failed(ident, RpcError(LIMIT_EXCEEDED, "the batch takes too long")))
            yield
        return _dump(answers)

    def _one(self, request: Any) -> dict[str, Any]:
        if not isinstance(request, dict) or not isinstance(request.get("method"), str):
            return _failed(None, RpcError(INVALID_REQUEST, "no JSON-RPC request"))
        ident, params = request.get("id"), request.get("params", [])
        try:
            if not isinstance(params, list):
                raise RpcError(INVALID_PARAMS, "params must be an array")
            method = self._methods.get(request["method"])
            if method is None:
                raise RpcError(NO_METHOD, f"the method {request['method'][:80]} does not exist")
            try:
                result = method(*params)
            except TypeError as error:
                if error.__traceback__ is not None and error.__traceback__.tb_next is None:
                    raise RpcError(INVALID_PARAMS, "wrong number of params") from error
                raise
            return {"jsonrpc": "2.0", "id": ident, "result": result}
        except RpcError as error:
            return _failed(ident, error)
        except PoolRefused as error:
            return _failed(ident, RpcError(REFUSED, str(error)))
        except (PyEVMError, ValidationError, MissingTrieNode) as error:
            return _failed(ident, RpcError(INTERNAL, f"{type(error).__name__}: {error}"))

    # -- which block -------------------------------------------------------------------------

    def _block(self, tag: Any) -> Block | None:
        engine = self._engine
        if isinstance(tag, dict):
            if "blockHash" in tag:
                return engine.block_by_hash(blob(tag["blockHash"], 32))
            tag = tag.get("blockNumber", "latest")
        if tag in ("latest", "safe", "finalized", "pending", None):
            return engine.head
        if tag == "earliest":
            return engine.blocks[0]
        height = number(tag)
        return engine.blocks[height] if height < len(engine.blocks) else None

    def _state(self, tag: Any) -> Any:
        if tag == "pending":
            return self._engine.pending_state()
        block = self._block(tag)
        if block is None:
            raise RpcError(REFUSED, "header not found")
        return self._engine.state(block)

    def _block_by_number(self, tag: Any, full: bool = False) -> Any:
        block = self._block(tag)
        return None if block is None else _block_json(block, full)

    def _block_by_hash(self, block_hash: Any, full: bool = False) -> Any:
        block = self._engine.block_by_hash(blob(block_hash, 32))
        return None if block is None else _block_json(block, full)

    def _fee_history(self, count: Any, newest: Any = "latest", percentiles: Any = None) -> Any:
        last = self._block(newest)
        if last is None:
            raise RpcError(REFUSED, "header not found")
        first = max(0, last.number + 1 - min(number(count), FEE_HISTORY_MAX))
        blocks = self._engine.blocks[first : last.number + 1]
        if not blocks:
            raise RpcError(REFUSED, "fee history of no blocks")
        history: dict[str, Any] = {
            "oldestBlock": hex(first),
            "baseFeePerGas": [hex(b.base_fee) for b in [*blocks, blocks[-1]]],
            "gasUsedRatio": [b.gas_used / BLOCK_GAS_MAX for b in blocks],
        }
        if isinstance(percentiles, list) and percentiles:
            history["reward"] = [["0x1"] * len(percentiles) for _ in blocks]
        return history

    # -- transactions ------------------------------------------------------------------------

    def _transaction_count(self, who: Any, tag: Any = "latest") -> str:
        if tag == "pending":
            return hex(self._engine.pending_nonce(blob(who, 20)))
        return hex(self._state(tag).get_nonce(blob(who, 20)))

    def _send(self, raw: Any) -> str:
        item = self._engine.submit(blob(raw))
        self._extras.submitted()
        return _hex(item.tx_hash)

    def _transaction_by_hash(self, tx_hash: Any) -> Any:
        wanted = blob(tx_hash, 32)
        waiting = self._engine.pool.get(wanted)
        if waiting is not None:
            return _transaction_json(waiting, None)
        found = self._engine.find(wanted)
        return None if found is None else _transaction_json(found[1], found[0])

    def _receipt(self, tx_hash: Any) -> Any:
        found = self._engine.find(blob(tx_hash, 32))
        return None if found is None else _receipt_json(*found)

    def _block_receipts(self, tag: Any) -> Any:
        block = self._block(tag)
        return None if block is None else [_receipt_json(block, t) for t in block.transactions]

    # -- calls -------------------------------------------------------------------------------

    def _parse_call(self, call: Any) -> dict[str, Any]:
        if not isinstance(call, dict):
            raise RpcError(INVALID_PARAMS, "a call is an object")
        to = call.get("to")
        return {
            "sender": blob(call.get("from") or "0x" + "00" * 20, 20),
            "to": blob(to, 20) if to else b"",
            "data": blob(call.get("input") or call.get("data") or "0x"),
            "value": number(call.get("value") or 0),
        }

    def _call(self, call: Any, tag: Any = "latest", overrides: Any = None) -> str:
        if overrides:
            raise RpcError(INVALID_PARAMS, "state overrides are not supported")
        fields = self._parse_call(call)
        gas = min(number(call.get("gas") or CALL_GAS_MAX), CALL_GAS_MAX)
        outcome = self._bounded(lambda: self._engine.call(self._state(tag), **fields, gas=gas))
        _require_success(outcome)
        return _hex(outcome.output)

    def _estimate(self, call: Any, tag: Any = "latest") -> str:
        fields = self._parse_call(call)
        outcome = self._bounded(lambda: self._engine.estimate(self._state(tag), **fields))
        _require_success(outcome)
        return hex(outcome.gas_used)

    def _bounded(self, run: Callable[[], Outcome]) -> Outcome:
        """Run a call that nobody pays for, unless it takes too long.

        :raises RpcError: if it does
        """
        limit = CpuLimit(CALL_CPU_MAX_S)
        try:
            with limit:
                return run()
        finally:
            if limit.fired:
                self._engine.forget_state()
                raise RpcError(LIMIT_EXCEEDED, "the call takes too long")

    # -- logs --------------------------------------------------------------------------------

    def _logs(self, query: Any) -> list[dict[str, Any]]:
        if not isinstance(query, dict):
            raise RpcError(INVALID_PARAMS, "a filter is an object")
        first, last = self._range(query)
        addresses = query.get("address") or []
        addresses = [addresses] if isinstance(addresses, str) else addresses
        topics = query.get("topics") or []
        if not isinstance(addresses, list) or not isinstance(topics, list) or len(topics) > 4:
            raise RpcError(INVALID_PARAMS, "address and topics must be arrays")
        wanted: list[Sequence[bytes]] = []
        for topic in topics:
            choices = topic if isinstance(topic, list) else [] if topic is None else [topic]
            wanted.append([blob(choice, 32) for choice in choices])
        found: list[dict[str, Any]] = []
        for log in self._engine.logs(
            first=first, last=last, addresses=[blob(a, 20) for a in addresses], topics=wanted
        ):
            found.append(_log_json(log, self._engine.blocks[log.block]))
            if len(found) > LOGS_MAX:
                raise RpcError(LIMIT_EXCEEDED, f"more than {LOGS_MAX} logs: ask for fewer blocks")
        return found

    def _range(self, query: dict[str, Any]) -> tuple[int, int]:
        if query.get("blockHash") is not None:
            block = self._engine.block_by_hash(blob(query["blockHash"], 32))
            if block is None:
                raise RpcError(REFUSED, "unknown block")
            return block.number, block.number
        head = self._engine.head.number

        def height(tag: Any) -> int:
            if isinstance(tag, str) and not tag.startswith("0x"):
                block = self._block(tag)
                return head if block is None else block.number
            return number(tag)

        return height(query.get("fromBlock") or "latest"), height(query.get("toBlock") or "latest")

    # -- ours --------------------------------------------------------------------------------

    def _faucet(self, who: Any, units: Any = None, wei: Any = None) -> dict[str, str]:
        faucet = self._extras.faucet
        if faucet is None:  # Not registered without one.
            raise RpcError(NO_METHOD, "this chain has no faucet")
        sent = faucet(
            blob(who, 20),
            None if units is None else number(units),
            None if wei is None else number(wei),
        )
        self._extras.submitted()
        return sent

    def _manual(self) -> Manual:
        if self._extras.manual is None:
            raise RpcError(NO_METHOD, "only with --manual")
        return self._extras.manual

    def _mine(self, count: Any = 1) -> str:
        for _ in range(min(number(count), 10_000)):
            self._engine.seal()
        return hex(self._engine.head.number)

    def _set_time(self, time_s: Any) -> str:
        manual = self._manual()
        wanted = number(time_s)
        if wanted < self._engine.head.time_s:
            raise RpcError(REFUSED, f"the chain is at {self._engine.head.time_s} already")
        manual.time_s = wanted
        return hex(wanted)

    def _set_automatic(self, automatic: Any) -> bool:
        self._manual().automatic = bool(automatic)
        return bool(automatic)

    def _reorg(self, depth: Any, drop: Any = None) -> list[str]:
        """Take blocks off; their transactions wait again, except those named in ``drop``."""
        try:
            raws = self._engine.rewind(number(depth))
        except ValueError as error:
            raise RpcError(REFUSED, str(error)) from error
        self._extras.rewound(number(depth))
        dropped = {blob(item, 32) for item in drop or []}
        kept: list[str] = []
        for raw in raws:
            try:
                item = self._engine.submit(raw)
            except PoolRefused:  # It followed one that could not come back.
                continue
            if item.tx_hash in dropped:
                self._engine.pool.drop(item)
            else:
                kept.append(_hex(item.tx_hash))
        return kept


def _too_deep(body: bytes) -> bool:
    """Return whether the brackets nest deeper than any request's.

    The machine raises Python's limit of recursion for its own calls, so that a parser would run
    out of the stack, and end the process, before it ran into that limit.
    """
    if body.count(b"[") + body.count(b"{") <= NESTING_MAX:
        return False
    depth = 0
    for bracket in _BRACKETS.finditer(body):
        depth += _STEPS.get(bracket[0], 0)
        if depth > NESTING_MAX:
            return True
    return False


def _require_success(outcome: Outcome) -> None:
    if outcome.reverted:
        reason = ""
        if outcome.output[:4] == _ERROR_STRING:
            try:
                reason = ": " + abi_decode(["string"], outcome.output[4:])[0]
            except DecodingError:
                reason = ""
        raise RpcError(REVERTED, outcome.error + reason, _hex(outcome.output))
    if outcome.error:
        raise RpcError(REFUSED, outcome.error)


def _failed(ident: Any, error: RpcError) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": ident, "error": error.body()}


def _dump(answer: Any) -> bytes:
    return json.dumps(answer, separators=(",", ":")).encode()


def _block_json(block: Block, full: bool) -> dict[str, Any]:
    zero32 = "0x" + "00" * 32
    return {
        "number": hex(block.number),
        "hash": _hex(block.hash),
        "parentHash": _hex(block.parent_hash),
        "sha3Uncles": _hex(EMPTY_UNCLE_HASH),
        "miner": "0x" + "00" * 20,
        "stateRoot": _hex(block.state_root),
        "transactionsRoot": _hex(block.tx_root),
        "receiptsRoot": _hex(block.receipts_root),
        "logsBloom": _hex(block.bloom.to_bytes(256, "big")),
        "difficulty": "0x0",
        "totalDifficulty": "0x0",
        "gasLimit": hex(BLOCK_GAS_MAX),
        "gasUsed": hex(block.gas_used),
        "timestamp": hex(block.time_s),
        "extraData": "0x",
        "mixHash": _hex(block.parent_hash),
        "nonce": "0x" + "00" * 8,
        "baseFeePerGas": hex(block.base_fee),
        "withdrawalsRoot": _hex(BLANK_ROOT_HASH),
        "withdrawals": [],
        "blobGasUsed": "0x0",
        "excessBlobGas": "0x0",
        "parentBeaconBlockRoot": zero32,
        "size": hex(640 + sum(len(done.raw) for done in block.transactions)),
        "uncles": [],
        "transactions": [
            _transaction_json(done, block) if full else _hex(done.tx_hash)
            for done in block.transactions
        ],
    }


def _transaction_json(item: Mined | Pooled, block: Block | None) -> dict[str, Any]:
    tx: Any = CancunTransactionBuilder.decode(item.raw)
    kind = getattr(tx, "type_id", None) or 0
    body: dict[str, Any] = {
        "hash": _hex(item.tx_hash),
        "type": hex(kind),
        "from": _hex(item.sender),
        "to": _hex(tx.to) if tx.to else None,
        "nonce": hex(tx.nonce),
        "value": hex(tx.value),
        "gas": hex(tx.gas),
        "input": _hex(tx.data),
        "chainId": hex(tx.chain_id),
        "v": hex(tx.y_parity if kind else tx.v),
        "r": hex(tx.r),
        "s": hex(tx.s),
        "blockHash": None,
        "blockNumber": None,
        "transactionIndex": None,
    }
    if kind:
        body["yParity"] = hex(tx.y_parity)
        body["accessList"] = [
            {"address": _hex(who), "storageKeys": [_hex(s.to_bytes(32, "big")) for s in slots]}
            for who, slots in tx.access_list
        ]
    if kind == 2:
        body["maxFeePerGas"] = hex(tx.max_fee_per_gas)
        body["maxPriorityFeePerGas"] = hex(tx.max_priority_fee_per_gas)
    body["gasPrice"] = hex(item.gas_price if isinstance(item, Mined) else tx.max_fee_per_gas)
    if block is not None and isinstance(item, Mined):
        body["blockHash"], body["blockNumber"] = _hex(block.hash), hex(block.number)
        body["transactionIndex"] = hex(item.index)
    return body


def _receipt_json(block: Block, done: Mined) -> dict[str, Any]:
    receipt = {
        "transactionHash": _hex(done.tx_hash),
        "transactionIndex": hex(done.index),
        "blockHash": _hex(block.hash),
        "blockNumber": hex(block.number),
        "from": _hex(done.sender),
        "to": _hex(done.to) if done.to else None,
        "type": hex(done.raw[0] if done.raw[0] < 0x80 else 0),
        "status": "0x1" if done.ok else "0x0",
        "gasUsed": hex(done.gas_used),
        "cumulativeGasUsed": hex(done.gas_used_before + done.gas_used),
        "effectiveGasPrice": hex(done.gas_price),
        "contractAddress": _hex(done.created) if done.created else None,
        "logs": [_log_json(log, block) for log in done.logs],
        "logsBloom": _hex(done.bloom.to_bytes(256, "big")),
    }
    if not done.ok:
        receipt["revertReason"] = _hex(done.revert)  # As some public nodes give it too.
    return receipt


def _log_json(log: Log, block: Block) -> dict[str, Any]:
    return {
        "address": _hex(log.address),
        "topics": [_hex(topic) for topic in log.topics],
        "data": _hex(log.data),
        "blockNumber": hex(log.block),
        "blockHash": _hex(block.hash),
        "blockTimestamp": hex(block.time_s),
        "transactionHash": _hex(log.tx_hash),
        "transactionIndex": hex(log.tx_index),
        "logIndex": hex(log.index),
        "removed": False,
    }
