"""The embedded chain itself: py-evm's Cancun machine, blocks of our own, no disk and no network.

Blocks are built straight on the virtual machine's state, with one state root for each block: a
token transfer then costs about a tenth of what it costs by way of eth-tester, and an empty block
next to nothing. Time comes in with each block. Nothing here knows of JSON.

What it leaves out of Cancun: blob transactions, and the system call that stores beacon roots
(there is no beacon chain; an empty block changes no state).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from eth.constants import (
    BLANK_ROOT_HASH,
    CREATE_CONTRACT_ADDRESS,
    EMPTY_UNCLE_HASH,
    SECPK1_N,
    ZERO_ADDRESS,
)
from eth.db.account import AccountDB
from eth.db.atomic import AtomicDB
from eth.db.trie import make_trie_root_and_nodes
from eth.exceptions import Revert
from eth.vm.execution_context import ExecutionContext
from eth.vm.forks.cancun import CancunVM
from eth.vm.forks.cancun.transactions import CancunTransactionBuilder
from eth.vm.message import Message
from eth_utils.exceptions import ValidationError
from rlp.exceptions import RLPException  # type: ignore[import-untyped]

from coase.protocol.identity import keccak256

from .devchain_pool import Pool, Pooled, PoolRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

BLOCK_GAS_MAX: Final = 30_000_000  # About 190 deals' locks, more than a second's work here.
# One endless loop costs three seconds of everybody's time. It is the main chain's limit, too.
TX_GAS_MAX: Final = 2**24
TX_SIZE_MAX_BYTES: Final = 128 * 1024  # The limit of public nodes; a deployment takes 40 KiB.
INITCODE_SIZE_MAX_BYTES: Final = 2 * 24_576  # EIP-3860
NONCE_AHEAD_MAX: Final = 1024  # Further ahead cannot be a real sender's gap.
BASE_FEE_FIRST: Final = 10**9
_ZERO32: Final = b"\0" * 32
_HALF_ORDER: Final = SECPK1_N // 2
_BLOB_TYPE: Final = 3
# The machine's types name every kind of bytes; ours are plain.
_Context: Any = ExecutionContext
_Message: Any = Message


@dataclass(frozen=True, slots=True)
class Log:
    """One event, with its place in the chain."""

    address: bytes
    topics: tuple[bytes, ...]
    data: bytes
    block: int
    tx_hash: bytes
    tx_index: int
    index: int


@dataclass(frozen=True, slots=True)
class Mined:
    """A transaction in a block and what became of it."""

    tx_hash: bytes
    raw: bytes
    sender: bytes
    to: bytes
    index: int
    ok: bool
    gas_used: int
    gas_used_before: int
    gas_price: int
    logs: tuple[Log, ...]
    bloom: int
    created: bytes | None
    revert: bytes


@dataclass(frozen=True, slots=True)
class Block:
    """A sealed block. Fields that a Cancun header has and these lack are constant."""

    number: int
    time_s: int
    hash: bytes
    parent_hash: bytes
    state_root: bytes
    base_fee: int
    tx_root: bytes = BLANK_ROOT_HASH
    receipts_root: bytes = BLANK_ROOT_HASH
    bloom: int = 0
    gas_used: int = 0
    transactions: tuple[Mined, ...] = ()

    def header(self) -> bytes:
        """Return the RLP of the header, which is what its hash is taken of.

        Written out for this one shape: a general encoder takes most of an empty block's time.
        """
        payload = b"".join(
            (
                b"\xa0",
                self.parent_hash,
                _HEADER_START,
                self.state_root,
                b"\xa0",
                self.tx_root,
                b"\xa0",
                self.receipts_root,
                b"\xb9\x01\x00",
                self.bloom.to_bytes(256, "big") if self.bloom else _NO_BLOOM,
                b"\x80",
                _number(self.number),
                _number(BLOCK_GAS_MAX),
                _number(self.gas_used),
                _number(self.time_s),
                b"\x80\xa0",
                self.parent_hash,  # As the random beacon: the same when it is executed again.
                _HEADER_MIDDLE,
                _number(self.base_fee),
                _HEADER_END,
            )
        )
        return b"\xf9" + len(payload).to_bytes(2, "big") + payload


_NO_BLOOM: Final = bytes(256)
_HEADER_START: Final = b"\xa0" + EMPTY_UNCLE_HASH + b"\x94" + ZERO_ADDRESS + b"\xa0"
_HEADER_MIDDLE: Final = b"\x88" + bytes(8)
_HEADER_END: Final = b"\xa0" + BLANK_ROOT_HASH + b"\x80\x80\xa0" + _ZERO32


def _number(value: int) -> bytes:
    """Return the RLP of a number below 2**440."""
    if not value:
        return b"\x80"
    data = value.to_bytes((value.bit_length() + 7) // 8, "big")
    return data if value < 0x80 else bytes((0x80 + len(data),)) + data


@dataclass(frozen=True, slots=True)
class Account:
    """What the first block holds at one address."""

    balance: int = 0
    code: bytes = b""
    storage: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call came to. ``error`` is empty when it went through."""

    output: bytes
    error: str
    gas_used: int

    @property
    def reverted(self) -> bool:
        """Whether the contract itself refused, so that ``output`` says why."""
        return self.error == _REVERTED


_REVERTED: Final = "execution reverted"


def _next_base_fee(parent: Block) -> int:
    """EIP-1559: up or down by at most an eighth, towards blocks that are half full."""
    target = BLOCK_GAS_MAX // 2
    change = parent.base_fee * abs(parent.gas_used - target) // target // 8
    if parent.gas_used > target:
        return parent.base_fee + max(change, 1)
    return parent.base_fee - change


class Engine:
    """A chain of blocks and the pool in front of it. Single-threaded; the caller brings time.

    ``next_time`` gets the newest block's time and returns the next one's. ``journal`` is called
    with each block before anybody can see it; if it raises, the block never was.
    """

    def __init__(
        self,
        *,
        chain_id: int,
        genesis_time_s: int,
        alloc: dict[bytes, Account],
        next_time: Callable[[int], int],
        journal: Callable[[Block], None] | None = None,
    ) -> None:
        self.chain_id = chain_id
        self.pool = Pool()
        self.blocks: list[Block] = []
        self._next_time = next_time
        self._journal = journal
        self._db = AtomicDB()
        self._state_class: Any = CancunVM.get_state_class()
        self._places: dict[bytes, tuple[int, int]] = {}
        self._numbers: dict[bytes, int] = {}
        self._logs: dict[bytes, tuple[list[int], list[Log]]] = {}
        self._head_state: Any = None
        accounts: Any = AccountDB(self._db)
        for address, account in sorted(alloc.items()):
            accounts.set_balance(address, account.balance)
            if account.code:
                accounts.set_nonce(address, 1)
                accounts.set_code(address, account.code)
            for slot, value in account.storage:
                accounts.set_storage(address, slot, value)
        accounts.persist()
        genesis = Block(
            number=0,
            time_s=genesis_time_s,
            hash=b"",
            parent_hash=_ZERO32,
            state_root=accounts.state_root,
            base_fee=BASE_FEE_FIRST,
        )
        self._publish(replace(genesis, hash=keccak256(genesis.header())))

    # -- what stands -------------------------------------------------------------------------

    @property
    def head(self) -> Block:
        """The newest block."""
        return self.blocks[-1]

    def block_by_hash(self, block_hash: bytes) -> Block | None:
        """Return the block of that hash, or None if it is not part of the chain."""
        number = self._numbers.get(block_hash)
        return None if number is None else self.blocks[number]

    def find(self, tx_hash: bytes) -> tuple[Block, Mined] | None:
        """Return the block that holds the transaction, and what became of it."""
        place = self._places.get(tx_hash)
        if place is None:
            return None
        block = self.blocks[place[0]]
        return block, block.transactions[place[1]]

    def state(self, block: Block | None = None) -> Any:
        """Return a state to read from: that of the newest block, or of ``block``.

        :raises ValidationError: if the state of so old a block is not kept
        """
        if block is None or block is self.head:
            if self._head_state is None:
                self._head_state = self._open_state(self.head, self.head.state_root)
            return self._head_state
        return self._open_state(block, block.state_root)

    def forget_state(self) -> None:
        """Open the newest state anew when it is asked for: a call was cut off while it ran on it.

        Nothing of a call is ever written below, so that what it left behind goes with it.
        """
        self._head_state = None

    def pending_state(self) -> Any:
        """Return the newest state as the next block will see it, without what waits."""
        return self._open_state(self._draft(), self.head.state_root)

    def pending_nonce(self, sender: bytes) -> int:
        """Return the next free nonce of ``sender``, what waits included."""
        return self.pool.next_nonce(sender, int(self.state().get_nonce(sender)))

    def logs(
        self,
        *,
        first: int,
        last: int,
        addresses: Sequence[bytes],
        topics: Sequence[Sequence[bytes]],
    ) -> Iterator[Log]:
        """Yield the events of blocks ``first`` to ``last`` that match, in the chain's order.

        No address, and no topic at a place, stands for any.
        """
        found: list[Log] = []
        for address in addresses or list(self._logs):
            numbers, logs = self._logs.get(address, ([], []))
            found += logs[bisect_left(numbers, first) : bisect_right(numbers, last)]
        if len(addresses) != 1:
            found.sort(key=lambda log: (log.block, log.index))
        for log in found:
            if len(topics) <= len(log.topics) and all(
                not wanted or log.topics[place] in wanted for place, wanted in enumerate(topics)
            ):
                yield log

    # -- taking transactions -----------------------------------------------------------------

    def submit(self, raw: bytes) -> Pooled:
        """Take a signed transaction into the pool.

        :raises PoolRefused: with the words of public nodes, if no block could take it
        """
        tx, sender = self._decode(raw)
        tx_hash = keccak256(raw)
        if tx_hash in self._places:
            raise PoolRefused("already known")
        state = self.state()
        nonce = int(state.get_nonce(sender))
        if tx.nonce < nonce:
            raise PoolRefused(f"nonce too low: next nonce {nonce}, tx nonce {tx.nonce}")
        if tx.nonce > nonce + NONCE_AHEAD_MAX:
            raise PoolRefused(f"nonce too high: next nonce {nonce}, tx nonce {tx.nonce}")
        if tx.gas > TX_GAS_MAX:
            raise PoolRefused(f"exceeds block gas limit: at most {TX_GAS_MAX} for a transaction")
        fee_max, tip_max = int(tx.max_fee_per_gas), int(tx.max_priority_fee_per_gas)
        if tip_max > fee_max:
            raise PoolRefused("max priority fee per gas higher than max fee per gas")
        cost = int(tx.value) + int(tx.gas) * fee_max
        if int(state.get_balance(sender)) < cost:
            raise PoolRefused(
                f"insufficient funds for gas * price + value: have "
                f"{state.get_balance(sender)} want {cost}"
            )
        return self.pool.add(
            tx_hash=tx_hash, raw=raw, tx=tx, sender=sender, fee_max=fee_max, tip_max=tip_max
        )

    def _decode(self, raw: bytes) -> tuple[Any, bytes]:
        if len(raw) > TX_SIZE_MAX_BYTES:
            raise PoolRefused("oversized data")
        if raw[:1] == bytes((_BLOB_TYPE,)):
            raise PoolRefused("transaction type not supported")
        try:
            tx = CancunTransactionBuilder.decode(raw)
            if tx.chain_id != self.chain_id:
                raise PoolRefused(f"invalid chain id: have {tx.chain_id} want {self.chain_id}")
            # The machine checks neither of these for typed transactions.
            if tx.gas < tx.intrinsic_gas:
                raise PoolRefused(f"intrinsic gas too low: have {tx.gas}, want {tx.intrinsic_gas}")
            if not tx.to and len(tx.data) > INITCODE_SIZE_MAX_BYTES:
                raise PoolRefused("max initcode size exceeded")
            if tx.s > _HALF_ORDER or not 0 <= tx.y_parity <= 1:
                raise PoolRefused("invalid transaction v, r, s values")
            tx.validate()
            return tx, bytes(tx.sender)
        except ValidationError as error:
            raise PoolRefused(str(error)) from error
        except (RLPException, ValueError, TypeError, IndexError) as error:
            raise PoolRefused(f"no transaction: {error}") from error

    # -- making blocks -----------------------------------------------------------------------

    def seal(self, *, full: Callable[[], bool] = lambda: False) -> Block:
        """Seal the next block from what waits, and return it; ``full`` ends it early."""
        draft = self._draft()
        state: Any = self._open_state(draft, self.head.state_root) if len(self.pool) else None
        mined: list[Mined] = []
        receipts: list[Any] = []
        txs: list[Any] = []
        gas_used = log_count = 0
        stopped: set[bytes] = set()
        nonces = {sender: int(state.get_nonce(sender)) for sender in self.pool.senders()}
        for item in self.pool.ready(nonces, draft.base_fee):
            if gas_used + int(item.tx.gas) > BLOCK_GAS_MAX or full():
                break
            if item.sender in stopped:
                continue
            try:
                receipt, done = _execute(state, draft, item, len(mined), gas_used, log_count)
            except ValidationError:  # Its sender has spent the money meanwhile.
                stopped.add(item.sender)
                self.pool.drop(item)
                continue
            gas_used += done.gas_used
            log_count += len(done.logs)
            mined.append(done)
            receipts.append(receipt)
            txs.append(item.tx)
        self._finish(draft, state, mined, receipts, txs)
        return self.head

    def replay(self, raws: Sequence[bytes], time_s: int) -> Block:
        """Execute a recorded block again and return it.

        :raises PoolRefused: if one of its transactions is no longer valid
        """
        draft = self._draft(time_s)
        state = self._open_state(draft, self.head.state_root) if raws else None
        mined: list[Mined] = []
        receipts: list[Any] = []
        txs: list[Any] = []
        gas_used = log_count = 0
        for raw in raws:
            tx, sender = self._decode(raw)
            item = Pooled(keccak256(raw), raw, tx, sender, int(tx.nonce), 0, 0, 0)
            try:
                receipt, done = _execute(state, draft, item, len(mined), gas_used, log_count)
            except ValidationError as error:
                raise PoolRefused(str(error)) from error
            gas_used += done.gas_used
            log_count += len(done.logs)
            mined.append(done)
            receipts.append(receipt)
            txs.append(tx)
        self._finish(draft, state, mined, receipts, txs)
        return self.head

    def rewind(self, depth: int) -> list[bytes]:
        """Take the newest ``depth`` blocks off and return their transactions, oldest first."""
        if not 0 < depth < len(self.blocks):
            raise ValueError(f"the chain has {len(self.blocks) - 1} blocks above the first")
        gone = self.blocks[-depth:]
        del self.blocks[-depth:]
        for block in gone:
            del self._numbers[block.hash]
            for done in block.transactions:
                del self._places[done.tx_hash]
        for numbers, logs in self._logs.values():
            keep = bisect_right(numbers, self.head.number)
            del numbers[keep:], logs[keep:]
        self._head_state = None
        return [done.raw for block in gone for done in block.transactions]

    def _draft(self, time_s: int | None = None) -> Block:
        parent = self.head
        return Block(
            number=parent.number + 1,
            time_s=self._next_time(parent.time_s) if time_s is None else time_s,
            hash=b"",
            parent_hash=parent.hash,
            state_root=parent.state_root,
            base_fee=_next_base_fee(parent),
        )

    def _finish(
        self, draft: Block, state: Any, mined: list[Mined], receipts: list[Any], txs: list[Any]
    ) -> None:
        block = draft
        if mined:
            state.persist()
            bloom = 0
            for receipt in receipts:
                bloom |= receipt.bloom
            block = replace(
                draft,
                state_root=state.state_root,
                tx_root=make_trie_root_and_nodes(tuple(txs))[0],
                receipts_root=make_trie_root_and_nodes(tuple(receipts))[0],
                bloom=bloom,
                gas_used=sum(done.gas_used for done in mined),
                transactions=tuple(mined),
            )
        block = replace(block, hash=keccak256(block.header()))
        if self._journal is not None:
            self._journal(block)
        self._publish(block)

    def _publish(self, block: Block) -> None:
        self.blocks.append(block)
        self._numbers[block.hash] = block.number
        self._head_state = None
        for done in block.transactions:
            self._places[done.tx_hash] = (block.number, done.index)
            for log in done.logs:
                numbers, logs = self._logs.setdefault(log.address, ([], []))
                numbers.append(log.block)
                logs.append(log)
        if block.transactions:
            state = self.state()
            for sender in {done.sender for done in block.transactions}:
                self.pool.forget_below(sender, int(state.get_nonce(sender)))

    def _open_state(self, block: Block, root: bytes) -> Any:
        context = _Context(
            coinbase=ZERO_ADDRESS,
            timestamp=block.time_s,
            block_number=block.number,
            difficulty=0,
            mix_hash=block.parent_hash,
            gas_limit=BLOCK_GAS_MAX,
            prev_hashes=(self.blocks[n].hash for n in range(block.number - 1, -1, -1)),
            chain_id=self.chain_id,
            base_fee_per_gas=block.base_fee,
            excess_blob_gas=0,
        )
        return self._state_class(self._db, context, root)

    # -- reading by calling ------------------------------------------------------------------

    def call(
        self, state: Any, *, sender: bytes, to: bytes, data: bytes, value: int = 0, gas: int = 0
    ) -> Outcome:
        """Run a call on ``state`` and undo it. Nothing is paid, no nonce is looked at."""
        intrinsic = _intrinsic_gas(to, data)
        gas = min(gas or TX_GAS_MAX, TX_GAS_MAX)
        if gas < intrinsic:
            return Outcome(b"", "intrinsic gas too low", intrinsic)
        if int(state.get_balance(sender)) < value:
            return Outcome(b"", "insufficient funds for transfer", intrinsic)
        create = to == CREATE_CONTRACT_ADDRESS
        context = state.get_transaction_context_class()(gas_price=0, origin=sender)
        message = _Message(
            gas=gas - intrinsic,
            to=to,
            sender=sender,
            value=value,
            data=b"" if create else data,
            code=data if create else state.get_code(to),
            create_address=keccak256(sender + data)[12:] if create else None,
        )
        machine = state.computation_class
        state.lock_changes()
        snapshot = state.snapshot()
        try:
            state.mark_address_warm(sender)
            state.mark_address_warm(message.storage_address)
            apply = machine.apply_create_message if create else machine.apply_message
            done = apply(state, message, context)
        finally:
            state.revert(snapshot)
            state.clear_transient_storage()
        used = gas - int(done.get_gas_remaining())
        if not done.is_error:
            return Outcome(bytes(done.output), "", used)
        if isinstance(done.error, Revert):
            return Outcome(bytes(done.output), _REVERTED, used)
        return Outcome(b"", type(done.error).__name__, used)

    def estimate(self, state: Any, *, sender: bytes, to: bytes, data: bytes, value: int) -> Outcome:
        """Return how much gas is enough; ``error`` and ``output`` say why none is."""
        high = self.call(state, sender=sender, to=to, data=data, value=value)
        if high.error:
            return high
        low, enough = high.gas_used - 1, TX_GAS_MAX
        tried = min(TX_GAS_MAX, high.gas_used * 64 // 63 + 2300)
        while low + 1 < enough and enough - low > enough // 64:
            run = self.call(state, sender=sender, to=to, data=data, value=value, gas=tried)
            low, enough = (tried, enough) if run.error else (low, tried)
            tried = (low + enough) // 2
        return Outcome(b"", "", enough)


def _intrinsic_gas(to: bytes, data: bytes) -> int:
    zeros = data.count(0)
    create = 32_000 if to == CREATE_CONTRACT_ADDRESS else 0
    return 21_000 + create + 4 * zeros + 16 * (len(data) - zeros)


def _execute(
    state: Any, draft: Block, item: Pooled, index: int, gas_before: int, logs_before: int
) -> tuple[Any, Mined]:
    """Execute one transaction on ``state``; raises ValidationError with nothing changed."""
    tx = item.tx
    state.lock_changes()
    computation = state.apply_transaction(tx)
    receipt = CancunVM.make_receipt(
        SimpleNamespace(gas_used=gas_before),  # type: ignore[arg-type]
        tx,
        computation,
        state,
    )
    logs = tuple(
        Log(
            address=bytes(address),
            topics=tuple(topic.to_bytes(32, "big") for topic in topics),
            data=bytes(data),
            block=draft.number,
            tx_hash=item.tx_hash,
            tx_index=index,
            index=logs_before + place,
        )
        for place, (address, topics, data) in enumerate(computation.get_log_entries())
    )
    created = None
    if tx.to == CREATE_CONTRACT_ADDRESS and not computation.is_error:
        created = bytes(computation.msg.storage_address)
    reverted = computation.is_error and isinstance(computation.error, Revert)
    return receipt, Mined(
        tx_hash=item.tx_hash,
        raw=item.raw,
        sender=item.sender,
        to=bytes(tx.to),
        index=index,
        ok=not computation.is_error,
        gas_used=receipt.gas_used - gas_before,
        gas_used_before=gas_before,
        gas_price=int(state.get_gas_price(tx)),
        logs=logs,
        bloom=int(receipt.bloom),
        created=created,
        revert=bytes(computation.output) if reverted else b"",
    )
