"""What a node does for reputation by itself: registers its agents, says what came of deals, hears
what others say. All of it in the background: no deal ever waits for it, and none fails by it.

What shall be said is in the journal before anything is sent, so that a node which was killed says
it when it is back; each word is one effect, so that it is said once.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import anyio

from coase.escrow.feedback import (
    STARRED,
    FeedbackEntry,
    FeedbackFile,
    Flaw,
    GiveFeedback,
    PaymentProof,
    data_uri,
    registry_name,
)
from coase.protocol.errors import CallReverted, ChainUnavailable, ConfigurationError
from coase.protocol.identity import keccak256
from coase.protocol.states import Role

from .hearsay import HEARSAY_FILE, Hearsay
from .notes import FEEDBACK, Note, note_of
from .profile import Directory, Registrar
from .reputation import Readings, reader_of
from .supervisor import attempt, supervise
from .wiring import is_local
from .wishes import wishes_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from coase.escrow.feedback import AgentRecord, PaymentLog
    from coase.escrow.ports import Registries
    from coase.protocol.session import Thread
    from coase.protocol.types import AgentId

    from .agent import Agent
    from .node import Node
    from .steps import Notice

log = logging.getLogger(__name__)

Item = TypeVar("Item")

PASS_EVERY_S: Final = 1.0
AT_ONCE: Final = 8  # Words, registrations or looks of one pass; the chain serves deals first.
AGAIN_FIRST_S: Final = 2.0
TOLD_AT_TRY: Final = 2
AGAIN_MAX_S: Final = 600.0
KEEP_MS: Final = 24 * 3600 * 1000  # So long a word waits for a chain that is away, or for coin.
LOOK_EVERY_S: Final = 30.0  # On a chain of one's own; on others each look may take fifty questions.
LOOK_EVERY_FAR_S: Final = 3600.0
HISTORY_MAX_BLOCKS: Final = 100_000  # Two days of a quick chain; who wants more asks by command.
SELLERS_MAX: Final = 1_000


class Reviewer:
    """Does this for the agents of one node."""

    def __init__(
        self,
        node: Node,
        registries: Registries,
        *,
        registers: bool = False,
        directory: Path | None = None,
    ) -> None:
        self._node, self._registries = node, registries
        self._directory = Directory(registries, from_block=node.network.from_block)
        self._registrar = Registrar(registries, self._directory)
        self._readings = Readings(registries, reader_of(node.network))
        self._local = is_local(node.network)
        self._registers = registers and self._local
        self._notes: dict[str, Note] = {}
        self._begun: set[AgentId] = set()
        self._registered: set[AgentId] = set()
        self._curious: dict[AgentId, set[AgentId]] = {}
        """Sellers of whom an agent of ours would like to know, and which agents."""
        self._looked: dict[AgentId, float] = {}
        self._place = directory
        self._hearsay = Hearsay(directory / HEARSAY_FILE if directory is not None else None)
        self._told: dict[str, int] = {}
        self._met: dict[AgentId, set[AgentId]] = {}
        """Whom each of our agents has dealt with."""
        self._due: dict[str, tuple[float, float]] = {}
        """When what failed is tried again, and after how long then."""

    # -- hearing of deals ------------------------------------------------------------------------

    def observe(self, who: AgentId, notice: Notice) -> None:
        """Take note of offers, and of deals that are over."""
        thread = notice.thread
        if thread is not None and thread.is_contract:
            return
        if thread is not None and notice.kind == "ended" and thread.job_id:
            self._met.setdefault(who, set()).add(thread.counterparty)
        if thread is None or thread.side is not Role.BUYER:
            return
        if notice.kind == "heard:offer" and len(self._curious) < SELLERS_MAX:
            self._curious.setdefault(thread.counterparty, set()).add(who)
        if notice.kind == "ended":
            self._note(who, thread)

    def _note(self, who: AgentId, thread: Thread) -> None:
        note = note_of(thread, now_ms=self._node.runtime.now_ms())
        agent = self._agent(who)
        if note is None or agent is None or not agent.profile.speaks(local=self._local):
            return
        if thread.method == "channel":
            note = self._of_channel(agent, note)
        if (
            note is None
            or thread.agreed_terms.price_units
            < self._node.settlement.asset.money(agent.profile.feedback_min).units
        ):
            return
        # Nobody would count a word about one who was not registered when he was paid.
        if not self._directory.knows(note.seller):
            return
        self._node.journal.append([note.to_record()])
        self._notes[note.name] = note

    def _of_channel(self, agent: Agent, note: Note) -> Note | None:
        """Return a note as one of its seller's channel, together with what waits of that."""
        if agent.buying is None or self._node.channels is None:
            return None
        ends = [line.buyer for line in agent.buying.desk.streams.lines.values()]
        end = next((e for e in reversed(ends) if e and e.config.receiver == note.seller), None)
        if end is None:
            return None
        name = end.channel_id.hex()
        if (earlier := self._notes.get(FEEDBACK + name)) is not None:
            return earlier.and_again(note.value)
        block = self._node.runtime.head.number
        return note.of_channel(end.channel_id, end.config, block=block)

    # -- working -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            await self.work()
            await anyio.sleep(PASS_EVERY_S)

    async def work(self) -> None:
        """Do once what is due."""
        self._recall()
        for agent in self._due_first(self._node.agents, lambda agent: f"register:{agent.address}"):
            if agent.address not in self._registered:
                await self._register(agent)
        await self._grant()
        for note in self._due_first(self._notes.values(), lambda note: note.name):
            await self._say(note)
        await self._look()

    def _recall(self) -> None:
        """Take up what agents had to say in an earlier life."""
        for agent in self._node.agents:
            if agent.address not in self._begun:
                self._begun.add(agent.address)
                rows = [
                    json.loads(d) for _, _, d in self._node.journal.summaries(agent.address) if d
                ]
                met = {row["counterparty"] for row in rows if row["job_id"]}
                self._met.setdefault(agent.address, set()).update(met)
                heard = self._hearsay.of(agent.address, now_s=self._node.runtime.head.time_s)
                for seller, (good, bad) in heard.items():
                    if agent.buying is not None:
                        agent.buying.experience.hear(seller, good=good, bad=bad)
                for record in self._node.journal.open_records(agent.address):
                    if record.kind == "feedback":
                        note = Note.from_record(record)
                        self._notes[note.name] = note

    async def _register(self, agent: Agent) -> None:
        name = f"register:{agent.address}"
        if not agent.offerings or not agent.profile.registers(by_default=self._registers):
            self._registered.add(agent.address)
            return
        identity = agent.seat.identity if agent.seat is not None else None
        if identity is None:
            return
        about = "; ".join(sorted({one.about for one in agent.offerings.values() if one.about}))
        made = await attempt(
            lambda: self._registrar.register(identity, agent.profile, name=agent.name, about=about),
            name=f"{agent.name}'s registration",
            level=logging.INFO,
        )
        match made:
            case ChainUnavailable() | ConfigurationError():
                self._try_again(name, made)
            case Exception():
                self._registered.add(agent.address)  # The registry refuses it for good.
            case record:
                log.info("%s is agent %d of %s", agent.name, record.agent_id, self._registry)
                self._registered.add(agent.address)

    async def _grant(self) -> None:
        """Register as the owner wishes, who cannot use the keys while the node does."""
        if self._place is None:
            return
        for wish in self._due_first(wishes_in(self._place), lambda wish: wish.id):
            agent = self._agent(wish.agent)
            if agent is None or agent.seat is None:
                continue
            work = partial(
                self._registrar.register, agent.seat.identity, wish.profile, name=agent.name
            )
            made = await attempt(work, name=f"the wish for {agent.name}", level=logging.INFO)
            if isinstance(made, ChainUnavailable):
                self._try_again(wish.id, made)
            else:
                wish.grant(self._place, why=str(made) if isinstance(made, Exception) else "")

    @property
    def _registry(self) -> str:
        domain = self._registries.domain
        return registry_name(domain.chain_id, domain.contract)

    # -- speaking ----------------------------------------------------------------------------

    async def _say(self, note: Note) -> None:
        agent = self._agent(note.agent)
        if agent is None or agent.seat is None:
            return
        identity = agent.seat.identity

        async def say() -> None:
            effect_id, call = await self._call(note)
            await self._registries.perform(effect_id, call, identity)

        said = await attempt(say, name=note.name, level=logging.INFO)
        age_ms = self._node.runtime.now_ms() - note.at_ms
        match said:
            case ChainUnavailable() | ConfigurationError() if age_ms < KEEP_MS:
                self._try_again(note.name, said)
            case _:
                self._close(note)

    async def _call(self, note: Note) -> tuple[str, GiveFeedback]:
        """Return the call that says it, and its effect id: one for each payment.

        :raises ChainUnavailable: if the payment is not final yet
        :raises CallReverted: if no reader would count it
        """
        record = await self._directory.paid_to(note.seller)
        if record is None:
            raise CallReverted("NotRegistered", note.seller)
        tx_hash, paid = await self._payment(note)
        data = self._file(note, record, tx_hash, paid).encode()
        call = GiveFeedback(
            agent_id=record.agent_id,
            value=note.value,
            decimals=0,
            tag1=STARRED,
            tag2=note.capability,
            endpoint="",
            uri=data_uri(data),
            file_hash=keccak256(data),
        )
        # Read as anybody would read it: gas is paid only for what will count.
        flaw = await self._readings.check(_entry(call, note, paid))
        if isinstance(flaw, Flaw):
            raise CallReverted("Uncountable", flaw.value)
        return f"{note.name}:{tx_hash[:18]}:{paid.log_index}@{note.agent}", call

    async def _payment(self, note: Note) -> tuple[str, PaymentLog]:
        """Return the transaction and the log by which a note is paid for.

        :raises ChainUnavailable: if there is none that is final yet
        """
        if note.channel is None:
            job_id = bytes.fromhex(note.job_id)
            found = await self._registries.payments(note.tx_hash)
            for one in found:
                if one.job_id == job_id:
                    return note.tx_hash, one
            raise ChainUnavailable(f"the payment of {note.deal} is not final yet")
        channels, channel_id = self._node.channels, bytes.fromhex(note.deal)
        events = (await channels.events(note.block))[0] if channels is not None else []
        for event in events:
            if (event.kind, event.channel_id) == ("claimed", channel_id):
                log = await self._registries.payment(event.tx_hash, event.log_index)
                if log is not None:
                    return event.tx_hash, log
        raise ChainUnavailable(f"nothing was claimed of the channel {note.deal[:16]} yet")

    def _file(
        self, note: Note, record: AgentRecord, tx_hash: str, paid: PaymentLog
    ) -> FeedbackFile:
        proof = PaymentProof(
            payer=note.agent,
            payee=note.seller,
            chain_id=self._registries.domain.chain_id,
            tx_hash=tx_hash,
            contract=paid.contract,
            log_index=paid.log_index,
            job_id=paid.job_id,
            channel=note.channel,
        )
        return FeedbackFile(
            registry=self._registry,
            agent_id=record.agent_id,
            client=note.agent,
            created_at=datetime.fromtimestamp(note.at_ms // 1000, UTC).isoformat(),
            value=note.value,
            decimals=0,
            proof=proof,
            tag1=STARRED,
            tag2=note.capability,
        )

    def _close(self, note: Note) -> None:
        self._notes.pop(note.name, None)
        self._due.pop(note.name, None)
        self._node.journal.close_deals(note.agent, [(note.name, b"")])

    # -- hearing -----------------------------------------------------------------------------

    async def _look(self) -> None:
        """Hear what others say of the sellers that made us offers."""
        now, every_s = anyio.current_time(), LOOK_EVERY_S if self._local else LOOK_EVERY_FAR_S
        due = [
            seller
            for seller in self._curious
            if now - self._looked.get(seller, -every_s) >= every_s
        ]
        for seller in due[:AT_ONCE]:
            self._looked[seller] = now
            buyers = self._curious.pop(seller)
            await attempt(
                lambda seller=seller, buyers=buyers: self._hear(seller, buyers),  # type: ignore[misc]
                name=f"reading what is said of {seller}",
                level=logging.INFO,
            )
        self._hearsay.save()
        if len(self._looked) > SELLERS_MAX:
            self._looked = {s: at for s, at in self._looked.items() if now - at < every_s}

    async def _hear(self, seller: AgentId, buyers: set[AgentId]) -> None:
        record = await self._directory.paid_to(seller)
        if record is None:
            return
        head = self._node.runtime.head
        first = max(self._node.network.from_block, head.number - HISTORY_MAX_BLOCKS)
        for who in buyers:
            agent = self._agent(who)
            if agent is None or agent.buying is None:
                continue
            repute = await self._readings.read(
                record, known=self._known(who), now_s=head.time_s, from_block=first
            )
            good, bad = repute.prior(me=who)
            agent.buying.experience.hear(seller, good=good, bad=bad)
            self._hearsay.keep(who, seller, good=good, bad=bad, at_s=head.time_s)

    def _known(self, who: AgentId) -> set[AgentId]:
        """Return whom an agent has dealt with, and its companions in this node."""
        met = self._met.get(who, set())
        return met | {agent.address for agent in self._node.agents}

    # -- when --------------------------------------------------------------------------------

    def _agent(self, who: AgentId) -> Agent | None:
        return next((agent for agent in self._node.agents if agent.address == who), None)

    def _due_first(self, them: Iterable[Item], name: Callable[[Item], str]) -> list[Item]:
        now = anyio.current_time()
        return [one for one in them if self._due.get(name(one), (0.0, 0.0))[0] <= now][:AT_ONCE]

    def _try_again(self, name: str, error: Exception) -> None:
        _, pause_s = self._due.get(name, (0.0, AGAIN_FIRST_S / 2))
        pause_s = min(2 * pause_s, AGAIN_MAX_S)
        self._due[name] = (anyio.current_time() + pause_s, pause_s)
        # No coin, say: its owner can mend it, and has to be told, but not again and again, nor
        # while the faucet of a local chain is still at it.
        if not isinstance(error, ConfigurationError):
            return
        tried = self._told[name] = self._told.get(name, 0) + 1
        if tried == TOLD_AT_TRY:
            log.error("%s waits: %s", name.partition(":")[0], error)


def _entry(call: GiveFeedback, note: Note, paid: PaymentLog) -> FeedbackEntry:
    """Return the entry that a call will make, as if it came right behind the payment."""
    return FeedbackEntry(
        agent_id=call.agent_id,
        client=note.agent,
        index=0,
        value=call.value,
        decimals=call.decimals,
        tag1=call.tag1,
        tag2=call.tag2,
        endpoint=call.endpoint,
        uri=call.uri,
        file_hash=call.file_hash,
        block=paid.block + 1,
        log_index=0,
        time_s=paid.time_s,
        tx_hash="",
    )


def serve_reputation(
    node: Node, *, registers: bool = False, directory: Path | None = None
) -> Reviewer | None:
    """Let a node that runs register its agents, say what came of deals, and hear what is said.

    None where its network has no registries. With ``registers`` sellers whose profile says nothing
    of it are registered as well, if the chain is this machine's own. What is heard is kept in
    ``directory``.
    """
    if node.registries is None:
        return None
    reviewer = Reviewer(node, node.registries, registers=registers, directory=directory)
    node.runtime.observers.append(reviewer.observe)
    node.runtime.start(supervise, "reputation", reviewer.run)
    return reviewer
