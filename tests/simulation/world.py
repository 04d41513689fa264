"""A world from one seed: agents, a network, a chain and a clock, and what must never happen.

Time is virtual, chance is one seeded generator, and everything that happens is an event in one
queue, so that the same seed is the same world. After every step the world looks whether any of
its invariants is broken, and says which, where and when.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

from coase.escrow.backends.memory import MemoryChain
from coase.escrow.lifecycle import LIVE, is_signed_by
from coase.protocol.effects import ClaimRefund, Decline, Open, Poke, Rule, Settle, Submit, Withdraw
from coase.protocol.identity import keccak256
from coase.protocol.messages import capability_id, schemas_hash
from coase.protocol.states import Role, State
from coase.protocol.types import ZERO_ADDRESS, Asset, How, Phase
from tests.simulation.cheap import cheap_vouchers, is_cheaply_signed
from tests.simulation.eve import Eve
from tests.simulation.ledger import Ledger, Sent
from tests.simulation.node import INPUT_SCHEMA, LARGE_BYTES, MARGINS, OUTPUT_SCHEMA, Node
from tests.simulation.payments import Payments
from tests.simulation.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from coase.agents.ports import Record
    from coase.escrow.backends.memory import Block, Transaction
    from coase.protocol.terms import Terms

START_MS: Final = 1_700_000_000_000
AFTER_MAX_MS: Final = 600_000
"""How long a world may go on after its last request: longer than any deal may live."""
SLACK_S: Final = 60
"""How long after its last deadline a deal may still be open: somebody restarts, then pokes."""
MINTED_UNITS: Final = 10**9
STRANGER: Final = "0x" + "57" * 20


class Violation(AssertionError):
    """Something that must never happen has happened."""


@dataclass(slots=True)
class OnChainDeal:
    """A deal that was opened, with what both sides did as far as their disks tell."""

    job_id: bytes
    terms: Terms
    deal: str
    buyer: Node
    seller: Node
    result_s: int | None = None
    """Chain time at which the seller had its result on its disk."""
    result_units: int = 0
    heard: bool = False
    """Whether the buyer has the result on its disk."""
    verdict: str = ""


@dataclass(slots=True)
class Report:
    """What came of a world."""

    seed: int
    digest: str
    asks: int
    deals: int
    events: int
    virtual_s: int
    outcomes: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)


class World:
    """Everything there is."""

    def __init__(self, seed: int, plan: Plan | None = None, *, trace: bool = False) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.plan = plan or Plan.draw(seed, self.rng)
        self.trace = trace
        self._digest = blake2b(digest_size=16)
        self.now = START_MS
        self._events: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0
        self.happened = 0
        self.asset = Asset(1, "0x" + "33" * 20)
        self.chain = MemoryChain(
            self.asset,
            escrow="0x" + "44" * 20,
            time_s=START_MS // 1_000,
            verify=is_signed_by if self.plan.real_keys else is_cheaply_signed,
        )
        self.ledger = Ledger(self.asset, time_s=START_MS // 1_000)
        self.payments = Payments(self)
        self.arbiter = "0x" + "a7" * 20
        self.schemas = schemas_hash(INPUT_SCHEMA, OUTPUT_SCHEMA)
        self.capability = capability_id("echo", self.schemas)
        self.deals: dict[bytes, OnChainDeal] = {}
        self._by_deal: dict[str, OnChainDeal] = {}
        self._by_buyer: dict[str, list[OnChainDeal]] = {}
        self._by_task: dict[bytes, bytes] = {}
        self.results: dict[str, tuple[int, int]] = {}
        self.heard: set[str] = set()
        self.verdicts: dict[str, str] = {}
        self.disputed: dict[str, int] = {}
        self.lost_calls: set[tuple[str, str]] = set()
        self.rulings: dict[bytes, int] = {}
        self.cut: frozenset[str] = frozenset()
        self.halted_until = 0
        self.closing = False
        """Whether all has happened and only the books are closed."""
        self.counts: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.nodes = self._people()
        self.by_address = {node.me: node for node in self.nodes}
        self.eve = Eve(self) if self.plan.eve else None
        self._faults()

    def _people(self) -> list[Node]:
        plan = self.plan
        nodes = [Node(self, f"seller{n}", sells=True, buys=False) for n in range(plan.sellers)]
        nodes += [Node(self, f"buyer{n}", sells=False, buys=True) for n in range(plan.buyers)]
        nodes += [Node(self, f"both{n}", sells=True, buys=True) for n in range(plan.both)]
        for node in nodes:
            for side, vices in ((Role.SELLER, plan.seller_vices), (Role.BUYER, plan.buyer_vices)):
                if self.rng.randrange(100) < plan.vices_percent:
                    vice = self.rng.choice(vices)
                    cheap = vice != "lies" or not plan.real_keys
                    node.vices[side] = vice if cheap else ""
            self.chain.mint(node.me, MINTED_UNITS, approve=True)
            self.ledger.mint(node.me, MINTED_UNITS)
            node.boot()
        return nodes

    def _faults(self) -> None:
        plan, faults = self.plan, self.chain.faults
        if plan.lose_call_permille:
            faults.lose_call = self._loses
            self.ledger.loses = self._loses
        if plan.lose_receipt_permille:
            permille = plan.lose_receipt_permille
            faults.lose_receipt = lambda _: self.rng.randrange(1_000) < permille

    def _loses(self, transaction: Transaction | Sent) -> bool:
        """Lose a call, but each at most once: a chain that takes nothing keeps no promise."""
        key = (transaction.caller, transaction.effect_id)
        if key in self.lost_calls or self.rng.randrange(1_000) >= self.plan.lose_call_permille:
            return False
        self.lost_calls.add(key)
        return True

    # ---- time ------------------------------------------------------------------------------

    def at(self, at_ms: int, act: Callable[..., None], *args: object) -> None:
        """Let ``act`` happen at a time."""
        self._sequence += 1
        heapq.heappush(self._events, (at_ms, self._sequence, act, args))

    def later(self, delay_ms: int, act: Callable[..., None], *args: object) -> None:
        """Let ``act`` happen after a while."""
        self.at(self.now + delay_ms, act, *args)

    def note(self, node: Node | None, what: str) -> None:
        """Write a line of the trace."""
        line = f"{self.now - START_MS:>8} {node.name if node else '-':<8} {what}"
        self._digest.update(line.encode())
        if self.trace:
            print(line)

    def require(self, holds: bool, node: Node | None, what: str, *more: object) -> None:
        """Return if an invariant holds.

        :raises Violation: otherwise
        """
        if not holds:
            self.note(node, f"VIOLATION {what}")
            where = f"seed {self.seed}, {self.now - START_MS} ms, {node.name if node else 'world'}"
            raise Violation(f"{where}: {what} {' '.join(str(item) for item in more)}".rstrip())

    def run(self) -> Report:
        """Let everything happen, and return what came of it.

        :raises Violation: if an invariant is broken
        """
        with nullcontext() if self.plan.real_keys else cheap_vouchers():
            return self._run()

    def _run(self) -> Report:
        plan = self.plan
        buyers = [node for node in self.nodes if node.buys]
        for n in range(plan.asks if buyers else 0):
            node, task = self.rng.choice(buyers), self._task(n)
            self.at(START_MS + 10 + self.rng.randint(0, n * plan.asks_every_ms), node.ask, task)
        last_ms = START_MS + plan.asks * plan.asks_every_ms
        self.at(START_MS + 1_000, self._block)
        if plan.partitions:
            self.later(self.rng.randint(0, 20_000), self._part)
        if self.eve is not None:
            self.later(500, self.eve.act)
        while self._events:
            at_ms, _, act, args = heapq.heappop(self._events)
            self.now = max(self.now, at_ms)
            act(*args)
            self.happened += 1
            if self.now > last_ms and self._idle():
                break
            if self.now > last_ms + AFTER_MAX_MS:
                self.require(False, None, "stuck", *self._left())
        self._finish()
        return Report(
            seed=self.seed,
            digest=self._digest.hexdigest(),
            asks=plan.asks,
            deals=len(self.deals) + len(self.payments.deals),
            events=self.happened,
            virtual_s=(self.now - START_MS) // 1_000,
            outcomes=self.outcomes,
            counts=self._all_counts(),
        )

    def _task(self, n: int) -> str:
        task = f"task {n} of {self.seed}"
        if self.rng.randrange(100) < self.plan.large_percent:
            task += "x" * LARGE_BYTES
        return task

    def answer(self, task: str) -> str:
        """Return what a good seller makes of a task."""
        return '{"x":"done ' + task + '"}'

    def text(self, task: str) -> str:
        """Return what a good seller writes on a task, where it is paid word by word."""
        count = 8 + keccak256(task.encode())[0] % 90
        return f"On {task[:20]}: " + " ".join(f"word{n}" for n in range(count)) + "."

    def _idle(self) -> bool:
        return all(
            node.vanished
            or (
                node.up
                and not (node.desk.threads or node.calls or node.store.queue)
                and not node.till.calls
                and all(node.asked.values())
            )
            for node in self.nodes
        )

    def _left(self) -> list[str]:
        return [
            f"{node.name}:{thread.deal[:6]}:{thread.state}"
            for node in self.nodes
            if not node.vanished
            for thread in node.desk.threads.values()
        ] + [
            f"{node.name} asks {ask[:6]}"
            for node in self.nodes
            if not node.vanished
            for ask, ended in node.asked.items()
            if not ended
        ]

    def _all_counts(self) -> Counter[str]:
        for node in self.nodes:
            self.counts["crashes"] += node.crashes
            self.counts.update(node.desk.counts)
        return self.counts

    # ---- the network -----------------------------------------------------------------------

    def send(self, source: Node, to: str, wire: bytes) -> None:
        """Carry an envelope, or not, or twice, or late."""
        target = self.by_address.get(to)
        if self.eve is not None:
            self.eve.see(to, wire)
        if target is None:
            return
        if (source.name in self.cut) != (target.name in self.cut):
            self.counts["cut off"] += 1
            return
        plan, rng = self.plan, self.rng
        copies = 1
        if plan.double_permille and rng.randrange(1_000) < plan.double_permille:
            copies = 2
        for _ in range(copies):
            if plan.loss_permille and rng.randrange(1_000) < plan.loss_permille:
                self.counts["lost"] += 1
                continue
            delay = rng.randint(1, 15)
            if plan.slow_permille and rng.randrange(1_000) < plan.slow_permille:
                delay = rng.randint(20, 700)
            self.later(delay, target.hear, wire)

    def publish(self, source: Node, wire: bytes) -> None:
        """Carry a request to all sellers."""
        for node in self.nodes:
            if node.sells and node is not source:
                self.send(source, node.me, wire)

    def _part(self) -> None:
        """Cut some agents off from the others, or join them again."""
        if self.cut:
            self.cut = frozenset()
            self.later(self.rng.randint(10_000, 60_000), self._part)
        else:
            names = [node.name for node in self.nodes if self.rng.random() < 0.4]
            self.cut = frozenset(names)
            self.later(self.rng.randint(500, 10_000), self._part)
        self.note(None, f"cut off: {sorted(self.cut)}")

    # ---- the chain -------------------------------------------------------------------------

    def _block(self) -> None:
        self.later(1_000, self._block)
        if self.now < self.halted_until:
            return
        if self.plan.halts and self.now > self.halted_until + 60_000:
            if self.rng.randrange(50) == 0:
                self.halted_until = self.now + self.rng.randint(1, 4) * 1_000
                self.note(None, "the chain halts")
                return
        self._reorganise()
        if self.plan.strangers:
            self._meddle()
        if self.plan.blacklist:
            self._ban()
        self._sealed(self.chain.seal(self.now // 1_000))
        self._settled(self.now // 1_000)
        self._judge()
        for node in self.nodes:
            node.on_block()
        self._watch()

    def _reorganise(self) -> None:
        plan, chain = self.plan, self.chain
        most = plan.confirmations + (4 if plan.deep_reorgs else 0)
        if not (plan.reorg_permille and most):
            return
        if self.rng.randrange(1_000) >= plan.reorg_permille:
            return
        depth = min(self.rng.randint(1, most), chain.head().number)
        times = [chain.head(back).time_s for back in reversed(range(depth))]

        def drop(transaction: Transaction) -> bool:
            key = (transaction.caller, transaction.effect_id)
            if key in self.lost_calls or self.rng.random() < 0.7:
                return False
            self.lost_calls.add(key)
            return True

        dropped = chain.reorg(depth, drop=drop)
        self.note(None, f"reorg of {depth}, {len(dropped)} dropped")
        self.counts["reorgs"] += 1
        self._undo(depth, times)
        for time_s in times:
            self._sealed(chain.seal(time_s))

    def _undo(self, depth: int, times: list[int]) -> None:
        """Undo the same blocks of the channels."""
        depth = min(depth, self.ledger.height)
        if not depth:
            return

        def keep(sent: Sent) -> bool:
            key = (sent.caller, sent.effect_id)
            if key in self.lost_calls or self.rng.random() < 0.7:
                return True
            self.lost_calls.add(key)
            return False

        self.ledger.undo(depth, keep)
        for time_s in times[-depth:]:
            self._settled(time_s)

    def _settled(self, time_s: int) -> None:
        """Make a block of the channels."""
        if not self.plan.streams:
            return
        for sent, error in self.ledger.seal(time_s):
            name = type(sent.call).__name__
            self.note(self.by_address.get(sent.caller), f"channels: {name} {error or 'ok'}")
            self.counts[f"channels: {name} {error}".rstrip()] += 1

    def _sealed(self, block: Block) -> None:
        for transaction, refusal in block.outcomes:
            call = transaction.call
            caller = self.by_address.get(transaction.caller)
            name = type(call).__name__
            self.note(caller, f"block {block.number}: {name} {refusal.error if refusal else 'ok'}")
            if refusal is not None:
                self.counts[f"refused {refusal.error}"] += 1
            elif isinstance(call, Open):
                self._opened(call.terms)
            if transaction.caller == STRANGER and refusal is None:
                harmless = isinstance(call, Poke | ClaimRefund | Withdraw)
                self.require(harmless, None, "a stranger's call went through", name)

    def _opened(self, terms: Terms) -> None:
        job_id = terms.digest(self.chain.domain)
        if job_id in self.deals:
            return
        buyer, seller = self.by_address[terms.buyer], self.by_address[terms.seller]
        deal = buyer.desk.jobs.get(job_id) or seller.desk.jobs.get(job_id) or ""
        first = self._by_task.setdefault(terms.work.task, job_id)
        self.require(first == job_id, buyer, "paid twice for one task", deal)
        found = OnChainDeal(job_id, terms, deal, buyer, seller)
        self.deals[job_id] = found
        self._by_deal[deal] = found
        self._by_buyer.setdefault(terms.buyer, []).append(found)

    def jobs_of(self, buyer: str) -> list[OnChainDeal]:
        """Return the deals that a buyer ever opened."""
        return self._by_buyer.get(buyer, [])

    def outflow(self, deal: OnChainDeal) -> int:
        """Return what a deal has cost its buyer so far, the locked included."""
        job, terms = self.chain.job(deal.job_id), deal.terms
        price, bond = terms.price_units, terms.bond_units
        if job.phase in LIVE:
            return price + (bond if job.phase in (Phase.DISPUTED, Phase.ANSWERED) else 0)
        if job.phase is not Phase.CLOSED:
            return 0
        lost = bond - bond * job.to_buyer_units // price if job.how is How.RULED else 0
        return price - job.to_buyer_units + lost

    def _meddle(self) -> None:
        """Do, as a stranger, what anybody may do, and try what nobody else may."""
        if not self.deals or self.rng.random() < 0.5:
            return
        deal = self.rng.choice(list(self.deals.values()))
        terms, nothing = deal.terms, b"\0" * 32
        call = self.rng.choice(
            (
                Poke(terms),
                Poke(terms),
                ClaimRefund(deal.job_id),
                Withdraw(terms.seller),
                Settle(terms, nothing, 0, b"", b""),
                Decline(terms),
                Submit(terms, nothing),
                Rule(terms, 0, 0, nothing),
            )
        )
        self.chain.send(f"stranger{self.now}", call, STRANGER)

    def _ban(self) -> None:
        banned = self.chain.faults.blacklist
        if self.rng.randrange(20) == 0:
            banned ^= {self.rng.choice(self.nodes).me}

    def _judge(self) -> None:
        """Rule, if the arbiter is one that rules."""
        if self.plan.arbiter not in ("honest", "random"):
            return
        for deal in self.deals.values():
            depth = self.plan.confirmations
            answered = self.chain.view(deal.job_id, depth).phase is Phase.ANSWERED
            if not answered or deal.job_id in self.rulings:
                continue
            price = deal.terms.price_units
            if self.plan.arbiter == "honest":
                bad = self._bad_work(deal)
                units = 0 if bad else price
            else:
                units = self.rng.randint(0, price)
            self.rulings[deal.job_id] = units
        for job_id, units in self.rulings.items():
            terms = self.deals[job_id].terms
            if self.chain.job(job_id).phase is Phase.ANSWERED:
                call = Rule(terms, units, 0, keccak256(b"ruling"))
                self.chain.send(f"rule{job_id.hex()}", call, self.arbiter)

    def _bad_work(self, deal: OnChainDeal) -> bool:
        return not deal.seller.honest(deal.deal, Role.SELLER)

    # ---- what must never happen --------------------------------------------------------------

    def recorded(self, node: Node, record: Record) -> None:
        """Take note of what is on a disk."""
        self.payments.recorded(node, record)
        if record.kind == "said" and b'"kind":"result"' in record.data[:24]:
            thread = node.desk.threads.get(record.deal)
            if thread is not None and thread.result is not None:
                units = int(thread.result.to_seller_units)
                self.results.setdefault(record.deal, (self.chain.head().time_s, units))
        elif record.kind == "heard" and b'"kind":"result"' in record.data[:24]:
            self.heard.add(record.deal)
        elif record.kind == "judged":
            self.verdicts.setdefault(record.deal, record.data.decode())

    def _watch(self) -> None:
        """Look, after every block, at the money and the deadlines."""
        head_s = self.chain.head().time_s
        self.require(self.chain.total() == self.chain.minted_units, None, "units were made or lost")
        for job_id, deal in self.deals.items():
            if self.chain.job(job_id).phase in LIVE:
                late = head_s - deal.terms.expires_at_s
                self.require(
                    late <= SLACK_S or self._nobody_there(deal), None, "stuck on chain", deal.deal
                )
        for node in self.nodes:
            if node.buys and node.up:
                committed = self._committed(node)
                within = committed <= node.limit_units
                self.require(within, node, "is above its limit", committed, node.limit_units)
        if self.plan.streams:
            self.payments.watch()
        if head_s % 16 == 0:
            self.chain.check()

    def _committed(self, node: Node) -> int:
        """Return what a buyer has set aside, locked and spent, the chain's word first."""
        aside = dict(node.purse.reserved)
        gone = sum(max(self.outflow(job), aside.pop(job.deal, 0)) for job in self.jobs_of(node.me))
        return gone + sum(aside.values()) + self.payments.spent(node)

    def _nobody_there(self, deal: OnChainDeal) -> bool:
        # What was undone under the feet of those who had closed their books is nobody's any more.
        return self.plan.deep_reorgs or (deal.buyer.vanished and deal.seller.vanished)

    def _finish(self) -> None:
        """Close the world's books: whatever is open is poked, and then nothing may be left."""
        chain = self.chain
        while any(chain.job(job_id).phase in LIVE for job_id in self.deals):
            for job_id, deal in self.deals.items():
                if chain.job(job_id).phase in LIVE:
                    self.require(self._nobody_there(deal), None, "left on chain", deal.deal)
                    chain.send(f"end{self.now}{job_id.hex()}", Poke(deal.terms), STRANGER)
            self.now += 60_000
            self._sealed(chain.seal(self.now // 1_000))
        chain.faults.blacklist.clear()
        chain.faults.lose_call = None
        for node in self.nodes:
            if chain.owed(node.me):
                chain.send(f"at the end {node.name}", Withdraw(node.me), STRANGER)
                node_owed = f"{node.name} was owed {chain.owed(node.me)}"
                self.note(node, node_owed)
        self._sealed(chain.seal(self.now // 1_000 + 1))
        chain.check()
        self.require(chain.held() == 0, None, "the escrow holds units for nobody", chain.held())
        for deal in () if self.plan.deep_reorgs else self.deals.values():
            self._settled_rightly(deal)
            self._told_the_same(deal)
        self._unopened()
        self.closing = True
        if self.plan.streams:
            self.payments.finish()
        self._tally()

    def _settled_rightly(self, deal: OnChainDeal) -> None:
        """Compare how a deal was closed with what its two sides did."""
        job, terms = self.chain.job(deal.job_id), deal.terms
        if job.phase is not Phase.CLOSED:
            return
        to_seller, how = job.to_seller_units, job.how
        right = to_seller + job.to_buyer_units == terms.price_units
        self.require(right, None, "the split is not the price", deal.deal)
        buyer = deal.buyer.honest(deal.deal, Role.BUYER)
        seller = deal.seller.honest(deal.deal, Role.SELLER)
        result = self.results.get(deal.deal)
        verdict = self.verdicts.get(deal.deal, "")
        arbitrated = terms.arbiter != ZERO_ADDRESS
        tale = (deal.deal[:6], how.name, to_seller, terms.price_units)
        if how is How.SETTLED and buyer:
            self.require(verdict == "good", deal.buyer, "paid for what it did not want", *tale)
        if how is How.SETTLED and seller:
            paid = result is not None and to_seller == result[1]
            self.require(paid, deal.seller, "settled at another amount", *tale)
        if how is How.UNDELIVERED and seller and result is not None:
            late = result[0] > terms.deliver_by_s - MARGINS.chain_s
            self.require(late, deal.seller, "delivered and was not paid", *tale)
        if seller:
            self.require(
                how not in (How.DECLINED, How.SILENT_SELLER), deal.seller, "kept silent", *tale
            )
        if how is How.SILENT_BUYER:
            fine = not buyer or not arbitrated or verdict == "good"
            self.require(fine, deal.buyer, "paid for an undelivered job", *tale)
            self.require(to_seller == terms.price_units, None, "not paid in full", *tale)
        if how in (How.RULED, How.SILENT_ARBITER, How.SILENT_SELLER):
            self.require(not (buyer and seller), None, "honest sides in a dispute", *tale)
        if buyer and seller:
            # No loss, crash, cut or halt of this world lasts as long as the time to deliver.
            done = how in (How.SETTLED, How.SILENT_BUYER)
            self.require(done, None, "honest sides came to nothing", *tale)
        if how is How.SILENT_ARBITER:
            self.require(self.plan.arbiter == "silent", None, "the arbiter was late", *tale)
            default = to_seller == terms.default_to_seller_units
            self.require(default, None, "another split than the default", *tale)
        if how is How.RULED:
            agreed = to_seller == self.rulings[deal.job_id]
            self.require(agreed, None, "another split than the ruling", *tale)

    def _told_the_same(self, deal: OnChainDeal) -> None:
        """Compare what both sides wrote into their books with each other and with the chain."""
        job = self.chain.job(deal.job_id)
        paid = job.to_seller_units > 0
        state = State.SETTLED if paid else State.REFUNDED
        if job.phase is not Phase.CLOSED:
            state = State.LAPSED
        for node in (deal.buyer, deal.seller):
            if node.vanished:
                continue
            summary = node.store.summaries.get(deal.deal)
            told = summary is not None and summary["state"] == state
            told = told and summary["to_seller_units"] == job.to_seller_units  # type: ignore[index]
            self.require(told, node, "tells another end", deal.deal, state, summary)

    def _unopened(self) -> None:
        opened = {deal.deal for deal in self.deals.values()} | self.payments.deals.keys()
        for node in self.nodes:
            for deal, summary in node.store.summaries.items():
                if deal not in opened:
                    ended = summary["state"] in (State.LAPSED, State.REJECTED)
                    self.require(ended, node, "tells of a deal that never was", deal, summary)

    def _tally(self) -> None:
        for deal in self.deals.values():
            job = self.chain.job(deal.job_id)
            self.outcomes[f"{job.how.name.lower().replace('_', ' ')}"] += 1
        self.outcomes.update(self.payments.tally())
        asks = sum(len(node.asked) for node in self.nodes)
        deals = self.outcomes.total()
        self.outcomes["no deal"] += asks - deals - len(self.payments.contracts)
        if self.plan.calm and not any(node.vanished for node in self.nodes):
            ways = ("", "channel ", "none ", "call ")
            settled = sum(self.outcomes[f"{way}settled"] for way in ways)
            settled += self.outcomes["call refused"] + self.outcomes["call given up"]
            self.require(settled == deals, None, "calm and not settled", self.outcomes)
