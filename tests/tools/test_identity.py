"""``coase identity`` and ``coase reputation`` on the embedded chain, as their user calls them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
from anyio.from_thread import start_blocking_portal
from eth_account import Account

from coase.agents.backends.sqlite import StateDirectory
from coase.agents.beside import open_beside
from coase.agents.config import save_network
from coase.agents.reputation import Repute, Word
from coase.agents.wiring import view_settlement
from coase.agents.wishes import wishes_in
from coase.escrow.feedback import (
    AgentRecord,
    Counted,
    FeedbackEntry,
    Flaw,
    GiveFeedback,
    PaymentLog,
    data_uri,
    registry_domain,
)
from coase.protocol.identity import Identity, keccak256
from coase.protocol.types import How
from coase.tools.cli import identity_commands
from coase.tools.cli.identity_commands import _document as told_of
from coase.tools.cli.identity_commands import _tell
from coase.tools.cli.reputation_command import _WHY, _document, _show
from tests.agents.realmarket import RealMarket, real_market
from tests.tools.commands import Home

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyio.from_thread import BlockingPortal

pytestmark = pytest.mark.xdist_group("identity")

STRANGER = Identity(bytes([0x71]) * 32)
SLY = b'{"name": "a\\n  owner   0xbad", "description": "\\u001b[2J\\u202e"}'
FAR = Account.from_key(bytes([0x72]) * 32)


@dataclass(slots=True)
class User:
    """Somebody with two keys on a market of his own, none of which is registered yet."""

    home: Home
    market: RealMarket
    portal: BlockingPortal
    keys: dict[str, str]

    def show(self, who: str) -> Any:
        (found,) = self.home.json("identity", "show", who)["agents"]
        return found

    def refused(self, *args: str, code: int = 2) -> str:
        done = self.home.call(*args, code=code)
        return " ".join((done.stderr + done.stdout).split())


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    home = Home(tmp_path_factory.mktemp("identity") / "home")
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(real_market(home.path)) as market,
    ):
        portal.call(market.fund, STRANGER.address)
        keys = {name: home.json("keys", "new", name)["address"] for name in ("oracle", "treasury")}
        yield User(home, market, portal, keys)


async def slander(market: RealMarket, agent_id: int) -> None:
    """Speak of an agent without having paid it."""
    settlement = await view_settlement(market.network)
    try:
        registries = (await open_beside(market.network, settlement)).registries
        assert registries is not None
        call = GiveFeedback(agent_id, 0, 0, "starred", "", "", data_uri(b"{}"), keccak256(b"{}"))
        await registries.perform("slander", call, STRANGER)
    finally:
        await settlement.close()


def test_registered_once_changed_linked_and_spoken_of(user: User) -> None:
    home, keys = user.home, user.keys
    assert "is not registered as an agent" in user.refused("identity", "show", "oracle")
    where = home.path.parent / "file.json"
    made = home.json(
        *("identity", "register", "oracle", "--description", "Answers."),
        *("--service", "web=https://oracle.example", "--file", str(where)),
    )
    assert (made["owner"], made["paid_to"]) == (keys["oracle"], keys["oracle"])
    assert made["file"] == json.loads(where.read_bytes())
    assert made["file"]["services"][1] == {"name": "web", "endpoint": "https://oracle.example"}
    # Another address of the file is one transaction more, and no other agent.
    state = user.market.dev.engine.state
    before = state().get_nonce(bytes.fromhex(keys["oracle"][2:]))
    uri = "https://oracle.example/agent.json"
    moved = home.json("identity", "register", "oracle", "--uri", uri)
    assert (moved["agent_id"], moved["uri"], moved["file"]) == (made["agent_id"], uri, None)
    assert state().get_nonce(bytes.fromhex(keys["oracle"][2:])) == before + 1

    # The key that sells becomes the wallet of the agent that another key owns.
    linked = home.json("identity", "link", "oracle", "treasury")
    assert (linked["owner"], linked["paid_to"]) == (keys["oracle"], keys["treasury"])
    assert user.show("treasury") == linked
    # A wallet whose key is not here signs elsewhere what is printed.
    typed = json.loads(home.call("identity", "link", "oracle", FAR.address).stdout)
    signed = Account.sign_typed_data(FAR.key, full_message=typed)
    deadline = typed["message"]["deadline"]
    agreed = ("--deadline", deadline, "--signature", signed.signature.hex())
    far = home.json("identity", "link", "oracle", FAR.address, *agreed)
    assert far["paid_to"] == FAR.address.lower()
    shown = home.call("identity", "show").stdout
    assert f"oracle is agent {made['agent_id']} of eip155:31337:" in shown
    assert FAR.address.lower() in shown

    user.portal.call(slander, user.market, made["agent_id"])
    assert "nobody whose word counts" in home.call("reputation", "oracle").stdout
    told = home.json("reputation", str(made["agent_id"]))
    assert (told["counted"], told["rejected"], told["rating_permille"]) == (0, 1, None)
    (entry,) = told["entries"]
    assert (entry["client"], entry["flaw"]) == (STRANGER.address, "bad_file")
    assert entry["why"] == "its file names no payment"


def test_what_is_wrong_is_said_with_what_to_do(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = user.refused
    assert "no agent 99 is registered" in refused("identity", "show", "99")
    assert "is not registered as an agent" in refused("reputation", STRANGER.address)
    assert "no key of yours" in refused("reputation", "somebody")
    assert "coase keys new nobody" in refused("identity", "register", "nobody")
    assert "no address that others" in refused("identity", "register", "oracle", "--uri", "ftp:")
    assert "KIND=ADDRESS" in refused("identity", "register", "oracle", "--service", "web")
    assert "comes with --deadline" in refused("identity", "link", "oracle", "x", "--deadline", "1")
    place = user.market.home / "nodes"
    held = StateDirectory(next(place.rglob("oracle")))
    try:
        assert "nobody else may use its key" in refused("identity", "link", "oracle", "treasury")
        monkeypatch.setattr(identity_commands, "GRANTED_MAX_S", 0.2)
        assert "does not answer: stop it" in refused("identity", "register", "oracle")
        assert wishes_in(held.path) == []
    finally:
        held.release()

    # Other networks: without registries, of another chain, and one that costs real coin.
    network = user.market.network
    path = user.market.home / "network.json"
    try:
        for change, code, why in (
            ({"identity_registry": ""}, 2, "names no registries of agents"),
            ({"chain_id": 31338}, 2, "serves chain 31337, and 31338 was expected"),
            ({"reputation_registry": network.token}, 2, "is no reputation registry"),
            ({"rpc": "http://127.0.0.1:1"}, 69, "cannot be reached"),
        ):
            save_network(network.model_copy(update=change), path)
            assert why in refused("reputation", "0", code=code)
        user.home.json("keys", "new", "poor")
        save_network(network.model_copy(update={"faucet": False}), path)
        assert "to pay for gas" in refused("identity", "register", "poor")
    finally:
        save_network(network, path)


def test_a_reputation_is_told_entry_by_entry(
    user: User, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = FeedbackEntry(
        *(3, STRANGER.address, 1, 975, 1, "starred", "summarise", "", "", b"", 9, 0, 1_800_000_000),
        tx_hash="0x1",
    )
    log = PaymentLog("", True, 8, 0, 1_800_000_000, to_seller_units=20_000, how=How.SETTLED)
    counted = Counted(entry, log, user.market.network.token, complains=False)
    words = (Word(entry, counted, None, 14_000), Word(entry, None, Flaw.OTHER_PAYER))
    repute = Repute(AgentRecord(3, STRANGER.address, STRANGER.address, ""), words)
    told = _document(user.market.network, repute, {STRANGER.address})
    assert (told["rating_permille"], told["counted"], told["rejected"]) == (975, 1, 1)
    first, second = told["entries"]
    assert (first["value"], first["paid"], first["weight"]) == ("97.5", "0.02", 14_000)
    assert (second["flaw"], second["why"]) == ("other_payer", "somebody else paid")
    assert told["prior"]["good_millionths"] > 30 * told["prior"]["bad_millionths"] > 0
    assert set(_WHY) == set(Flaw)
    # What strangers write commands no terminal, and takes no more than its line.
    spoken = replace(entry, tag2="[red]\x1b[2J\u202e" + "x" * 500)
    word = Word(spoken, replace(counted, entry=spoken), None, 14_000)
    _show(_document(user.market.network, replace(repute, words=(word,)), set()))
    record = AgentRecord(3, STRANGER.address, STRANGER.address, data_uri(SLY))
    _tell(told_of(registry_domain(31337, "0x" + "01" * 20), record), as_json=False)
    printed = capsys.readouterr().out
    assert "[red]" in printed
    assert all(char.isprintable() or char == "\n" for char in printed)
    assert not [line for line in printed.splitlines() if line.startswith("  owner   0xbad")]
