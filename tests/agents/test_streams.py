"""Deals that a channel pays: one chunk at risk, whatever is lost, doubled, killed or lied about."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from coase.agents.firm import Firm, joined_firm, new_firm
from coase.agents.metering import count_input, stream_units, text_of, units_of
from coase.agents.seller import Quote, SellerDesk, Ware
from coase.agents.steps import DoWork, Step
from coase.escrow.voucher import AskWithdrawal, ChannelConfig, ClaimAll, PayOut
from coase.protocol.errors import LocalProtocolError
from coase.protocol.messages import ZERO_BYTES32_TEXT, Task
from coase.protocol.states import State

from .desks import CAPABILITY, SCHEMA, Market, kind_of

if TYPE_CHECKING:
    from coase.agents.asks import Ask
    from coase.protocol.messages import Request
    from coase.protocol.session import Thread

    from .desks import Seat

WORDS = "the quick brown fox jumps over the lazy dog and on it goes. " * 8
PART = 64
RATE = 2_000_000  # Units for a million tokens: two a token.


class ByToken:
    """Sells by the token, at one price."""

    def quote(self, request: Request, buyer: str, *, load: int, now_ms: int) -> Quote | None:
        price = (request.input_max + request.output_max) * RATE // 1_000_000
        metered = {"input": RATE, "output": RATE}
        return Quote(price, 30, pricing="tokens", metered=metered)

    def answer(self, thread: Thread, *, now_ms: int) -> Quote | None:
        return None


class Streaming(Market):
    """A market whose sellers write, part by part, as they are paid."""

    def __init__(self) -> None:
        super().__init__(prices=(1_000,))
        self.text = WORDS
        self.writes = True
        self.sellers[0].desk.seller = self.wares(self.sellers[0])

    @staticmethod
    def wares(seat: Seat) -> SellerDesk:
        seller = SellerDesk(seat.desk, agent=seat.name)
        seller.sell(Ware("echo", SCHEMA, SCHEMA, ByToken(), shown=True))
        return seller

    @property
    def seller(self) -> Seat:
        return self.sellers[0]

    def buy(self, *, settlements: tuple[str, ...] = ("channel", "escrow")) -> Ask:
        return self.ask("write", settlements=settlements, input_max=100, output_max=400)  # type: ignore[arg-type]

    def _perform(self, seat: Seat, effect: object) -> None:
        if not isinstance(effect, DoWork):
            super()._perform(seat, effect)  # type: ignore[arg-type]

    def pass_ms(self, duration_ms: int, *, pause_ms: int = 250) -> None:
        super().pass_ms(duration_ms, pause_ms=pause_ms)
        if self.writes:
            for deal in list(self.seller.desk.threads):
                self.write(deal)

    def write(self, deal: str) -> None:
        """Let the seller go on with a deal as far as it is paid."""
        desk = self.seller.desk
        for _ in range(2):
            thread = desk.threads.get(deal)
            ready = thread is not None and thread.state is State.LOCKED and thread.task is not None
            if not ready or thread is None or thread.owed_units:
                return
            try:
                step = self._next(thread)
            except LocalProtocolError:
                return  # The chain has to be asked first.
            self.perform(self.seller, step)
            self.deliver()

    def _next(self, thread: Thread) -> Step:
        """Return the seller's next chunk, or its result."""
        desk, deal = self.seller.desk, thread.deal
        rest = self.text[len(thread.shown) :]
        if len(rest) > PART and thread.streamed:
            part = rest[:PART]
            due = units_of(thread, thread.shown + part)
            return desk.chunk(deal, part, tokens=16, due_units=due, now_ms=self.now_ms)
        return desk.work_done(
            deal,
            result=json.dumps({"text": self.text}),
            to_seller_units=units_of(thread, self.text) if thread.streamed else 500,
            usage={},
            salt=b"\1" * 32,
            now_ms=self.now_ms,
        )

    def lose(self, kind: str, *, every: int) -> None:
        """Let every so many-th envelope of a kind get lost, the first one among them."""
        seen = [0]

        def lost(to: str, wire: bytes) -> bool:
            if kind_of(wire) != kind:
                return False
            seen[0] += 1
            return seen[0] % every == 1

        self.lost = lost

    def kill(self, who: str) -> None:
        """Kill the ``seller``, the ``buyer`` or ``both``, and let them be born again."""
        self.queue.clear()  # What was on its way dies with them.
        if who in ("seller", "both"):
            again = self.restart(self.seller)
            again.desk.seller = self.wares(again)
        if who in ("buyer", "both"):
            self.restart(self.buyer)

    def paid(self) -> int:
        """Return the total for which the seller holds a voucher."""
        ends = [line.seller for line in self.seller.desk.streams.lines.values()]
        return sum(end.voucher.units for end in ends if end is not None and end.voucher)

    def signed(self) -> int:
        """Return the total that the buyer has signed, as far as his journal knows."""
        ends = [line.buyer for line in self.buyer.desk.streams.lines.values()]
        return sum(end.signed_units for end in ends if end is not None)

    def config(self) -> ChannelConfig:
        """Return the channel between the two."""
        line = next(iter(self.seller.desk.streams.lines.values()))
        assert line.seller is not None
        return line.seller.config

    def claim(self) -> None:
        """Turn the seller's vouchers into money."""
        rows = []
        for channel_id, line in self.seller.desk.streams.lines.items():
            if line.seller is not None:
                seen = line.seller.see(self.ledger.view(channel_id))
                rows += [seen.claim] if seen.claim else []
        if rows:
            self.ledger.execute(ClaimAll(tuple(rows)), self.seller.desk.me)
        self.ledger.execute(PayOut(self.seller.desk.me), self.seller.desk.me)


@pytest.fixture
def market() -> Streaming:
    return Streaming()


def over(ask: Ask) -> bool:
    return ask.outcome is not None


def test_a_stream_is_paid_chunk_by_chunk_and_ends_settled_on_both_sides(market: Streaming) -> None:
    ask = market.buy()
    market.until(lambda: over(ask))
    assert ask.outcome is not None
    assert ask.outcome.state is State.SETTLED
    price = ask.outcome.view.to_seller_units
    assert price == stream_units(ask.outcome.agreed_terms, count_input(task("write")), WORDS)
    assert market.kinds().count("voucher") >= len(WORDS) // PART
    assert market.paid() == market.signed() == price
    assert "open" not in {name.split(":")[1] for name in market.funded}
    assert not market.seller.desk.threads
    before = market.ledger.balances[market.seller.desk.me]
    market.claim()
    assert market.ledger.balances[market.seller.desk.me] == before + price


def test_the_second_deal_needs_no_transaction(market: Streaming) -> None:
    first = market.buy()
    market.until(lambda: over(first))
    blocks = market.ledger.number
    second = market.buy()
    market.until(lambda: over(second))
    assert second.outcome is not None
    assert second.outcome.state is State.SETTLED
    assert market.ledger.number == blocks
    assert market.paid() == 2 * second.outcome.view.to_seller_units


def test_a_seller_without_channels_is_paid_by_the_escrow(market: Streaming) -> None:
    market.seller.desk.streams.enabled = False
    ask = market.buy()
    market.until(lambda: over(ask))
    assert ask.outcome is not None
    assert ask.outcome.method == "escrow"
    assert ask.outcome.state is State.SETTLED


def test_who_wants_the_escrow_gets_it(market: Streaming) -> None:
    ask = market.buy(settlements=("escrow", "channel"))
    market.until(lambda: over(ask))
    assert ask.outcome is not None
    assert ask.outcome.method == "escrow"


@pytest.mark.parametrize("kind", ["task", "chunk", "voucher", "result", "ack", "settle"])
@pytest.mark.parametrize("every", [2, 3])
def test_what_is_lost_is_said_again_and_paid_once(market: Streaming, kind: str, every: int) -> None:
    market.lose(kind, every=every)
    ask = market.buy()
    market.until(lambda: over(ask))
    assert ask.outcome is not None
    assert ask.outcome.state is State.SETTLED
    assert market.paid() == market.signed() == ask.outcome.view.to_seller_units


@pytest.mark.parametrize("who", ["seller", "buyer", "both"])
@pytest.mark.parametrize("chunks", [0, 1, 3, 6])
def test_killed_in_mid_stream_it_goes_on_from_what_was_paid(
    market: Streaming, who: str, chunks: int
) -> None:
    ask = market.buy()
    market.until(lambda: market.kinds().count("chunk") >= chunks)
    market.kill(who)
    deal = ask.chosen or next(iter(market.buyer.desk.threads), "")
    market.until(lambda: bool(deal) and not market.buyer.desk.threads)
    summaries = [json.loads(data) for name, data in market.buyer.closed if name == deal]
    assert summaries[-1]["state"] == "settled"
    price = summaries[-1]["to_seller_units"]
    assert market.paid() == market.signed() == price
    assert len(market.funded) == 1


def test_a_journal_cut_anywhere_signs_nothing_twice() -> None:
    whole = Streaming()
    ask = whole.buy()
    whole.until(lambda: over(ask))
    lines = len(whole.buyer.records)
    for cut in range(3, lines, 5):
        cut_and_restarted(cut, most_units=whole.signed())


def cut_and_restarted(cut: int, *, most_units: int) -> None:
    market = Streaming()
    ask = market.buy()
    market.until(lambda: over(ask) or len(market.buyer.records) >= cut)
    if over(ask):
        return
    before = market.signed()
    market.restart(market.buyer)
    assert market.signed() == before
    assert market.buyer.desk.threads
    market.until(lambda: not market.buyer.desk.threads)
    assert market.paid() <= market.signed() <= most_units


def test_a_buyer_who_stops_has_paid_what_he_had(market: Streaming) -> None:
    ask = market.buy()
    market.until(lambda: market.paid() > 0)
    deal, paid = ask.chosen, market.paid()
    market.writes = False
    market.perform(market.buyer, market.buyer.desk.stop(deal, "enough", now_ms=market.now_ms))
    market.deliver()
    assert not market.seller.desk.threads
    assert ask.outcome is not None
    assert ask.outcome.view.to_seller_units == market.signed()
    assert market.signed() - paid <= stream_units(ask.outcome.agreed_terms, 0, "x" * 2 * PART)


def test_a_buyer_who_falls_silent_costs_one_chunk(market: Streaming) -> None:
    market.buy()
    market.until(lambda: market.paid() > 0)
    market.lost = lambda to, wire: kind_of(wire) == "voucher"
    market.pass_ms(20_000)
    deal = next(iter(market.seller.desk.threads))
    thread = market.seller.desk.threads[deal]
    assert 0 < thread.owed_units <= 2 * PART
    market.until(lambda: not market.seller.desk.threads, within_ms=300_000)
    line = next(iter(market.seller.desk.streams.lines.values()))
    assert line.seller is not None
    assert line.seller.arrears_units == thread.owed_units


def test_a_seller_who_counts_too_much_is_not_paid_for_it(market: Streaming) -> None:
    ask = market.buy()
    market.until(lambda: market.paid() > 0)
    market.writes = False
    deal, paid = ask.chosen, market.paid()
    thread = market.seller.desk.threads[deal]
    step = market.seller.desk.chunk(
        deal, "x" * PART, tokens=16, due_units=thread.due_units + 100, now_ms=market.now_ms
    )
    market.perform(market.seller, step)
    market.deliver()
    assert ask.outcome is not None
    assert "counts more tokens" in ask.outcome.verdict
    assert market.paid() == paid


def test_a_result_of_another_text_is_not_paid_for(market: Streaming) -> None:
    ask = market.buy()
    market.until(lambda: market.paid() > 0)
    market.text = "something else entirely, which nobody was shown. " * 10
    market.until(lambda: over(ask))
    assert ask.outcome is not None
    assert ask.outcome.verdict not in ("", "good")
    assert market.paid() < stream_units(ask.outcome.agreed_terms, count_input(task("write")), WORDS)


def test_no_chunk_leaves_while_a_withdrawal_is_pending(market: Streaming) -> None:
    first = market.buy()
    market.until(lambda: over(first))
    config = market.config()
    market.ledger.execute(AskWithdrawal(config, 100), market.buyer.desk.me)
    for seat in (market.seller, market.buyer):  # Both look again, as after a restart.
        for line in seat.desk.streams.lines.values():
            if line.seller is not None:
                line.seller = line.seller.forget_view()
        seat.desk.streams.want(config.channel_id(market.ledger.domain))
    second = market.buy()
    market.until(lambda: over(second))
    assert second.outcome is not None
    assert second.outcome.state is State.REFUNDED
    assert market.paid() == market.signed()
    # The buyer's own end stopped there, and the next deal goes on with another channel.
    third = market.buy()
    market.until(lambda: over(third))
    assert third.outcome is not None
    assert third.outcome.state is State.SETTLED
    assert len(market.buyer.desk.streams.lines) == 2


def test_a_channel_that_cannot_be_filled_lapses_and_nothing_was_paid(market: Streaming) -> None:
    market.ledger.balances[market.buyer.desk.me] = 10
    ask = market.buy()
    market.until(lambda: over(ask))
    assert ask.outcome is not None
    assert ask.outcome.state is State.LAPSED
    assert market.signed() == 0
    assert any("InsufficientBalance" in notice.detail for notice in market.buyer.notices)


def test_unmetered_work_is_paid_at_its_end() -> None:
    market = Market(prices=(1_000,))
    ask = market.ask("hello", settlements=("channel",))  # type: ignore[arg-type]
    market.until(lambda: ask.outcome is not None)
    assert ask.outcome is not None
    assert (ask.outcome.method, ask.outcome.state) == ("channel", State.SETTLED)
    assert ask.outcome.view.to_seller_units == 1_000
    assert ask.wish.capability == CAPABILITY


def test_within_a_firm_nothing_is_locked_or_paid() -> None:
    market = Market(prices=(1_000,))
    seller = market.sellers[0].desk.seller
    assert isinstance(seller, SellerDesk)
    firm = new_firm("home")
    seller.firm = market.buying.firm = lambda: firm
    ask = market.ask("hello", settlements=("none", "escrow"))  # type: ignore[arg-type]
    market.until(lambda: ask.outcome is not None)
    assert ask.outcome is not None
    assert (ask.outcome.method, ask.outcome.agreed_terms.price_units) == ("none", 0)
    assert ask.outcome.state is State.SETTLED
    assert not market.funded


def test_strangers_pay_where_a_firm_does_not() -> None:
    market = Market(prices=(1_000,))
    seller = market.sellers[0].desk.seller
    assert isinstance(seller, SellerDesk)
    ours, other = new_firm("ours"), new_firm("ours")
    seller.firm, market.buying.firm = lambda: other, lambda: ours
    ask = market.ask("hello", settlements=("none", "escrow"))  # type: ignore[arg-type]
    market.until(lambda: ask.outcome is not None)
    assert ask.outcome is not None
    assert ask.outcome.method == "escrow"


def test_free_work_of_a_stranger_is_refused() -> None:
    market = Market(prices=(1_000,))
    seller = market.sellers[0].desk.seller
    assert isinstance(seller, SellerDesk)
    ours = new_firm("ours")
    # He trusts us, as by a list of keys, and cannot prove that he is one of ours.
    seller.firm = lambda: Firm("his", None, ((market.buyer.desk.me, "prey"),))
    market.buying.firm = lambda: ours
    ask = market.ask("a secret", settlements=("none",))  # type: ignore[arg-type]
    market.until(lambda: ask.why)
    assert ask.outcome is None
    assert "task" not in market.kinds()
    # Unless we have put him on our own list.
    mine = ours.with_key(market.sellers[0].desk.me, "his")
    market.buying.firm = lambda: mine
    ask = market.ask("a secret", settlements=("none",))  # type: ignore[arg-type]
    market.until(lambda: ask.outcome is not None)
    assert ask.outcome is not None
    assert ask.outcome.state is State.SETTLED


def test_a_proof_is_good_for_one_agent_one_side_and_one_request() -> None:
    firm = new_firm("home")
    assert firm.code is not None
    same = joined_firm(firm.code.text.lower())
    ann, bob = "0x" + "aa" * 20, "0x" + "bb" * 20
    proof = firm.proof("buyer", "r1", ann)
    assert same.has(ann, proof, side="buyer", request_id="r1")
    assert not same.has(bob, proof, side="buyer", request_id="r1")
    assert not same.has(ann, proof, side="seller", request_id="r1")
    assert not same.has(ann, proof, side="buyer", request_id="r2")
    assert not same.has(ann, "", side="buyer", request_id="r1")
    assert firm.code.text not in repr(firm)


def test_what_no_reader_sees_is_not_paid(market: Streaming) -> None:
    ask = market.buy()
    market.until(lambda: over(ask))
    assert ask.outcome is not None
    terms, words, read = ask.outcome.agreed_terms, "x" * 400, count_input(task("write"))
    seen = stream_units(terms, read, words)
    assert stream_units(terms, read, f"{words}\x1ejunk\n{words * 9}") == seen
    assert stream_units(terms, read, f"\x1ethinking\n{words}") == seen
    assert stream_units(terms, read, "") < seen


def test_what_a_reader_who_died_asked_for_is_not_paid_to_its_end(market: Streaming) -> None:
    ask = market.buy()
    market.until(lambda: market.paid() > 0)
    deal, paid = ask.chosen, market.paid()
    again = market.restart(market.buyer)
    again.desk.abandoned = [deal]
    market.until(lambda: not again.desk.threads)
    market.deliver()
    assert not market.seller.desk.threads
    assert market.paid() <= paid + stream_units_of_a_chunk()


def stream_units_of_a_chunk() -> int:
    return 2 * PART // 4 * RATE // 1_000_000


def task(text: str) -> Task:
    return Task(
        salt=ZERO_BYTES32_TEXT, task=text, withdraw_delay_s=0, channel_salt=ZERO_BYTES32_TEXT
    )


def test_a_task_costs_what_its_texts_are_and_not_how_it_is_written() -> None:
    assert count_input(task('{"prompt": "12345678", "seed": 12345678, "model": ""}')) == 2
    assert (
        count_input(task('{"history":[{"content":"1234"},{"content":"12345"}],"raw":false}')) == 3
    )
    assert count_input(task("no json")) == 2
    assert count_input(task("[" * 100_000)) == 25_000


def test_the_text_of_a_result_is_its_field_of_that_name() -> None:
    assert text_of('{"text": "hi", "model": "m"}') == "hi"
    assert text_of('{"summary": "hi"}') == '{"summary": "hi"}'
    assert text_of("no json") == "no json"
