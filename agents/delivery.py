"""What a desk's owner tells it, and what it says then: results, chunks, findings, consent."""

from __future__ import annotations

import heapq
import json
from abc import abstractmethod
from typing import TYPE_CHECKING

from coase.escrow.accounts import ChannelStopped
from coase.protocol.errors import LocalProtocolError
from coase.protocol.messages import Ack, Body, Header, Nack, commitment
from coase.protocol.session import Margins, Thread, Verify, acknowledged, fail, judge, taken
from coase.protocol.states import BOUND, State
from coase.protocol.terms import settlement_digest

from .memory import Memory
from .metering import fault_in_stream
from .pieces import SHOWN_MAX_BYTES, size_as_json
from .standing import CALL_REFUSED
from .steps import Notice, Step, Transmit

if TYPE_CHECKING:
    from coase.protocol.envelope import Message

    from .ports import Codec


class Delivery(Memory):
    """The part of a desk that its owner's own code speaks to."""

    codec: Codec
    abandoned: list[str]
    """Deals of an earlier life that are paid as they come, and that nobody waits for; and its rate
    contracts."""
    margins: Margins
    verify: Verify

    @abstractmethod
    def say(
        self,
        deal: str,
        kind: str,
        body: dict[str, object],
        step: Step,
        *,
        now_ms: int,
        re: str = "",
        until_ms: int = 0,
        message_id: str = "",
    ) -> Message:
        """Make our own move in a thread."""

    @abstractmethod
    def _work(self, deal: str, step: Step, *, now_ms: int) -> None:
        """Perform what is owed now."""

    @abstractmethod
    def _encode(
        self,
        kind: str,
        message_id: str,
        to: str,
        deal: str,
        re: str,
        plain: bytes,
        key: str,
        now_ms: int,
        seq: int = 0,
    ) -> bytes:
        """Return an envelope."""

    def _task_taken(self, header: Header, answer: Body, step: Step, *, now_ms: int) -> None:
        """Tell that the seller has the task, and keep its signature where it stakes something."""
        thread = self.threads.get(header.deal)
        if thread is None or not isinstance(answer, Ack):
            return
        step.effects.append(Notice("taken", thread.deal, thread))
        if not answer.signature or not thread.agreed_terms.stake_units:
            return
        signature = bytes.fromhex(answer.signature[2:])
        moved = taken(thread, signature, verify=self.verify)
        if moved is not thread:
            self._put(moved)
            self._record_data(step, moved, "taken", signature, now_ms=now_ms)

    def _paid(self, header: Header, answer: Body, step: Step, *, now_ms: int) -> None:
        """Take the seller's word that the last payment came; one who forgot the deal has it."""
        thread = self.threads.get(header.deal)
        done = isinstance(answer, Ack) and answer.level == "done"
        gone = isinstance(answer, Nack) and answer.reason == "unknown_deal"
        if thread is None or thread.counterparty != header.sender or not (done or gone):
            return
        moved = acknowledged(thread, now_ms=now_ms)
        if moved is not thread:
            self._put(moved)
            self._record_data(step, moved, "acked", b"", now_ms=now_ms)
            self.close_if_over(thread.deal, step, now_ms=now_ms)

    def _uncalled(self, thread: Thread, answer: Nack, step: Step, *, now_ms: int) -> None:
        """End the deal of a call that its seller does not begin: it can be asked for as usual."""
        begun = thread.chunks or thread.result is not None
        if thread.state in BOUND and not begun:
            self._withdraw(thread.deal, f"{CALL_REFUSED}: {answer.reason}", step, now_ms=now_ms)
            self.close_if_over(thread.deal, step, now_ms=now_ms)

    def _effect_id(self, thread: Thread, duty: str) -> str:
        return f"{thread.deal}:{duty}@{self.me}"

    def pursue(self, deal: str, step: Step, *, now_ms: int) -> None:
        """Do what is owed in a deal now, and end it if it is over."""
        self._work(deal, step, now_ms=now_ms)
        self.close_if_over(deal, step, now_ms=now_ms)

    def work_done(
        self,
        deal: str,
        *,
        result: str,
        to_seller_units: int,
        usage: dict[str, int],
        salt: bytes,
        now_ms: int,
    ) -> Step:
        """Take the seller's result: sign for it, send it until it is answered."""
        step = Step()
        thread = self.threads.get(deal)
        if thread is None or thread.result is not None:
            return step
        if thread.state is State.AGREED:
            # The lock was reorganised away meanwhile: work again if it comes back.
            self._retry.pop(self._effect_id(thread, "work"), None)
            return step
        if thread.task is not None and size_as_json(thread.task.task, result) > SHOWN_MAX_BYTES:
            raise LocalProtocolError("task and result are too large to be shown to an arbiter")
        deliverable = commitment(salt, result.encode())
        digest = settlement_digest(self.domain, thread.job_id, deliverable, to_seller_units)
        terms = thread.agreed_terms
        body: dict[str, object] = {
            "salt": "0x" + salt.hex(),
            "result": result,
            "to_seller_units": str(to_seller_units),
            "usage": usage,
            "signature": "0x" + self.codec.sign(digest).hex(),
        }
        until_ms = (terms.deliver_by_s + terms.dispute_s) * 1000
        self.streams.sending(thread, to_seller_units - thread.due_units, step, now_ms=now_ms)
        re = thread.last_id or thread.task_id
        self.say(deal, "result", body, step, now_ms=now_ms, re=re, until_ms=until_ms)
        patience_ms = self.margins.settle_patience_ms
        heapq.heappush(self._agenda, (now_ms + patience_ms, deal))
        self._work(deal, step, now_ms=now_ms)
        return step

    def show(self, deal: str, number: int, text: str, tokens: int, *, now_ms: int) -> Step:
        """Show the buyer how the result's text goes on; ``number`` counts from 0 in each deal.

        Nothing is journalled or repeated: the result alone counts.
        """
        step, thread = Step(), self.threads.get(deal)
        if thread is None or thread.state not in BOUND or thread.result is not None:
            return step
        plain = json.dumps(
            {"text": text, "tokens": tokens, "at": 0, "due_units": "0"}, ensure_ascii=False
        ).encode()
        to, key = thread.counterparty, thread.their_key
        wire = self._encode("chunk", self._id(), to, deal, "", plain, key, now_ms, number)
        step.effects.append(Transmit(to, wire))
        return step

    def chunk(self, deal: str, text: str, *, tokens: int, due_units: int, now_ms: int) -> Step:
        """Deliver how the result's text goes on; the deal costs ``due_units`` up to here.

        It is repeated until it is paid for.

        :raises LocalProtocolError: if an earlier one is not paid yet, or it is too much at once
        """
        step, thread = Step(), self.threads.get(deal)
        if thread is None or thread.state is not State.LOCKED:
            return step
        self.streams.sending(thread, due_units - thread.due_units, step, now_ms=now_ms)
        body: dict[str, object] = {
            "text": text,
            "tokens": tokens,
            "at": len(thread.shown),
            "due_units": str(due_units),
        }
        until_ms = thread.agreed_terms.deliver_by_s * 1000
        re = thread.last_id or thread.task_id
        self.say(deal, "chunk", body, step, now_ms=now_ms, re=re, until_ms=until_ms)
        return step

    def stop(self, deal: str, why: str, *, now_ms: int) -> Step:
        """End a deal that is paid as it comes: nothing more is delivered or paid."""
        step, thread = Step(), self.threads.get(deal)
        if thread is None or not thread.streamed or thread.state not in BOUND:
            return step
        self._withdraw(deal, why, step, now_ms=now_ms)
        self.close_if_over(deal, step, now_ms=now_ms)
        return step

    def give_up_abandoned(self, step: Step, *, now_ms: int) -> None:
        """End the deals of an earlier life that nobody waits for any more."""
        deals, self.abandoned = self.abandoned, []
        for deal in deals:
            thread = self.threads.get(deal)
            if thread is not None and thread.state in BOUND:
                why = "rates end with a restart" if thread.is_contract else "its reader is gone"
                self._withdraw(deal, why, step, now_ms=now_ms)
                self.close_if_over(deal, step, now_ms=now_ms)

    def failed(self, thread: Thread, step: Step, *, now_ms: int) -> None:
        """Keep a thread whose seller cannot deliver."""
        self._put(thread)
        self._record_data(step, thread, "failed", thread.failed.encode(), now_ms=now_ms)

    def work_failed(self, deal: str, why: str, *, now_ms: int) -> Step:
        """Take the seller's failure: it declines, and the buyer has all of its money back."""
        step = Step()
        thread = self.threads.get(deal)
        if thread is None or thread.result is not None:
            return step
        self.failed(fail(thread, why), step, now_ms=now_ms)
        self.pursue(deal, step, now_ms=now_ms)
        return step

    def checked(self, deal: str, verdict: str, *, now_ms: int) -> Step:
        """Take the buyer's finding on a result: ``good``, or what is wrong with it."""
        step = Step()
        thread = self.threads.get(deal)
        if thread is None or thread.verdict:
            return step
        if verdict == "good" and thread.streamed:
            verdict = fault_in_stream(thread) or verdict
        self._put(judge(thread, verdict))
        self._record_data(step, thread, "judged", verdict.encode(), now_ms=now_ms)
        if self.buyer is not None:
            self.buyer.judged(self.threads[deal], now_ms=now_ms)
        step.wait = True
        if verdict != "good":
            step.effects.append(Notice("bad_result", deal, self.threads[deal], verdict))
        self.pursue(deal, step, now_ms=now_ms)
        return step

    def _say_settle(self, thread: Thread, step: Step, *, now_ms: int) -> None:
        terms, result = thread.agreed_terms, thread.result
        if result is None:
            raise LocalProtocolError("nothing to settle")
        units = int(result.to_seller_units)
        digest = settlement_digest(self.domain, thread.job_id, thread.deliverable, units)
        body: dict[str, object] = {
            "deliverable": "0x" + thread.deliverable.hex(),
            "to_seller_units": str(units),
            "signature": "0x" + self.codec.sign(digest).hex(),
        }
        until_ms = (terms.deliver_by_s + terms.dispute_s) * 1000
        self.say(
            thread.deal, "settle", body, step, now_ms=now_ms, re=thread.result_id, until_ms=until_ms
        )

    def _say_voucher(self, thread: Thread, step: Step, *, now_ms: int) -> None:
        terms = thread.agreed_terms
        try:
            body = self.streams.pay(thread, step, now_ms=now_ms)
        except ChannelStopped as error:
            # Nothing is ever paid here again: whoever waits for it should know.
            self._withdraw(thread.deal, str(error), step, now_ms=now_ms)
            return
        until_ms = (terms.deliver_by_s + terms.dispute_s) * 1000
        re = thread.last_id if thread.result is None else thread.result_id
        self.say(thread.deal, "voucher", body, step, now_ms=now_ms, re=re, until_ms=until_ms)

    def _say_withdraw(self, thread: Thread, step: Step, *, now_ms: int) -> None:
        why = thread.failed or thread.verdict or "not wanted any more"
        self._withdraw(thread.deal, why, step, now_ms=now_ms)

    def _withdraw(self, deal: str, why: str, step: Step, *, now_ms: int) -> None:
        self.say(deal, "withdraw", {"reason": why[:200]}, step, now_ms=now_ms)
