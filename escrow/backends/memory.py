"""A chain in memory: one token, one escrow, blocks, a mempool, reorgs, and faults on demand.

``MemoryChain`` is synchronous and deterministic and needs no event loop, so that a simulator can
run whole economies through it from one seed. Nothing is ever copied per block: each block keeps a
list of the old values that it overwrote, and a reorg writes them back.

``MemorySettlement`` is the settlement port over such a chain.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.lowlevel

from coase.escrow.funding import (
    BY_ALLOWANCE,
    Funding,
    Purpose,
    by_authorization,
    by_permit,
    deadline_of,
)
from coase.escrow.lifecycle import (
    NO_JOB,
    DealCall,
    Job,
    Payout,
    Pull,
    Reserve,
    Step,
    Verify,
    apply,
    check_owed,
    is_signed_by,
    job_id_of,
    nonce_bit,
)
from coase.escrow.ports import ChainEvent, FundingKind, Receipt, Settlement, chain_terms
from coase.protocol.effects import Answer, Call, ClaimRefund, Dispute, Invalidate, Open, Withdraw
from coase.protocol.errors import (
    BookOutOfBalance,
    CallReverted,
    ChainUnavailable,
    LocalProtocolError,
)
from coase.protocol.identity import SIGNATURE_SIZE_BYTES, Identity, keccak256
from coase.protocol.terms import Domain, permit_digest, receive_digest
from coase.protocol.types import AgentId, Asset, Head, JobView

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

UINT256_MAX: Final = 2**256 - 1
REORG_DEPTH_MAX: Final = 64
"""Blocks that can be undone; older ones forget what they overwrote. Above any policy's depth."""
RECEIPT_WAIT_MAX_BLOCKS: Final = 8
"""A call not in any of that many blocks is taken for lost: one is enough on a healthy chain."""
RECEIPT_WAIT_MAX_S: Final = 30
"""And if there are no blocks at all: thirty times the interval of a local chain."""

_PERMIT, _AUTHORIZATION = 1, 2  # The contract's numbers; 0 is an allowance.
_MISSING: Final = object()
_Undo = list[tuple[Any, Any, Any]]
"""What was overwritten: (table, key, old value), (table, key, _Added), or (list, None, None)."""


@dataclass(frozen=True, slots=True)
class _Added:
    """Undone by subtracting, not by restoring: what was minted in between stays."""

    units: int


class EffectExistsWithOtherCall(LocalProtocolError):
    """One effect id was used for two different calls; the second was not sent."""

    def __init__(self, effect_id: str) -> None:
        super().__init__(f"the effect {effect_id!r} was sent before with another call")
        self.effect_id = effect_id


@dataclass(frozen=True, slots=True)
class At:
    """A call on another contract than the escrow."""

    contract: AgentId
    call: object


@dataclass(frozen=True, slots=True)
class Transaction:
    """A call on its way. ``signature`` is that of the party whose act ``caller`` carries."""

    tx_hash: str
    effect_id: str
    caller: AgentId
    call: Call | At
    signature: bytes = b""
    funding: Funding = BY_ALLOWANCE


@dataclass(slots=True)
class Faults:
    """What goes wrong, on demand. Each predicate is asked once per occasion."""

    lose_call: Callable[[Transaction], bool] | None = None
    """True: the sender believes it sent it, and it reaches no block."""
    lose_receipt: Callable[[Transaction], bool] | None = None
    """True: it is in a block, but the sender's question gets no answer this time."""
    blacklist: set[AgentId] = field(default_factory=set)
    """Receivers that the token refuses to pay: payouts to them become owed."""


@dataclass(slots=True)
class Block:
    """A block, what it executed, and what it overwrote."""

    number: int
    time_s: int
    first_event: int
    outcomes: list[tuple[Transaction, CallReverted | None]] = field(default_factory=list)
    undo: _Undo = field(default_factory=list)


class MemoryContract(ABC):
    """Another contract on a chain in memory. What it stores it writes by ``MemoryChain.write``."""

    address: AgentId

    @abstractmethod
    def execute(self, transaction: Transaction, now_s: int) -> None:
        """Do what was sent to this contract, all or nothing.

        :raises CallReverted: if the contract refuses it
        """

    def reserve(self, wanted: Reserve) -> None:
        """Reserve a seller's stake for a deal that the escrow is just opening.

        :raises CallReverted: if it cannot; then the deal does not open
        """
        raise CallReverted("NoReason")

    @abstractmethod
    def check(self) -> None:
        """Return if this contract holds what it should.

        :raises BookOutOfBalance: if it does not
        """


class MemoryChain:
    """One chain with one token and its escrow, in the calling thread.

    Whatever is sent is executed by the next ``seal``, in the order in which it was sent, all or
    nothing per call. After each block the escrow's balance is compared with what it should hold.
    """

    def __init__(
        self,
        asset: Asset,
        *,
        escrow: str,
        time_s: int = 0,
        verify: Verify = is_signed_by,
    ) -> None:
        self.asset = asset
        self.domain = Domain(asset.chain_id, escrow)
        self.token_domain = Domain(asset.chain_id, asset.token, name="Coase", version="1")
        self.faults = Faults()
        self.minted_units = 0
        self.listeners: list[Callable[[Block], None]] = []
        """Called after each block, in the thread that seals. Must not block or raise."""
        self.forks: list[int] = []
        """For each fork the first block that it replaced, so that readers know where to go back."""
        self.contracts: dict[AgentId, MemoryContract] = {}
        self.verify = verify
        self._balances: dict[str, int] = {}
        self._allowances: dict[str, int] = {}
        self._owed: dict[str, int] = {}
        self._nonces: dict[tuple[str, int], int] = {}
        self._authorizations: dict[tuple[str, bytes], bool] = {}
        self._permit_nonces: dict[str, int] = {}
        self._history: dict[bytes, list[tuple[int, Job, str]]] = {}
        self._totals: dict[str, int] = {"locked": 0, "owed": 0}
        self._events: list[ChainEvent] = []
        self._mempool: deque[Transaction] = deque()
        self._effects: dict[tuple[str, str], Transaction] = {}
        self._receipts: dict[str, Receipt | CallReverted] = {}
        self._attempts: dict[tuple[str, str], int] = {}
        self._blocks: list[Block] = [Block(0, time_s, 0)]
        self._undo: _Undo = []

    # ------------------------------------------------------------------------------- the token

    def mint(self, owner: AgentId, units: int, *, approve: bool = False) -> None:
        """Give ``owner`` new units, outside of any block and safe from reorgs.

        ``approve`` lets the escrow take any amount, which a simulator wants and a wallet does not.
        """
        self._balances[owner] = self._balances.get(owner, 0) + units
        self.minted_units += units
        if approve:
            self._allowances[owner] = UINT256_MAX

    def approve(self, owner: AgentId, units: int) -> None:
        """Set what the escrow may take from ``owner`` by allowance, outside of any block."""
        self._allowances[owner] = units

    def allowance(self, owner: AgentId) -> int:
        """Return what the escrow may still take from ``owner`` by allowance."""
        return self._allowances.get(owner, 0)

    def permit_nonce(self, owner: AgentId) -> int:
        """Return the EIP-2612 nonce that the next permit of ``owner`` must carry."""
        return self._permit_nonces.get(owner, 0)

    def balance(self, owner: AgentId) -> int:
        """Return the units that ``owner`` holds."""
        return self._balances.get(owner, 0)

    def owed(self, owner: AgentId) -> int:
        """Return what a failed payout left with the escrow for ``owner``."""
        return self._owed.get(owner, 0)

    def held(self) -> int:
        """Return all that the escrow holds."""
        return self._balances.get(self.domain.contract, 0)

    def total(self) -> int:
        """Return the units of all accounts together, the escrow's included."""
        return sum(self._balances.values())

    def check(self) -> None:
        """Return if every unit is where it should be; walks over all accounts and deals.

        :raises BookOutOfBalance: if any was created, lost, or is held for nobody
        """
        if self.total() != self.minted_units:
            raise BookOutOfBalance(self.minted_units, self.total())
        due = sum(history[-1][1].locked_units for history in self._history.values() if history)
        due += sum(self._owed.values())
        if due != self.held() or min(self._balances.values(), default=0) < 0:
            raise BookOutOfBalance(due, self.held())
        for contract in self.contracts.values():
            contract.check()

    # ------------------------------------------------------------------------------- the chain

    def head(self, depth: int = 0) -> Head:
        """Return the block ``depth`` below the newest, or the first if there are not so many."""
        block = self._blocks[max(0, len(self._blocks) - 1 - depth)]
        return Head(block.number, block.time_s)

    def job(self, job_id: bytes, depth: int = 0) -> Job:
        """Return the escrow's record of a deal as it was ``depth`` blocks below the newest."""
        return self._at(job_id, depth)[0]

    def view(self, job_id: bytes, depth: int = 0) -> JobView:
        """Return what the settlement port tells of a deal, ``depth`` blocks below the newest."""
        job, tx_hash = self._at(job_id, depth)
        return job.view(tx_hash)

    def _at(self, job_id: bytes, depth: int) -> tuple[Job, str]:
        newest = self.head(depth).number
        for number, job, tx_hash in reversed(self._history.get(job_id, ())):
            if number <= newest:
                return job, tx_hash
        return NO_JOB, ""

    def nonce_used(self, seller: AgentId, nonce: int) -> bool:
        """Return whether the seller's ``nonce`` was opened or invalidated."""
        word, bit = nonce_bit(nonce)
        return bool(self._nonces.get((seller, word), 0) & bit)

    def events(self, from_block: int, depth: int = 0) -> tuple[list[ChainEvent], int]:
        """Return the events from ``from_block`` up to ``depth`` below the newest block.

        The second value is the block to ask from next time.
        """
        newest = self.head(depth).number
        if from_block > newest:
            return [], from_block
        first = self._blocks[max(0, from_block)].first_event
        past = newest + 1
        last = self._blocks[past].first_event if past < len(self._blocks) else len(self._events)
        return self._events[first:last], past

    def pending(self) -> int:
        """Return how many calls wait for a block."""
        return len(self._mempool)

    def send(
        self,
        effect_id: str,
        call: Call | At,
        caller: AgentId,
        *,
        signature: bytes = b"",
        funding: Funding = BY_ALLOWANCE,
    ) -> str:
        """Hand in ``call`` for the next block and return its transaction hash.

        The same effect id of the same caller finds what is pending or went through and sends
        nothing; after a refusal, a loss or a dropping reorg it is sent again.

        :raises EffectExistsWithOtherCall: if that id stands for another call
        """
        key = (caller, effect_id)
        known = self._effects.get(key)
        if known is not None:
            if known.call != call:
                raise EffectExistsWithOtherCall(effect_id)
            if self.is_known(effect_id, caller):
                return known.tx_hash
        attempt = self._attempts.get(key, 0)
        self._attempts[key] = attempt + 1
        text = f"{self.domain.chain_id}/{caller}/{effect_id}/{attempt}"
        tx_hash = "0x" + keccak256(text.encode()).hex()
        transaction = Transaction(tx_hash, effect_id, caller, call, signature, funding)
        if self.faults.lose_call is not None and self.faults.lose_call(transaction):
            return tx_hash
        self._effects[key] = transaction
        self._mempool.append(transaction)
        return tx_hash

    def is_known(self, effect_id: str, caller: AgentId) -> bool:
        """Return whether an effect is pending or went through, so that it needs no sending."""
        transaction = self._effects.get((caller, effect_id))
        return transaction is not None and not isinstance(
            self._receipts.get(transaction.tx_hash), CallReverted
        )

    def receipt(self, effect_id: str, caller: AgentId) -> Receipt | None:
        """Return the receipt of an effect, or nothing while it is in no block.

        :raises CallReverted: if it is in a block that refused it
        :raises ChainUnavailable: if the faults say that the answer gets lost
        """
        transaction = self._effects.get((caller, effect_id))
        found = self._receipts.get(transaction.tx_hash) if transaction is not None else None
        if transaction is None or found is None:
            return None
        if self.faults.lose_receipt is not None and self.faults.lose_receipt(transaction):
            raise ChainUnavailable(f"the receipt of {effect_id!r} was lost; repeat it")
        if isinstance(found, CallReverted):
            raise CallReverted(found.error, *found.values)
        return found

    def try_call(
        self,
        call: Call | At,
        caller: AgentId,
        *,
        now_s: int,
        signature: bytes = b"",
        funding: Funding = BY_ALLOWANCE,
    ) -> None:
        """Execute ``call`` on the newest state and take everything back.

        :raises CallReverted: if the escrow or the token would refuse it
        """
        mark, events = len(self._undo), len(self._events)
        try:
            self._execute(Transaction("", "", caller, call, signature, funding), now_s)
        finally:
            self._roll_back(self._undo, mark)
            del self._events[events:]

    def seal(self, now_s: int) -> Block:
        """Make a block at ``now_s`` of all that is pending, and return it.

        :raises LocalProtocolError: if ``now_s`` is earlier than the newest block's time
        :raises BookOutOfBalance: if the escrow holds another amount than it should
        """
        last = self._blocks[-1]
        if now_s < last.time_s:
            raise LocalProtocolError(f"a block at {now_s} cannot follow one at {last.time_s}")
        block = Block(last.number + 1, now_s, len(self._events), undo=self._undo)
        self._blocks.append(block)
        while self._mempool:
            transaction = self._mempool.popleft()
            mark, events = len(self._undo), len(self._events)
            refusal: CallReverted | None = None
            try:
                self._execute(transaction, now_s)
            except CallReverted as error:
                self._roll_back(self._undo, mark)
                del self._events[events:]
                refusal = error
            receipt = refusal or Receipt(transaction.tx_hash, block.number, now_s, 0)
            self._receipts[transaction.tx_hash] = receipt
            block.outcomes.append((transaction, refusal))
        self._undo = []
        if len(self._blocks) > REORG_DEPTH_MAX:
            self._blocks[-1 - REORG_DEPTH_MAX].undo = []
        due = self._totals["locked"] + self._totals["owed"]
        if due != self.held():
            raise BookOutOfBalance(due, self.held())
        for listener in self.listeners:
            listener(block)
        return block

    def reorg(
        self, depth: int, *, drop: Callable[[Transaction], bool] | None = None
    ) -> list[Transaction]:
        """Undo the newest ``depth`` blocks and return the calls that were dropped with them.

        Calls that ``drop`` does not choose wait again, before those that waited already.

        :raises LocalProtocolError: if ``depth`` is more than can be undone
        """
        if not 0 <= depth <= min(REORG_DEPTH_MAX - 1, len(self._blocks) - 1):
            raise LocalProtocolError(f"{depth} blocks cannot be undone")
        back: list[Transaction] = []
        if depth:
            self.forks.append(self._blocks[-depth].number)
        for _ in range(depth):
            block = self._blocks.pop()
            self._roll_back(block.undo, 0)
            del self._events[block.first_event :]
            back[:0] = [transaction for transaction, _ in block.outcomes]
        dropped = [t for t in back if drop is not None and drop(t)]
        gone = {t.tx_hash for t in dropped}
        for transaction in back:
            del self._receipts[transaction.tx_hash]
            if transaction.tx_hash in gone:
                del self._effects[(transaction.caller, transaction.effect_id)]
        self._mempool.extendleft(t for t in reversed(back) if t.tx_hash not in gone)
        return dropped

    # --------------------------------------------------------------------------- one execution

    def execute(self, transaction: Transaction, now_s: int) -> None:
        """Execute a call that another contract makes within a transaction of somebody's.

        :raises CallReverted: if it is refused; the contract must let that pass on
        """
        self._execute(transaction, now_s)

    def _contract_at(self, address: AgentId) -> MemoryContract:
        contract = self.contracts.get(address)
        if contract is None:
            raise CallReverted("NoReason")  # What a call of no code gives.
        return contract

    def _execute(self, transaction: Transaction, now_s: int) -> None:
        call, caller = transaction.call, transaction.caller
        if isinstance(call, At):
            self._contract_at(call.contract).execute(transaction, now_s)
        elif isinstance(call, Withdraw):
            units = check_owed(call.owner, self.owed(call.owner))
            if call.owner in self.faults.blacklist:
                raise CallReverted("ReceiverBlocked", call.owner)
            self._owe(call.owner, -units)
            self._move(self.domain.contract, call.owner, units)
        elif isinstance(call, Invalidate):
            key = (caller, call.word)
            self._set(self._nonces, key, self._nonces.get(key, 0) | call.mask)
        else:
            self._execute_deal(transaction, call, now_s)

    def _execute_deal(self, transaction: Transaction, call: DealCall, now_s: int) -> None:
        job_id = job_id_of(call, self.domain)
        history = self._history.get(job_id, [])
        job = history[-1][1] if history else NO_JOB
        step = apply(
            job,
            call,
            caller=transaction.caller,
            now_s=now_s,
            domain=self.domain,
            asset=self.asset.token,
            nonce_used=isinstance(call, Open)
            and self.nonce_used(call.terms.seller, call.terms.nonce),
            signature=transaction.signature,
            verify=self.verify,
        )
        if isinstance(call, Open):
            word, bit = nonce_bit(call.terms.nonce)
            key = (call.terms.seller, word)
            self._set(self._nonces, key, self._nonces.get(key, 0) | bit)
        self._balance_step(job, step)
        if step.reserve is not None:
            self._contract_at(step.reserve.vault).reserve(step.reserve)
        if step.pull is not None:
            self._collect(step.pull, transaction.funding, now_s)
        # The phase that a refund at expiry leaves alone was brought about by an earlier call.
        expired = isinstance(call, ClaimRefund)
        tx_hash = history[-1][2] if expired else transaction.tx_hash
        history.append((self._blocks[-1].number, step.job, tx_hash))
        self._history[job_id] = history
        self._undo.append((history, None, None))
        self._tell(step, job_id, call, transaction.tx_hash, now_s)
        for payout in step.payouts:
            self._push(payout)

    def _balance_step(self, job: Job, step: Step) -> None:
        """Book what the escrow must hold from now on, and check the step itself."""
        taken = step.pull.units if step.pull is not None else 0
        paid = sum(payout.units for payout in step.payouts)
        before, after = job.locked_units + taken, step.job.locked_units + paid
        if before != after:
            raise BookOutOfBalance(before, after)
        change = step.job.locked_units - job.locked_units
        if change:
            self._add(self._totals, "locked", change)

    def _tell(self, step: Step, job_id: bytes, call: DealCall, tx_hash: str, now_s: int) -> None:
        block = self._blocks[-1]
        for told in step.events:
            terms = chain_terms(call.terms) if isinstance(call, Open) else None
            self._events.append(
                ChainEvent(
                    kind=told.kind,
                    job_id=job_id,
                    block=block.number,
                    log_index=len(self._events) - block.first_event,
                    time_s=now_s,
                    tx_hash=tx_hash,
                    terms=terms,
                    evidence=told.evidence,
                    to_seller_units=told.to_seller_units,
                    to_buyer_units=told.to_buyer_units,
                )
            )

    def _collect(self, pull: Pull, funding: Funding, now_s: int) -> None:
        """Take a party's money in the way that it chose, as the contract and the token would."""
        owner, units, escrow = pull.owner, pull.units, self.domain.contract
        size = len(funding.signature)
        if funding.kind and (funding.kind > _AUTHORIZATION or size != SIGNATURE_SIZE_BYTES):
            raise CallReverted("BadFunding", funding.kind, size)
        if funding.kind == _AUTHORIZATION:
            after_s, before_s = funding.valid_after_s, funding.deadline_s
            digest = receive_digest(
                self.token_domain, owner, escrow, units, after_s, before_s, pull.nonce
            )
            if not self.verify(digest, funding.signature, owner):
                raise CallReverted("ERC3009InvalidSignature")
            if not after_s < now_s < before_s:
                raise CallReverted("ERC3009InvalidAuthorizationTime", after_s, before_s)
            if self._authorizations.get((owner, pull.nonce)):
                raise CallReverted("ERC3009UsedAuthorization", owner, "0x" + pull.nonce.hex())
            self._set(self._authorizations, (owner, pull.nonce), True)
        else:
            if funding.kind == _PERMIT:
                self._permit(pull, funding, now_s)
            allowed = self.allowance(owner)
            if allowed < units:
                raise CallReverted("ERC20InsufficientAllowance", escrow, allowed, units)
            if allowed < UINT256_MAX:
                self._add(self._allowances, owner, -units)
        if self.balance(owner) < units:
            raise CallReverted("ERC20InsufficientBalance", owner, self.balance(owner), units)
        self._move(owner, escrow, units)

    def _permit(self, pull: Pull, funding: Funding, now_s: int) -> None:
        """Grant the allowance, or do nothing: somebody may have sent the permit before us."""
        nonce = self.permit_nonce(pull.owner)
        digest = permit_digest(
            self.token_domain,
            pull.owner,
            self.domain.contract,
            pull.units,
            nonce,
            funding.deadline_s,
        )
        signed = self.verify(digest, funding.signature, pull.owner)
        if signed and now_s <= funding.deadline_s:
            self._set(self._permit_nonces, pull.owner, nonce + 1)
            self._set(self._allowances, pull.owner, pull.units)

    def _push(self, payout: Payout) -> None:
        if payout.to in self.faults.blacklist:
            self._owe(payout.to, payout.units)
        else:
            self._move(self.domain.contract, payout.to, payout.units)

    def _owe(self, to: str, units: int) -> None:
        self._add(self._owed, to, units)
        self._add(self._totals, "owed", units)

    # -------------------------------------------------------------------------- writes and undo

    def write(self, table: dict[Any, Any], key: object, value: object) -> None:
        """Store ``value`` in a contract's own ``table``, until the block is undone."""
        self._set(table, key, value)

    def take(self, owner: AgentId, to: AgentId, units: int) -> None:
        """Move units of somebody who allowed the contract ``to`` to take them.

        :raises CallReverted: if there are not so many
        """
        if self.balance(owner) < units:
            raise CallReverted("ERC20InsufficientBalance", owner, self.balance(owner), units)
        self._move(owner, to, units)

    def pay(self, payer: AgentId, to: AgentId, units: int) -> bool:
        """Pay units that a contract holds; False if the token refuses the receiver."""
        if to in self.faults.blacklist or self.balance(payer) < units:
            return False
        self._move(payer, to, units)
        return True

    def _set(self, table: dict[Any, Any], key: object, value: object) -> None:
        self._undo.append((table, key, table.get(key, _MISSING)))
        table[key] = value

    def _add(self, table: dict[str, int], key: str, units: int) -> None:
        self._undo.append((table, key, _Added(units)))
        table[key] = table.get(key, 0) + units

    def _move(self, owner: str, to: str, units: int) -> None:
        self._add(self._balances, owner, -units)
        self._add(self._balances, to, units)

    @staticmethod
    def _roll_back(undo: _Undo, mark: int) -> None:
        while len(undo) > mark:
            table, key, old = undo.pop()
            if isinstance(table, list):
                table.pop()
            elif type(old) is _Added:
                table[key] -= old.units
            elif old is _MISSING:
                del table[key]
            else:
                table[key] = old


class MemorySettlement(Settlement):
    """The settlement port over a ``MemoryChain``; several may share one chain.

    ``clock_s`` tells the time of the blocks that it seals and at which it tries a call first. With
    ``seal_at_once`` each call gets a block of its own; else somebody else seals, for instance
    ``seal_for_ever``.
    """

    def __init__(
        self,
        chain: MemoryChain,
        clock_s: Callable[[], int],
        *,
        confirmations: int = 0,
        funding: FundingKind = FundingKind.AUTHORIZATION,
        seal_at_once: bool = False,
    ) -> None:
        self.chain = chain
        self.asset = chain.asset
        self.domain = chain.domain
        self.confirmations = confirmations
        self._clock_s = clock_s
        self._funding = funding
        self._seal_at_once = seal_at_once
        self._sealed = anyio.Event()
        self._forks_seen = len(chain.forks)
        chain.listeners.append(self._on_block)

    def _on_block(self, block: Block) -> None:
        self._sealed.set()
        self._sealed = anyio.Event()

    async def head(self) -> Head:
        """Return the newest block."""
        return self.chain.head()

    async def balance(self, owner: AgentId) -> int:
        """Return the token units that ``owner`` holds outside of the escrow."""
        return self.chain.balance(owner)

    async def owed(self, owner: AgentId) -> int:
        """Return the units that a failed payout left with the escrow for ``owner``."""
        return self.chain.owed(owner)

    async def held(self) -> int:
        """Return all token units that the escrow itself holds."""
        return self.chain.held()

    async def jobs(self, job_ids: Sequence[bytes]) -> dict[bytes, JobView]:
        """Return each deal as it stood ``confirmations`` below the newest block."""
        return {job_id: self.chain.view(job_id, self.confirmations) for job_id in job_ids}

    async def events(self, from_block: int) -> tuple[list[ChainEvent], int]:
        """Return the events from ``from_block`` on that are ``confirmations`` deep.

        The first call after a fork that reaches below ``from_block`` gives all events since it.
        """
        forks = self.chain.forks[self._forks_seen :]
        self._forks_seen += len(forks)
        from_block = min([from_block, *forks])
        return self.chain.events(from_block, self.confirmations)

    async def perform(self, effect_id: str, call: Call | At, identity: Identity) -> Receipt:
        """Send ``call`` and return its receipt once it is in a block. Safe to repeat.

        :raises CallReverted: if the escrow or the token refuses it; it is tried before it is sent
        :raises EffectExistsWithOtherCall: if that id stands for another call
        :raises ChainUnavailable: if no block has it after some time; repeat it
        """
        await anyio.lowlevel.checkpoint()
        chain, caller = self.chain, identity.address
        funding = self._fund(call, identity)
        if not chain.is_known(effect_id, caller):
            chain.try_call(call, caller, now_s=self._clock_s(), funding=funding)
        chain.send(effect_id, call, caller, funding=funding)
        if self._seal_at_once and chain.pending():
            chain.seal(max(self._clock_s(), chain.head().time_s))
        first = chain.head().number
        with anyio.move_on_after(RECEIPT_WAIT_MAX_S):
            while (receipt := chain.receipt(effect_id, caller)) is None:
                waited = chain.head().number - first
                if self._seal_at_once or waited >= RECEIPT_WAIT_MAX_BLOCKS:
                    break
                await self._sealed.wait()
            else:
                return receipt
        raise ChainUnavailable(
            f"{effect_id!r} is in no block; it was lost or nobody seals blocks: repeat it"
        )

    async def close(self) -> None:
        """Stop listening to the chain, which lives on. Safe to repeat."""
        if self._on_block in self.chain.listeners:
            self.chain.listeners.remove(self._on_block)

    def _fund(self, call: Call | At, identity: Identity) -> Funding:
        """Return what the escrow needs to take the money of ``call``, signed by its sender."""
        match call:
            case Open():
                units, purpose = call.terms.price_units, Purpose.PRICE
            case Dispute():
                units, purpose = call.terms.bond_units, Purpose.DISPUTE_BOND
            case Answer():
                units, purpose = call.terms.bond_units, Purpose.ANSWER_BOND
            case _:
                return BY_ALLOWANCE
        chain, escrow, token = self.chain, self.domain.contract, self.chain.token_domain
        deadline_s = deadline_of(call.terms, purpose)
        if self._funding is FundingKind.AUTHORIZATION:
            return by_authorization(
                identity,
                token,
                escrow=escrow,
                units=units,
                job_id=job_id_of(call, self.domain),
                purpose=purpose,
                deadline_s=deadline_s,
            )
        if self._funding is FundingKind.PERMIT:
            nonce = chain.permit_nonce(identity.address)
            return by_permit(
                identity, token, escrow=escrow, units=units, nonce=nonce, deadline_s=deadline_s
            )
        # The standing allowance of a wallet that trusts the escrow to pull from signers only.
        chain.approve(identity.address, UINT256_MAX)
        return BY_ALLOWANCE


async def seal_for_ever(
    chain: MemoryChain, clock_s: Callable[[], int], *, interval_s: float = 1
) -> None:
    """Make a block every ``interval_s`` at the clock's time, empty or not, until cancelled."""
    while True:
        await anyio.sleep(interval_s)
        chain.seal(max(clock_s(), chain.head().time_s))
