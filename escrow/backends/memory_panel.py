"""A panel of arbiters on a chain in memory, and the port of panels over it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from coase.escrow.panel import (
    Constitution,
    PanelCall,
    PanelRule,
    WithdrawFee,
    fee_shares,
    signers_of,
)
from coase.escrow.ports import Panel
from coase.protocol.errors import BookOutOfBalance, CallReverted
from coase.protocol.terms import ruling_digest

from .memory import At, MemoryChain, MemoryContract, MemorySettlement, Transaction

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coase.escrow.ports import Receipt
    from coase.protocol.effects import Rule
    from coase.protocol.identity import Identity
    from coase.protocol.types import AgentId


@dataclass(frozen=True, slots=True)
class DeployPanel:
    """Put the panel of that constitution on the chain, or find it there."""

    constitution: Constitution


class MemoryPanels(MemoryContract):
    """The factory of panels, on the chain when made; ``code`` is where their code would be."""

    def __init__(self, chain: MemoryChain, address: AgentId, *, code: AgentId) -> None:
        self.address = address
        self.chain = chain
        self.code = code
        self.deployed: dict[AgentId, Constitution | None] = {}
        chain.contracts[address] = self

    def address_of(self, constitution: Constitution) -> AgentId:
        """Return where that panel is or will be."""
        return constitution.address(factory=self.address, code=self.code)

    def check(self) -> None:
        """Return: the factory holds nothing."""

    def execute(self, transaction: Transaction, now_s: int) -> None:
        """Put a panel on the chain."""
        call = transaction.call.call if isinstance(transaction.call, At) else None
        if not isinstance(call, DeployPanel):
            raise CallReverted("NoReason")
        panel = self.address_of(call.constitution)
        if not self.deployed.get(panel):
            self.chain.write(self.deployed, panel, call.constitution)
            if panel not in self.chain.contracts:
                # Stays where a fork takes the deployment back: without it the panel does nothing.
                MemoryPanelContract(self, panel)


class MemoryPanelContract(MemoryContract):
    """One panel."""

    def __init__(self, panels: MemoryPanels, address: AgentId) -> None:
        self.address = address
        self._panels = panels
        self._chain = panels.chain
        self._owed: dict[AgentId, int] = {}
        self._chain.contracts[address] = self

    def owed(self, owner: AgentId) -> int:
        """Return what a failed payout left here for ``owner``."""
        return self._owed.get(owner, 0)

    def check(self) -> None:
        """Return if the panel, and the escrow for it, hold what it owes.

        :raises BookOutOfBalance: if not
        """
        held = self._chain.balance(self.address) + self._chain.owed(self.address)
        if sum(self._owed.values()) != held:
            raise BookOutOfBalance(sum(self._owed.values()), held)

    def execute(self, transaction: Transaction, now_s: int) -> None:
        """Rule, or pay out what is owed."""
        call = transaction.call.call if isinstance(transaction.call, At) else None
        constitution = self._panels.deployed.get(self.address)
        match call:
            case PanelRule() if constitution is not None:
                self._rule(constitution, transaction, call, now_s)
            case WithdrawFee(owner) if constitution is not None:
                units = self.owed(owner)
                if not units:
                    raise CallReverted("NothingOwed", self._chain.asset.token, owner)
                self._chain.write(self._owed, owner, 0)
                if not self._chain.pay(self.address, owner, units):
                    raise CallReverted("ReceiverBlocked", owner)
            case _:
                raise CallReverted("NoReason")

    def _rule(
        self, constitution: Constitution, transaction: Transaction, call: PanelRule, now_s: int
    ) -> None:
        chain, ruling = self._chain, call.ruling
        terms = ruling.terms
        digest = ruling_digest(
            chain.domain,
            terms.digest(chain.domain),
            ruling.to_seller_units,
            ruling.penalty_units,
            ruling.evidence,
        )
        signers = signers_of(
            constitution,
            digest,
            call.signatures,
            caller=transaction.caller,
            verify=chain.verify,
        )
        chain.execute(replace(transaction, caller=self.address, call=ruling), now_s)
        for share in fee_shares(terms.bond_units, signers):
            if not chain.pay(self.address, share.to, share.units):
                chain.write(self._owed, share.to, self.owed(share.to) + share.units)


class MemoryPanel(Panel):
    """The port of one panel; ``settlement`` brings its calls into blocks."""

    def __init__(
        self, panels: MemoryPanels, settlement: MemorySettlement, constitution: Constitution
    ) -> None:
        self._panels = panels
        self._settlement = settlement
        self.constitution = constitution
        self.domain = settlement.domain
        self.address = panels.address_of(constitution)

    async def is_deployed(self) -> bool:
        """Return whether the panel is on the chain."""
        return self._panels.deployed.get(self.address) is not None

    async def owed(self, owner: AgentId) -> int:
        """Return the units that a failed payout left with the panel for ``owner``."""
        contract = self._panels.chain.contracts.get(self.address)
        return contract.owed(owner) if isinstance(contract, MemoryPanelContract) else 0

    async def rule(
        self,
        effect_id: str,
        ruling: Rule,
        signatures: Mapping[AgentId, bytes],
        identity: Identity,
    ) -> Receipt:
        """Rule with these members' signatures, after putting the panel on the chain."""
        if not await self.is_deployed():
            deploy = At(self._panels.address, DeployPanel(self.constitution))
            await self._settlement.perform(f"{effect_id}/deploy", deploy, identity)
        call = PanelRule(ruling, self.constitution.places(signatures))
        return await self._perform(effect_id, call, identity)

    async def withdraw(self, effect_id: str, owner: AgentId, identity: Identity) -> Receipt:
        """Pay out what a failed transfer left with the panel for ``owner``."""
        return await self._perform(effect_id, WithdrawFee(owner), identity)

    async def _perform(self, effect_id: str, call: PanelCall, identity: Identity) -> Receipt:
        return await self._settlement.perform(effect_id, At(self.address, call), identity)

    async def close(self) -> None:
        """Do nothing: the settlement has a life of its own."""
