"""Who an agent is to the world (ERC-8004): registered once, its file published, its wallet linked.

Every step looks first at what is registered, so that a registration which was cut short goes on
and one that is complete costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from itertools import count
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from coase.escrow.feedback import (
    LinkWallet,
    SetAgentUri,
    data_uri,
    registration_file,
    registry_name,
    wallet_digest,
)
from coase.protocol.errors import ChainUnavailable, ConfigurationError
from coase.protocol.identity import keccak256
from coase.protocol.types import ZERO_ADDRESS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coase.escrow.feedback import AgentRecord
    from coase.escrow.ports import Registries
    from coase.protocol.identity import Identity
    from coase.protocol.types import AgentId

LINK_LIFE_S: Final = 240  # The registries take no signature that is good for more than 300.
LOOKS_MAX: Final = 8  # Of how many registrations of one wallet the owner is asked for.
_TRIES_MAX: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What an agent lets the world know of itself, and whether it speaks of those it buys from.

    Where ``register`` or ``feedback`` is None the chain decides: no where gas costs something. On
    a chain of one's own machine it speaks, and the commands that run a seller register it.
    """

    register: bool | None = None
    """Whether it is registered when it takes its place in a node."""
    feedback: bool | None = None
    """Whether it says on chain, after a deal, what it thinks of the seller."""
    feedback_min: str = "0"
    """The price, in the network's token, below which it says nothing."""
    description: str = ""
    """What its file says; without, what its offers say."""
    image: str = ""
    services: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Endpoints by kind, such as A2A, MCP or web."""
    uri: str = ""
    """Where its owner publishes the file; without, the registry's entry carries it."""

    def __post_init__(self) -> None:
        try:
            good = Decimal(self.feedback_min) >= 0
        except ArithmeticError:
            good = False
        if not good:
            raise ConfigurationError(
                f"feedback_min is {self.feedback_min!r}: an amount of the network's token, as text"
            )

    def registers(self, *, by_default: bool) -> bool:
        """Return whether an agent with something to sell is registered at its start."""
        return by_default if self.register is None else self.register

    def speaks(self, *, local: bool) -> bool:
        """Return whether it gives feedback."""
        return local if self.feedback is None else self.feedback

    def file(
        self, registries: Registries, agent_id: int, *, name: str, key: AgentId, about: str = ""
    ) -> bytes:
        """Return the registration file of an agent whose messages are signed by ``key``."""
        domain = registries.domain
        did = f"did:pkh:eip155:{domain.chain_id}:{key}"
        return registration_file(
            name=name,
            description=self.description or about,
            image=self.image,
            services={"DID": did, **self.services},
            registrations=[(agent_id, registry_name(domain.chain_id, domain.contract))],
        )


class Directory:
    """Finds the agent behind an address, by what the identity registry's log says."""

    def __init__(self, registries: Registries, *, from_block: int = 0) -> None:
        self._registries, self._next = registries, from_block
        self._ids: dict[AgentId, dict[int, None]] = {}

    async def paid_to(self, wallet: AgentId) -> AgentRecord | None:
        """Return the agent whose clients pay ``wallet``: the oldest, if there are several.

        :raises ChainUnavailable: if the endpoint does not answer
        """
        return next((one for one in await self._records(wallet) if one.paid_to == wallet), None)

    def knows(self, wallet: AgentId) -> bool:
        """Return whether an agent was ever linked to ``wallet``, as far as the log was read."""
        return wallet in self._ids

    async def owned_by(self, owner: AgentId) -> AgentRecord | None:
        """Return the agent that ``owner`` has registered: the oldest, if there are several.

        :raises ChainUnavailable: if the endpoint does not answer
        """
        return next((one for one in await self._records(owner) if one.owner == owner), None)

    async def _records(self, wallet: AgentId) -> list[AgentRecord]:
        told, self._next = await self._registries.links(self._next)
        for agent_id, linked in told:
            if linked != ZERO_ADDRESS:
                self._ids.setdefault(linked, {})[agent_id] = None
        ids = sorted(self._ids.get(wallet, ()))[:LOOKS_MAX]
        found = [await self._registries.agent(agent_id) for agent_id in ids]
        return [one for one in found if one is not None]


class Registrar:
    """Registers agents and keeps what is registered of them as it should be."""

    def __init__(self, registries: Registries, directory: Directory) -> None:
        self._registries, self._directory = registries, directory

    async def register(
        self,
        identity: Identity,
        profile: Profile,
        *,
        name: str,
        about: str = "",
        keep_file: bool = False,
    ) -> AgentRecord:
        """Return the agent of ``identity``, registered if it was not, with its file published.

        Safe to repeat at any time: what is as it should be is left alone, and with ``keep_file``
        so is a file that says something else.

        :raises ConfigurationError: if the key has no coin for the gas
        :raises CallReverted: if the registry refuses it
        :raises ChainUnavailable: if it cannot be told how far it came; repeat it
        """
        record = await self._directory.owned_by(identity.address)
        if record is None and (theirs := await self._directory.paid_to(identity.address)):
            if keep_file:
                return theirs
            raise ConfigurationError(
                f"{identity.address} is the wallet of agent {theirs.agent_id} already, and its file"
                f" is its owner's, {theirs.owner}"
            )
        if record is None:
            record = await self._new(identity)
        if record.uri and keep_file:
            return record
        uri = profile.uri
        if not uri:
            key = identity.address
            uri = data_uri(
                profile.file(self._registries, record.agent_id, name=name, key=key, about=about)
            )
        return await self._publish(record, uri, identity)

    async def link(
        self, record: AgentRecord, owner: Identity, wallet: Identity, *, now_s: int
    ) -> AgentRecord:
        """Return the agent, paid to ``wallet``, which signs for that; ``owner`` sends it.

        ``now_s`` is chain time. Safe to repeat.

        :raises ConfigurationError: if ``owner`` is not the agent's, or has no coin for the gas
        :raises CallReverted: if the registry refuses it
        """
        deadline_s = now_s + LINK_LIFE_S
        digest = wallet_digest(
            self._registries.domain, record.agent_id, wallet.address, record.owner, deadline_s
        )
        return await self.link_signed(
            record, owner, wallet.address, deadline_s=deadline_s, signature=wallet.sign(digest)
        )

    async def link_signed(
        self,
        record: AgentRecord,
        owner: Identity,
        wallet: AgentId,
        *,
        deadline_s: int,
        signature: bytes,
    ) -> AgentRecord:
        """Return the agent, paid to ``wallet``, whose signature was made elsewhere.

        Raises what ``link`` raises.
        """
        if record.owner != owner.address:
            raise ConfigurationError(
                f"agent {record.agent_id} is {record.owner}'s, and {owner.address} may not change"
                " whom it is paid to"
            )
        if record.wallet == wallet:
            return record
        call = LinkWallet(record.agent_id, wallet, deadline_s, signature)
        effect_id = f"link:{self._place}:{record.agent_id}:{wallet}:{deadline_s}@{owner.address}"
        await self._registries.perform(effect_id, call, owner)
        return await self._told(record.agent_id)

    @property
    def _place(self) -> str:
        return self._registries.domain.contract

    async def _new(self, identity: Identity) -> AgentRecord:
        """Register without a file: the file names the number that only this gives."""
        for attempt in range(_TRIES_MAX):
            effect_id = f"register:{self._place}:{attempt}@{identity.address}"
            agent_id = await self._registries.register(effect_id, "", identity)
            record = await self._told(agent_id)
            if record.owner == identity.address:
                return record
        raise ConfigurationError(
            f"{identity.address} has given away {_TRIES_MAX} agents: use a key of its own"
        )

    async def _publish(self, record: AgentRecord, uri: str, identity: Identity) -> AgentRecord:
        agent_id = record.agent_id
        change = keccak256(f"{record.uri}\0{uri}".encode())[:8].hex()
        for attempt in count():
            if record.uri == uri:
                break
            # The same change may have been made before, and undone since.
            effect_id = f"file:{self._place}:{agent_id}:{change}:{attempt}@{identity.address}"
            await self._registries.perform(effect_id, SetAgentUri(agent_id, uri), identity)
            record = await self._told(agent_id)
        return record

    async def _told(self, agent_id: int) -> AgentRecord:
        record = await self._registries.agent(agent_id)
        if record is None:  # An endpoint of several machines may lag behind its own receipts.
            raise ChainUnavailable(f"agent {agent_id} is not told of yet; repeat it")
        return record
