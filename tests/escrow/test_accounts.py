"""The rules of both ends of a channel, each against the attack that it is for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coase.escrow.accounts import (
    BuyerChannel,
    BuyerLimits,
    BuyerRecord,
    ChannelStopped,
    ExposureExceeded,
    Fault,
    SellerChannel,
    SellerPolicy,
    SellerRecord,
    ViewTooOld,
    VoucherRefused,
    decode_record,
    encode_record,
    require_final,
)
from coase.escrow.voucher import (
    ChannelConfig,
    ChannelView,
    Voucher,
    channels_domain,
    voucher_digest,
)
from coase.protocol.errors import BudgetExhausted, LocalProtocolError
from coase.protocol.identity import Identity, keccak256
from coase.protocol.terms import Terms, Work
from coase.protocol.types import ZERO_ADDRESS

BUYER, SELLER, OTHER = (Identity(keccak256(name)) for name in (b"b", b"s", b"o"))
TOKEN = "0x" + "70" * 20
DOMAIN = channels_domain(31337)
DELAY_S = 900
NOW_S = 1_800_000_000
CONFIG = ChannelConfig(BUYER.address, BUYER.address, SELLER.address, SELLER.address, TOKEN, DELAY_S)
VIEW = ChannelView(balance_units=100, time_s=NOW_S)
POLICY = SellerPolicy(
    tokens=frozenset((TOKEN,)),
    chunk_max_units=10,
    exposure_max_units=25,
    withdraw_delay_min_s=DELAY_S,
)
LIMITS = BuyerLimits(deposit_max_units=150, chunk_max_units=10, exposure_max_units=25)


def voucher(units: int, who: Identity = BUYER, config: ChannelConfig = CONFIG) -> Voucher:
    channel_id = config.channel_id(DOMAIN)
    return Voucher(channel_id, units, who.sign(voucher_digest(DOMAIN, channel_id, units)))


def seller_of(
    config: ChannelConfig = CONFIG, view: ChannelView | None = VIEW, **changes: Any
) -> SellerChannel:
    policy = replace(POLICY, **changes)
    seller = SellerChannel.accept(config, DOMAIN, policy, seller=SELLER.address)
    return seller if view is None else seller.see(view)


def buyer_of(view: ChannelView = VIEW, **changes: Any) -> BuyerChannel:
    return BuyerChannel.open(CONFIG, DOMAIN, replace(LIMITS, **changes), view)[0]


def taken(seller: SellerChannel, units: int, *, pays: int, deal: str = "deal") -> SellerChannel:
    return seller.take(voucher(units), deal_id=deal, units=pays, now_s=NOW_S)[0]


def refused(seller: SellerChannel, one: Voucher, *, pays: int = 10, now_s: int = NOW_S) -> Fault:
    with pytest.raises(VoucherRefused) as raised:
        seller.take(one, deal_id="deal", units=pays, now_s=now_s)
    return raised.value.fault


# ---- 1: a withdrawal that is armed


def test_no_voucher_is_good_while_a_withdrawal_is_pending() -> None:
    armed = replace(VIEW, withdrawing_units=1, withdraw_since_s=NOW_S - 10 * DELAY_S)
    assert refused(seller_of(view=armed), voucher(10)) is Fault.WITHDRAWAL_PENDING
    with pytest.raises(VoucherRefused) as raised:
        seller_of(view=armed).send(deal_id="deal", units=1, now_s=NOW_S)
    assert raised.value.fault is Fault.WITHDRAWAL_PENDING


def test_a_view_is_good_for_a_third_of_the_delay() -> None:
    seller, last_s = seller_of(), NOW_S + DELAY_S // 3
    for now_s in (NOW_S, last_s):
        seller.take(voucher(10), deal_id="deal", units=10, now_s=now_s)
        seller.send(deal_id="deal", units=10, now_s=now_s)
    with pytest.raises(ViewTooOld) as raised:
        seller.take(voucher(10), deal_id="deal", units=10, now_s=last_s + 1)
    assert raised.value.age_s == DELAY_S // 3 + 1
    with pytest.raises(ViewTooOld):
        seller.send(deal_id="deal", units=10, now_s=last_s + 1)


def test_the_chain_is_asked_at_first_after_a_restart_and_after_a_top_up() -> None:
    first = seller_of(view=None)
    again = SellerChannel.accept(CONFIG, DOMAIN, POLICY, seller=SELLER.address, records=())
    for seller in (first, again, seller_of().forget_view()):
        with pytest.raises(ViewTooOld) as raised:
            seller.take(voucher(10), deal_id="deal", units=10, now_s=NOW_S)
        assert raised.value.age_s is None


def test_a_voucher_reaches_no_higher_than_the_balance() -> None:
    assert refused(seller_of(), voucher(101)) is Fault.ABOVE_BALANCE
    assert taken(seller_of(), 100, pays=10).secured_units == 100


# ---- 2: withdraw and run


def test_a_seller_looks_six_times_in_a_delay() -> None:
    assert seller_of().poll_every_s == DELAY_S // 6
    assert seller_of().claim is None
    assert taken(seller_of(view=VIEW), 30, pays=10).claim is not None


def test_what_can_be_claimed_is_never_more_than_is_there() -> None:
    seller = taken(seller_of(), 60, pays=10)
    claim = seller.see(replace(VIEW, balance_units=40)).claim
    assert claim is not None
    assert claim.units == 40
    assert seller.see(replace(VIEW, claimed_units=60)).claim is None
    assert seller.forget_view().claim is None


# ---- 4 and 5: whose keys


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"receiver": OTHER.address}, Fault.OTHER_RECEIVER),
        ({"receiver_authorizer": OTHER.address}, Fault.FOREIGN_AUTHORIZER),
        ({"payer_authorizer": ZERO_ADDRESS}, Fault.REVOCABLE_SIGNATURE),
        ({"token": "0x" + "71" * 20}, Fault.OTHER_ASSET),
        ({"withdraw_delay_s": DELAY_S - 1}, Fault.WITHDRAW_DELAY),
        ({"withdraw_delay_s": 30 * 86400 + 1}, Fault.WITHDRAW_DELAY),
    ],
)
def test_channels_that_a_seller_does_not_take(changes: dict[str, Any], fault: Fault) -> None:
    with pytest.raises(VoucherRefused) as raised:
        seller_of(replace(CONFIG, **changes))
    assert raised.value.fault is fault


def test_a_seller_on_a_public_chain_asks_for_a_day() -> None:
    public = SellerPolicy(tokens=POLICY.tokens, chunk_max_units=1, exposure_max_units=1)
    with pytest.raises(VoucherRefused):
        SellerChannel.accept(CONFIG, DOMAIN, public, seller=SELLER.address)
    slow = replace(CONFIG, withdraw_delay_s=86_400)
    SellerChannel.accept(slow, DOMAIN, public, seller=SELLER.address)


def test_vouchers_are_signed_by_the_named_key_and_by_plain_ecdsa() -> None:
    seller = seller_of()
    assert refused(seller, voucher(10, OTHER)) is Fault.BAD_SIGNATURE
    assert refused(seller, replace(voucher(10), units=11)) is Fault.BAD_SIGNATURE
    assert refused(seller, replace(voucher(10), signature=b"\x01" * 64)) is Fault.BAD_SIGNATURE
    foreign = voucher(10, config=replace(CONFIG, salt=b"\1" * 32))
    assert refused(seller, foreign) is Fault.OTHER_CHANNEL


# ---- 6: the signing key is stolen


def test_a_deposit_keeps_to_the_limit_for_one_seller() -> None:
    buyer = buyer_of()  # 100 are in it.
    buyer.check_deposit(50)
    for units in (51, 0, -1):
        with pytest.raises(BudgetExhausted):
            buyer.check_deposit(units)
    spent = buyer_of(replace(VIEW, balance_units=200, claimed_units=120))
    assert spent.stopped  # See below; what is claimed is no longer at risk.
    replace(spent, stopped="").check_deposit(70)


def test_claims_that_this_side_never_signed_stop_it() -> None:
    buyer, records = buyer_of().see(replace(VIEW, claimed_units=1))
    assert "claimed" in buyer.stopped
    assert len(records) == 1
    with pytest.raises(ChannelStopped):
        buyer.promise(deal_id="deal", units=1)
    with pytest.raises(ChannelStopped):
        buyer.check_deposit(1)


# ---- 7: the seller takes more, or does not give back


def test_a_seller_who_refunds_in_mid_stream_gets_no_more_vouchers() -> None:
    buyer, _ = buyer_of().see(replace(VIEW, balance_units=50, refund_nonce=1))
    assert buyer.stopped == "the seller refunded"


def test_a_buyer_who_stops_asks_for_what_he_has_not_signed() -> None:
    buyer, _ = buyer_of().promise(deal_id="deal", units=10)
    buyer, records = buyer.stop("too slow")
    assert buyer.stop("again") == (buyer, ())
    assert len(records) == 1
    assert buyer.rest_units == 90
    assert buyer.sign(BUYER).units == 10  # What was promised is signed again.


def test_a_seller_gives_back_only_what_no_voucher_covers() -> None:
    seller = taken(seller_of(), 30, pays=30)
    assert seller.refundable_units == 0  # In mid-stream.
    seller, _ = seller.end("deal")
    assert seller.refundable_units == 70
    assert seller.forget_view().refundable_units == 0


# ---- 8: lost state


def story() -> tuple[list[SellerRecord], SellerChannel, list[BuyerRecord], BuyerChannel]:
    """Three chunks, the last one not paid yet, with all records as a journal keeps them."""
    sold: list[SellerRecord] = []
    buyer, bought = BuyerChannel.open(CONFIG, DOMAIN, LIMITS, VIEW)
    seller, paid = seller_of(), list(bought)
    for number in range(3):
        seller, more = seller.send(deal_id="deal", units=7, now_s=NOW_S)
        sold += more
        if number == 2:
            break
        buyer, news = buyer.check(deal_id="deal", units=7)
        paid += news
        buyer, news = buyer.promise(deal_id="deal", units=7)
        paid += news
        seller, more = seller.take(buyer.sign(BUYER), deal_id="deal", units=7, now_s=NOW_S)
        sold += more
    return sold, seller, paid, buyer


def test_records_survive_the_journal() -> None:
    sold, _, paid, _ = story()
    records = [*sold, *paid]
    assert [decode_record(encode_record(one)) for one in records] == records
    for bad in (b"[]", b'{"kind":"Nothing"}', b'{"kind":"ChunkSent","deal_id":"x"}', b"{"):
        with pytest.raises(ValueError, match=r".*"):
            decode_record(bad)


def test_a_restart_loses_nothing_but_the_view() -> None:
    sold, seller, paid, buyer = story()
    again = SellerChannel.accept(CONFIG, DOMAIN, POLICY, seller=SELLER.address, records=sold)
    assert again == seller.forget_view()
    assert (again.exposed_units, again.secured_units) == (7, 14)
    assert BuyerChannel.replay(CONFIG, DOMAIN, LIMITS, paid) == replace(buyer, view=None)
    with pytest.raises(ExposureExceeded):  # The third chunk is not sent twice for one voucher.
        again.see(VIEW).send(deal_id="deal", units=7, now_s=NOW_S)


def test_a_crash_between_journal_and_voucher_signs_the_same_total() -> None:
    _, _, paid, buyer = story()
    before = buyer.sign(BUYER)
    again = BuyerChannel.replay(CONFIG, DOMAIN, LIMITS, paid)
    assert again.sign(BUYER) == before
    with pytest.raises(ViewTooOld):
        again.promise(deal_id="deal", units=1)


def test_a_voucher_that_comes_twice_is_booked_once() -> None:
    seller = taken(seller_of(), 10, pays=10)
    assert seller.take(voucher(10), deal_id="deal", units=10, now_s=NOW_S) == (seller, ())
    assert refused(seller, voucher(9)) is Fault.NOT_ABOVE_LAST
    assert refused(seller, replace(voucher(10), signature=b"\1" * 65)) is Fault.NOT_ABOVE_LAST


def test_a_buyer_believes_no_total_without_his_own_signature() -> None:
    buyer, _ = BuyerChannel.after_loss(CONFIG, DOMAIN, LIMITS, replace(VIEW, claimed_units=20))
    assert (buyer.signed_units, buyer.stopped) == (20, "")
    for forged in (voucher(25, SELLER), replace(voucher(25), units=26)):
        with pytest.raises(VoucherRefused):
            buyer.recover(forged)
    with pytest.raises(VoucherRefused):
        buyer.recover(voucher(25, config=replace(CONFIG, salt=b"\1" * 32)))
    with pytest.raises(ExposureExceeded):
        buyer.recover(voucher(31))
    assert buyer.recover(voucher(20)) == (buyer, ())
    buyer, records = buyer.recover(voucher(30))
    assert buyer.signed_units == 30
    assert BuyerChannel.replay(CONFIG, DOMAIN, LIMITS, records).signed_units == 30


def test_a_seller_who_lost_his_journal_does_not_deliver_twice_for_old_money() -> None:
    seller = taken(seller_of(), 80, pays=5)  # The buyer's total; this seller knows nothing of it.
    assert seller.secured_units == 80
    assert seller.streams["deal"].paid_units == 5
    seller, _ = seller.send(deal_id="deal", units=5, now_s=NOW_S)
    assert seller.exposed_units == 0


# ---- 9: several streams


def test_streams_share_one_sequence_and_one_limit() -> None:
    seller = seller_of()
    for deal in ("a", "b"):
        seller, _ = seller.send(deal_id=deal, units=10, now_s=NOW_S)
    with pytest.raises(ExposureExceeded):
        seller.send(deal_id="c", units=6, now_s=NOW_S)
    seller, _ = seller.send(deal_id="c", units=5, now_s=NOW_S)
    assert seller.exposed_units == 25
    seller = taken(seller, 10, pays=10, deal="b")
    with pytest.raises(ExposureExceeded):
        seller.send(deal_id="a", units=1, now_s=NOW_S)
    assert refused(seller, voucher(19), pays=10) is Fault.TOO_LITTLE
    seller = taken(seller, 20, pays=10, deal="a")
    seller, _ = seller.send(deal_id="a", units=10, now_s=NOW_S)
    assert (seller.exposed_units, seller.secured_units) == (15, 20)


def test_a_buyer_is_one_chunk_ahead_of_what_he_checked() -> None:
    buyer, _ = buyer_of().promise(deal_id="a", units=10)
    with pytest.raises(ExposureExceeded):
        buyer.promise(deal_id="a", units=1)
    buyer, _ = buyer.promise(deal_id="b", units=10)
    with pytest.raises(ExposureExceeded):
        buyer.promise(deal_id="c", units=6)
    buyer, _ = buyer.check(deal_id="a", units=10)
    buyer, _ = buyer.promise(deal_id="a", units=10)
    assert (buyer.exposed_units, buyer.signed_units) == (20, 30)
    buyer, _ = buyer.end("b")
    assert buyer.end("b") == (buyer, ())
    assert (buyer.exposed_units, buyer.arrears_units) == (20, 10)  # What was paid never came.
    with pytest.raises(ExposureExceeded):
        buyer.promise(deal_id="c", units=6)


def test_nobody_gets_a_chunk_for_nothing_in_stream_after_stream() -> None:
    seller = seller_of()
    records: list[SellerRecord] = []
    for deal, units in (("a", 10), ("b", 10), ("c", 5)):
        seller, more = seller.send(deal_id=deal, units=units, now_s=NOW_S)
        seller, ended = seller.end(deal)
        records += [*more, *ended]
    assert (seller.exposed_units, seller.arrears_units) == (25, 25)
    with pytest.raises(ExposureExceeded):
        seller.send(deal_id="d", units=1, now_s=NOW_S)
    again = SellerChannel.accept(CONFIG, DOMAIN, POLICY, seller=SELLER.address, records=records)
    assert again.see(VIEW) == seller
    seller = taken(seller, 10, pays=10, deal="d")  # The first voucher: its base is not known.
    seller = taken(seller, 35, pays=10, deal="d")
    assert (seller.arrears_units, seller.exposed_units) == (10, 10)
    seller, _ = seller.send(deal_id="d", units=10, now_s=NOW_S)
    seller = taken(seller, 45, pays=0, deal="for the arrears alone")
    assert (seller.arrears_units, list(seller.streams)) == (0, ["d"])


def test_terms_for_a_channel_wait_for_nobody() -> None:
    plain = Terms(BUYER.address, SELLER.address, TOKEN, 100, Work("echo-00000000"), 1, 2, 3, 4)
    require_final(plain)
    wrong: tuple[dict[str, Any], ...] = (
        {"arbiter": OTHER.address},
        {"bond_units": 1},
        {"stake_units": 1},
        {"default_to_seller_units": 1},
    )
    for changes in wrong:
        with pytest.raises(LocalProtocolError):
            require_final(replace(plain, **changes))


def test_neither_side_goes_beyond_what_the_channel_holds() -> None:
    small = replace(VIEW, balance_units=12)
    with pytest.raises(VoucherRefused) as raised:
        taken(seller_of(view=small), 10, pays=10, deal="x").send(
            deal_id="deal", units=5, now_s=NOW_S
        )
    assert raised.value.fault is Fault.ABOVE_BALANCE
    buyer, _ = buyer_of(small).promise(deal_id="deal", units=10)
    buyer, _ = buyer.check(deal_id="deal", units=10)
    with pytest.raises(BudgetExhausted):
        buyer.promise(deal_id="deal", units=3)


def test_chunks_have_a_price_within_the_limit() -> None:
    for units in (0, -1, 11):
        with pytest.raises(ExposureExceeded):
            seller_of().send(deal_id="deal", units=units, now_s=NOW_S)
    for units in (0, 11):
        with pytest.raises(ExposureExceeded):
            buyer_of().promise(deal_id="deal", units=units)


def test_only_the_named_key_signs() -> None:
    with pytest.raises(LocalProtocolError):
        buyer_of().sign(OTHER)


moves = st.lists(
    st.tuples(
        st.sampled_from(("send", "pay", "check", "end")),
        st.sampled_from("abc"),
        st.integers(-1, 12),
    ),
    max_size=60,
)


@given(moves)
def test_whatever_the_other_side_does_a_chunk_or_the_limit_is_at_risk(
    story: list[tuple[str, str, int]],
) -> None:
    """Both sides act at random and honest ones refuse: what was given and not got is bounded."""
    seller, buyer = seller_of(), buyer_of()
    sent: dict[str, int] = {}
    total = 0
    for move, deal, units in story:
        try:
            if move == "send":
                seller, _ = seller.send(deal_id=deal, units=units, now_s=NOW_S)
                sent[deal], total = sent.get(deal, 0) + units, total + units
            elif move == "pay":
                buyer, _ = buyer.promise(deal_id=deal, units=units)
                seller, _ = seller.take(buyer.sign(BUYER), deal_id=deal, units=units, now_s=NOW_S)
            elif move == "check":
                good = min(units, sent.get(deal, 0) - checked(buyer, deal))
                buyer, _ = buyer.check(deal_id=deal, units=max(0, good))
            else:
                seller, buyer = seller.end(deal)[0], buyer.end(deal)[0]
                sent.pop(deal, None)
        except (LocalProtocolError, BudgetExhausted, VoucherRefused):
            continue
        assert buyer.signed_units == seller.secured_units
        assert seller.exposed_units <= POLICY.exposure_max_units
        assert buyer.exposed_units <= LIMITS.exposure_max_units
        assert total - seller.secured_units <= POLICY.exposure_max_units
        assert buyer.signed_units - total <= LIMITS.exposure_max_units
        for name in sent:
            paid = seller.streams[name].paid_units
            assert sent[name] - paid <= POLICY.chunk_max_units
            assert paid - checked(buyer, name) <= LIMITS.chunk_max_units


def checked(buyer: BuyerChannel, deal: str) -> int:
    stream = buyer.streams.get(deal)
    return stream.work_units if stream is not None else 0


def test_vouchers_that_overtake_each_other_pay_each_for_its_own_deal() -> None:
    seller = seller_of()
    records: list[SellerRecord] = []
    for deal in ("a", "b"):
        seller, more = seller.send(deal_id=deal, units=10, now_s=NOW_S)
        records += more
    late, early = voucher(10), voucher(20)  # Signed for a, then for b.
    seller, more = seller.take(early, deal_id="b", units=10, now_s=NOW_S)
    records += more
    assert (seller.secured_units, seller.unbooked_units) == (20, 10)
    assert refused(seller, late, pays=11) is Fault.NOT_ABOVE_LAST
    assert refused(seller, voucher(10, OTHER)) is Fault.BAD_SIGNATURE
    seller, more = seller.take(late, deal_id="a", units=10, now_s=NOW_S)
    records += more
    assert (seller.secured_units, seller.unbooked_units, seller.exposed_units) == (20, 0, 0)
    assert seller.voucher == early
    assert refused(seller, late) is Fault.NOT_ABOVE_LAST  # Not for a third deal as well.
    assert [decode_record(encode_record(one)) for one in records] == records
    again = SellerChannel.accept(CONFIG, DOMAIN, POLICY, seller=SELLER.address, records=records)
    assert again.see(VIEW) == seller


def test_what_pays_arrears_may_turn_out_to_be_meant_for_another_deal() -> None:
    seller = taken(seller_of(), 5, pays=5, deal="z")
    seller, _ = seller.send(deal_id="left", units=10, now_s=NOW_S)
    seller, _ = seller.end("left")
    seller, _ = seller.send(deal_id="a", units=10, now_s=NOW_S)
    seller = taken(seller, 25, pays=10, deal="b")
    assert (seller.arrears_units, seller.exposed_units) == (0, 10)
    seller = taken(seller, 15, pays=10, deal="a")
    assert (seller.arrears_units, seller.exposed_units) == (10, 10)


def test_old_money_pays_no_more_than_what_is_open_at_the_first_voucher() -> None:
    seller, _ = seller_of().send(deal_id="a", units=4, now_s=NOW_S)
    seller = taken(seller, 80, pays=5, deal="b")
    assert seller.unbooked_units == 4
    assert refused(seller, voucher(70), pays=5) is Fault.NOT_ABOVE_LAST
