"""The registries in memory: the rules of the contracts, each call a block of its own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from coase.escrow.feedback import (
    AgentRecord,
    FeedbackEntry,
    GiveFeedback,
    LinkWallet,
    PaymentLog,
    RegisterAgent,
    RegistryCall,
    RevokeFeedback,
    SetAgentUri,
    registry_domain,
    wallet_digest,
)
from coase.escrow.ports import Receipt, Registries
from coase.protocol.errors import BadSignature, CallReverted, LocalProtocolError
from coase.protocol.identity import keccak256, recover
from coase.protocol.types import ZERO_ADDRESS, AgentId

if TYPE_CHECKING:
    from coase.protocol.identity import Identity

WALLET_DEADLINE_MAX_S: Final = 300
DECIMALS_MAX: Final = 18
VALUE_MAX: Final = 10**38


@dataclass(slots=True)
class RegistryBooks:
    """What both registries hold. ``time_s`` is the time of the next block: a test moves it."""

    time_s: int = 0
    number: int = 0
    agents: dict[int, list[tuple[int, AgentRecord]]] = field(default_factory=dict)
    """The states of each agent, with the block from which on each holds."""
    entries: list[FeedbackEntry] = field(default_factory=list)
    payments: dict[tuple[str, int], PaymentLog] = field(default_factory=dict)
    """Whatever is paid elsewhere, by transaction and place."""


class MemoryRegistries(Registries):
    """The port over books in memory."""

    def __init__(self, books: RegistryBooks, *, chain_id: int, identity: str, reputation: str):
        self.books = books
        self.domain = registry_domain(chain_id, identity)
        self.reputation = reputation
        self._done: dict[tuple[AgentId, str], tuple[RegistryCall, Receipt, int]] = {}

    async def perform(self, effect_id: str, call: RegistryCall, identity: Identity) -> Receipt:
        """Execute ``call``, once for each effect id of a sender.

        :raises CallReverted: if a registry would refuse it
        :raises LocalProtocolError: if that id stands for another call
        """
        return (await self._perform(effect_id, call, identity))[0]

    async def register(self, effect_id: str, uri: str, identity: Identity) -> int:
        """Make a new agent of ``identity`` and return its id."""
        return (await self._perform(effect_id, RegisterAgent(uri), identity))[1]

    async def _perform(
        self, effect_id: str, call: RegistryCall, identity: Identity
    ) -> tuple[Receipt, int]:
        known = self._done.get((identity.address, effect_id))
        if known is not None:
            if known[0] != call:
                raise LocalProtocolError(f"the effect {effect_id!r} was another call")
            return known[1:]
        number = self.books.number + 1
        tx_hash = "0x" + keccak256(b"registries/%d" % number).hex()
        made = self._execute(call, identity.address, number, tx_hash)
        self.books.number = number
        receipt = Receipt(tx_hash, number, self.books.time_s, 0)
        self._done[identity.address, effect_id] = (call, receipt, made)
        return receipt, made

    def _execute(self, call: RegistryCall, caller: AgentId, number: int, tx_hash: str) -> int:
        match call:
            case RegisterAgent(uri):
                agent_id = len(self.books.agents)
                record = AgentRecord(agent_id, caller, caller, uri)
                self.books.agents[agent_id] = [(number, record)]
                return agent_id
            case SetAgentUri(agent_id, uri):
                record = replace(self._mine(agent_id, caller), uri=uri)
                self.books.agents[agent_id].append((number, record))
            case LinkWallet():
                self._link(call, caller, number)
            case GiveFeedback():
                self._give(call, caller, number, tx_hash)
            case RevokeFeedback(agent_id, index):
                self._revoke(agent_id, caller, index)
        return -1

    def _mine(self, agent_id: int, caller: AgentId) -> AgentRecord:
        if agent_id not in self.books.agents:
            raise CallReverted("ERC721NonexistentToken", agent_id)
        record = self.books.agents[agent_id][-1][1]
        if record.owner != caller:
            raise CallReverted("NotAuthorized", agent_id, caller)
        return record

    def _link(self, call: LinkWallet, caller: AgentId, number: int) -> None:
        record, now_s = self._mine(call.agent_id, caller), self.books.time_s
        if call.wallet == ZERO_ADDRESS:
            raise CallReverted("BadWallet", call.wallet)
        if not now_s <= call.deadline_s <= now_s + WALLET_DEADLINE_MAX_S:
            raise CallReverted("BadDeadline", call.deadline_s)
        digest = wallet_digest(
            self.domain, call.agent_id, call.wallet, record.owner, call.deadline_s
        )
        try:
            signer = recover(digest, call.signature)
        except BadSignature:
            signer = ""
        if signer != call.wallet:
            raise CallReverted("InvalidWalletSignature", call.wallet)
        self.books.agents[call.agent_id].append((number, replace(record, wallet=call.wallet)))

    def _give(self, call: GiveFeedback, caller: AgentId, number: int, tx_hash: str) -> None:
        if not 0 <= call.decimals <= DECIMALS_MAX or abs(call.value) > VALUE_MAX:
            raise CallReverted("BadValue", call.value, call.decimals)
        if call.agent_id not in self.books.agents:
            raise CallReverted("ERC721NonexistentToken", call.agent_id)
        if self.books.agents[call.agent_id][-1][1].owner == caller:
            raise CallReverted("OwnFeedback", call.agent_id, caller)
        self.books.entries.append(
            FeedbackEntry(
                agent_id=call.agent_id,
                client=caller,
                index=1 + sum(1 for one in self._of(call.agent_id) if one.client == caller),
                value=call.value,
                decimals=call.decimals,
                tag1=call.tag1,
                tag2=call.tag2,
                endpoint=call.endpoint,
                uri=call.uri,
                file_hash=call.file_hash,
                block=number,
                log_index=0,
                time_s=self.books.time_s,
                tx_hash=tx_hash,
            )
        )

    def _revoke(self, agent_id: int, caller: AgentId, index: int) -> None:
        for place, one in enumerate(self.books.entries):
            if (one.agent_id, one.client, one.index) == (agent_id, caller, index):
                if one.is_revoked:
                    raise CallReverted("AlreadyRevoked", agent_id, index)
                self.books.entries[place] = replace(one, is_revoked=True)
                return
        raise CallReverted("NoSuchFeedback", agent_id, caller, index)

    def _of(self, agent_id: int) -> list[FeedbackEntry]:
        return [one for one in self.books.entries if one.agent_id == agent_id]

    async def agent(self, agent_id: int, *, block: int | None = None) -> AgentRecord | None:
        """Return what is registered of an agent, now or at a block; None if it is not there."""
        states = self.books.agents.get(agent_id, [])
        held = [one for number, one in states if block is None or number <= block]
        return held[-1] if held else None

    async def feedback(self, agent_id: int, from_block: int = 0) -> list[FeedbackEntry]:
        """Return what was said of an agent from ``from_block`` on, oldest first."""
        return [one for one in self._of(agent_id) if one.block >= from_block]

    async def links(self, from_block: int = 0) -> tuple[list[tuple[int, AgentId]], int]:
        """Return which agent was linked to which wallet, oldest first, and the next block."""
        states = [state for states in self.books.agents.values() for state in states]
        told = [(one.agent_id, one.wallet) for block, one in sorted(
            states, key=lambda state: state[0]
        ) if block >= from_block]  # fmt: skip
        return told, self.books.number + 1

    async def payments(self, tx_hash: str) -> list[PaymentLog]:
        """Return the payments that were put into a transaction."""
        found = [log for (where, _), log in self.books.payments.items() if where == tx_hash]
        return sorted(found, key=lambda log: log.log_index)

    async def close(self) -> None:
        """Do nothing."""
