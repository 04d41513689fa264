"""``coase wallet``, ``export``, ``audit`` and ``withdraw --channels`` over channels on the embedded
chain, and over differences planted in journal and chain: every one must be named."""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from coase.agents import Agent
from coase.agents.audit import Report, audit, compare
from coase.agents.backends.sqlite import SqliteJournal
from coase.agents.collector import ALL_CLAIMS
from coase.agents.takeback import WHY, Pass, TakeBack, TakeBacks
from coase.agents.wallet import Reach, read_facts, read_places
from coase.agents.wiring import open_settlement, view_settlement
from coase.escrow.backends.evm.beside import Channel
from coase.escrow.backends.evm.chain import Request
from coase.escrow.backends.evm.channels import EvmChannels, channels_abi
from coase.escrow.backends.keystore import open_keyring
from coase.escrow.ports import MemoryTxStore
from coase.escrow.stake import Deposit, Unbond
from coase.escrow.voucher import AskWithdrawal, ChannelConfig, Fund
from coase.protocol.identity import Identity, keccak256
from tests.agents.realmarket import FUNDS, RealMarket, buy, scribe
from tests.tools import books
from tests.tools.books import alter, copied, lines, open_world, without_deal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from coase.agents.node import Node
    from coase.escrow.accounts import BuyerChannel
    from coase.escrow.backends.evm.moves import ChainFacts
    from coase.escrow.voucher import ChannelView

pytestmark = pytest.mark.xdist_group("channel-money")

PRICE = 20_000
DEPOSIT = 20 * PRICE
STAKE = 5_000
DELAY_S = 900


@dataclass(slots=True)
class World(books.World):
    """The same with channels and stakes."""

    @property
    def reach(self) -> Reach:
        return Reach.of(self.market.network)

    def audit(self, place: Path) -> Report:
        return self.portal.call(partial(audit, self.settlement, [place], reach=self.reach))

    def facts(self, place: Path) -> ChainFacts:
        places = read_places([place], deep=True)
        work = partial(read_facts, self.settlement, places, moves=True, reach=self.reach)
        return self.portal.call(work)

    def compare(self, place: Path, facts: ChainFacts) -> Report:
        places = read_places([place], deep=True)
        network = self.market.network
        return compare(places, places, facts, asset=network.asset, escrow=network.escrow)

    def jump(self) -> None:
        """Let the channels' delay pass on the chain."""

        async def seal() -> None:
            dev = self.market.dev
            assert dev.manual is not None
            dev.manual.time_s = dev.engine.head.time_s + DELAY_S + 1
            dev.engine.seal()

        self.portal.call(seal)


def trusting(seller: Agent) -> None:
    """Have a seller deliver a whole summary to strangers before it is paid."""
    assert seller.seat is not None
    streams = seller.seat.desk.streams
    streams.policy = replace(streams.policy, chunk_max_units=PRICE)


async def _deals(market: RealMarket, node: Node) -> dict[str, str]:
    """Two purchases through one channel, of which one is claimed; one by the escrow; a stake."""
    seller, buyer = scribe("seller"), Agent("buyer")
    await market.join(node, seller, buyer)
    trusting(seller)
    collector = node.collector
    assert collector is not None
    collector.policy = replace(ALL_CLAIMS, units_min=10**30, age_max_s=10**9)  # Only as told.
    for method in ("channel", "escrow", "channel"):
        assert await buy(buyer, "A good text", settlements=(method,)) == PRICE
        await market.rest(node)
        if method == "escrow":
            with anyio.fail_after(60):
                while not await collector.collect(policy=ALL_CLAIMS):  # noqa: ASYNC110
                    await anyio.sleep(0.05)
    assert node.stake is not None
    assert seller.seat is not None
    await node.stake.perform("stake", Deposit(STAKE), seller.seat.identity)
    await node.stake.perform("unstake", Unbond(1_000), seller.seat.identity)
    return {"seller": seller.address, "buyer": buyer.address}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with open_world(World, tmp_path_factory.mktemp("channels") / "home", _deals) as world:
        yield world


def position(key: dict[str, Any], kind: str) -> dict[str, Any]:
    (row,) = [row for row in key["positions"] if row["kind"] == kind]
    return dict(row)


def test_the_wallet_shows_channels_and_stake(world: World) -> None:
    keys = world.keys()
    bought, sold = (position(keys[name], "channel") for name in ("buyer", "seller"))
    assert bought["counterparty"] == world.addresses["seller"]
    assert (bought["side"], sold["side"]) == ("buyer", "seller")
    assert bought["channel"] == sold["channel"]
    for row in (bought, sold):
        assert int(row["deposited_units"]) == DEPOSIT
        assert int(row["signed_units"]) == 2 * PRICE
        assert int(row["claimed_units"]) == PRICE
        assert (row["state"], row["takeable_at"]) == ("open", "")
    assert int(bought["free_units"]) == int(keys["buyer"]["channels_units"]) == DEPOSIT - 2 * PRICE
    assert int(sold["claimable_units"]) == int(keys["seller"]["claimable_units"]) == PRICE
    assert int(keys["buyer"]["balance_units"]) == FUNDS - DEPOSIT - PRICE
    assert int(keys["seller"]["balance_units"]) == FUNDS + 2 * PRICE - STAKE
    stake = position(keys["seller"], "stake")
    assert int(stake["bonded_units"]) == int(keys["seller"]["stake_units"]) == STAKE
    assert stake["unbonding_units"] == "1000"
    shown = world.home.call("wallet")
    assert "what lies in channels" in shown.stdout
    assert "seller's stake: 0.004 free, 0 reserved, 0.001 unbonding" in shown.stderr


def test_every_voucher_is_posted_and_the_postings_add_up(world: World) -> None:
    rows, keys = world.home.json("export"), world.keys()
    entries: dict[tuple[str, str], int] = defaultdict(int)
    sums: dict[tuple[str, str], int] = defaultdict(int)
    for row in rows:
        entries[row["entry"], row["asset"]] += int(row["units"])
        if row["asset"] == "COASE":
            sums[row["agent"], row["account"]] += int(row["units"])
    assert set(entries.values()) == {0}
    for name, key in keys.items():
        assert sums[name, "wallet"] == int(key["balance_units"])
        assert sums[name, "stake"] == int(key["stake_units"])
    assert sums["buyer", "purchases"] == -sums["seller", "sales"] == 3 * PRICE
    assert sums["buyer", "channels"] == DEPOSIT - PRICE
    assert sums["seller", "channels"] == 0, "what was claimed is paid out"
    assert sums["seller", "vouchers"] == -sums["buyer", "vouchers"] == PRICE
    told = [row for row in rows if row["account"] == "sales"]
    assert all(row["capability"].startswith("summarise-") and row["deal"] for row in told)
    assert len({row["deal"] for row in told}) == 3
    assert {row["counterparty"] for row in told} == {world.addresses["buyer"]}


def test_what_agrees_is_said_to_agree(world: World) -> None:
    report = world.home.json("audit")
    assert report["differences"] == report["notes"] == []
    assert (report["keys"], report["deals"], report["channels"]) == (2, 6, 1)


# ---- planted in the journal --------------------------------------------------------------------

VOUCHER = "kind = 'voucher' AND json_extract(CAST(data AS TEXT), '$.kind') = '{}'"
TAKEN, PROMISED = (VOUCHER.format(kind) for kind in ("VoucherTaken", "VoucherPromised"))
LAST = f"(SELECT max(seq) FROM records WHERE {TAKEN})"  # noqa: S608
PAID_BY_VOUCHER = "json_extract(CAST(summary AS TEXT), '$.method') = 'channel'"
ONE_DEAL = f"(SELECT deal FROM closed WHERE {PAID_BY_VOUCHER} LIMIT 1)"  # noqa: S608
BUYERS = (
    "agent = (SELECT agent FROM records WHERE kind = 'deposit')"
    " AND kind IN ('channel', 'voucher', 'deposit', 'deposited')"
)


def with_field(kind: str, path: str, value: str) -> str:
    """SQL that changes one field of records of one kind."""
    changed = books.with_field("data", path, value)
    return f"UPDATE records SET data = {changed} WHERE {kind}"  # noqa: S608


def in_summaries(name: str, value: int) -> str:
    """SQL that changes one field of the deals that were paid by voucher."""
    changed = books.with_field("summary", name, str(value))
    return f"UPDATE closed SET summary = {changed} WHERE {PAID_BY_VOUCHER}"  # noqa: S608


PLANTED = {
    "a voucher that is gone": (
        [f"DELETE FROM records WHERE seq = {LAST}"],  # noqa: S608
        "journal: the deal says that 0.02 COASE were paid, and the vouchers booked to it make 0",
    ),
    "a deal that is gone": (
        without_deal(ONE_DEAL),
        "journal: vouchers over 0.02 COASE pay for a deal that the journal does not know",
    ),
    "a voucher above the deposit": (
        [with_field(f"seq = {LAST}", "total_units", "'500000'")],
        "chain: vouchers go up to 0.5 COASE, and the channel holds 0.4 COASE: 0.1 COASE of them"
        " cannot be claimed; sell nothing more",
    ),
    "a voucher that is forged": (
        [with_field(f"seq = {LAST}", "signature", "'0x" + "11" * 65 + "'")],
        "journal: the voucher over 0.04 COASE is not signed by",
    ),
    "promises that are gone": (
        [f"DELETE FROM records WHERE {PROMISED}"],  # noqa: S608
        "journal: 0.02 COASE were claimed, and the journal has signed 0 COASE only",
    ),
    "a promise that is gone": (
        [f"DELETE FROM records WHERE seq = (SELECT max(seq) FROM records WHERE {PROMISED})"],  # noqa: S608
        "journal: the seller holds a voucher over 0.04 COASE, and the buyer's journal has promised"
        " 0.02 COASE",
    ),
    "vouchers that are gone": (
        [f"DELETE FROM records WHERE {TAKEN}"],  # noqa: S608
        "journal: 0.02 COASE were claimed, and the journal has vouchers for 0 COASE only",
    ),
    "a channel that is lost": (
        [f"DELETE FROM records WHERE {BUYERS}"],  # noqa: S608
        "holds 0.38 COASE of this key, and the journal does not know it: take it back with coase",
    ),
    "another channel": (
        [with_field("kind = 'channel'", "config.withdraw_delay_s", "901")],
        "journal: what is kept under this id is another channel",
    ),
    "a beginning that is gone": (
        ["DELETE FROM records WHERE kind = 'channel'"],
        "do not follow",
    ),
    "a deposit that never was": (
        [
            with_field("kind = 'deposit'", "id", "'another'"),
            "UPDATE records SET data = CAST('another' AS BLOB) WHERE kind = 'deposited'",
        ],
        "chain: the journal says that 0.4 COASE were deposited, and the chain has no such deposit",
    ),
    "a deposit that nobody sent": (
        ["DELETE FROM transactions WHERE effect_id LIKE '%:fund:%'"],
        "chain: 0.4 COASE were deposited by a transaction that none of these nodes sent",
    ),
    "a deal that was cheaper": (
        [in_summaries("to_seller_units", 19_999)],
        "journal: the deal says that 0.019999 COASE were paid, and the vouchers booked to it make",
    ),
    "a deal that came back": ([in_summaries("to_buyer_units", 1)], "book: the purse says that"),
}


@pytest.fixture
def copy(world: World, tmp_path: Path) -> Path:
    return copied(world, tmp_path)


@pytest.mark.parametrize("case", PLANTED)
def test_a_difference_planted_in_the_journal_is_named(world: World, copy: Path, case: str) -> None:
    statements, said = PLANTED[case]
    alter(copy, *statements)
    found = lines(world.audit(copy))
    assert any(said in line for line in found), found


# ---- another chain than there is ---------------------------------------------------------------


def seen_as(**changes: int) -> Callable[[ChainFacts], ChainFacts]:
    """Return facts of a chain whose channels look otherwise."""

    def change(facts: ChainFacts) -> ChainFacts:
        assert facts.channels is not None

        def other(view: ChannelView) -> ChannelView:
            return replace(view, **changes)

        channels = {
            id_: Channel(one.config, other(one.view))
            for id_, one in facts.channels.channels.items()
        }
        return replace(facts, channels=replace(facts.channels, channels=channels))

    return change


def held_by_the_contract(units: int) -> Callable[[ChainFacts], ChainFacts]:
    def change(facts: ChainFacts) -> ChainFacts:
        assert facts.channels is not None
        return replace(facts, channels=replace(facts.channels, held_units=units))

    return change


def not_paid_out(facts: ChainFacts) -> ChainFacts:
    assert facts.channels is not None
    unpaid = dict.fromkeys(facts.channels.unpaid, 7)
    return replace(facts, channels=replace(facts.channels, unpaid=unpaid))


def stakes_seen_as(**changes: int) -> Callable[[ChainFacts], ChainFacts]:
    def change(facts: ChainFacts) -> ChainFacts:
        assert facts.stakes is not None
        stakes = {owner: replace(one, **changes) for owner, one in facts.stakes.stakes.items()}
        return replace(facts, stakes=replace(facts.stakes, stakes=stakes))

    return change


def vault_emptied(facts: ChainFacts) -> ChainFacts:
    assert facts.stakes is not None
    return replace(facts, stakes=replace(facts.stakes, held_units=0))


def without_channels(facts: ChainFacts) -> ChainFacts:
    return replace(facts, channels=None)


def with_a_deal_on_stake(facts: ChainFacts) -> ChainFacts:
    assert facts.stakes is not None
    opened = next(event for event in facts.events if event.terms is not None)
    assert opened.terms is not None
    terms = replace(opened.terms, stake_units=77, vault=facts.stakes.vault)
    another = replace(opened, job_id=b"j" * 32, terms=terms)
    return replace(facts, events=(*facts.events, another))


SEEN = {
    "a withdrawal that takes vouchers": (
        seen_as(withdrawing_units=DEPOSIT - PRICE, withdraw_since_s=1_000),
        "the buyer takes back 0.38 COASE, from 1970-01-01 00:31:40 UTC on, and vouchers over 0.02"
        " COASE are not claimed: 0.02 COASE of them will be lost; claim now",
    ),
    "a withdrawal that takes none": (
        seen_as(withdrawing_units=PRICE, withdraw_since_s=1_000),
        "all that is signed is covered",
    ),
    "a withdrawal that nobody asked for": (
        seen_as(withdrawing_units=PRICE, withdraw_since_s=1_000),
        "a withdrawal of 0.02 COASE, due 1970-01-01 00:31:40 UTC, was asked for by a transaction"
        " that none of these nodes sent",
    ),
    "a balance that is not there": (
        seen_as(balance_units=PRICE),
        "put nothing more into it: the seller was promised what is not there",
    ),
    "money that was given back": (seen_as(refund_nonce=1), "the seller gave money back"),
    "more free than was paid in": (
        seen_as(balance_units=2 * DEPOSIT),
        "the channels hold 0.78 COASE for the key, and 0.38 COASE by what was paid in and out",
    ),
    "a contract that is short": (held_by_the_contract(5), "the channels' contract has 0.000005"),
    "claims that nobody fetched": (not_paid_out, "0.000007 COASE were claimed and not paid out"),
    "no contract": (without_channels, "the network names no contract of any"),
    "a stake that is freed": (
        stakes_seen_as(reserved_units=9),
        "0.000009 COASE of stake are reserved for deals that are over",
    ),
    "a deal that stands on no stake": (
        with_a_deal_on_stake,
        "open deals stand on 0.000077 COASE of stake, and the vault keeps 0 COASE reserved",
    ),
    "a stake that is unbonded": (
        stakes_seen_as(unbond_at_s=1),
        "0.001 COASE of stake are unbonded and can be released",
    ),
    "a stake that grew": (stakes_seen_as(free_units=9_000), "the vault holds 0.01 COASE for the"),
    "a vault that is empty": (vault_emptied, "the vault has 0 COASE, and owes 0.005 COASE"),
}


@pytest.mark.parametrize("case", SEEN)
def test_a_difference_on_the_chain_is_named(
    world: World, copy: Path, case: str, facts: ChainFacts
) -> None:
    change, said = SEEN[case]
    assert world.compare(copy, facts).notes == []
    report = world.compare(copy, change(facts))
    found = [finding.what for finding in (*report.differences, *report.notes)]
    assert any(said in line for line in found), found


def test_what_a_key_from_elsewhere_did_there_is_no_difference(
    world: World, facts: ChainFacts
) -> None:
    armed = seen_as(withdrawing_units=PRICE, withdraw_since_s=1_000)(facts)
    (place,) = read_places([world.market.place("swarm")], deep=True)
    network = world.market.network
    found = {}
    for imported in (frozenset[str](), frozenset(place.owners)):
        places = [replace(place, imported=imported)]
        report = compare(places, places, armed, asset=network.asset, escrow=network.escrow)
        found[bool(imported)] = [
            any("was asked for by" in one.what for one in where)
            for where in (report.differences, report.notes)
        ]
    assert found == {False: [True, False], True: [False, True]}


@pytest.fixture(scope="module")
def facts(world: World) -> ChainFacts:
    """What the chain says of the two."""
    return world.facts(world.market.place("swarm"))


# ---- home with it ------------------------------------------------------------------------------


class Died(BaseException):
    """The process was killed here."""


@dataclass(slots=True)
class Till:
    """A key whose journal knows of no channel, opened anew for every life of the process."""

    market: RealMarket
    path: Path

    @property
    def key(self) -> Identity:
        return open_keyring(self.path).derive("till")

    def config(self, receiver: str, number: int) -> ChannelConfig:
        payer, token = self.key.address, self.market.network.token
        salt = number.to_bytes(32, "big")
        return ChannelConfig(payer, payer, receiver, receiver, token, DELAY_S, salt)

    async def deposit(
        self, config: ChannelConfig, units: int, *, ask: bool = False, relay: Identity | None = None
    ) -> None:
        """Fill a channel from elsewhere: nothing of it is in the journal."""
        settlement = await view_settlement(self.market.network)
        assert isinstance(settlement.chain.store, MemoryTxStore)
        try:
            channels = await EvmChannels.beside(settlement)
            head = await settlement.head()
            fund = Fund(config, units, config.salt, head.time_s + 3_600)
            if relay is not None:
                data = channels._call_data(fund, self.key)
                request = Request(channels.domain.contract, data, 400_000)
                await settlement.chain.send("relay", relay, request, channels_abi())
            else:
                await channels.perform(f"fund{config.salt.hex()}", fund, self.key)
            if ask:
                await channels.perform("ask", AskWithdrawal(config, units), self.key)
        finally:
            await settlement.close()

    async def dies(self, order: TakeBack, breaks: dict[str, Any]) -> bool:
        """Return whether a process that performs ``order`` was killed."""
        try:
            await self.life(order, **breaks)
        except Died:
            return True
        return False

    async def life(self, order: TakeBack, **breaks: Any) -> Pass:
        """Run a process that performs ``order``; ``breaks`` replaces methods of its parts."""
        journal = SqliteJournal(self.path / "journal.sqlite")
        settlement = await open_settlement(self.market.network, journal)
        try:
            for name, broken in breaks.items():
                target = settlement.chain.store if name == "save" else settlement.chain
                setattr(target, name, broken(getattr(target, name)))
            takebacks = TakeBacks(
                settlement,
                await EvmChannels.beside(settlement),
                journal,
                identity_of=lambda _: self.key,
                now_ms=lambda: 7,
            )
            return await takebacks.perform(order)
        finally:
            await settlement.close()
            await journal.close()


def dies_after(real: Any) -> Any:
    async def broken(*args: Any, **more: Any) -> Any:
        await real(*args, **more)
        raise Died

    return broken


BREAKS: tuple[dict[str, Any], ...] = ({"save": dies_after}, {"send": dies_after})


def test_a_node_that_runs_is_told(world: World) -> None:
    with world.node("busy") as node:
        seller, buyer = scribe("writer"), Agent("reader")
        world.portal.call(world.market.join, node, seller, buyer)
        trusting(seller)
        paid = world.portal.call(partial(buy, buyer, "Another text", settlements=("channel",)))
        assert paid == PRICE
        world.portal.call(world.market.rest, node)
        place = str(world.market.place("busy"))
        told = world.home.json("withdraw", "--channels", "--state", place)
        rows = [row for key in told["keys"] for row in key["positions"]]
        assert {row["state"] for row in rows if row["side"] == "buyer"} == {"withdrawing"}
        assert [end.stopped for end in ends_of(buyer)] == [WHY]
        # It goes on buying, through another channel, which the order does not mean.
        paid = world.portal.call(partial(buy, buyer, "More text", settlements=("channel",)))
        assert paid == PRICE
        world.portal.call(world.market.rest, node)
        stops = [end.stopped for end in ends_of(buyer)]
        assert stops == [WHY, ""]
        world.portal.call(_goes_on, node)
        assert [end.stopped for end in ends_of(buyer)] == stops
        assert world.home.json("audit", "--state", place)["differences"] == []


def ends_of(buyer: Agent) -> list[BuyerChannel]:
    assert buyer.seat is not None
    lines = buyer.seat.desk.streams.lines.values()
    return [line.buyer for line in lines if line.buyer is not None]


async def _goes_on(node: Node) -> None:
    """Go on with what the owner ordered, as a node does when something may have come due."""
    assert isinstance(node.journal, SqliteJournal)
    takebacks = TakeBacks(
        node.settlement,  # type: ignore[arg-type]
        node.channels,  # type: ignore[arg-type]
        node.journal,
        identity_of=lambda owner: node.runtime.seats[owner].identity,
        now_ms=node.runtime.now_ms,
        runtime=node.runtime,
    )
    (order,) = takebacks.unfinished()
    done = await takebacks.perform(order, renewed=False)
    assert len(done.waiting) == 1


def test_a_lost_channel_comes_home_once_whenever_it_dies(world: World) -> None:
    till = Till(world.market, world.market.place("till"))
    world.home.call("keys", "new", "till", "--state", str(till.path))
    owner = till.key.address
    world.portal.call(world.market.fund, owner)
    order = TakeBack("home", owner)
    for step, breaks in enumerate(BREAKS):
        config = till.config(world.addresses["seller"], step)
        world.portal.call(till.deposit, config, 1_000 + step)
        assert world.portal.call(till.dies, order, breaks)
        done = world.portal.call(till.life, order)
        assert len(done.waiting) == step + 1
        assert not done.over
    report = world.audit(till.path)
    assert [line for line in lines(report) if "does not know it" in line] == []
    assert sum("can be taken back from" in note.what for note in report.notes) == len(BREAKS)
    world.jump()
    for breaks in BREAKS:
        assert world.portal.call(till.dies, order, breaks)
    done = world.portal.call(till.life, order)
    assert done.over
    assert world.portal.call(world.settlement.balance, owner) == FUNDS
    assert [key["positions"] for key in world.keys().values() if key["address"] == owner] == [[]]
    shutil.rmtree(till.path)  # What was done without its journal stays a difference.


@pytest.mark.parametrize("relay", [None, Identity(keccak256(b"relay"))], ids=["sent", "relayed"])
def test_what_is_done_with_a_key_elsewhere_is_named(world: World, relay: Identity | None) -> None:
    till = Till(world.market, world.market.place("leaky"))
    world.home.call("keys", "new", "till", "--state", str(till.path))
    world.portal.call(world.market.fund, till.key.address)
    if relay is not None:
        world.portal.call(partial(world.market.fund, relay.address, units=0))
    config = till.config(world.addresses["seller"], 0)
    world.portal.call(partial(till.deposit, config, 50, ask=relay is None, relay=relay))
    try:
        found = lines(world.audit(till.path))
    finally:
        shutil.rmtree(till.path)
    named = ["the journal does not know it", "were deposited by a"]
    named += ["was asked for by a", "of this key are on the chain"] if relay is None else []
    assert len(found) == len(named)
    for said in named:
        assert any(said in line for line in found), found


def test_all_that_is_free_comes_home_and_the_books_agree(world: World) -> None:
    refused = world.home.call("withdraw", "0x" + "0d" * 20, "1", "--channels", code=2)
    assert "say no address" in refused.stderr
    assert "say to which address" in world.home.call("withdraw", code=2).stderr
    before, place = world.keys(), ("--state", str(world.market.place("swarm")))
    asked = world.home.json("withdraw", "--channels", *place)
    bought = position(next(key for key in asked["keys"] if key["name"] == "buyer"), "channel")
    assert (bought["state"], asked["refused"]) == ("withdrawing", [])
    assert int(bought["withdrawing_units"]) == DEPOSIT - 2 * PRICE
    gained = int(world.keys()["seller"]["balance_units"]) - int(before["seller"]["balance_units"])
    assert gained == PRICE, "claimed and paid out at once"
    notes = [note["what"] for note in world.home.json("audit", *place)["notes"]]
    assert any("0.36 COASE can be taken back from" in note for note in notes)
    again = world.home.json("withdraw", "--channels", "--from", "buyer", *place)
    assert position(again["keys"][0], "channel") == bought, "asked for once"
    world.jump()
    # The order is in the journal: a node that starts goes on with it by itself.
    with world.node("swarm") as node:
        world.portal.call(_until_home, node, world.addresses["buyer"])
    after = world.keys()["buyer"]
    assert int(after["balance_units"]) == FUNDS - 3 * PRICE
    assert position(after, "channel")["stopped"]
    world.home.call("withdraw", "--channels", *place)  # It may have ended between money and note.
    shown = world.home.call("withdraw", "--channels", *place)
    assert "nothing of yours lies" in shown.stdout
    assert world.home.json("audit")["differences"] == []


async def _until_home(node: Node, owner: str) -> None:
    with anyio.fail_after(60):
        while await node.settlement.balance(owner) != FUNDS - 3 * PRICE:  # noqa: ASYNC110
            await anyio.sleep(0.05)
