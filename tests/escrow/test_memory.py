"""The chain in memory: forks leave no trace, faults lose no unit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import anyio
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coase.escrow.backends.memory import (
    RECEIPT_WAIT_MAX_BLOCKS,
    REORG_DEPTH_MAX,
    UINT256_MAX,
    EffectExistsWithOtherCall,
    MemoryChain,
    MemorySettlement,
    seal_for_ever,
)
from coase.escrow.funding import BY_ALLOWANCE, Funding
from coase.escrow.ports import Receipt
from coase.protocol.effects import (
    Answer,
    Call,
    Cancel,
    ClaimRefund,
    Decline,
    Dispute,
    Invalidate,
    Open,
    Poke,
    Rule,
    Settle,
    Submit,
    Withdraw,
)
from coase.protocol.errors import (
    BookOutOfBalance,
    CallReverted,
    ChainUnavailable,
    LocalProtocolError,
)
from coase.protocol.identity import Identity, keccak256
from coase.protocol.terms import Terms, Work, permit_digest, receive_digest
from coase.protocol.types import Asset, Phase

ASSET: Final = Asset(31337, "0x" + "70" * 20)
ESCROW: Final = "0x" + "e5" * 20
KEYS: Final = {
    name: Identity(keccak256(name.encode())) for name in ("buyer", "seller", "arbiter", "stranger")
}
BUYER, SELLER, ARBITER, STRANGER = (key.address for key in KEYS.values())
HASH: Final = keccak256(b"the result")
NOW_S: Final = 1000


def new_chain(*, real: bool = False) -> MemoryChain:
    """Return a chain whose parties have 1000 units each and trust the escrow."""
    options: dict[str, Any] = {} if real else {"verify": lambda digest, signature, signer: True}
    chain = MemoryChain(ASSET, escrow=ESCROW, time_s=NOW_S, **options)
    for key in KEYS.values():
        chain.mint(key.address, 1000, approve=not real)
    return chain


def terms_of(nonce: int, **changes: Any) -> Terms:
    terms = Terms(
        buyer=BUYER,
        seller=SELLER,
        asset=ASSET.token,
        price_units=100,
        work=Work("inference-00000000"),
        lock_by_s=NOW_S + 100,
        deliver_by_s=NOW_S + 200,
        dispute_s=30,
        nonce=nonce,
        arbiter=ARBITER,
        bond_units=10,
        default_to_seller_units=40,
        answer_s=30,
        rule_s=30,
    )
    return replace(terms, **changes)


def opening(chain: MemoryChain, terms: Terms) -> Open:
    return Open(terms, KEYS["seller"].sign(terms.digest(chain.domain)))


def open_deal(chain: MemoryChain, nonce: int = 1) -> tuple[Terms, bytes]:
    terms = terms_of(nonce)
    chain.send(f"open {nonce}", opening(chain, terms), BUYER)
    chain.seal(chain.head().time_s + 1)
    assert chain.job(terms.digest(chain.domain)).phase is Phase.WORKING
    return terms, terms.digest(chain.domain)


# ---------------------------------------------------------------------------------------- blocks


def test_a_block_executes_what_waits_in_its_order() -> None:
    chain = new_chain()
    terms = terms_of(1)
    job_id = terms.digest(chain.domain)
    chain.send("late", Submit(terms, HASH), SELLER)
    chain.send("open", opening(chain, terms), BUYER)
    chain.send("submit", Submit(terms, HASH), SELLER)
    assert chain.pending() == 3
    block = chain.seal(NOW_S + 1)
    refusals = [refusal and refusal.error for _, refusal in block.outcomes]
    assert refusals == ["WrongStatus", None, None]
    assert chain.job(job_id).phase is Phase.DELIVERED
    with pytest.raises(CallReverted, match="WrongStatus"):
        chain.receipt("late", SELLER)
    receipt = chain.receipt("submit", SELLER)
    assert receipt == Receipt(block.outcomes[2][0].tx_hash, 1, NOW_S + 1, 0)
    assert chain.receipt("submit", BUYER) is None
    kinds = [(event.kind, event.log_index) for event in chain.events(0)[0]]
    assert kinds == [("opened", 0), ("submitted", 1)]


def test_time_does_not_go_back() -> None:
    chain = new_chain()
    chain.seal(NOW_S)
    with pytest.raises(LocalProtocolError):
        chain.seal(NOW_S - 1)


def test_a_trial_changes_nothing() -> None:
    chain = new_chain()
    terms = terms_of(1)
    before = picture(chain)
    chain.try_call(opening(chain, terms), BUYER, now_s=NOW_S + 1)
    with pytest.raises(CallReverted, match="BadParties"):
        chain.try_call(opening(chain, terms_of(1, seller=BUYER)), BUYER, now_s=NOW_S + 1)
    assert picture(chain) == before
    assert chain.nonce_used(SELLER, 1) is False


def test_a_refused_call_leaves_nothing_behind() -> None:
    chain = new_chain()
    before = picture(chain)
    chain.send("open", opening(chain, terms_of(1, price_units=1001)), BUYER)
    block = chain.seal(NOW_S)
    assert [refusal and refusal.error for _, refusal in block.outcomes] == [
        "ERC20InsufficientBalance"
    ]
    assert picture(chain) == before | {"head": chain.head()}
    assert chain.nonce_used(SELLER, 1) is False


def test_nonces_are_burnt_one_by_one() -> None:
    chain = new_chain()
    open_deal(chain, 1)
    open_deal(chain, 2)
    chain.send("invalidate", Invalidate(0, 1 << 4), SELLER)
    chain.seal(NOW_S + 5)
    assert [chain.nonce_used(SELLER, nonce) for nonce in range(6)] == [
        *(False, True, True),
        *(False, True, False),
    ]


def test_an_effect_id_is_one_call() -> None:
    chain = new_chain()
    terms = terms_of(1)
    first = chain.send("open", opening(chain, terms), BUYER)
    assert chain.send("open", opening(chain, terms), BUYER) == first
    with pytest.raises(EffectExistsWithOtherCall):
        chain.send("open", opening(chain, terms_of(2)), BUYER)
    assert chain.pending() == 1
    chain.seal(NOW_S + 1)
    assert chain.send("open", opening(chain, terms), BUYER) == first
    assert chain.pending() == 0
    # Ids are the sender's own.
    chain.send("open", Cancel(terms_of(3)), SELLER)
    assert chain.pending() == 1


def test_a_refused_call_may_be_sent_again_under_its_id() -> None:
    chain = new_chain()
    terms, job_id = open_deal(chain)
    first = chain.send("poke", Poke(terms), STRANGER)
    chain.seal(terms.deliver_by_s)
    with pytest.raises(CallReverted, match="TooEarly"):
        chain.receipt("poke", STRANGER)
    second = chain.send("poke", Poke(terms), STRANGER)
    assert second != first
    chain.seal(terms.deliver_by_s + 1)
    assert chain.receipt("poke", STRANGER) is not None
    assert chain.view(job_id).tx_hash == second


def test_views_and_events_at_depth() -> None:
    chain = new_chain()
    terms, job_id = open_deal(chain)
    chain.send("submit", Submit(terms, HASH), SELLER)
    chain.seal(NOW_S + 2)
    seen = [chain.view(job_id, depth).phase for depth in range(4)]
    assert seen == [Phase.DELIVERED, Phase.WORKING, Phase.NONE, Phase.NONE]
    assert [len(chain.events(0, depth)[0]) for depth in range(4)] == [2, 1, 0, 0]
    assert [chain.head(depth).number for depth in range(4)] == [2, 1, 0, 0]
    events, following = chain.events(0, 1)
    assert (events[0].kind, following) == ("opened", 2)
    assert chain.events(2, 1) == ([], 2)
    assert chain.events(7) == ([], 7)


def test_expiry_keeps_the_transaction_that_made_the_phase() -> None:
    chain = new_chain()
    terms, job_id = open_deal(chain)
    opened = chain.view(job_id).tx_hash
    chain.send("refund", ClaimRefund(job_id), STRANGER)
    chain.seal(terms.expires_at_s)
    assert chain.receipt("refund", STRANGER) is not None
    assert chain.view(job_id).tx_hash == opened
    assert chain.view(job_id).phase is Phase.WORKING


# ----------------------------------------------------------------------------------------- forks


def test_a_fork_returns_calls_to_the_front_of_the_queue() -> None:
    chain = new_chain()
    terms, job_id = open_deal(chain)
    chain.send("submit", Submit(terms, HASH), SELLER)
    chain.seal(NOW_S + 2)
    chain.send("settle", Settle(terms, HASH, 100, b"", b""), BUYER)
    assert chain.reorg(2) == []
    assert chain.job(job_id).phase is Phase.NONE
    assert (chain.pending(), chain.head().number) == (3, 0)
    assert chain.receipt("submit", SELLER) is None
    block = chain.seal(NOW_S + 1)
    assert [(t.effect_id, refusal) for t, refusal in block.outcomes] == [
        ("open 1", None),
        ("submit", None),
        ("settle", None),
    ]
    assert chain.job(job_id).phase is Phase.CLOSED
    assert chain.balance(SELLER) == 1100
    chain.check()


def test_a_fork_may_lose_calls_that_are_then_sent_again() -> None:
    chain = new_chain()
    terms, job_id = open_deal(chain)
    first = chain.view(job_id).tx_hash
    dropped = chain.reorg(1, drop=lambda transaction: transaction.caller == BUYER)
    assert [transaction.effect_id for transaction in dropped] == ["open 1"]
    assert chain.pending() == 0
    assert not chain.is_known("open 1", BUYER)
    assert chain.nonce_used(SELLER, 1) is False
    again = chain.send("open 1", opening(chain, terms), BUYER)
    assert again != first
    chain.seal(NOW_S + 5)
    assert chain.job(job_id).phase is Phase.WORKING


def test_what_was_minted_survives_a_fork() -> None:
    chain = new_chain()
    open_deal(chain)
    chain.mint(BUYER, 7)
    chain.mint(ESCROW, 0)
    chain.reorg(1, drop=lambda _: True)
    assert chain.balance(BUYER) == 1007
    assert chain.total() == chain.minted_units == 4007
    chain.check()


def test_forks_have_a_depth() -> None:
    chain = new_chain()
    with pytest.raises(LocalProtocolError):
        chain.reorg(1)
    for number in range(REORG_DEPTH_MAX + 5):
        chain.send(str(number), Invalidate(number, 1), SELLER)
        chain.seal(NOW_S + number)
    with pytest.raises(LocalProtocolError):
        chain.reorg(REORG_DEPTH_MAX)
    chain.reorg(REORG_DEPTH_MAX - 1, drop=lambda _: True)
    assert [chain.nonce_used(SELLER, 256 * word) for word in (5, 6)] == [True, False]


# ---------------------------------------------------------------------------------------- faults


def test_a_lost_call_reaches_no_block() -> None:
    chain = new_chain()
    losses = iter([True, False])
    chain.faults.lose_call = lambda _: next(losses)
    terms = terms_of(1)
    chain.send("open", opening(chain, terms), BUYER)
    assert chain.pending() == 0
    chain.seal(NOW_S + 1)
    assert chain.receipt("open", BUYER) is None
    chain.send("open", opening(chain, terms), BUYER)
    chain.seal(NOW_S + 2)
    assert chain.receipt("open", BUYER) is not None


def test_a_lost_receipt_is_no_lost_call() -> None:
    chain = new_chain()
    answers = iter([True, False])
    chain.faults.lose_receipt = lambda _: next(answers)
    chain.send("invalidate", Invalidate(0, 1), SELLER)
    assert chain.receipt("invalidate", SELLER) is None
    chain.seal(NOW_S + 1)
    with pytest.raises(ChainUnavailable):
        chain.receipt("invalidate", SELLER)
    assert chain.receipt("invalidate", SELLER) is not None


def test_a_blocked_party_is_owed_and_the_others_are_paid() -> None:
    chain = new_chain()
    terms, _ = open_deal(chain)
    chain.send("submit", Submit(terms, HASH), SELLER)
    chain.send("dispute", Dispute(terms, HASH), BUYER)
    chain.send("answer", Answer(terms, HASH), SELLER)
    chain.seal(NOW_S + 2)
    assert chain.held() == 120
    chain.faults.blacklist |= {BUYER, ARBITER}
    chain.send("rule", Rule(terms, 30, 0, HASH), ARBITER)
    chain.seal(NOW_S + 3)
    assert (chain.owed(BUYER), chain.owed(ARBITER), chain.owed(SELLER)) == (77, 10, 0)
    assert (chain.held(), chain.balance(SELLER)) == (87, 1000 - 10 + 33)
    chain.send("withdraw", Withdraw(BUYER), STRANGER)
    chain.seal(NOW_S + 4)
    assert chain.owed(BUYER) == 77
    chain.check()
    chain.faults.blacklist.clear()
    for owner in (BUYER, ARBITER):
        chain.send(f"withdraw {owner}", Withdraw(owner), STRANGER)
    chain.seal(NOW_S + 5)
    assert (chain.held(), chain.owed(BUYER), chain.balance(ARBITER)) == (0, 0, 1010)
    chain.check()


def test_a_unit_from_nowhere_stops_the_chain() -> None:
    chain = new_chain()
    open_deal(chain)
    chain._balances[ESCROW] += 1
    with pytest.raises(BookOutOfBalance):
        chain.check()
    with pytest.raises(BookOutOfBalance):
        chain.seal(NOW_S + 9)


# --------------------------------------------------------------------------------------- funding


def permit(chain: MemoryChain, units: int, *, nonce: int = 0, deadline_s: int = 2000) -> Funding:
    digest = permit_digest(chain.token_domain, BUYER, ESCROW, units, nonce, deadline_s)
    signature = KEYS["buyer"].sign(digest)
    return Funding(1, 0, deadline_s, signature)


def authorization(
    chain: MemoryChain, nonce: bytes, *, units: int = 100, after_s: int = 0, before_s: int = 2000
) -> Funding:
    digest = receive_digest(chain.token_domain, BUYER, ESCROW, units, after_s, before_s, nonce)
    signature = KEYS["buyer"].sign(digest)
    return Funding(2, after_s, before_s, signature)


def refusal_of(chain: MemoryChain, terms: Terms, funding: Funding, *, at_s: int = 1001) -> str:
    try:
        chain.try_call(opening(chain, terms), BUYER, now_s=at_s, funding=funding)
    except CallReverted as error:
        return error.error
    return ""


def test_an_allowance_must_suffice_and_is_used_up() -> None:
    chain = new_chain(real=True)
    terms = terms_of(1)
    assert refusal_of(chain, terms, BY_ALLOWANCE) == "ERC20InsufficientAllowance"
    chain.approve(BUYER, 99)
    assert refusal_of(chain, terms, BY_ALLOWANCE) == "ERC20InsufficientAllowance"
    chain.approve(BUYER, 150)
    chain.send("open", opening(chain, terms), BUYER)
    chain.seal(1001)
    assert chain.allowance(BUYER) == 50
    chain.reorg(1, drop=lambda _: True)
    assert chain.allowance(BUYER) == 150
    chain.approve(BUYER, UINT256_MAX)
    chain.send("open", opening(chain, terms), BUYER)
    chain.seal(1001)
    assert chain.allowance(BUYER) == UINT256_MAX


def test_a_permit_is_for_one_amount_one_nonce_and_some_time() -> None:
    chain = new_chain(real=True)
    terms = terms_of(1)
    missing = "ERC20InsufficientAllowance"
    assert refusal_of(chain, terms, permit(chain, 100)) == ""
    assert refusal_of(chain, terms, permit(chain, 99)) == missing
    assert refusal_of(chain, terms, permit(chain, 100, nonce=1)) == missing
    assert refusal_of(chain, terms, permit(chain, 100, deadline_s=1000)) == missing
    assert refusal_of(chain, terms, permit(chain, 100, deadline_s=1001)) == ""
    # Somebody was faster with the same permit: the allowance is there all the same.
    chain.approve(BUYER, 100)
    assert refusal_of(chain, terms, permit(chain, 100, nonce=7)) == ""
    chain.send("open", opening(chain, terms), BUYER, funding=permit(chain, 100))
    chain.seal(1001)
    assert (chain.permit_nonce(BUYER), chain.allowance(BUYER)) == (1, 0)


def test_an_authorisation_pays_this_deal_and_no_other() -> None:
    chain = new_chain(real=True)
    terms, other = terms_of(1), terms_of(2)
    job_id = terms.digest(chain.domain)
    good = authorization(chain, job_id)
    assert refusal_of(chain, terms, good) == ""
    assert refusal_of(chain, other, good) == "ERC3009InvalidSignature"
    more = authorization(chain, job_id, units=101)
    assert refusal_of(chain, terms, more) == "ERC3009InvalidSignature"
    early = authorization(chain, job_id, after_s=1001)
    assert refusal_of(chain, terms, early) == "ERC3009InvalidAuthorizationTime"
    assert refusal_of(chain, terms, early, at_s=1002) == ""
    late = authorization(chain, job_id, before_s=1001)
    assert refusal_of(chain, terms, late) == "ERC3009InvalidAuthorizationTime"
    assert refusal_of(chain, terms, late, at_s=1000) == ""
    for kind, signature in ((1, b"short"), (2, b"short"), (3, good.signature)):
        assert refusal_of(chain, terms, Funding(kind, 0, 2000, signature)) == "BadFunding"
    all_of_it = terms_of(4, price_units=1000)
    exact = authorization(chain, all_of_it.digest(chain.domain), units=1000)
    assert refusal_of(chain, all_of_it, exact) == ""
    poor = terms_of(3, price_units=1001, bond_units=0)
    paper = authorization(chain, poor.digest(chain.domain), units=1001)
    assert refusal_of(chain, poor, paper) == "ERC20InsufficientBalance"
    chain.send("open", opening(chain, terms), BUYER, funding=good)
    chain.seal(1001)
    # The deal is open and its id is used up; without the deal the paper would still be.
    del chain._history[job_id]
    chain._nonces.clear()
    assert refusal_of(chain, terms, good, at_s=1002) == "ERC3009UsedAuthorization"


def test_a_relayer_carries_every_act() -> None:
    chain = new_chain(real=True)
    terms = terms_of(1, bond_units=0)
    job_id = terms.digest(chain.domain)
    chain.send(
        "open",
        opening(chain, terms),
        STRANGER,
        signature=KEYS["buyer"].sign(job_id),
        funding=authorization(chain, job_id),
    )
    chain.send("forged", Submit(terms, HASH), STRANGER, signature=KEYS["buyer"].sign(job_id))
    block = chain.seal(1001)
    assert [refusal and refusal.error for _, refusal in block.outcomes] == [None, "BadSignature"]
    assert chain.job(job_id).phase is Phase.WORKING


# ------------------------------------------------------------------------------------ settlement


def settlement(chain: MemoryChain, **options: Any) -> MemorySettlement:
    return MemorySettlement(chain, lambda: chain.head().time_s + 1, **options)


@pytest.mark.anyio
async def test_calls_of_many_agents_share_a_block() -> None:
    chain = new_chain(real=True)
    port = settlement(chain)
    receipts: list[Receipt] = []

    async def lock(nonce: int) -> None:
        call = opening(chain, terms_of(nonce))
        receipts.append(await port.perform(str(nonce), call, KEYS["buyer"]))

    async with anyio.create_task_group() as tasks:
        for nonce in range(5):
            tasks.start_soon(lock, nonce)
        await anyio.wait_all_tasks_blocked()
        assert chain.pending() == 5
        chain.seal(NOW_S + 1)
    assert {receipt.block for receipt in receipts} == {1}
    assert chain.held() == 500
    await port.close()


@pytest.mark.anyio
async def test_blocks_come_by_themselves_when_somebody_seals_for_ever() -> None:
    chain = new_chain(real=True)
    port = settlement(chain, seal_at_once=False)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: seal_for_ever(chain, lambda: 0, interval_s=0.001))
        receipt = await port.perform("x", Invalidate(0, 1), KEYS["seller"])
        tasks.cancel_scope.cancel()
    assert receipt.time_s == NOW_S  # The clock lags behind the chain, whose time never goes back.


@pytest.mark.anyio
async def test_a_lost_call_is_told_as_unknown_and_may_be_repeated() -> None:
    chain = new_chain(real=True)
    losses = iter([True, False, True, False])
    chain.faults.lose_call = lambda _: next(losses)
    at_once = settlement(chain, seal_at_once=True)
    with pytest.raises(ChainUnavailable, match="repeat"):
        await at_once.perform("x", Invalidate(0, 1), KEYS["seller"])
    assert (await at_once.perform("x", Invalidate(0, 1), KEYS["seller"])).block == 1

    waiting = settlement(chain)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: seal_for_ever(chain, lambda: 0, interval_s=0.001))
        with pytest.raises(ChainUnavailable):
            await waiting.perform("y", Invalidate(0, 1), KEYS["seller"])
        # One block from the first call, those that the second waited for, and perhaps one more.
        assert 0 <= chain.head().number - 1 - RECEIPT_WAIT_MAX_BLOCKS <= 1
        await waiting.perform("y", Invalidate(0, 1), KEYS["seller"])
        tasks.cancel_scope.cancel()


@pytest.mark.anyio
async def test_a_lost_receipt_is_found_by_repeating() -> None:
    chain = new_chain(real=True)
    losses = iter([True, False])
    chain.faults.lose_receipt = lambda _: next(losses)
    port = settlement(chain, seal_at_once=True)
    terms = terms_of(1)
    with pytest.raises(ChainUnavailable):
        await port.perform("open", opening(chain, terms), KEYS["buyer"])
    await port.perform("open", opening(chain, terms), KEYS["buyer"])
    assert (chain.head().number, chain.held()) == (1, 100)


@pytest.mark.anyio
async def test_a_call_that_loses_the_race_is_refused_in_its_block() -> None:
    chain = new_chain(real=True)
    port = settlement(chain)
    terms = terms_of(1)
    errors: list[str] = []

    async def lock() -> None:
        try:
            await port.perform("open", opening(chain, terms), KEYS["buyer"])
        except CallReverted as error:
            errors.append(error.error)

    async with anyio.create_task_group() as tasks:
        chain.send("cancel", Cancel(terms), SELLER)
        tasks.start_soon(lock)
        await anyio.wait_all_tasks_blocked()
        assert chain.pending() == 2
        chain.seal(NOW_S + 1)
    assert errors == ["JobExists"]
    assert chain.balance(BUYER) == 1000


@pytest.mark.anyio
async def test_closed_settlements_leave_the_chain_alone() -> None:
    chain = new_chain()
    port = settlement(chain)
    assert len(chain.listeners) == 1
    await port.close()
    await port.close()
    assert chain.listeners == []


# --------------------------------------------------------------------------------- any of it all


def picture(chain: MemoryChain) -> dict[str, Any]:
    """Return everything that a chain knows, in a form that can be compared."""
    return {
        "balances": {owner: units for owner, units in chain._balances.items() if units},
        "owed": {owner: units for owner, units in chain._owed.items() if units},
        "nonces": {key: word for key, word in chain._nonces.items() if word},
        "totals": dict(chain._totals),
        "jobs": {key: list(entries) for key, entries in chain._history.items() if entries},
        "events": list(chain._events),
        "head": chain.head(),
    }


class ForkingChain(RuleBasedStateMachine):
    """Any calls by anybody, blocks, forks and blocked receivers."""

    nonces = st.integers(0, 3)
    roles = st.sampled_from(list(KEYS))
    kinds = st.sampled_from(
        [Open, Submit, Settle, Decline, Dispute, Answer, Rule, Poke, ClaimRefund, Cancel, Withdraw]
    )

    @initialize()
    def start(self) -> None:
        self.chain = new_chain()
        self.sent = 0
        self.pictures = [picture(self.chain)]
        self.opened: set[int] = set()

    @staticmethod
    def terms(nonce: int) -> Terms:
        return terms_of(nonce, bond_units=10 * (nonce % 2))

    @rule(kind=kinds, nonce=nonces, role=roles, share=st.integers(0, 100))
    def send(self, kind: type, nonce: int, role: str, share: int) -> None:
        terms = self.terms(nonce)
        calls: dict[type, Call] = {
            Open: Open(terms, b"trusted"),
            Submit: Submit(terms, HASH),
            Settle: Settle(terms, HASH, share, b"", b""),
            Decline: Decline(terms),
            Dispute: Dispute(terms, HASH),
            Answer: Answer(terms, HASH),
            Rule: Rule(terms, share, 0, HASH),
            Poke: Poke(terms),
            ClaimRefund: ClaimRefund(terms.digest(self.chain.domain)),
            Cancel: Cancel(terms),
            Withdraw: Withdraw(KEYS[role].address),
        }
        self.sent += 1
        self.chain.send(f"effect {self.sent}", calls[kind], KEYS[role].address)

    @rule(wait_s=st.sampled_from([0, 1, 20, 31, 200]))
    def seal(self, wait_s: int) -> None:
        self.chain.seal(self.chain.head().time_s + wait_s)
        self.pictures.append(picture(self.chain))

    @precondition(lambda self: len(self.pictures) > 1)
    @rule(depth=st.integers(1, 6), drop=st.sampled_from(["all", "none", "buyer"]))
    def fork(self, depth: int, drop: str) -> None:
        depth = min(depth, len(self.pictures) - 1)
        chooses = {
            "all": lambda t: True,
            "none": lambda t: False,
            "buyer": lambda t: t.caller == BUYER,
        }
        self.chain.reorg(depth, drop=chooses[drop])
        del self.pictures[-depth:]
        # What was undone left no trace.
        assert picture(self.chain) == self.pictures[-1]

    @rule(role=roles)
    def block_or_free(self, role: str) -> None:
        self.chain.faults.blacklist ^= {KEYS[role].address}

    @invariant()
    def every_unit_is_somewhere(self) -> None:
        self.chain.check()

    def teardown(self) -> None:
        """However it went, anybody can bring every deal to its end and empty the escrow."""
        chain = self.chain
        chain.faults.blacklist.clear()
        chain.seal(chain.head().time_s)
        end_s = max(chain.head().time_s, terms_of(0).expires_at_s)
        for nonce in range(4):
            chain.send(f"end {nonce}", Poke(self.terms(nonce)), STRANGER)
        for key in KEYS.values():
            chain.send(f"pay {key.address}", Withdraw(key.address), STRANGER)
        chain.seal(end_s)
        assert chain.held() == 0
        assert chain.balance(STRANGER) == 1000
        assert chain.balance(ARBITER) >= 1000
        chain.check()


TestForkingChain = ForkingChain.TestCase
TestForkingChain.settings = settings(max_examples=60, stateful_step_count=40)
