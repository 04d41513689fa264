"""``coase deploy`` on an embedded chain, and on anvil where it is: planned, killed, repeated."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

import pytest

from coase.agents.config import load_network
from coase.escrow.backends.evm.artifacts import artifact
from coase.escrow.backends.evm.deploy import created_by_proxy, escrow_address
from coase.escrow.backends.evm.fixed import IDENTITY_REGISTRY
from coase.escrow.backends.keystore import names_in
from coase.escrow.presets import BASE, DEPLOYER_PROXY, DEPLOYER_PROXY_CODE
from coase.escrow.voucher import CHANNELS
from tests.escrow.odd_tokens import PLAIN
from tests.tools.commands import PATIENCE_S, Home, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FACTORY = created_by_proxy(artifact("EscrowFactory").bytecode)


@dataclass
class Chain:
    """An embedded chain in a process of its own, whose blocks are the test's."""

    rpc: str
    facts: dict[str, Any]

    def ask(self, method: str, *params: Any) -> Any:
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
        headers = {"Content-Type": "application/json"}
        request = Request(self.rpc, body.encode(), headers)  # noqa: S310 - loopback
        with urlopen(request, timeout=PATIENCE_S) as answer:  # noqa: S310
            return json.load(answer)["result"]

    def make_fresh(self) -> None:
        """Make a block of a time that is believed now, and for a while longer."""
        self.ask("coase_setTime", hex(int(time.time()) + 45))
        self.ask("coase_mine", "0x1")

    def count(self, address: str, tag: str = "latest") -> int:
        return int(self.ask("eth_getTransactionCount", address, tag), 16)


@contextmanager
def chain_of(path: Path, *options: str) -> Iterator[Chain]:
    place = {DEPLOYER_PROXY: {"code": "0x" + DEPLOYER_PROXY_CODE.hex()}}
    path.write_text(json.dumps(place))
    process = subprocess.Popen(
        [sys.executable, "-m", "coase.escrow.backends.devchain", "--with-parent", "--manual",
         "--place", str(path), *options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        facts = json.loads(process.stdout.readline())
        yield Chain(facts["rpc"], facts)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    with chain_of(tmp_path_factory.mktemp("chain") / "place.json") as chain:
        yield chain


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def test_planned_made_found_again_and_written_for_others(home: Home, chain: Chain) -> None:
    deploying = ("deploy", "--rpc", chain.rpc)
    told = home.json(*deploying, "--dry-run")
    # What everybody knows by its address is on this chain from its first block.
    there = {piece["what"]: piece["there"] for piece in told["pieces"]}
    assert [what for what in there if not there[what]] == ["token", "factory", "escrow"]
    assert there["channels"]
    assert there["reputation_registry"]
    assert told["pieces"][1]["address"] == FACTORY
    assert int(told["cost_max_wei"]) == int(told["gas_price_max_wei"]) * told["gas"] > 0
    assert not home.path.exists()  # A plan leaves nothing behind.

    file = home.path.parent / "network.json"
    arbiter = "0x" + "AB" * 20
    made = home.json(*deploying, "--network", str(file), "--arbiter", arbiter, "--net", "ours")
    assert made["factory"] == FACTORY
    assert made["escrow"] == escrow_address(FACTORY, made["token"])
    assert 0 < int(made["paid_wei"]) <= 10**18
    assert file.stat().st_mode & 0o777 == 0o600
    network = load_network(file)
    assert (network.net, network.arbiters) == ("ours", (arbiter.lower(),))
    assert (network.token, network.escrow) == (made["token"], made["escrow"])
    assert (network.rpc, network.from_block) == (chain.rpc, made["from_block"])
    assert not network.faucet
    assert (network.channels, network.vault) == (CHANNELS, "")
    assert network.identity_registry == IDENTITY_REGISTRY

    again = home.json(*deploying, "--network", str(file))
    assert all(piece["there"] for piece in again["pieces"])
    assert again["paid_wei"] == "0"
    assert load_network(file) == network
    shown = home.call(*deploying, "--dry-run").stdout
    assert shown.count("there, checked") == len(told["pieces"])
    assert "nothing was sent; the missing parts cost at most 0.000000" in shown

    # The same file for another network would send its readers elsewhere.
    other = home.call(*deploying, "--token", chain.facts["token"], "--network", str(file), code=2)
    assert "describes another network" in other.stderr
    # Later beside the same escrow: the file learns of it, and keeps what it knew.
    staked = home.json(*deploying, "--stakes", "--network", str(file))
    assert load_network(file).vault == staked["vault"] != ""
    assert load_network(file).arbiters == network.arbiters
    home.json(*deploying, "--network", str(file))
    assert load_network(file).panels == staked["panels"] != ""
    theirs = home.json(*deploying, "--token", chain.facts["token"])
    assert theirs["factory"] == FACTORY
    assert theirs["escrow"] == escrow_address(FACTORY, chain.facts["token"])


@pytest.mark.slow
def test_killed_in_mid_step_it_goes_on_where_it_was(home: Home, chain: Chain) -> None:
    state = home.path / "state"
    deploying = ("deploy", "--rpc", chain.rpc, "--state", str(state))

    def address() -> str:
        return names_in(state).get("deployer", "")

    def waits() -> bool:
        """Whether the deployer's first transaction waits for a block; it gets its coin by one."""
        if not address():
            return False
        if int(chain.ask("eth_getBalance", address(), "latest"), 16) == 0:
            chain.ask("coase_mine", "0x1")
        return chain.count(address(), "pending") == 1

    chain.ask("coase_setAutomatic", False)
    try:
        with home.running(*deploying) as running:
            eventually(waits)
            running.process.kill()
            assert running.process.wait(PATIENCE_S) == -signal.SIGKILL
        assert chain.count(address()) == 0
        chain.ask("coase_mine", "0x1")
    finally:
        chain.ask("coase_setAutomatic", True)
    made = home.json(*deploying)
    assert chain.count(address()) in (2, 3)  # Each step once; the factory may be there before.
    code = bytes.fromhex(chain.ask("eth_getCode", made["escrow"], "latest")[2:])
    assert artifact("JobEscrow").same_code(code)
    assert home.json(*deploying)["paid_wei"] == "0"


def test_what_cannot_be_is_said_before_anything_is_sent(home: Home, chain: Chain) -> None:
    def refused(*options: str, code: int = 2) -> str:
        return home.call("deploy", "--rpc", chain.rpc, *options, code=code).stderr

    assert "serves chain 31337, and 8453 was expected" in refused("--preset", "base")
    assert "there is no preset 'moon'" in refused("--preset", "moon")
    assert "give one of them" in refused("--new-token", "--token", PLAIN)
    assert "is no address" in refused("--token", "0x12")
    assert "is no token" in refused("--token", "0x" + "12" * 20)
    file = home.path.parent / "file.json"
    file.write_text("{}")
    file.chmod(0o600)
    assert str(file) in refused("--network", str(file))
    assert not (home.path / "deploy").exists()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
        away = home.call("deploy", "--rpc", nowhere, code=69)
    assert "cannot be reached" in away.stderr


def test_on_a_chain_with_real_money_nothing_is_guessed(home: Home, tmp_path: Path) -> None:
    secret = tmp_path / "phrase"
    secret.write_text("correct horse battery staple")
    secret.chmod(0o600)
    home.environment["COASE_PASSPHRASE_FILE"] = str(secret)
    with chain_of(tmp_path / "place.json", "--chain-id", "8453") as chain:
        # Its newest block is years old: nothing is begun with that.
        token = chain.facts["token"]
        usdc = ("deploy", "--rpc", chain.rpc, "--preset", "base", "--token", token)
        assert "is stale: its newest block" in home.call(*usdc, code=69).stderr

        def refused(*options: str, code: int = 2) -> str:
            chain.make_fresh()
            return home.call("deploy", "--rpc", chain.rpc, *options, code=code).stderr

        assert "say --preset base if that is meant" in refused()
        assert "makes a token of no worth" in refused("--preset", "base", "--new-token")
        # USDC is not on this chain, whatever its number says.
        assert BASE.token is not None
        assert f"at {BASE.token.address} on chain 8453 is no token" in refused("--preset", "base")
        poor = refused("--preset", "base", "--token", token)
        assert "of the coin of Base (8453) and has 0.000000: send it the rest" in poor
        deployer = names_in(home.path / "deploy" / "8453")["deployer"]
        assert deployer in poor
        assert chain.count(deployer, "pending") == 0
        # Once it was sent some, the same command goes through.
        chain.make_fresh()
        chain.ask("coase_faucet", deployer, "0x0", hex(10**18))
        made = home.json(*usdc)
        assert made["escrow"] == escrow_address(FACTORY, token)


@pytest.mark.live
@pytest.mark.skipif(shutil.which("anvil") is None, reason="anvil is not on the PATH")
def test_on_anvil(home: Home) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rpc = f"http://127.0.0.1:{port}"
    anvil = subprocess.Popen(["anvil", "--port", str(port), "--silent"], stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: home.run("deploy", "--rpc", rpc, "--dry-run", code=None).returncode == 0)
        made = home.json("deploy", "--rpc", rpc)
        assert made["factory"] == FACTORY  # anvil is born with the proxy.
        # Whoever runs it may put code anywhere: so where stock clients look for it.
        assert (made["channels"], made["identity_registry"]) == (CHANNELS, IDENTITY_REGISTRY)
        assert home.json("deploy", "--rpc", rpc)["paid_wei"] == "0"
    finally:
        anvil.kill()
        anvil.wait()
