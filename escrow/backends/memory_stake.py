"""The vault of stakes on a chain in memory, and the port of stakes over it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coase.escrow.ports import StakeRegistry
from coase.escrow.stake import (
    NO_ALLOWANCE,
    NO_STAKE,
    Allow,
    Allowance,
    CloseSlice,
    Deposit,
    Release,
    Stake,
    StakeCall,
    Unbond,
    WithdrawStake,
    allowed,
    closed,
    deposited,
    released,
    reserved,
    slashed_units,
    unbonded,
)
from coase.protocol.errors import BookOutOfBalance, CallReverted

from .memory import At, MemoryChain, MemoryContract, MemorySettlement, Transaction

if TYPE_CHECKING:
    from coase.escrow.lifecycle import Reserve
    from coase.escrow.ports import Receipt
    from coase.protocol.identity import Identity
    from coase.protocol.types import AgentId, Asset


class MemoryVault(MemoryContract):
    """A vault in the chain's one token, for its one escrow; it is on the chain when made."""

    def __init__(self, chain: MemoryChain, address: AgentId) -> None:
        self.address = address
        self.chain = chain
        self._stakes: dict[AgentId, Stake] = {}
        self._allowances: dict[AgentId, Allowance] = {}
        self._slices: dict[bytes, int] = {}
        self._owed: dict[AgentId, int] = {}
        chain.contracts[address] = self

    def stake(self, owner: AgentId) -> Stake:
        """Return what ``owner`` has here."""
        return self._stakes.get(owner, NO_STAKE)

    def allowance(self, owner: AgentId) -> Allowance:
        """Return what the escrow keeps and may keep reserved of it."""
        return self._allowances.get(owner, NO_ALLOWANCE)

    def slice_units(self, job_id: bytes) -> int:
        """Return what is reserved for a deal."""
        return self._slices.get(job_id, 0)

    def owed(self, owner: AgentId) -> int:
        """Return what a failed payout left here for ``owner``."""
        return self._owed.get(owner, 0)

    def held(self) -> int:
        """Return all that the vault holds."""
        return self.chain.balance(self.address)

    def check(self) -> None:
        """Return if the vault holds what it owes, and what is reserved is the sum of the slices.

        :raises BookOutOfBalance: if not
        """
        due = sum(stake.bonded_units for stake in self._stakes.values()) + sum(self._owed.values())
        if due != self.held():
            raise BookOutOfBalance(due, self.held())
        slices = sum(self._slices.values())
        for sums in (self._stakes, self._allowances):
            kept = sum(entry.reserved_units for entry in sums.values())
            if kept != slices:
                raise BookOutOfBalance(slices, kept)

    def reserve(self, wanted: Reserve) -> None:
        """Reserve the slice of a deal that is just being opened."""
        seller, escrow = wanted.seller, self.chain.domain.contract
        stake, allowance = reserved(
            self.stake(seller),
            self.allowance(seller),
            wanted.units,
            seller=seller,
            escrow=escrow,
        )
        self.chain.write(self._stakes, seller, stake)
        self.chain.write(self._allowances, seller, allowance)
        self.chain.write(self._slices, wanted.job_id, wanted.units)

    def execute(self, transaction: Transaction, now_s: int) -> None:
        """Do what was sent to the vault."""
        call, caller = self._call_of(transaction), transaction.caller
        match call:
            case Deposit(units):
                self.chain.write(self._stakes, caller, deposited(self.stake(caller), units))
                self.chain.take(caller, self.address, units)
            case Allow(token, units):
                after = allowed(self.allowance(caller), units)
                if token == self.chain.asset.token:  # The chain has no other token's escrow.
                    self.chain.write(self._allowances, caller, after)
            case Unbond(units):
                stake = unbonded(self.stake(caller), units, owner=caller, now_s=now_s)
                self.chain.write(self._stakes, caller, stake)
            case Release():
                before = self.stake(caller)
                self.chain.write(self._stakes, caller, released(before, owner=caller, now_s=now_s))
                self._pay(caller, before.unbonding_units)
            case CloseSlice():
                self._close(call, now_s)
            case WithdrawStake(owner):
                units = self.owed(owner)
                if not units:
                    raise CallReverted("NothingOwed", owner)
                self.chain.write(self._owed, owner, 0)
                self._pay(owner, units)

    @staticmethod
    def _call_of(transaction: Transaction) -> StakeCall:
        call = transaction.call.call if isinstance(transaction.call, At) else None
        if not isinstance(call, StakeCall):
            raise CallReverted("NoReason")
        return call

    def _close(self, call: CloseSlice, now_s: int) -> None:
        chain, terms = self.chain, call.terms
        job_id = terms.digest(chain.domain)
        units = self.slice_units(job_id)
        if not units:
            raise CallReverted("NothingReserved", chain.domain.contract, "0x" + job_id.hex())
        job = chain.job(job_id)
        slashed = slashed_units(
            call,
            how=job.how,
            penalty_units=job.penalty_units,
            now_s=now_s,
            domain=chain.domain,
            verify=chain.verify,
        )
        seller = terms.seller
        after = closed(self.stake(seller), self.allowance(seller), units=units, slashed=slashed)
        chain.write(self._slices, job_id, 0)
        chain.write(self._stakes, seller, after.stake)
        chain.write(self._allowances, seller, after.allowance)
        if slashed and not chain.pay(self.address, terms.buyer, slashed):
            chain.write(self._owed, terms.buyer, self.owed(terms.buyer) + slashed)

    def _pay(self, to: AgentId, units: int) -> None:
        if not self.chain.pay(self.address, to, units):
            raise CallReverted("ReceiverBlocked", to)


class MemoryStakeRegistry(StakeRegistry):
    """The port of stakes over a vault in memory; ``settlement`` brings its calls into blocks."""

    def __init__(self, vault: MemoryVault, settlement: MemorySettlement) -> None:
        self._vault = vault
        self._settlement = settlement
        self.vault = vault.address
        self.domain = settlement.domain

    @property
    def asset(self) -> Asset:
        """The token of the stakes."""
        return self._settlement.asset

    async def stake(self, owner: AgentId) -> Stake:
        """Return what ``owner`` has in the vault."""
        return self._vault.stake(owner)

    async def allowance(self, owner: AgentId) -> Allowance:
        """Return what the escrow keeps and may keep reserved of ``owner``'s stake."""
        return self._vault.allowance(owner)

    async def slice_units(self, job_id: bytes) -> int:
        """Return what is reserved for a deal; 0 before it opened and after its slice was closed."""
        return self._vault.slice_units(job_id)

    async def owed(self, owner: AgentId) -> int:
        """Return the units that a failed payout left with the vault for ``owner``."""
        return self._vault.owed(owner)

    async def held(self) -> int:
        """Return all token units that the vault holds."""
        return self._vault.held()

    async def perform(self, effect_id: str, call: StakeCall, identity: Identity) -> Receipt:
        """Send ``call`` from ``identity`` and return its receipt once it is in a block."""
        return await self._settlement.perform(effect_id, At(self.vault, call), identity)

    async def close(self) -> None:
        """Do nothing: the settlement has a life of its own."""
