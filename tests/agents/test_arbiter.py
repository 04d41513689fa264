"""The arbiter decides by what both signed, whoever shows it, and is not to be kept from it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from coase.agents import arbiter as court
from coase.agents.arbiter import Arbiter, Case, judge_evidence, worth_units
from coase.escrow.backends.memory import MemoryChain, MemorySettlement
from coase.escrow.ports import ChainEvent
from coase.protocol.identity import Identity, keccak256
from coase.protocol.messages import Evidence, commitment, schemas_hash, terms_to_wire
from coase.protocol.types import Asset
from tests.protocol.threads import BUYER, DOMAIN, SALT, SELLER, TASK, TERMS

if TYPE_CHECKING:
    from coase.protocol.terms import Terms

RULER = Identity(keccak256(b"ruler"))
OUTPUT = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
RESULT = '{"text":"HELLO"}'
ENDLESS = {"type": "object", "properties": {"text": {"type": "string", "pattern": "^(a+)+$"}}}


def terms_of(output: dict[str, Any], **changes: Any) -> Terms:
    work = replace(TERMS.work, schemas=schemas_hash({"type": "object"}, output))
    return replace(TERMS, work=work, arbiter=RULER.address, **changes)


def shown(terms: Terms, result: str = RESULT, **changes: Any) -> Evidence:
    body = {
        "terms": terms_to_wire(terms),
        "task_salt": "0x" + SALT.hex(),
        "task": TASK,
        "result_salt": "0x" + SALT.hex(),
        "result": result,
        "input_schema": '{"type":"object"}',
        "output_schema": json.dumps(OUTPUT),
        "claim": "",
    }
    return Evidence.model_validate({**body, **changes})


def hash_of(result: str) -> bytes:
    return commitment(SALT, result.encode())


@pytest.fixture
def arbiter() -> Arbiter:
    chain = MemoryChain(Asset(DOMAIN.chain_id, TERMS.asset), escrow=DOMAIN.contract, time_s=1)
    return Arbiter(RULER, MemorySettlement(chain, lambda: 1))


# ---- What counts -----------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize(
    "lie",
    [
        {"input_schema": "{}", "output_schema": "{}"},
        {"output_schema": "no JSON"},
        {"output_schema": json.dumps(ENDLESS)},
        {"result": '{"text": 5}'},
        {"result_salt": "0x" + "00" * 32},
    ],
)
@pytest.mark.parametrize("first", [True, False])
async def test_a_lie_is_as_if_nothing_had_been_shown(lie: dict[str, str], first: bool) -> None:
    terms = terms_of(OUTPUT)
    evidence = [shown(terms, **lie), shown(terms)]
    finding = await judge_evidence(terms, hash_of(RESULT), evidence if first else evidence[::-1])
    assert finding.to_seller_units == terms.price_units


@pytest.mark.anyio
async def test_who_made_the_result_has_to_show_it() -> None:
    terms = terms_of(OUTPUT)
    for evidence in ([], [shown(terms, output_schema="{}")], [shown(terms, '{"text":"other"}')]):
        assert (await judge_evidence(terms, hash_of(RESULT), evidence)).to_seller_units == 0


@pytest.mark.anyio
async def test_what_does_not_fit_is_not_paid() -> None:
    terms = terms_of(OUTPUT)
    finding = await judge_evidence(terms, hash_of('{"text":5}'), [shown(terms, '{"text":5}')])
    assert finding.to_seller_units == 0
    assert "does not fit" in finding.why


def metered(given: object, written: object) -> str:
    return json.dumps({"text": "no", "input_tokens": given, "output_tokens": written})


@pytest.mark.parametrize(
    ("given", "written", "units"),
    [
        (10, 5, 2 * 10 + 8 * 5),
        (10**9, 5, 2 * 100 + 8 * 5),  # No more than the terms meter,
        (10, 10**9, 2 * 10 + 8 * (len(metered(10, 10**9)) + 16)),  # nor than there are bytes.
    ],
)
def test_tokens_are_paid_as_the_result_counts_them_and_as_there_can_be(
    given: int, written: int, units: int
) -> None:
    work = replace(
        TERMS.work,
        pricing="tokens",
        input_price_units=2_000_000,
        output_price_units=8_000_000,
        input_max=100,
        output_max=1_000,
    )
    result = metered(given, written)
    assert worth_units(replace(TERMS, price_units=10_000, work=work), result) == units


@pytest.mark.parametrize("result", ["7", "{}", metered("1", 1), metered(-1, 1), "no JSON"])
def test_what_counts_no_tokens_costs_its_price(result: str) -> None:
    work = replace(TERMS.work, pricing="tokens", input_max=100, output_max=100)
    assert worth_units(replace(TERMS, work=work), result) == TERMS.price_units
    assert worth_units(TERMS, metered(1, 1)) == TERMS.price_units


# ---- What is taken ---------------------------------------------------------------------------


def told(kind: str, terms: Terms, time_s: int = 10) -> ChainEvent:
    return ChainEvent(kind, terms.digest(DOMAIN), 1, 0, time_s, "0x")


def test_cases_are_those_of_the_chain(arbiter: Arbiter) -> None:
    terms = terms_of(OUTPUT)
    assert arbiter.take(BUYER.address, shown(terms)) == ""
    assert arbiter.cases == {}
    arbiter._see(told("disputed", terms))
    assert arbiter.take(Identity(keccak256(b"eve")).address, shown(terms)) == ""
    assert arbiter.take(BUYER.address, shown(terms)) == terms.digest(DOMAIN).hex()
    for number in range(50):
        # Made-up terms cost nobody anything, and push nobody out.
        assert arbiter.take(BUYER.address, shown(replace(terms, nonce=10**6 + number))) == ""
    assert len(arbiter.cases) == 1


def test_a_case_that_is_over_is_forgotten_and_its_evidence_with_it() -> None:
    over: list[str] = []
    chain = MemoryChain(Asset(DOMAIN.chain_id, TERMS.asset), escrow=DOMAIN.contract, time_s=1)
    arbiter = Arbiter(RULER, MemorySettlement(chain, lambda: 1), forget=over.append)
    terms = terms_of(OUTPUT)
    arbiter.recall(SELLER.address, shown(terms))  # Of an earlier life: the journal keeps it.
    assert len(arbiter.cases) == 1
    arbiter._see(told("settled", terms))
    assert arbiter.cases == {}
    assert over == [terms.digest(DOMAIN).hex()]


def test_quarrels_of_one_pair_wait_for_each_other_and_the_urgent_come_first(
    arbiter: Arbiter,
) -> None:
    def case(nonce: int, buyer: Identity, answered_s: int) -> Case:
        terms = replace(terms_of(OUTPUT), nonce=nonce, buyer=buyer.address)
        arbiter._see(told("answered", terms, answered_s))
        for side in (terms.buyer, terms.seller):
            assert arbiter.take(side, shown(terms))
        return arbiter.cases[terms.digest(DOMAIN)]

    mallory, others = BUYER, [Identity(keccak256(bytes((n,)))) for n in range(6)]
    quarrels = [case(number, mallory, 10) for number in range(8)]
    honest = [case(100 + number, who, 20 - number) for number, who in enumerate(others)]
    due = arbiter._due(30)
    assert len(due) == court.RULINGS_AT_ONCE
    assert due == [quarrels[0], honest[5], honest[4], honest[3]]
    for one in due:
        arbiter._pairs.add(court._pair(one))
        one.busy = True
    assert arbiter._due(30) == []


def test_who_was_down_gets_a_third_of_the_time(arbiter: Arbiter) -> None:
    terms = replace(terms_of(OUTPUT), rule_s=60)
    arbiter._see(told("answered", terms, 100))
    assert arbiter.take(BUYER.address, shown(terms))
    assert arbiter._due(119) == []
    assert len(arbiter._due(120)) == 1
    assert arbiter.take(SELLER.address, shown(terms))
    assert len(arbiter._due(101)) == 1


def test_the_key_for_evidence_outlives_the_process() -> None:
    assert RULER.subkey("inbox") == Identity(keccak256(b"ruler")).subkey("inbox")
    assert RULER.subkey("inbox") != RULER.subkey("other")
    assert RULER.subkey("inbox") != RULER.secret_for_keystore()
