"""``coase keeper`` ends the deals of people who have gone, from a key and a journal of its own."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from coase.agents.backends.sqlite import StateDirectory
from coase.agents.config import NatsAddress, Network, save_network
from coase.escrow.backends.evm.settlement import EvmSettlement
from coase.escrow.ports import MemoryTxStore
from coase.protocol.effects import Open, Submit
from coase.protocol.identity import Identity, keccak256
from coase.protocol.terms import Terms, Work
from coase.protocol.types import How
from tests.tools.commands import Home, eventually
from tests.tools.test_cli_deploy import Chain, chain_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BUYER, SELLER = (Identity(bytes((n,)) * 32) for n in (0x61, 0x62))
RESULT = keccak256(b"result")
PRICE = 100


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    with chain_of(tmp_path_factory.mktemp("chain") / "place.json") as chain:
        yield chain


@pytest.fixture
def home(tmp_path: Path, chain: Chain) -> Home:
    """A user with a network file, and a broker in it that does not exist."""
    home = Home(tmp_path / "home")
    facts = chain.facts
    network = Network(
        nats=NatsAddress(url="nats://127.0.0.1:1"),
        rpc=chain.rpc,
        chain_id=facts["chain_id"],
        token=facts["token"],
        factory=facts["factory"],
        escrow=facts["escrow"],
        faucet=True,
    )
    save_network(network, home.path / "network.json")
    return home


def time_of(chain: Chain) -> int:
    return int(chain.ask("eth_getBlockByNumber", "latest", False)["timestamp"], 16)


async def deals(chain: Chain, first_nonce: int) -> tuple[Terms, Terms]:
    """Two deals, one that was never delivered and one whose buyer has gone."""
    settlement = await connect(chain)
    for who in (BUYER, SELLER):
        chain.ask("coase_faucet", who.address, hex(1000), hex(10**18))
    start_s = time_of(chain)
    work = Terms(
        buyer=BUYER.address, seller=SELLER.address, asset=settlement.asset.token,
        price_units=PRICE, work=Work("echo-00000000"), lock_by_s=start_s + 50,
        deliver_by_s=start_s + 100, dispute_s=20, nonce=first_nonce,
    )  # fmt: skip
    both = work, replace(work, nonce=first_nonce + 1)
    for terms in both:
        signature = SELLER.sign(terms.digest(settlement.domain))
        await settlement.perform(f"open-{terms.nonce}", Open(terms, signature), BUYER)
    await settlement.perform("submit", Submit(both[1], RESULT), SELLER)
    await settlement.close()
    return both


async def connect(chain: Chain) -> EvmSettlement:
    return await EvmSettlement.connect(
        chain.rpc, escrow=chain.facts["escrow"], store=MemoryTxStore(), poll_s=0.005
    )


async def how(chain: Chain, *all_terms: Terms) -> list[How]:
    settlement = await connect(chain)
    ids = [terms.digest(settlement.domain) for terms in all_terms]
    views = await settlement.jobs(ids)
    await settlement.close()
    return [views[job_id].how for job_id in ids]


def wait(chain: Chain, time_s: int) -> None:
    chain.ask("coase_setTime", hex(time_s))
    chain.ask("coase_mine", "0x1")


def test_one_look_ends_what_is_due_and_nothing_else(home: Home, chain: Chain) -> None:
    silent, delivered = anyio.run(deals, chain, 1)
    assert home.json("keeper", "--once")["poked"] == []
    wait(chain, silent.deliver_by_s + 11)
    said = home.json("keeper", "--once")
    assert [poked["phase"] for poked in said["poked"]] in (
        ["working", "delivered"],
        ["delivered", "working"],
    )
    assert (said["open"], said["refused"]) == (0, [])
    assert anyio.run(how, chain, silent, delivered) == [How.UNDELIVERED, How.SILENT_BUYER]
    again = home.json("keeper", "--once")
    assert (again["poked"], again["keeper"]) == ([], said["keeper"])
    assert "0 deals ended" in home.call("keeper", "--once").stdout


@pytest.mark.slow
def test_it_goes_on_until_it_is_told_to_end_and_after_a_kill(home: Home, chain: Chain) -> None:
    silent, delivered = anyio.run(deals, chain, 11)
    late_s = silent.deliver_by_s + 6
    try:
        with home.running("keeper", "--grace", "5", "--json") as running:
            keeper = running.ready()["keeper"]
            chain.ask("coase_setAutomatic", False)
            wait(chain, late_s)
            eventually(lambda: chain.count(keeper, "pending") >= 1)
            running.process.kill()
            running.process.wait()
    finally:
        chain.ask("coase_setAutomatic", True)
    chain.ask("coase_mine", "0x1")
    sent = chain.count(keeper)
    assert sent >= 1
    with home.running("keeper", "--grace", "5", "--json") as running:
        assert running.ready()["keeper"] == keeper
        while anyio.run(how, chain, silent, delivered) != [How.UNDELIVERED, How.SILENT_BUYER]:
            chain.ask("coase_mine", "0x1")
        assert running.end() == 128 + signal.SIGINT
    assert chain.count(keeper) == 2  # One for each deal, however often it was begun.


def test_what_it_needs_is_said(home: Home, chain: Chain, tmp_path: Path) -> None:
    state = tmp_path / "keeper"
    held = StateDirectory(state)
    try:
        assert (
            "is held by process"
            in home.call("keeper", "--once", "--state", str(state), code=2).stderr
        )
    finally:
        held.release()
    public: dict[str, Any] = json.loads((home.path / "network.json").read_text())
    public |= {"faucet": False, "head_age_max_s": 0}
    (home.path / "network.json").write_text(json.dumps(public))
    secret = tmp_path / "phrase"
    secret.write_text("correct horse battery staple")
    secret.chmod(0o600)
    home.environment["COASE_PASSPHRASE_FILE"] = str(secret)
    said = home.call("keeper", "--once", "--state", str(state), code=2).stderr
    assert "has none of the chain's coin to pay for gas" in said
