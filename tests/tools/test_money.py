"""``coase wallet``, ``export`` and ``audit`` over deals on the embedded chain, and over planted
differences: every one must be named."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from coase.agents import Agent, passphrase
from coase.agents.audit import audit
from coase.agents.backends.sqlite import StateDirectory
from coase.escrow.backends.evm.abi import token_abi
from coase.escrow.backends.evm.chain import EvmChain, Request
from coase.escrow.backends.evm.settlement import token_facts
from coase.escrow.backends.keystore import open_keyring
from coase.escrow.ports import MemoryTxStore
from coase.protocol.identity import Identity, keccak256
from coase.protocol.terms import receive_digest
from coase.tools.cli import withdraw_command
from tests.agents.realmarket import ARBITER, FUNDS, RealMarket, buy, scribe
from tests.tools.books import World, alter, copied, lines, open_world, with_field, without_deal
from tests.tools.commands import Home

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from coase.agents.node import Node

pytestmark = pytest.mark.xdist_group("money")

PRICE, BOND = 20_000, 2_000


async def _deals(market: RealMarket, node: Node) -> dict[str, str]:
    """A sale, a refund, a liar who is ruled against, and a quarreller who is."""
    seller, buyer = scribe("seller"), Agent("buyer")
    await market.join(node, seller, buyer)
    paid: dict[str, int] = {}

    async def one(text: str, **wish: Any) -> None:
        paid[text] = await buy(buyer, text, **wish)

    async with anyio.create_task_group() as group:
        group.start_soon(one, "A good text")
        group.start_soon(one, "this will fail")
        group.start_soon(one, "this is a lie")
    await one("another", check=lambda _: "I do not like it")
    await market.rest(node)
    assert paid == {"A good text": PRICE, "this will fail": 0, "this is a lie": 0, "another": 0}
    return {"seller": seller.address, "buyer": buyer.address, "arbiter": ARBITER.address}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with open_world(World, tmp_path_factory.mktemp("money") / "home", _deals) as world:
        yield world


def test_the_wallet_shows_what_each_key_has(world: World) -> None:
    keys = world.keys()
    assert set(keys) == {"seller", "buyer", ARBITER.address}
    # Sold two; of the bonds the liar lost one, and the quarreller the other.
    assert int(keys["seller"]["balance_units"]) == FUNDS + 2 * PRICE - BOND
    assert int(keys["buyer"]["balance_units"]) == FUNDS - 2 * PRICE - BOND
    assert int(keys[ARBITER.address]["balance_units"]) == 2 * BOND
    assert {key["locked"] for key in keys.values()} == {"0"}
    shown = world.home.call("wallet").stdout
    assert keys["buyer"]["address"] in shown
    assert keys["buyer"]["balance"] in shown


def postings(world: World) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(world.home.call("export").stdout)))


def test_the_postings_add_up_to_the_wallet(world: World) -> None:
    rows, keys = postings(world), world.keys()
    assert (
        rows
        == world.home.json("export")
        == json.loads(world.home.call("export", "--format", "json").stdout)
    )
    entries: dict[tuple[str, str], int] = defaultdict(int)
    sums: dict[tuple[str, str, str], int] = defaultdict(int)
    for row in rows:
        entries[row["entry"], row["asset"]] += int(row["units"])
        sums[row["address"], row["account"], row["asset"]] += int(row["units"])
    assert set(entries.values()) == {0}
    for key in keys.values():
        address = key["address"]
        assert sums[address, "wallet", "COASE"] == int(key["balance_units"])
        assert sums[address, "wallet", "coin"] == int(key["coin_wei"])
        assert sums[address, "escrow", "COASE"] == 0
    buyer, seller = world.addresses["buyer"], world.addresses["seller"]
    assert sums[seller, "sales", "COASE"] == -2 * PRICE
    assert sums[buyer, "purchases", "COASE"] == 2 * PRICE
    assert sums[buyer, "arbitration", "COASE"] == sums[seller, "arbitration", "COASE"] == BOND
    assert sums[ARBITER.address, "arbitration", "COASE"] == -2 * BOND
    assert sums[seller, "received", "COASE"] == -FUNDS
    assert sums[buyer, "gas", "coin"] > 0


def test_a_posting_says_when_with_whom_and_for_what(world: World) -> None:
    sale = next(row for row in postings(world) if row["account"] == "sales")
    deals = {row["deal"] for row in world.home.json("replay")}
    assert sale["deal"] in deals
    assert sale["capability"].startswith("summarise-")
    assert sale["counterparty"] == world.addresses["buyer"]
    assert (sale["agent"], sale["amount"], sale["asset"]) == ("seller", "-0.02", "COASE")
    assert sale["tx"].startswith("0x")
    assert sale["time"].endswith("Z")


def test_what_agrees_is_said_to_agree(world: World) -> None:
    report = world.home.json("audit")
    assert report["differences"] == report["notes"] == []
    assert (report["keys"], report["deals"]) == (3, 8)
    assert "they agree" in world.home.call("audit").stdout


async def _held(market: RealMarket, node: Node, gate: anyio.Event) -> None:
    seller, buyer = scribe("slow", gate=gate), Agent("patient")
    await market.join(node, seller, buyer)
    node.runtime.start(_quietly, buyer)
    seat = seller.seat
    assert seat is not None
    with anyio.fail_after(60):
        while not any(t.state == "locked" for t in seat.desk.threads.values()):  # noqa: ASYNC110
            await anyio.sleep(0.02)


async def _quietly(buyer: Agent) -> None:
    await buy(buyer, "A held text")


def test_beside_a_node_that_runs(world: World) -> None:
    gate = world.portal.call(anyio.Event)
    with world.node("running") as node:
        world.portal.call(_held, world.market, node, gate)
        key = world.keys()["patient"]
        assert (key["locked"], key["bonds"], key["claimable"]) == ("0.02", "0", "0")
        assert [p["side"] for p in key["positions"]] == ["buyer"]
        assert key["positions"][0]["deal"]
        report = world.home.json("audit")
        assert report["differences"] == report["notes"] == []
        escrowed = sum(
            int(row["units"])
            for row in postings(world)
            if (row["agent"], row["account"]) == ("patient", "escrow")
        )
        assert escrowed == PRICE
        world.portal.call(gate.set)
        world.portal.call(world.market.rest, node)
    assert world.keys()["patient"]["locked"] == "0"
    assert world.home.json("audit")["differences"] == []


# ---- planted differences -----------------------------------------------------------------------


FIELD = "json_extract(CAST(summary AS TEXT), '$.{}') = '{}'"


def closed_as(side: str, how: str) -> str:
    """SQL for the rowid of a closed deal of one side that ended one way."""
    both = FIELD.format("side", side) + " AND " + FIELD.format("how", how)
    return f"(SELECT seq FROM closed WHERE {both} LIMIT 1)"  # noqa: S608


def altered(side: str, how: str, name: str, value: str) -> str:
    """SQL that changes one field of a closed deal's summary."""
    changed = with_field("summary", name, value)
    return f"UPDATE closed SET summary = {changed} WHERE seq = {closed_as(side, how)}"  # noqa: S608


EMPTY = f"UPDATE closed SET summary = X'7b7d' WHERE seq = {closed_as('buyer', 'ruled')}"  # noqa: S608
ONE_DEAL = f"(SELECT deal FROM closed WHERE seq = {closed_as('buyer', 'settled')})"  # noqa: S608
ONE_TX = "(SELECT min(seq) FROM transactions)"
PLANTED = {
    "paid more": ([altered("buyer", "settled", "to_seller_units", "20001")], "20001 in the jour"),
    "a refund that was none": (
        [altered("buyer", "settled", "to_buyer_units", "20000")],
        "the purse says that",
    ),
    "another price": ([altered("seller", "settled", "price_units", "1")], "price is 1 in the"),
    "another counterparty": (
        [altered("seller", "settled", "counterparty", "'0x'")],
        "counterparty is 0x in the journal",
    ),
    "no ruling": ([altered("buyer", "ruled", "how", "'settled'")], "ruling is False in the"),
    "never locked": (
        [altered("seller", "settled", "how", "'open'")],
        "never was locked, and the chain has it closed",
    ),
    "another result": ([altered("buyer", "settled", "result", "'x'")], "does not follow from its"),
    "another verdict": (
        [altered("buyer", "settled", "verdict", "'bad'")],
        "verdict is bad, not good",
    ),
    "a summary that is none": (
        [EMPTY],
        "cannot be read",
    ),
    "a deal that is gone": (
        without_deal(ONE_DEAL),
        "the chain has a deal over 20000 units, closed, that the journal does not know",
    ),
    "records that are gone": (
        [f"DELETE FROM records WHERE deal = {ONE_DEAL} AND kind = 'thread'"],  # noqa: S608
        "its records are missing",
    ),
    "a summary that is gone": (
        [f"DELETE FROM closed WHERE seq = {closed_as('buyer', 'settled')}"],  # noqa: S608
        "its summary is missing",
    ),
    "an invented deal": (
        [altered("buyer", "settled", "job_id", "'" + "ab" * 32 + "'")],
        "says settled, and the chain has no such deal",
    ),
    "a transaction that is gone": (
        [f"DELETE FROM transactions WHERE seq = {ONE_TX}"],  # noqa: S608
        "1 transactions of this key are on the chain and not in the journal",
    ),
    "a transaction that is another": (
        [f"UPDATE transactions SET raw = raw || X'00' WHERE seq = {ONE_TX}"],  # noqa: S608
        "is another one",
    ),
    "a nonce that is another": (
        [f"UPDATE transactions SET nonce = 77 WHERE seq = {ONE_TX}"],  # noqa: S608
        "not 77",
    ),
}


@pytest.fixture
def copy(world: World, tmp_path: Path) -> Path:
    return copied(world, tmp_path)


def differences(world: World, place: Path) -> list[str]:
    return lines(world.portal.call(audit, world.settlement, [place]))


def test_an_untouched_copy_agrees(world: World, copy: Path) -> None:
    assert world.home.json("audit", "--state", str(copy))["agree"]


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_difference_is_named(world: World, copy: Path, case: str) -> None:
    statements, said = PLANTED[case]
    alter(copy, *statements)
    found = differences(world, copy)
    assert any(said in line for line in found), found


def test_a_difference_is_said_and_told_by_the_exit_code(world: World, copy: Path) -> None:
    alter(copy, f"DELETE FROM transactions WHERE seq = {ONE_TX}")  # noqa: S608
    report = world.home.json("audit", "--state", str(copy), code=1)
    assert not report["agree"]
    (found,) = report["differences"]
    assert found["where"] == "chain"
    shown = world.home.call("audit", "--state", str(copy), code=1).stdout
    assert f"differs chain: {found['what']} ({found['owner']})" in shown


def test_a_damaged_file_is_named(world: World, copy: Path) -> None:
    path = copy / "journal.sqlite"
    path.write_bytes(b"no journal at all" * 500)
    done = world.home.call("audit", "--state", str(copy), code=2)
    assert str(path) in done.stderr


def test_a_key_on_two_nodes_is_named(world: World) -> None:
    twin = world.market.place("twin")
    shutil.copytree(world.market.place("swarm"), twin)
    try:
        found = world.home.json("audit", code=1)["differences"]
    finally:
        shutil.rmtree(twin)
    assert {line["where"] for line in found} == {"keys"}
    assert {line["owner"] for line in found} == {
        world.addresses["seller"],
        world.addresses["buyer"],
    }


THIEF_AT = "0x" + "ee" * 20


async def _spend_elsewhere(market: RealMarket, place: Path, *, by_signature: bool) -> None:
    """Take five units of a key: by a transaction of its own, or with a mere signature of it."""
    identity = open_keyring(place).derive("spender")
    thief = Identity(keccak256(b"thief"))
    await market.fund(identity.address)
    await market.fund(thief.address, units=0)
    chain = await EvmChain.connect(market.network.rpc, store=MemoryTxStore(), poll_s=0.01)
    try:
        token, sender = market.network.token, identity
        data = token_abi().encode("transfer", THIEF_AT, 5)
        if by_signature:
            domain = (await token_facts(chain, token)).domain
            ends, nonce = 2**40, keccak256(b"nonce")
            digest = receive_digest(domain, identity.address, thief.address, 5, 0, ends, nonce)
            signed, sender = identity.sign(digest), thief
            data = token_abi().encode(
                "receiveWithAuthorization",
                identity.address,
                thief.address,
                5,
                0,
                ends,
                nonce,
                signed,
            )
        await chain.send("theft", sender, Request(token, data, 200_000), token_abi())
    finally:
        await chain.close()


@pytest.mark.parametrize("by_signature", [False, True], ids=["transaction", "signature"])
def test_what_a_key_spent_elsewhere_is_named(world: World, *, by_signature: bool) -> None:
    place = world.market.place("leaky")
    world.home.call("keys", "new", "spender", "--state", str(place))
    work = partial(_spend_elsewhere, world.market, place, by_signature=by_signature)
    world.portal.call(work)
    try:
        found = differences(world, place)
        rows = world.home.json("export", "--state", str(place))
    finally:
        shutil.rmtree(place)
    sent = [row for row in rows if row["account"] == "sent"]
    assert [row["units"] for row in sent] == ["5"]
    unknown = "chain: 1 transactions of this key are on the chain and not in the journal (nonces 0)"
    assert (unknown in found) == (not by_signature)
    taken = f"chain: 5 units went to {sent[0]['counterparty']} by a transaction that none of these"
    assert [line for line in found if line.startswith(taken)]
    assert len(found) == 2 - by_signature


# ---- money out ---------------------------------------------------------------------------------

OWNER_AT = "0x52908400098527886E0F7030069857D2E4169EE7"
RENT = ("withdraw", OWNER_AT, "1.5", "--from", "seller", "--yes", "--id", "rent")


def test_what_is_taken_out_is_sent_once_and_booked(world: World) -> None:
    before = world.keys()["seller"]
    sent = world.home.json(*RENT)
    assert (sent["amount"], sent["asset"], sent["to"]) == ("1.5", "COASE", OWNER_AT.lower())
    assert world.home.json(*RENT) == sent
    other = world.home.call(
        "withdraw", OWNER_AT, "2", "--from", "seller", "--yes", "--id", "rent", code=2
    )
    assert "stands for another withdrawal" in other.stderr
    coin = ("withdraw", OWNER_AT, "0.25", "--from", before["address"], "--coin", "-y")
    assert "sent 0.25 coin" in world.home.call(*coin).stdout
    after = world.keys()["seller"]
    assert int(before["balance_units"]) - int(after["balance_units"]) == 1_500_000
    booked = [row for row in postings(world) if row["account"] == "withdrawn"]
    assert [(row["amount"], row["asset"]) for row in booked] == [("1.5", "COASE"), ("0.25", "coin")]
    assert {row["agent"] for row in booked} == {"seller"}
    assert world.home.json("audit")["differences"] == []


def test_all_is_what_it_was_when_it_was_ordered(world: World) -> None:
    place = str(world.market.place("purse"))
    world.home.call("keys", "new", "purse", "--state", place)
    (key,) = world.home.json("wallet", "--state", place)["keys"]
    world.portal.call(world.market.fund, key["address"])
    order = ("withdraw", OWNER_AT, "all", "--yes", "--id", "last", "--state", place)
    sent = world.home.json(*order)
    assert sent["units"] == str(FUNDS)
    assert world.home.json(*order) == sent
    assert "amount is 0" in world.home.call(*order[:4], "--state", place, code=2).stderr
    (after,) = world.home.json("wallet", "--state", place)["keys"]
    assert after["balance"] == "0"


def test_beside_a_node_that_runs_it_is_the_node_that_sends(world: World) -> None:
    with world.node("swarm") as node:
        world.portal.call(world.market.join, node, scribe("seller"))
        sent = world.home.json("withdraw", OWNER_AT, "0.5", "--from", "seller", "--yes")
        assert sent["tx"]
        much = world.home.call("withdraw", OWNER_AT, "99", "--from", "seller", "--yes", code=2)
        assert "less than 99" in much.stderr
        assert world.home.json("audit")["differences"] == []


def test_who_holds_the_key_and_takes_no_orders_is_named(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(withdraw_command, "TAKEN_MAX_S", 0.3)
    place = world.market.place("swarm")
    held = StateDirectory(place)
    try:
        done = world.home.call("withdraw", OWNER_AT, "1", "--from", "seller", "--yes", code=2)
    finally:
        held.release()
    assert "takes no orders: nothing was sent" in done.stderr
    assert list((place / "orders").iterdir()) == []


def test_what_is_not_sent(world: World) -> None:
    def refused(*args: str) -> str:
        return world.home.call("withdraw", *args, code=2).stderr

    before = world.keys()
    seller = ("--from", "seller", "--yes")
    mistyped = OWNER_AT.replace("E7", "e7")
    assert "mistyped" in refused(mistyped, "1", *seller)
    assert "no address" in refused("bob", "1", *seller)
    assert "zero address" in refused("0x" + "00" * 20, "1", *seller)
    assert "the token's own contract" in refused(world.market.network.token, "1", *seller)
    assert "the escrow" in refused(world.market.network.escrow, "1", *seller)
    assert "the very key" in refused(before["seller"]["address"], "1", *seller)
    assert "the amount is 0" in refused(OWNER_AT, "0", *seller)
    assert "plain decimal" in refused(OWNER_AT, "1e3", *seller)
    assert "finer than" in refused(OWNER_AT, "0.0000001", *seller)
    assert "less than 1000" in refused(OWNER_AT, "1000", *seller)
    assert "must stay" in refused(OWNER_AT, "all", "--coin", *seller)
    assert "name one of your keys" in refused(OWNER_AT, "1", "--yes")
    assert "name one of your keys" in refused(OWNER_AT, "1", "--yes", "--from", "nobody")
    assert "add --yes" in refused(OWNER_AT, "1", "--from", "seller")
    assert "no id for a withdrawal" in refused(OWNER_AT, "1", "--id", "../x", *seller)
    after = world.keys()
    assert {k: v["balance_units"] for k, v in after.items()} == {
        k: v["balance_units"] for k, v in before.items()
    }


def test_at_a_terminal_it_asks(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passphrase, "can_ask", lambda: True)
    order = ("withdraw", OWNER_AT, "0.01", "--from", "seller")
    asked = world.home.call(*order, stdin=b"n\n", code=2).stderr
    assert f"send 0.01 COASE from seller {world.addresses['seller']} to {OWNER_AT}?" in asked
    assert "nothing was sent" in asked
    assert "sent 0.01 COASE" in world.home.call(*order, stdin=b"y\n").stdout


PLANTED_ORDERS = {
    "another amount": (
        "UPDATE records SET data = replace(CAST(data AS TEXT), '1500000', '1400000')"
        " WHERE kind = 'withdraw'",
        "withdraw:rent was to pay 1400000 units",
    ),
    "no order": ("DELETE FROM records WHERE kind = 'withdraw'", "was paid, and not ordered"),
    "no payment": (
        "DELETE FROM transactions WHERE effect_id LIKE 'withdraw:rent@%'",
        "withdraw:rent is paid by the journal, not by the chain",
    ),
}


@pytest.mark.parametrize("case", PLANTED_ORDERS)
def test_a_withdrawal_that_was_tampered_with_is_named(
    world: World, tmp_path: Path, case: str
) -> None:
    assert world.home.json(*RENT)["tx"]  # Paid before, or paid now: once in any case.
    copy = copied(world, tmp_path)
    statement, said = PLANTED_ORDERS[case]
    alter(copy, statement)
    found = differences(world, copy)
    assert any(said in line for line in found), found


# ---- budgets -----------------------------------------------------------------------------------


def limits(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (row,) = [row for row in rows if row["agent"] == name]
    found: dict[str, Any] = row["limits"]
    return found


def test_a_budget_is_shown_and_changed_and_counts_what_was_spent(world: World) -> None:
    home = world.home
    rows = home.json("budget", "buyer")
    assert limits(rows, "buyer") == {}
    # Two were paid in full, and a bond was lost.
    assert (rows[0]["spent"], rows[0]["promised"], rows[0]["paused"]) == ("0.042", "0", "")
    told = home.call("budget", "buyer", "--total", "1", "--per-day", "0.5")
    assert "from the next purchase on" in told.stderr
    rows = home.json("budget", "buyer")
    assert limits(rows, "buyer") == {
        "total": {"limit": "1", "left": "0.958"},
        "per_day": {"limit": "0.5", "left": "0.458"},
    }
    home.call("budget", "buyer", "--per-day", "none", "--total", "0.04")
    rows = home.json("budget", "buyer")
    assert limits(rows, "buyer") == {"total": {"limit": "0.04", "left": "0"}}
    assert rows[0]["paused"] == "buyer: in all is spent"
    assert "paused: buyer: buyer: in all is spent" in home.call("budget").stdout
    home.call("budget", "buyer", "--swarm", "--per-hour", "0.01")
    rows = home.json("budget", "seller", "--swarm")
    assert limits(rows, "")["per_hour"]["limit"] == "0.01"
    assert rows[1]["paused"].startswith("swarm: per hour is spent until 20")
    home.call("budget", "buyer", "--per-day", "declared", "--total", "declared")
    home.call("budget", "buyer", "--swarm", "--per-hour", "none")
    assert limits(home.json("budget", "buyer"), "buyer") == {}
    # An owner is not bound by it, and an agent is.
    home.call("budget", "buyer", "--total", "0")
    assert home.json("withdraw", OWNER_AT, "0.1", "--from", "buyer", "--yes")["tx"]
    home.call("budget", "buyer", "--total", "declared")


def test_a_budget_that_is_none_changes_nothing(world: World) -> None:
    def refused(*args: str) -> str:
        return world.home.call("budget", *args, code=2).stderr

    before = world.home.json("budget")
    assert "no agent 'nobody'" in refused("nobody", "--total", "1")
    assert "plain decimal" in refused("buyer", "--total=-1")
    assert "finer" in refused("buyer", "--per-deal", "0.00000001")
    assert "a change is for one" in refused("--total", "1")
    assert world.home.json("budget") == before


# ---- nothing there -----------------------------------------------------------------------------


def test_without_a_network_or_a_chain(tmp_path: Path, world: World) -> None:
    nobody = Home(tmp_path / "home")
    for command in ("wallet", "export", "audit", "budget"):
        assert "coase up" in nobody.call(command, code=2).stderr
        gone = str(tmp_path / "gone")
        assert "no directory of a node" in world.home.call(command, "--state", gone, code=2).stderr


def test_a_user_without_keys(tmp_path: Path, world: World) -> None:
    shutil.copytree(world.home.path, tmp_path / "home", ignore=shutil.ignore_patterns("nodes"))
    fresh = Home(tmp_path / "home")
    assert "no keys yet" in fresh.call("wallet").stdout
    assert fresh.json("wallet")["keys"] == []
    assert fresh.json("export") == []
    assert fresh.json("audit")["agree"]
