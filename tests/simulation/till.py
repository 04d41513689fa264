"""What a node of a simulated world does with channels: deposits, work, claims, and its vices."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from coase.agents.metering import is_counted, result_units, units_of
from coase.escrow.claims import ClaimPolicy, GasPrice, plan_claims
from coase.escrow.voucher import (
    AskWithdrawal,
    ClaimAll,
    Fund,
    PayOut,
    TakeWithdrawal,
    voucher_digest,
)
from coase.protocol.errors import LocalProtocolError
from coase.protocol.states import Role, State

if TYPE_CHECKING:
    from coase.agents.desk import Desk
    from coase.agents.steps import OnChannel
    from coase.escrow.voucher import ChannelCall, ChannelConfig, ChannelView
    from coase.protocol.session import Thread
    from tests.simulation.node import Node

RATE: Final = 2_000_000  # Units for a million tokens: two for each.
INPUT_MAX: Final = 20
OUTPUT_MAX: Final = 200
CHUNK_MAX_UNITS: Final = 720  # For strangers, in all their deals: four of a first chunk and input.
CLAIMS: Final = ClaimPolicy(value_to_cost=1, units_min=10**30, age_max_s=20)
NO_GAS: Final = GasPrice(0, 0)
CALL_WAIT_BLOCKS: Final = 3
TWISTS: Final = ("underpays", "stale_voucher", "foreign_voucher")


class Till:
    """The channels of one node in one of its lives."""

    def __init__(self, node: Node, desk: Desk) -> None:
        self.node, self.world, self.desk = node, node.world, desk
        self.ledger = node.world.ledger
        self.calls: dict[str, tuple[str, ChannelCall, int]] = {}
        self.writing: set[str] = set()
        self._claims = 0
        desk.streams.open(self.ledger.domain, is_local=True)
        policy = desk.streams.policy
        desk.streams.policy = replace(policy, chunk_max_units=CHUNK_MAX_UNITS)

    # ---- the chain -----------------------------------------------------------------------------

    def fund(self, effect: OnChannel) -> None:
        """Make a deposit, unless it is one that this buyer only promises."""
        vice = self.node.vice(effect.deal, Role.BUYER)
        if vice == "no_lock":
            return
        self._send(effect.effect_id, effect.deal, effect.call)
        if vice == "vanishes":
            self.node.vanish()

    def _send(self, effect_id: str, deal: str, call: ChannelCall) -> None:
        try:
            self.ledger.send(effect_id, call, self.node.me)
        except LocalProtocolError as error:
            self.world.require(False, self.node, str(error), effect_id)
        self.calls[effect_id] = (deal, call, self.world.chain.head().number)
        self.world.note(self.node, f"calls {type(call).__name__} {deal[:6]}")

    def on_block(self) -> None:
        """See which calls are through, claim what is worth it, and arm what is not ours."""
        depth, number = self.world.plan.confirmations, self.world.chain.head().number
        for effect_id, (_, call, sent) in list(self.calls.items()):
            error = self.ledger.outcome(effect_id, self.node.me, depth)
            if error is None:
                if number - sent < CALL_WAIT_BLOCKS + depth:
                    continue
                error = "lost"
            if error:
                self.ledger.forget(effect_id, self.node.me)
            del self.calls[effect_id]
            self._ended(effect_id, call, error)
        self.claim()
        if self.node.rng.random() < 0.03:
            self._arm()

    def _ended(self, effect_id: str, call: ChannelCall, error: str) -> None:
        match call:
            case Fund():
                now_ms = self.node.clock()
                self.node.take(self.desk.deposit_ended(effect_id, error, now_ms=now_ms))
            case ClaimAll(rows):
                for row in rows:
                    self.desk.streams.want(row.voucher.channel_id)

    def look(self) -> None:
        """Read the channels that have to be read."""
        depth = self.world.plan.confirmations
        wanted = self.desk.streams.wanted()
        if wanted:
            views = {one: self.ledger.view(one, depth) for one in wanted}
            self.node.take(self.desk.look_at_channels(views, now_ms=self.node.clock()))

    def claim(self) -> None:
        """Turn vouchers into money, when an agent would."""
        if any(isinstance(call, ClaimAll) for _, call, _ in self.calls.values()):
            return
        ready = self.desk.streams.claimable()
        now_s = self.desk.head.time_s
        for batch in plan_claims(ready, price=NO_GAS, policy=CLAIMS, now_s=now_s):
            self._claims += 1
            name = f"claim{self.node.life}.{self._claims}"
            self._send(name, name, ClaimAll(batch.rows))
        if self.node.sells and self.ledger.tip.unpaid(self.node.me):
            if self.node.rng.random() < 0.2:
                self._claims += 1
                name = f"payout{self.node.life}.{self._claims}"
                self._send(name, name, PayOut(self.node.me))

    def _arm(self) -> None:
        """Ask for a withdrawal while others think that they are paid from there."""
        if self.node.vices.get(Role.BUYER) != "arms":
            return
        for config, view in self._bought():
            if view.free_units and not view.is_withdrawing:
                self._claims += 1
                units = self.node.rng.randint(1, view.free_units)
                name = f"ask{self.node.life}.{self._claims}"
                self._send(name, name, AskWithdrawal(config, units))

    def run_away(self) -> None:
        """Take back at once what was asked for, now that the delay is over."""
        for config, view in self._bought():
            if view.is_withdrawing:
                name = f"run{config.channel_id(self.ledger.domain).hex()}"
                self.ledger.send(name, TakeWithdrawal(config), self.node.me)

    def _bought(self) -> list[tuple[ChannelConfig, ChannelView]]:
        ends = [line.buyer for line in self.desk.streams.lines.values()]
        return [
            (end.config, self.ledger.view(end.channel_id, 0)) for end in ends if end is not None
        ]

    # ---- the work --------------------------------------------------------------------------------

    def begin(self, deal: str) -> None:
        """Start to write a text; a restart starts again."""
        self.writing.add(deal)
        self.node.world.later(self.node.rng.randint(20, 400), self.node.guard(self._write), deal)

    def _write(self, deal: str) -> None:
        """Deliver the next part if the one before is paid, and come again."""
        node, desk = self.node, self.desk
        thread = desk.threads.get(deal)
        if thread is None or thread.task is None or thread.result is not None:
            self.writing.discard(deal)
            return
        vice = node.vice(deal, Role.SELLER)
        if vice == "declines" and node.rng.random() < 0.3:
            node.take(desk.work_failed(deal, "no", now_ms=node.clock()))
            return
        if vice == "vanishes" and thread.chunks > 1:
            node.vanish()
        stopped = vice == "stops" and thread.chunks > 2
        if thread.state is State.LOCKED and not thread.owed_units and not stopped:
            try:
                self._go_on(thread, vice)
            except LocalProtocolError as error:
                node.world.note(node, f"waits {deal[:6]}: {error}")
        pause = node.rng.choice((30, 60, 200)) if desk.threads.get(deal) is not thread else 250
        node.world.later(pause, node.guard(self._write), deal)

    def _go_on(self, thread: Thread, vice: str) -> None:
        node, desk, deal, terms = self.node, self.desk, thread.deal, thread.agreed_terms
        task = thread.task.task if thread.task is not None else ""
        text = node.world.text(task)
        rest = text[len(thread.shown) :]
        part = rest[: node.rng.choice((12, 40, 90))]
        if len(part) < len(rest):
            due = units_of(thread, thread.shown + part)
            if vice == "overcounts" and thread.chunks > 1 and due:
                due = min(due + 30, terms.price_units)
            now_ms = node.clock()
            step = desk.chunk(deal, part, tokens=len(part) // 4, due_units=due, now_ms=now_ms)
            node.take(step)
            return
        if vice == "other_text":
            text = "Something else. " * 9
        if vice == "garbage":
            text = thread.shown + "rubbish"
        result = json.dumps({"text": text})
        units = terms.price_units
        if is_counted(terms):
            units = result_units(thread, result)
        step = desk.work_done(
            deal,
            result=result,
            to_seller_units=0 if thread.method == "none" else units,
            usage={},
            salt=node.rng.randbytes(32),
            now_ms=node.clock(),
        )
        node.take(step)
        if vice == "twice" and thread.contract:
            node.caller.deliver_again(deal)

    # ---- lies ------------------------------------------------------------------------------------

    def twist(self, deal: str, plain: bytes) -> bytes:
        """Return the voucher that a dishonest buyer sends instead of the one that is due."""
        vice, body = self.node.vice(deal, Role.BUYER), json.loads(plain)
        thread = self.desk.threads.get(deal)
        if thread is None or vice not in TWISTS:
            return plain
        total, channel_id = int(body["total_units"]), b"\1" * 32
        if vice != "foreign_voucher":
            channel_id = self.desk.streams._config_of(thread).channel_id(self.ledger.domain)
            # Of a little less, or of a total that has been paid already.
            total -= 1 if vice == "underpays" else int(body["units"])
        digest = voucher_digest(self.ledger.domain, channel_id, total)
        body |= {
            "total_units": str(total),
            "signature": "0x" + self.node.identity.sign(digest).hex(),
        }
        return json.dumps(body, separators=(",", ":")).encode()
