"""Sending transactions so that each effect happens once: nonces, fees, repeats, receipts.

The order of things: a nonce is taken under the key's lock, the transaction is signed and kept in
the store, and only then sent. From there on the same bytes are sent until a block has them.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakValueDictionary

import rlp  # type: ignore[import-untyped]

from coase.escrow.ports import SentTx, TxStore
from coase.protocol.errors import (
    CallReverted,
    ChainUnavailable,
    ConfigurationError,
    FeeTooHigh,
    LocalProtocolError,
)

from .endpoints import Endpoints, Trust
from .rpc import ChainBlock, Endpoint, RpcFailed
from .transaction import sign_transaction

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from coase.protocol.identity import Identity

    from .abi import Abi

WAIT_MAX_S: Final = 120.0  # Then the caller is told, and may ask again under the same id.
AWAY_MAX_S: Final = 15.0  # Longer than a local chain needs to start again.
AWAY_AGAIN_S: Final = 0.5
REPEAT_EVERY_S: Final = 3.0  # Three blocks of a local chain: the endpoint may have lost it.
REPEATS_MAX: Final = 256  # More than one block takes of one sender; the rest comes next time.
BUMP_AFTER_S: Final = 30.0  # Far above a block's time anywhere; then the fee is too low.
BUMP_PERCENT: Final = 13  # Nodes want 10 more at least, some 12.5.
TIP_AGE_MAX_S: Final = 10.0
FEE_MAX_WEI: Final = 500 * 10**9  # A unit of gas; an opening then costs at most 0.3 of the coin.
BLOCKS_KEPT: Final = 16  # Receipts come of the newest few blocks, many of each.
RECHECK_EVERY_S: Final = 2.0  # All receipts, whatever the blocks said: endpoints forget.
_WAITS: Final = ("already known", "already imported", "known transaction", "alreadyknown")
_NONCE_PAST: Final = ("nonce too low", "nonce is too low", "oldnonce", "invalid transaction nonce")
_UNDERPRICED: Final = ("underpriced", "fee too low", "less than block base fee")
_NEVER: Final = ("chain id", "intrinsic gas", "block gas limit", "oversized", "not supported")
_CLOSED: Final = "the chain client was closed"
_POOR: Final = ("insufficient funds", "insufficient balance", "enough funds")


@dataclass(frozen=True, slots=True)
class TxReceipt:
    """What became of a transaction that is in a block."""

    tx_hash: str
    block: int
    block_hash: str
    ok: bool
    gas: int
    created: str
    revert: bytes | None
    """The reason of a failure, where the endpoint tells it with the receipt."""


@dataclass(frozen=True, slots=True)
class Request:
    """One call to be sent. ``gas`` is the limit; nothing is estimated."""

    to: str
    data: bytes
    gas: int
    value: int = 0


@dataclass(slots=True)
class _Key:
    """Where one sender stands. Nonces below ``floor`` are in blocks."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    loaded: bool = False
    quiet_until: float = 0.0
    mined: int = -1
    suspect: bool = False
    """The endpoint was away and may have forgotten what waited there."""
    floor: int = 0
    taken: dict[int, SentTx | None] = field(default_factory=dict)
    """What waits; None stands for a transaction that is not ours."""


class EvmChain:
    """One chain, seen through one endpoint, for any number of keys.

    ``poll_s`` is how often the newest block is asked for while somebody waits. A simulation at
    the next block precedes each transaction, so that a refusal costs nothing. ``fee_max_wei`` is
    the most that it ever bids for a unit of gas, whatever the endpoint says.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        chain_id: int,
        store: TxStore,
        poll_s: float = 0.2,
        wait_max_s: float = WAIT_MAX_S,
        fee_max_wei: int = FEE_MAX_WEI,
    ) -> None:
        self.endpoint = endpoint
        self.chain_id = chain_id
        self.store = store
        self._poll_s = poll_s
        self._wait_max_s = wait_max_s
        self._fee_max_wei = fee_max_wei
        self._blocks: OrderedDict[str, ChainBlock] = OrderedDict()
        self._keys: dict[str, _Key] = {}
        self._effects: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._waiting: dict[str, set[asyncio.Future[TxReceipt]]] = {}
        self._pump: asyncio.Task[None] | None = None
        self._tip: tuple[float, int] = (-TIP_AGE_MAX_S, 1)
        self._trouble = ""
        self._closed = False

    @classmethod
    async def connect(
        cls,
        url: str | Sequence[str],
        *,
        store: TxStore,
        chain_id: int | None = None,
        trust: Trust | None = None,
        **options: Any,
    ) -> EvmChain:
        """Return the chain at ``url``: one address, or several that are asked in their order.

        :raises ChainUnavailable: if no endpoint answers
        :raises ConfigurationError: if they serve another chain than ``chain_id``
        """
        endpoint = Endpoints(url, chain_id=chain_id, trust=trust)
        try:
            found = await endpoint.meet()
        except BaseException:
            await endpoint.close()
            raise
        return cls(endpoint, chain_id=found, store=store, **options)

    async def close(self) -> None:
        """Stop waiting and close the connections. What was sent stays sent. Safe to repeat."""
        self._closed = True
        pump, self._pump = self._pump, None
        if pump is not None:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)
        for futures in self._waiting.values():
            for future in futures:
                if not future.done():
                    future.set_exception(ChainUnavailable(_CLOSED))
        self._waiting.clear()
        await self.endpoint.close()

    # -- reading -----------------------------------------------------------------------------

    async def call(
        self, to: str, data: bytes, abi: Abi, *, sender: str = "", tag: str = "latest"
    ) -> bytes:
        """Return what a call gives, without sending it.

        :raises CallReverted: if the contract refuses it
        """
        request = {"to": to or None, "input": "0x" + data.hex()}
        if sender:
            request["from"] = sender
        try:
            result = await self.endpoint.ask("eth_call", request, tag)
        except RpcFailed as error:
            if (reason := error.revert_data) is not None:
                raise abi.reverted(reason) from error
            raise ChainUnavailable(f"{self.endpoint.url} refuses a call: {error}") from error
        return bytes.fromhex(str(result)[2:])

    async def code(self, address: str) -> bytes:
        """Return the code at ``address``; empty if there is none."""
        try:
            return bytes.fromhex(str(await self.endpoint.ask("eth_getCode", address, "latest"))[2:])
        except RpcFailed as error:
            raise ChainUnavailable(f"{self.endpoint.url} does not tell code: {error}") from error

    async def coin(self, address: str) -> int:
        """Return the native coin of ``address``, in its smallest unit."""
        try:
            return int(await self.endpoint.ask("eth_getBalance", address, "latest"), 16)
        except RpcFailed as error:
            raise ChainUnavailable(f"{self.endpoint.url} tells no balance: {error}") from error

    # -- sending -----------------------------------------------------------------------------

    async def send(
        self, effect_id: str, identity: Identity, request: Request, abi: Abi
    ) -> TxReceipt:
        """Bring ``request`` into a block, once, and return its receipt.

        :raises CallReverted: if the contract refuses it, before or after it was sent
        :raises ConfigurationError: if the key has no coin for the gas
        :raises FeeTooHigh: if gas costs more than we pay; nothing was signed
        :raises ChainUnavailable: if no block has it in time; repeat it under the same id
        """
        clock = asyncio.get_running_loop().time
        lock = self._effects.setdefault(effect_id, asyncio.Lock())
        async with lock:
            away_end = clock() + AWAY_MAX_S
            while True:
                began = clock()
                try:
                    return await self._send(effect_id, identity, request, abi)
                except FeeTooHigh:
                    raise
                except ChainUnavailable:  # Its process may be starting again just now.
                    late = clock() >= away_end or clock() - began >= self._wait_max_s
                    if late or self._closed:
                        raise
                    await asyncio.sleep(AWAY_AGAIN_S)

    async def kept(self, effect_id: str) -> tuple[bytes, bool] | None:
        """Return the calldata kept under ``effect_id`` and whether it failed in a block."""
        sent = await self.store.load(effect_id)
        if not sent:
            return None
        receipt = await self._receipt_of(sent)
        return destination_of(sent[-1].raw)[1], receipt is not None and not receipt.ok

    async def _send(
        self, effect_id: str, identity: Identity, request: Request, abi: Abi
    ) -> TxReceipt:
        sent = await self.store.load(effect_id)
        receipt = await self._receipt_of(sent)
        if receipt is not None and receipt.ok:
            await self.store.finish(effect_id)
            return receipt
        # A failed one changed nothing. Its time may have come by now; the trial will tell.
        if receipt is not None:
            sent = ()
        current = sent[-1] if sent else None
        key = self._keys.setdefault(identity.address, _Key())
        clock = asyncio.get_running_loop().time
        end = clock() + self._wait_max_s
        bump_at = clock() + BUMP_AFTER_S
        unsent = True
        while clock() < end:
            if current is None:
                await self._try(identity.address, request, abi)
                current, taken = await self._prepare(effect_id, identity, request)
                sent = (*sent, current)
                bump_at = clock() + BUMP_AFTER_S
            else:
                taken = await self._push_again(current) if unsent else key.mined <= current.nonce
            unsent = False
            if not taken:
                # Its nonce has gone to something: to one of these, or to a stranger.
                if (receipt := await self._receipt_of(sent)) is not None:
                    return await self._done(effect_id, receipt, request, identity, abi)
                if await self._is_past(current, key, sent):
                    key.loaded, current = False, None
                continue
            left = min(REPEAT_EVERY_S, max(0.0, end - clock()))
            receipt = await self._wait([tx.tx_hash for tx in sent], left)
            if receipt is not None:
                return await self._done(effect_id, receipt, request, identity, abi)
            await self._push_before(current, key, identity)
            if clock() >= bump_at and key.mined == current.nonce:
                current, unsent = await self._bump(effect_id, identity, request, current), True
                sent = (*sent, current)
                bump_at = clock() + BUMP_AFTER_S
        raise ChainUnavailable(await self._why_not(effect_id, current))

    async def _done(
        self, effect_id: str, receipt: TxReceipt, request: Request, identity: Identity, abi: Abi
    ) -> TxReceipt:
        self._mined(identity.address, receipt.tx_hash)
        await self.store.finish(effect_id)
        if receipt.ok:
            return receipt
        raise await self._reason(receipt, request, identity.address, abi)

    async def _try(self, sender: str, request: Request, abi: Abi) -> None:
        try:
            await self.call(request.to, request.data, abi, sender=sender, tag="pending")
        except ChainUnavailable:  # Not every endpoint knows the next block.
            await self.call(request.to, request.data, abi, sender=sender, tag="latest")

    async def _prepare(
        self, effect_id: str, identity: Identity, request: Request
    ) -> tuple[SentTx, bool]:
        """Sign with the next nonce, keep it, send it; a refusal gives the nonce back.

        Return it, and False if its nonce was used before.
        """
        fee_max, tip_max = await self.fees()
        key = self._keys.setdefault(identity.address, _Key())
        async with key.lock:
            if not key.loaded:
                await self._load(key, identity.address)
            nonce = key.floor
            while nonce in key.taken:
                nonce += 1
            tx = self._sign(effect_id, identity, request, nonce, fee_max, tip_max)
            await self.store.save(effect_id, tx.sender, tx.nonce, tx.raw, tx.tx_hash)
            key.taken[nonce] = tx
            try:
                return tx, await self._push_again(tx)
            except ConfigurationError:
                # It never left the endpoint's door: the next call may have its nonce.
                key.taken.pop(nonce, None)
                await self.store.forget(effect_id, tx.tx_hash)
                raise

    async def _push_again(self, tx: SentTx) -> bool:
        """Send the bytes and be calm about an endpoint that is away: they are kept."""
        try:
            return await self._push(tx)
        except ChainUnavailable as error:
            self._trouble = str(error)
            return True

    def _sign(
        self,
        effect_id: str,
        identity: Identity,
        request: Request,
        nonce: int,
        fee_max: int,
        tip_max: int,
    ) -> SentTx:
        signed = sign_transaction(
            identity,
            chain_id=self.chain_id,
            nonce=nonce,
            to=request.to,
            data=request.data,
            value=request.value,
            gas=request.gas,
            fee_max=fee_max,
            tip_max=tip_max,
        )
        return SentTx(effect_id, identity.address, nonce, signed.raw, signed.tx_hash)

    async def _load(self, key: _Key, address: str) -> None:
        """Learn where a sender stands: blocks, the endpoint's pool, and what we kept."""
        try:
            mined, pending = await self.endpoint.ask_many(
                [("eth_getTransactionCount", [address, tag]) for tag in ("latest", "pending")]
            )
        except RpcFailed as error:
            raise ChainUnavailable(f"{self.endpoint.url} tells no nonce: {error}") from error
        key.floor = int(mined, 16)
        key.taken = dict.fromkeys(range(key.floor, int(pending, 16)))
        for tx in await self.store.all_open():
            if tx.sender == address and tx.nonce >= key.floor:
                key.taken[tx.nonce] = tx
        key.loaded = True

    def _mined(self, address: str, tx_hash: str) -> None:
        key = self._keys.get(address)
        if key is None:
            return
        for nonce, tx in key.taken.items():
            if tx is not None and tx.tx_hash == tx_hash:
                key.floor = max(key.floor, nonce + 1)
                break
        for nonce in [nonce for nonce in key.taken if nonce < key.floor]:
            del key.taken[nonce]

    async def _push(self, tx: SentTx) -> bool:
        """Send the bytes; return False if their nonce is in a block already.

        :raises ConfigurationError: if the endpoint will never take them
        """
        try:
            await self.endpoint.ask("eth_sendRawTransaction", "0x" + tx.raw.hex())
        except RpcFailed as error:
            said = error.message.lower()
            if any(words in said for words in _WAITS):
                return True
            if any(words in said for words in _NONCE_PAST):
                return False
            if any(words in said for words in _UNDERPRICED):
                return True  # Something with its nonce waits there; the bump will outbid it.
            if any(words in said for words in _POOR):
                raise ConfigurationError(
                    f"{tx.sender} has too little of the chain's coin to pay for gas: send it at"
                    f" least {coin_text(cost_of(tx.raw))} of it ({error.message})"
                ) from error
            if any(words in said for words in _NEVER):
                raise ConfigurationError(
                    f"{self.endpoint.url} refuses a transaction: {error.message}"
                ) from error
            self._trouble = f"{self.endpoint.url} refuses it for now: {error.message}"
        return True

    async def _push_before(self, tx: SentTx, key: _Key, identity: Identity) -> None:
        """Send again what has to come before ``tx``, and fill a nonce that nobody holds.

        Once for all that wait with this key, and only if none of them got into a block meanwhile.
        """
        clock = asyncio.get_running_loop().time
        if key.lock.locked() or clock() < key.quiet_until:
            return
        async with key.lock:
            key.quiet_until = clock() + REPEAT_EVERY_S
            floor = key.floor
            try:
                mined = await self._mined_nonce(tx.sender)
                if not key.loaded:
                    await self._load(key, tx.sender)
            except ChainUnavailable as error:
                self._trouble = str(error)
                return
            moved, key.mined = mined > key.mined, mined
            if moved and not key.suspect:
                return
            key.suspect = False
            last = max([tx.nonce, *key.taken])
            for nonce in range(mined, min(last + 1, mined + REPEATS_MAX)):
                if key.floor > floor:
                    return  # A block came meanwhile: what is missing may be in it.
                if nonce not in key.taken:
                    await self._fill(key, identity, nonce)
                elif (earlier := key.taken[nonce]) is not None:
                    await self._push_again(earlier)

    async def _fill(self, key: _Key, identity: Identity, nonce: int) -> None:
        """Use up a nonce that was lost with a call of nothing: all later ones wait for it.

        It was lost if the endpoint refused what had it, or a fork undid it and nobody repeats it.
        """
        fee_max, tip_max = await self.fees()
        nothing = Request(identity.address, b"", 21_000)
        effect_id = f"gap/{self.chain_id}/{identity.address}/{nonce}"
        tx = self._sign(effect_id, identity, nothing, nonce, fee_max, tip_max)
        await self.store.save(effect_id, tx.sender, tx.nonce, tx.raw, tx.tx_hash)
        key.taken[nonce] = tx
        await self._push_again(tx)
        await self.store.finish(effect_id)  # Nobody waits for it; a new gap is filled anew.

    async def _bump(
        self, effect_id: str, identity: Identity, request: Request, old: SentTx
    ) -> SentTx:
        """Sign the same call with the same nonce and a higher fee, and keep it.

        What we pay at most is never passed: then the old one goes on waiting.
        """
        try:
            fee_max, tip_max = await self.fees()
        except FeeTooHigh as error:
            self._trouble = str(error)
            return old
        old_tip, old_fee = fees_of(old.raw)
        fee_max = max(fee_max, old_fee * (100 + BUMP_PERCENT) // 100 + 1)
        tip_max = max(tip_max, old_tip * (100 + BUMP_PERCENT) // 100 + 1)
        if fee_max > self._fee_max_wei:
            self._trouble = f"{old.tx_hash} offers the most that we pay for gas: {_gwei(old_fee)}"
            return old
        key = self._keys.setdefault(identity.address, _Key())
        async with key.lock:
            tx = self._sign(effect_id, identity, request, old.nonce, fee_max, tip_max)
            await self.store.save(effect_id, tx.sender, tx.nonce, tx.raw, tx.tx_hash)
            key.taken[tx.nonce] = tx
        return tx

    async def fees(self) -> tuple[int, int]:
        """Return (fee_max, tip_max) that get into a block even if the base fee doubles.

        :raises FeeTooHigh: if not even the next block is to be had for what we pay
        """
        clock = asyncio.get_running_loop().time
        if clock() - self._tip[0] >= TIP_AGE_MAX_S:
            try:
                tip = int(await self.endpoint.ask("eth_maxPriorityFeePerGas"), 16)
            except (RpcFailed, TypeError, ValueError):
                tip = 10**9  # Endpoints without the method want about that.
            self._tip = (clock(), max(1, tip))
        head, tip = await self.endpoint.latest(), self._tip[1]
        if head.base_fee + tip > self._fee_max_wei:
            raise FeeTooHigh(
                f"{self.endpoint.url} asks {_gwei(head.base_fee + tip)} for a unit of gas, and we"
                f" pay at most {_gwei(self._fee_max_wei)}: nothing was sent. Wait, use another"
                " endpoint if this one is wrong, or raise fee_max_wei in the network file"
            )
        return min(2 * head.base_fee + tip, self._fee_max_wei), tip

    async def _mined_nonce(self, address: str) -> int:
        try:
            return int(await self.endpoint.ask("eth_getTransactionCount", address, "latest"), 16)
        except RpcFailed as error:
            raise ChainUnavailable(f"{self.endpoint.url} tells no nonce: {error}") from error

    async def _is_past(self, tx: SentTx, key: _Key, sent: Iterable[SentTx]) -> bool:
        """Return whether the nonce is used up, and by none of ours that we can see.

        Receipts may lag behind nonces on an endpoint of several machines, so it looks twice; and
        one that knows a transaction has not forgotten it for good.
        """
        key.mined = await self._mined_nonce(tx.sender)
        if key.mined <= tx.nonce:
            await asyncio.sleep(self._poll_s)
            return False
        hashes = [one.tx_hash for one in sent]
        if await self._wait(hashes, REPEAT_EVERY_S) is not None:
            return False
        asked = [("eth_getTransactionByHash", [tx_hash]) for tx_hash in hashes]
        try:
            known = await self.endpoint.ask_many(asked)
        except RpcFailed as error:
            raise ChainUnavailable(f"{self.endpoint.url} tells no transaction: {error}") from error
        if any(found is not None for found in known):
            self._trouble = f"{self.endpoint.url} has {tx.tx_hash} and gives no receipt of it"
            return False
        return True

    async def _reason(
        self, receipt: TxReceipt, request: Request, sender: str, abi: Abi
    ) -> CallReverted:
        """Return why a transaction failed, by its receipt or by trying it there again."""
        if receipt.revert:
            return abi.reverted(receipt.revert)
        for number in (receipt.block - 1, receipt.block):
            try:
                await self.call(request.to, request.data, abi, sender=sender, tag=hex(number))
            except CallReverted as error:
                return error
            except ChainUnavailable:
                continue
        return CallReverted("NoReason")

    async def _why_not(self, effect_id: str, tx: SentTx | None) -> str:
        what = f"{effect_id!r} is in no block after {self._wait_max_s:.0f} s"
        if self._trouble:
            return f"{what}: {self._trouble}"
        head = await self.endpoint.latest()
        if tx is not None and (mined := await self._mined_nonce(tx.sender)) < tx.nonce:
            return f"{what}: it waits for nonce {mined} of {tx.sender}, itself being {tx.nonce}"
        return (
            f"{what}: the newest is {head.number}; either no blocks are made or the fee is too "
            "low. Repeat it under the same id"
        )

    async def arrived(self, hashes: list[str], seconds: float) -> None:
        """Return once all of these transactions, not ours perhaps, are in blocks.

        :raises ChainUnavailable: if they are not in time
        """
        for tx_hash in hashes:
            if await self._wait([tx_hash], seconds) is None:
                raise ChainUnavailable(
                    f"{tx_hash} is in no block of {self.endpoint.url} after {seconds:.0f} s"
                )

    # -- receipts ----------------------------------------------------------------------------

    async def _receipt_of(self, sent: Iterable[SentTx]) -> TxReceipt | None:
        """Return the newest receipt of several transactions, one that went through first."""
        hashes = [tx.tx_hash for tx in sent]
        if not hashes:
            return None
        found = await self._receipts(hashes)
        for receipt in reversed(found):
            if receipt.ok:
                return receipt
        # Only the last one's failure counts: earlier ones were prepared anew.
        return next((r for r in found if r.tx_hash == hashes[-1]), None)

    async def _receipts(self, hashes: list[str]) -> list[TxReceipt]:
        try:
            raws = await self.endpoint.ask_many(
                [("eth_getTransactionReceipt", [tx_hash]) for tx_hash in hashes]
            )
            found = [_receipt(raw) for raw in raws if raw is not None]
        except (RpcFailed, KeyError, TypeError, ValueError) as error:
            raise ChainUnavailable(f"{self.endpoint.url} gives no receipts: {error}") from error
        wanted = set(hashes)
        return [one for one in found if one.tx_hash in wanted and await self._is_in_block(one)]

    async def _is_in_block(self, receipt: TxReceipt) -> bool:
        """Return whether the block that a receipt names is there and holds the transaction.

        A fork may have undone it meanwhile, and some endpoints tell of blocks to come.
        """
        block = self._blocks.get(receipt.block_hash)
        if block is None:
            block = await self.endpoint.find_block(hex(receipt.block))
            if block is not None:
                self._keep(block)
        if block is None or block.hash != receipt.block_hash:
            self._trouble = f"{self.endpoint.url} gives a receipt of a block that is not there"
            return False
        if receipt.tx_hash not in block.tx_hashes:
            self._trouble = f"{self.endpoint.url} gives a receipt that its block does not hold"
            return False
        return True

    def _keep(self, block: ChainBlock) -> None:
        self._blocks[block.hash] = block
        while len(self._blocks) > BLOCKS_KEPT:
            self._blocks.popitem(last=False)

    async def _wait(self, hashes: list[str], seconds: float) -> TxReceipt | None:
        """Wait for the receipt of any of ``hashes``; None if there is none in time."""
        if self._closed:  # While it was being sent: nobody looks into blocks any more.
            raise ChainUnavailable(_CLOSED)
        future: asyncio.Future[TxReceipt] = asyncio.get_running_loop().create_future()
        for tx_hash in hashes:
            self._waiting.setdefault(tx_hash, set()).add(future)
        if self._pump is None or self._pump.done():
            self._pump = asyncio.ensure_future(self._watch())
        try:
            async with asyncio.timeout(seconds):
                return await future
        except TimeoutError:
            return None
        finally:
            for tx_hash in hashes:
                futures = self._waiting.get(tx_hash, set())
                futures.discard(future)
                if not futures:
                    self._waiting.pop(tx_hash, None)

    async def _watch(self) -> None:
        """Look into each new block for what somebody waits for, as long as somebody waits."""
        clock = asyncio.get_running_loop().time
        seen: ChainBlock | None = None
        recheck_at = clock()
        while self._waiting:
            try:
                block = await self.endpoint.latest()
                self._keep(block)
                if clock() >= recheck_at or seen is None or _missed(seen, block):
                    wanted, recheck_at = list(self._waiting), clock() + RECHECK_EVERY_S
                else:
                    wanted = [h for h in self._waiting if h in block.tx_hashes]
                seen = block
                for receipt in await self._receipts(wanted) if wanted else ():
                    for future in self._waiting.get(receipt.tx_hash, ()):
                        if not future.done():
                            future.set_result(receipt)
            except ChainUnavailable as error:
                self._trouble = str(error)
                seen = None
                for key in self._keys.values():
                    key.suspect = True
            await asyncio.sleep(self._poll_s)


def _gwei(wei: int) -> str:
    """Return a price of gas for people, to three places."""
    return f"{wei // 10**9}.{wei % 10**9 // 10**6:03} gwei"


def _missed(seen: ChainBlock, block: ChainBlock) -> bool:
    return block.hash != seen.hash and block.parent_hash != seen.hash


def _receipt(raw: dict[str, Any]) -> TxReceipt:
    reason = raw.get("revertReason")
    return TxReceipt(
        tx_hash=raw["transactionHash"],
        block=int(raw["blockNumber"], 16),
        block_hash=raw["blockHash"],
        ok=raw["status"] == "0x1",
        gas=int(raw["gasUsed"], 16),
        created=(raw.get("contractAddress") or "").lower(),
        revert=bytes.fromhex(reason[2:]) if isinstance(reason, str) else None,
    )


def fees_of(raw: bytes) -> tuple[int, int]:
    """Return (tip_max, fee_max) of a transaction of type 2."""
    fields = rlp.decode(raw[1:])
    return int.from_bytes(fields[2], "big"), int.from_bytes(fields[3], "big")


def cost_of(raw: bytes) -> int:
    """Return what a transaction of type 2 may take of its sender's coin at most, in wei."""
    fields = [int.from_bytes(field, "big") for field in rlp.decode(raw[1:])[3:7]]
    fee_max, gas, _, value = fields
    return fee_max * gas + value


def coin_text(wei: int) -> str:
    """Return an amount of the chain's coin for people, to six places and rounded up."""
    micro = -(-wei // 10**12)
    return f"{micro // 10**6}.{micro % 10**6:06}"


def destination_of(raw: bytes) -> tuple[str, bytes]:
    """Return (to, data) of a transaction of type 2."""
    fields = rlp.decode(raw[1:])
    return "0x" + fields[5].hex(), fields[7]


def other_call(effect_id: str) -> LocalProtocolError:
    """Return the error of an effect id that stands for another call already."""
    return LocalProtocolError(f"the effect {effect_id!r} was sent before with another call")
