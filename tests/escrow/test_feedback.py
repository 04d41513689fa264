"""What makes an entry count, one reason after the other, and what it then weighs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from eth_account.messages import _hash_eip191_message, encode_typed_data
from hypothesis import given
from hypothesis import strategies as st

from coase.escrow.feedback import (
    FILE_SIZE_MAX_BYTES,
    AgentRecord,
    BadFeedbackFile,
    Counted,
    FeedbackEntry,
    FeedbackFile,
    Flaw,
    PaymentLog,
    PaymentProof,
    Reader,
    Scale,
    data_uri,
    first_uses,
    from_data_uri,
    rating_permille,
    read_entry,
    registration_file,
    registry_domain,
    registry_name,
    wallet_digest,
    weigh,
    weight,
)
from coase.escrow.voucher import CHANNELS, ChannelConfig, channels_domain
from coase.protocol.identity import keccak256
from coase.protocol.types import ZERO_ADDRESS, How

BUYER, SELLER, OTHER, TOKEN, ESCROW, REGISTRY = ("0x" + f"{n:02x}" * 20 for n in range(0xA0, 0xA6))
CHAIN = 31337
NOW_S = 1_800_000_000
DAY_S = 86_400
JOB = keccak256(b"job")
TX = "0x" + keccak256(b"tx").hex()
CONFIG = ChannelConfig(BUYER, BUYER, SELLER, SELLER, TOKEN, 900)
READER = Reader(chain_id=CHAIN, registry=REGISTRY, tokens=frozenset((TOKEN,)))
PROOF = PaymentProof(BUYER, SELLER, CHAIN, TX, ESCROW, 3, job_id=JOB)
FILE = FeedbackFile(
    registry_name(CHAIN, REGISTRY), 7, BUYER, "2027-01-15T08:00:00Z", 80, 0, PROOF, tag1="starred"
)
LOG = PaymentLog(ESCROW, True, 10, 3, NOW_S, JOB, b"", BUYER, SELLER, TOKEN, 60, How.SETTLED)
CLAIM_PROOF = replace(PROOF, contract=CHANNELS, job_id=b"", channel=CONFIG)
CLAIM_LOG = PaymentLog(
    CHANNELS,
    True,
    10,
    3,
    NOW_S,
    channel_id=CONFIG.channel_id(channels_domain(CHAIN)),
    to_seller_units=20,
)


def entry_of(file: FeedbackFile = FILE, **changes: Any) -> FeedbackEntry:
    one = FeedbackEntry(
        agent_id=7,
        client=BUYER,
        index=1,
        value=80,
        decimals=0,
        tag1="starred",
        tag2="",
        endpoint="",
        uri="",
        file_hash=keccak256(file.encode()),
        block=11,
        log_index=0,
        time_s=NOW_S,
        tx_hash=TX,
    )
    return replace(one, **changes)


def read(
    file: FeedbackFile = FILE,
    log: PaymentLog | None = LOG,
    *,
    paid_to: str = SELLER,
    reader: Reader = READER,
    **changes: Any,
) -> Counted | Flaw:
    entry = entry_of(file, **changes)
    return read_entry(entry, file.encode(), log, paid_to=paid_to, reader=reader)


def with_proof(**changes: Any) -> FeedbackFile:
    return replace(FILE, proof=replace(PROOF, **changes))


CLAIMED = replace(FILE, proof=CLAIM_PROOF)


def test_an_entry_that_holds() -> None:
    deal = read()
    assert isinstance(deal, Counted)
    assert (deal.token, deal.complains, deal.log) == (TOKEN, False, LOG)
    claim = read(CLAIMED, CLAIM_LOG)
    assert isinstance(claim, Counted)
    assert claim.token == TOKEN


@pytest.mark.parametrize(
    ("flaw", "found"),
    [
        (Flaw.REVOKED, read(is_revoked=True)),
        (Flaw.OTHER_FILE, read(file_hash=keccak256(b"another"))),
        (Flaw.FILE_DISAGREES, read(value=81)),
        (Flaw.FILE_DISAGREES, read(tag1="uptime")),
        (Flaw.FILE_DISAGREES, read(agent_id=8)),
        (Flaw.FILE_DISAGREES, read(client=OTHER)),
        (Flaw.FILE_DISAGREES, read(replace(FILE, registry=registry_name(1, REGISTRY)))),
        (Flaw.OTHER_CHAIN, read(with_proof(chain_id=1))),
        (Flaw.NO_PAYMENT, read(log=None)),
        (Flaw.UNTRUSTED_CONTRACT, read(log=replace(LOG, is_trusted=False))),
        (Flaw.UNTRUSTED_CONTRACT, read(log=replace(LOG, contract=OTHER))),
        (Flaw.OTHER_PAYMENT, read(log=replace(LOG, log_index=4))),
        (Flaw.OTHER_PAYMENT, read(log=replace(LOG, job_id=keccak256(b"x")))),
        (Flaw.OTHER_PAYMENT, read(log=replace(LOG, job_id=b""))),
        (Flaw.OTHER_PAYMENT, read(CLAIMED, replace(CLAIM_LOG, channel_id=JOB))),
        (Flaw.UNTRUSTED_CONTRACT, read(CLAIMED, LOG)),
        (
            Flaw.OTHER_PAYMENT,
            read(replace(CLAIMED, proof=replace(CLAIM_PROOF, contract=ESCROW)), LOG),
        ),
        (Flaw.OTHER_PAYER, read(log=replace(LOG, buyer=OTHER))),
        (Flaw.OTHER_PAYER, read(with_proof(payer=OTHER))),
        (Flaw.OTHER_PAYEE, read(log=replace(LOG, seller=OTHER))),
        (Flaw.OTHER_PAYEE, read(with_proof(payee=OTHER))),
        (Flaw.OTHER_PAYEE, read(paid_to=OTHER)),
        (Flaw.OTHER_PAYEE, read(CLAIMED, CLAIM_LOG, paid_to="")),
        (Flaw.OTHER_ASSET, read(log=replace(LOG, token=OTHER))),
        (Flaw.OTHER_ASSET, read(CLAIMED, CLAIM_LOG, reader=replace(READER, tokens=frozenset()))),
        (Flaw.PAID_LATER, read(block=9)),
        (Flaw.PAID_LATER, read(block=10, log_index=2)),
        (Flaw.NOT_FAULTED, read(log=replace(LOG, to_seller_units=0))),
        (Flaw.NOT_FAULTED, read(log=replace(LOG, to_seller_units=0, how=How.DECLINED))),
    ],
)
def test_what_an_entry_may_lack(flaw: Flaw, found: Counted | Flaw) -> None:
    assert found is flaw


def test_bytes_that_are_no_file() -> None:
    for data in (b"", b"{}", b"[]", b"\xff", b"[" * 5000, b" " * (FILE_SIZE_MAX_BYTES + 1)):
        entry = entry_of(file_hash=keccak256(data))
        assert read_entry(entry, data, LOG, paid_to=SELLER, reader=READER) is Flaw.BAD_FILE
        with pytest.raises(BadFeedbackFile):
            FeedbackFile.decode(data)


@pytest.mark.parametrize("how", [How.UNDELIVERED, How.SILENT_SELLER, How.RULED])
def test_who_got_nothing_may_complain_where_the_seller_failed(how: How) -> None:
    found = read(log=replace(LOG, to_seller_units=0, how=how))
    assert isinstance(found, Counted)
    assert found.complains


@pytest.mark.parametrize("file", [FILE, CLAIMED, replace(FILE, tag2="x", endpoint="https://a")])
def test_a_file_reads_as_it_was_written(file: FeedbackFile) -> None:
    assert FeedbackFile.decode(file.encode()) == file
    told = json.loads(file.encode())
    assert told["proofOfPayment"] == {
        "fromAddress": BUYER,
        "toAddress": SELLER,
        "chainId": str(CHAIN),
        "txHash": TX,
    }
    assert from_data_uri(data_uri(file.encode())) == file.encode()


def test_uris_that_carry_nothing() -> None:
    assert from_data_uri("https://agent.example/file.json") is None
    assert from_data_uri("data:application/json;base64,!!") is None
    assert from_data_uri("data:application/json;base64," + "A" * 200_000) is None


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
))  # fmt: skip
def test_odd_files_are_refused_by_name(told: Any) -> None:
    good = json.loads(CLAIMED.encode())
    for name in ("proofOfPayment", "coase", "agentId", "clientAddress"):
        try:
            FeedbackFile.decode(json.dumps({**good, name: told}).encode())
        except BadFeedbackFile:
            continue
        assert name == "agentId"  # Numbers may be spelled in several ways.


def test_a_payment_is_used_once() -> None:
    def counted(file: FeedbackFile, log: PaymentLog, **changes: Any) -> Counted:
        one = read(file, log, **changes)
        assert isinstance(one, Counted)
        return one

    late, early = counted(FILE, LOG, block=12), counted(FILE, LOG, block=11, index=2)
    assert first_uses([late, early]) == [early]
    one, two = counted(CLAIMED, CLAIM_LOG), counted(CLAIMED, replace(CLAIM_LOG, block=9), block=13)
    assert first_uses([two, one, late]) == [one, late, two]
    assert first_uses([one, one]) == [one]


def test_a_wallet_agrees_to_typed_data() -> None:
    types = {
        "AgentWalletSet": [
            {"name": "agentId", "type": "uint256"},
            {"name": "newWallet", "type": "address"},
            {"name": "owner", "type": "address"},
            {"name": "deadline", "type": "uint256"},
        ]
    }
    domain = {
        "name": "ERC8004IdentityRegistry",
        "version": "1",
        "chainId": CHAIN,
        "verifyingContract": REGISTRY,
    }
    message = {"agentId": 7, "newWallet": BUYER, "owner": SELLER, "deadline": NOW_S}
    signable = encode_typed_data(domain, types, message)
    found = wallet_digest(registry_domain(CHAIN, REGISTRY), 7, BUYER, SELLER, NOW_S)
    assert found == bytes(_hash_eip191_message(signable))


def test_the_registration_file() -> None:
    name = registry_name(CHAIN, REGISTRY)
    told = json.loads(
        registration_file(
            name="Summer",
            description="Sums up.",
            services={"A2A": "https://a.example/card.json"},
            registrations=[(7, name)],
            x402=True,
        )
    )
    assert told["type"] == "https://eips.ethereum.org/EIPS/eip-8004#registration-v1"
    assert told["services"] == [{"name": "A2A", "endpoint": "https://a.example/card.json"}]
    assert told["registrations"] == [{"agentId": 7, "agentRegistry": name}]
    assert (told["x402Support"], told["active"]) == (True, True)


def test_an_agent_without_a_wallet_is_paid_at_its_owner() -> None:
    assert AgentRecord(1, SELLER, ZERO_ADDRESS, "").paid_to == SELLER
    assert AgentRecord(1, SELLER, OTHER, "").paid_to == OTHER


# ---- Weight


def paid(units: int, *, client: str = BUYER, age_s: int = 0, complains: bool = False) -> Counted:
    log = replace(LOG, to_seller_units=units, time_s=NOW_S - age_s)
    return Counted(entry_of(client=client), log, TOKEN, complains)


def test_weight_grows_with_the_logarithm_of_pay_and_fades() -> None:
    scale = Scale()
    weights = [weight(paid(units), now_s=NOW_S, scale=scale) for units in (0, 1, 3, 1023, 10**30)]
    assert weights == [0, 1000, 2000, 10_000, scale.entry_max]
    ages = (0, scale.half_life_s // 2, scale.half_life_s, 3 * scale.half_life_s, 10**12)
    faded = [weight(paid(1023, age_s=age_s), now_s=NOW_S, scale=scale) for age_s in ages]
    assert faded == [10_000, 7_500, 5_000, 1_250, 0]
    assert weight(paid(0, complains=True), now_s=NOW_S, scale=scale) == 1000


@given(st.integers(0, 10**20), st.integers(0, 10**20), st.integers(0, 10**9), st.integers(0, 10**9))
def test_more_pay_never_weighs_less_and_age_never_more(a: int, b: int, s: int, t: int) -> None:
    scale = Scale()
    less, more = sorted((a, b))
    young, old = sorted((s, t))
    assert weight(paid(less), now_s=NOW_S, scale=scale) <= weight(
        paid(more), now_s=NOW_S, scale=scale
    )
    assert weight(paid(a, age_s=old), now_s=NOW_S, scale=scale) <= weight(
        paid(a, age_s=young), now_s=NOW_S, scale=scale
    )


def test_all_strangers_together_weigh_no_more_than_one_group() -> None:
    scale = Scale(group_max=8_000)
    known = paid(1023, client=BUYER)
    strangers = [paid(1023, client="0x" + f"{n:040x}") for n in range(100)]
    weighed = weigh([known, *strangers], groups={BUYER: "mine"}, now_s=NOW_S, scale=scale)
    assert weighed[0] == (known, 8_000)
    assert sum(units for _, units in weighed[1:]) == 8_000
    assert weigh([], groups={}, now_s=NOW_S, scale=scale) == []
    assert weigh([paid(0)], groups={}, now_s=NOW_S, scale=scale) == [(paid(0), 0)]
    old = paid(1023, client=BUYER, age_s=DAY_S)
    (_, fresh), (_, aged) = weigh([known, old], groups={}, now_s=NOW_S, scale=scale)
    assert fresh > aged


@pytest.mark.parametrize(
    ("value", "decimals", "tag", "found"),
    [
        (80, 0, "starred", 800),
        (995, 1, "starred", 995),
        (101, 0, "starred", None),
        (-1, 0, "starred", None),
        (99, 0, "uptime", None),
    ],
)
def test_how_good_an_entry_finds_the_work(
    value: int, decimals: int, tag: str, found: int | None
) -> None:
    one = entry_of(value=value, decimals=decimals, tag1=tag)
    assert rating_permille(Counted(one, LOG, TOKEN, complains=False)) == found
    assert rating_permille(Counted(one, LOG, TOKEN, complains=True)) == 0


def test_a_file_that_is_nested_without_end_is_none() -> None:
    # Where py-evm was loaded, Python's own parser would go on until the stack is full.
    for deep in (b"[" * 60_000, b'{"a":' * 10_000):
        with pytest.raises(BadFeedbackFile):
            FeedbackFile.decode(deep)
