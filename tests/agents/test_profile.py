"""Registering over registries in memory: cut short anywhere, changed back and forth, taken over."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from coase.agents.hearsay import AGE_MAX_S, Hearsay
from coase.agents.profile import Directory, Profile, Registrar
from coase.agents.reputation import Readings, Repute, Word
from coase.escrow.backends.memory_registries import MemoryRegistries, RegistryBooks
from coase.escrow.feedback import (
    Counted,
    FeedbackFile,
    Flaw,
    GiveFeedback,
    PaymentLog,
    PaymentProof,
    Reader,
    RegisterAgent,
    SetAgentUri,
    data_uri,
    from_data_uri,
    registry_name,
)
from coase.negotiation.scores import HEARD_MAX
from coase.protocol.errors import ChainUnavailable, ConfigurationError
from coase.protocol.identity import Identity, keccak256
from coase.protocol.types import How

if TYPE_CHECKING:
    from pathlib import Path

    from coase.escrow.feedback import FeedbackEntry, RegistryCall
    from coase.escrow.ports import Receipt

pytestmark = pytest.mark.anyio

SELLER, OWNER, *BUYERS = (Identity(keccak256(b"profile%d" % n)) for n in range(7))
REGISTRY, TOKEN, ESCROW = ("0x" + f"{n:02x}" * 20 for n in (1, 2, 3))
NOW_S = 1_800_000_000


class Failing(MemoryRegistries):
    """Registries whose endpoint goes away at one kind of call, before or after it went through."""

    fails: type | None = None
    late = False
    calls = 0

    async def perform(self, effect_id: str, call: RegistryCall, identity: Identity) -> Receipt:
        fails = self.fails is not None and isinstance(call, self.fails)
        if fails and not self.late:
            raise ChainUnavailable("away")
        self.calls += 1
        receipt = await super().perform(effect_id, call, identity)
        if fails:
            raise ChainUnavailable("away")
        return receipt

    async def register(self, effect_id: str, uri: str, identity: Identity) -> int:
        made = await super().register(effect_id, uri, identity)
        if self.fails is RegisterAgent:
            raise ChainUnavailable("away")
        return made


def registries() -> Failing:
    books = RegistryBooks(time_s=NOW_S)
    return Failing(books, chain_id=31337, identity=REGISTRY, reputation="0x" + "04" * 20)


def registrar(port: Failing) -> Registrar:
    return Registrar(port, Directory(port))


@pytest.mark.parametrize("fails", [RegisterAgent, SetAgentUri])
@pytest.mark.parametrize("late", [False, True])
async def test_cut_short_it_goes_on_and_is_done_once(fails: type, late: bool) -> None:
    port = registries()
    port.fails, port.late = fails, late
    with pytest.raises(ChainUnavailable):
        await registrar(port).register(SELLER, Profile(), name="seller")
    port.fails = None
    record = await registrar(port).register(SELLER, Profile(), name="seller", about="Sells.")
    assert len(port.books.agents) == 1
    assert b'"description":"Sells."' in (from_data_uri(record.uri) or b"")
    done = port.calls
    assert (
        await registrar(port).register(SELLER, Profile(), name="seller", about="Sells.") == record
    )
    assert port.calls == done


async def test_a_file_may_be_changed_and_changed_back() -> None:
    port = registries()
    for uri in ("https://a.example", "https://b.example") * 2:
        profile = Profile(uri=uri)
        assert (await registrar(port).register(SELLER, profile, name="seller")).uri == uri
    kept = await registrar(port).register(SELLER, Profile(), name="seller", keep_file=True)
    assert kept.uri == "https://b.example"
    assert len(port.books.agents) == 1


async def test_a_wallet_belongs_to_one_agent_and_its_owner_says_whose() -> None:
    port = registries()
    owned = await registrar(port).register(OWNER, Profile(), name="firm")
    with pytest.raises(ConfigurationError, match="may not change whom it is paid to"):
        await registrar(port).link(owned, SELLER, SELLER, now_s=NOW_S)
    linked = await registrar(port).link(owned, OWNER, SELLER, now_s=NOW_S)
    assert linked.paid_to == SELLER.address
    assert await registrar(port).link(linked, OWNER, SELLER, now_s=NOW_S) == linked
    # The key that sells is somebody's wallet: it does not become another agent by mistake.
    with pytest.raises(ConfigurationError, match="is the wallet of agent 0 already"):
        await registrar(port).register(SELLER, Profile(), name="seller")
    same = await registrar(port).register(SELLER, Profile(), name="seller", keep_file=True)
    assert same == linked
    directory = Directory(port)
    assert await directory.paid_to(SELLER.address) == linked
    assert await directory.paid_to(OWNER.address) is None
    assert await directory.owned_by(OWNER.address) == linked


# ---- what is said ------------------------------------------------------------------------------


async def say(port: Failing, who: Identity, value: int, *, paid: int = 10_000) -> None:
    """Speak of agent 0 after having paid its seller."""
    number = port.books.number + 1
    tx_hash, job_id = "0x" + keccak256(b"tx%d" % number).hex(), keccak256(b"job%d" % number)
    port.books.payments[tx_hash, 1] = PaymentLog(
        ESCROW, True, number - 1, 1, NOW_S, job_id, b"", who.address, SELLER.address, TOKEN, paid,
        How.SETTLED if paid else How.UNDELIVERED,
    )  # fmt: skip
    proof = PaymentProof(who.address, SELLER.address, 31337, tx_hash, ESCROW, 1, job_id)
    name = registry_name(31337, REGISTRY)
    file = FeedbackFile(name, 0, who.address, "2027-01-15", value, 0, proof, tag1="starred")
    data = file.encode()
    call = GiveFeedback(0, value, 0, "starred", "", "", data_uri(data), keccak256(data))
    await port.perform(f"say{number}", call, who)


async def repute(port: Failing, *known: Identity) -> Repute:
    record = await port.agent(0)
    assert record is not None
    reader = Reader(chain_id=31337, registry=REGISTRY, tokens=frozenset((TOKEN,)))
    known_addresses = {one.address for one in known}
    return await Readings(port, reader).read(record, known=known_addresses, now_s=NOW_S)


async def test_many_strangers_weigh_no_more_than_one_and_a_known_one_as_much() -> None:
    port = registries()
    await registrar(port).register(SELLER, Profile(), name="seller")
    for who in BUYERS[:4]:
        for _ in range(5):
            await say(port, who, 100)
    await say(port, BUYERS[4], 0)
    crowd = await repute(port)
    heard = sum(word.weight for word in crowd.words)
    assert 19_000 < heard <= 20_000
    # The one that the reader has dealt with is heard beside the whole crowd.
    told = await repute(port, BUYERS[4])
    assert told.words[-1].weight > 10 * crowd.words[-1].weight
    assert (crowd.rating_permille or 0) > 900 > (told.rating_permille or 0)
    good, bad = told.prior()
    assert 0 < bad < good
    assert good + bad < HEARD_MAX
    # What the reader himself said stands in his own book.
    assert told.prior(me=BUYERS[4].address)[1] == 0


async def test_a_complaint_counts_where_nothing_was_delivered_and_each_payment_once() -> None:
    port = registries()
    await registrar(port).register(SELLER, Profile(), name="seller")
    await say(port, BUYERS[0], 100, paid=0)
    (word,) = (await repute(port)).words
    assert word.counted is not None
    assert word.counted.complains
    assert (await repute(port)).rating_permille == 0
    # The same file again is the same payment again.
    entry = word.entry
    again = GiveFeedback(0, 100, 0, "starred", "", "", entry.uri, entry.file_hash)
    await port.perform("again", again, BUYERS[0])
    assert [one.flaw for one in (await repute(port)).words] == [None, Flaw.USED_BEFORE]


async def test_nobody_speaks_and_nothing_is_believed() -> None:
    port = registries()
    await registrar(port).register(SELLER, Profile(), name="seller")
    empty = await repute(port)
    assert (empty.rating_permille, empty.prior()) == (None, (0, 0))
    await say(port, BUYERS[0], 100)
    (word,) = (await repute(port)).words
    other = replace(word.entry, tag1="uptime")
    assert isinstance(word.counted, Counted)
    told = _only(other, word)
    assert (told.rating_permille, told.prior()) == (None, (0, 0))


def _only(entry: FeedbackEntry, word: Word) -> Repute:
    assert word.counted is not None
    spoken = replace(word, entry=entry, counted=replace(word.counted, entry=entry))
    return Repute(record=None, words=(spoken,))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "damaged",
    ["", "{", "[[1]]", '[["a", "b", -1, 0, 0]]', "[" * 100_000],
    ids=["empty", "cut", "short", "negative", "deep"],
)
def test_what_was_heard_is_kept_and_a_damaged_file_is_left_aside(
    tmp_path: Path, damaged: str
) -> None:
    path = tmp_path / "heard.json"
    path.write_text(damaged)
    hearsay = Hearsay(path)
    assert hearsay.of("a", now_s=NOW_S) == {}
    hearsay.keep("a", "b", good=5, bad=7, at_s=NOW_S)
    hearsay.save()
    assert Hearsay(path).of("a", now_s=NOW_S) == {"b": (5, 7)}
    assert Hearsay(path).of("other", now_s=NOW_S) == {}
    assert Hearsay(path).of("a", now_s=NOW_S + AGE_MAX_S + 1) == {}
