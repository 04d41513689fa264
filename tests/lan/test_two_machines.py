"""Two machines, one market: each is a user of this one, with processes and a state of its own.

They meet over loopback, where mDNS and routes are the real ones; `test_namespaces.py` gives each
an interface of its own.
"""

from __future__ import annotations

import re
import signal
import stat
from typing import TYPE_CHECKING, Any

import pytest

from coase.agents.card import LanStateFile
from coase.protocol.joincode import JoinCode
from tests.tools.commands import PATIENCE_S, ROOT, Home, Running, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

# Every command is a process that loads for some seconds where many run beside it.
pytestmark = [pytest.mark.xdist_group("lan"), pytest.mark.timeout(400)]

HERE = ("--interface", "127.0.0.1")


class Pair:
    """The machine that began, with a seller, and one that joined it."""

    def __init__(self, first: Home, second: Home) -> None:
        self.first, self.second = first, second
        self.up_arguments = ("up", "--lan", "--state", str(first.path / "state"), *HERE)

    def code(self) -> str:
        """The join code, from where it is kept."""
        kept = LanStateFile(self.first.path / "state").load()
        assert kept is not None
        return kept.code

    def lan(self, home: Home) -> Any:
        """What one of them sees of the network."""
        return home.json("lan", "status")

    def see_each_other(self) -> bool:
        """Whether each has met the other."""
        return all(len(self.lan(home)["met"]) == 1 for home in (self.first, self.second))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    place = tmp_path_factory.mktemp("lan")
    return Pair(Home(place / "first"), Home(place / "second"))


@pytest.fixture(scope="module")
def up(pair: Pair) -> Iterator[list[Running]]:
    """The running ``coase up --lan``; a test that ends it puts another one in its place."""
    with pair.first.running(*pair.up_arguments) as running:
        running.ready()
        kept = [running]
        yield kept
        kept[-1].end()


@pytest.fixture(scope="module")
def seller(pair: Pair, up: list[Running]) -> Iterator[Running]:
    path = str(ROOT / "examples" / "inference.py")
    with pair.first.running("agent", "run", path, "--engine", "echo", "--json") as agent:
        agent.ready()
        yield agent


@pytest.fixture(scope="module")
def member(pair: Pair, up: list[Running]) -> Iterator[Running]:
    with pair.second.running("join", pair.code(), *HERE) as running:
        running.ready()
        yield running


def page() -> str:
    """What the README shows of two machines."""
    after = (ROOT / "README.md").read_text().partition("<!-- tests/lan/test_two_machines.py -->")[2]
    return after.partition("```text\n")[2].partition("```")[0]


def shape(line: str) -> str:
    """A line without what differs from run to run: codes, names, ids, addresses and times."""
    line = re.sub(r"(?:[0-9A-Z]{4}-){6}[0-9A-Z]{4}", "CODE", line)
    line = re.sub(r"\S+ \(chain\)", "NAME (chain)", line)
    line = re.sub(r"(?:lan-[0-9a-f]{12}|\b[0-9a-f]{8}\b)", "ID", line)
    line = re.sub(
        r"(?:(?:\[[0-9a-f:]+\]|[0-9a-f]*::?[0-9a-f:]+|[0-9.]{7,})(?::\d+)?,? )+", "AT ", line
    )
    line = re.sub(r"[-+]?\d+(?:\.\d+)+", "N", line)
    line = re.sub(r"\bport \d+", "port N", line)
    return " ".join(re.sub("─+", "─", line).split())


def ask(home: Home, question: str, *, code: int = 0) -> Any:
    return home.call("ask", question, "--max-price", "0.01", code=code)


def answered(home: Home, question: str) -> bool:
    """Return whether somebody offered and answered; nobody may be there yet."""
    try:
        return bool(ask(home, question).stdout == question + "\n")
    except AssertionError as error:
        if "nobody made an offer" not in str(error):
            raise
        return False


def test_who_asks_on_one_machine_is_answered_and_sells_on_the_other(
    pair: Pair, seller: Running, member: Running
) -> None:
    assert ask(pair.second, "Does it reach you?").stdout == "Does it reach you?\n"
    seller.until_said("oracle: earned ")


def test_both_see_one_market(pair: Pair, seller: Running, member: Running) -> None:
    here, there = pair.first.json("status"), pair.second.json("status")
    assert [seller["agent"] for seller in there["sellers"]] == ["oracle"]
    assert there["sellers"] == here["sellers"]
    for same in ("net", "chain_id", "escrow", "token", "arbiters"):
        assert there["network"][same] == here["network"][same]
    # Each with a broker and an endpoint of its own, neither of them beyond this machine.
    assert there["network"]["nats"] != here["network"]["nats"]
    assert there["network"]["rpc"] != here["network"]["rpc"]
    assert {there["network"][url].rpartition(":")[0] for url in ("nats", "rpc")} == {
        "nats://127.0.0.1",
        "http://127.0.0.1",
    }


def test_each_knows_the_other(pair: Pair, member: Running) -> None:
    eventually(pair.see_each_other)
    here, there = pair.lan(pair.first), pair.lan(pair.second)
    assert (here["met"][0]["node"], there["met"][0]["node"]) == (there["node"], here["node"])
    assert (here["met"][0]["chain"], there["met"][0]["chain"]) == (False, True)
    assert there["met"][0]["version"] == here["version"]
    assert there["met"][0]["rtt_ms"] > 0
    screen = pair.second.call("lan", "status").stdout
    assert here["node"][:8] in screen
    assert "(chain)" in screen


def test_the_code_is_for_its_owner_and_in_no_log(pair: Pair, member: Running) -> None:
    code = pair.code()
    assert JoinCode.parse(code).text == code
    for home, kept in ((pair.first, "state"), (pair.second, "lan")):
        place = home.path / kept
        assert stat.S_IMODE((place / "lan.json").stat().st_mode) == 0o600
        logs = [*place.rglob("*.log*"), home.path / "network.json"]
        assert len(logs) > 1
        for log in logs:
            assert code not in log.read_text(errors="replace"), log
    assert pair.first.json("lan", "code") == {"code": code}


def test_the_readme_shows_what_is_seen(pair: Pair, up: list[Running], member: Running) -> None:
    eventually(pair.see_each_other)
    member.until_said("ready")
    screen = pair.second.run("lan", "status").stdout
    seen = {shape(line) for line in (*up[0].said().splitlines(), *member.said().splitlines())}
    seen |= {shape(line) for line in screen.splitlines()}
    shown = [line for line in page().splitlines() if line.strip() and "$ " not in line]
    assert len(shown) > 6
    assert [line for line in shown if shape(line) not in seen] == []


def test_another_code_is_another_network(pair: Pair, member: Running) -> None:
    other = Home(pair.first.path.parent / "stranger")
    code = JoinCode.of(b"another network!").text
    with other.running("join", code, *HERE) as stranger:
        stranger.until_said("with another code")
        heard = {row["node"]: row for row in pair.lan(pair.first)["heard"]}
        assert [row["joined"] for row in heard.values() if row["ours"]] == [True]
        assert stranger.end() == 130
    assert "ready" not in stranger.said()
    assert not (other.path / "network.json").exists()


def test_what_is_mistyped_is_named_and_never_shown(pair: Pair, up: list[Running]) -> None:
    other = Home(pair.first.path.parent / "mistyped")
    code = pair.code()
    wrong = code[:-1] + ("0" if code[-1] != "0" else "1")
    for typed in ((wrong,), (), ("-",)):
        done = other.call("join", *typed, *HERE, stdin=f"{wrong}\n".encode(), code=2)
        assert "typing error" in done.stderr
        assert wrong not in done.stderr
    assert "28 letters" in other.call("join", "1234", code=2).stderr
    assert "no join code" in other.call("join", code=2).stderr
    assert not (other.path / "lan" / "lan.json").exists()


def test_one_state_is_for_one_process(pair: Pair, member: Running) -> None:
    other = Home(pair.second.path, {"COASE_NETWORK": str(pair.second.path / "other.json")})
    assert "is held by process" in other.call("join", pair.code(), *HERE, code=2).stderr
    done = Home(pair.first.path.parent / "third").call(*pair.up_arguments, code=2)
    assert "is held by process" in done.stderr


def test_a_taken_port_is_named(pair: Pair, up: list[Running]) -> None:
    port = str(pair.lan(pair.first)["port"])
    other = Home(pair.first.path.parent / "port")
    assert port in other.call("join", pair.code(), *HERE, "--lan-port", port, code=2).stderr


def test_without_the_chains_machine_members_wait_and_go_on_when_it_is_back(
    pair: Pair, seller: Running, up: list[Running], member: Running
) -> None:
    assert up[-1].end(signal.SIGKILL) == -signal.SIGKILL
    # The broker and the chain go down with it; here everything is still there, but the chain.
    eventually(lambda: not pair.lan(pair.second)["met"])
    assert "machine that holds the chain" in pair.second.call("status", code=69).stderr
    (pair.first.path / "network.json").unlink()
    with pair.first.running(*pair.up_arguments) as again:
        again.ready()
        up.append(again)
        eventually(pair.see_each_other)
        # Brokers see each other before an agent of theirs has found its own again.
        eventually(lambda: answered(pair.second, "And now?"))
        again.end()


def test_who_leaves_needs_the_code_again(pair: Pair, member: Running) -> None:
    assert pair.second.json("leave") == {"left": True, "ended": True}
    assert member.process.wait(PATIENCE_S) == 0
    kept = pair.second.path / "lan"
    assert not (kept / "lan.json").exists()
    assert not (kept / "mesh").exists()
    assert "no join code" in pair.second.call("join", *HERE, code=2).stderr
    assert "is in no network" in pair.second.call("leave", code=2).stderr


def test_who_holds_the_chain_can_neither_leave_nor_join(pair: Pair, up: list[Running]) -> None:
    for running in up:
        running.end()
    state, other = str(pair.first.path / "state"), Home(pair.first.path.parent / "holder")
    assert "--new-code" in other.call("leave", "--state", state, code=2).stderr
    done = other.call("join", pair.code(), "--state", state, code=2)
    assert "holds a chain of its own" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--open",), "--open belongs to --lan"),
        (("--new-code",), "--new-code belongs to --lan"),
        (("--lan-port", "5"), "--lan-port belongs to --lan"),
        (("--lan", "--open", "--new-code"), "no code"),
        (("--lan", "--interface", "192.0.2.77"), "192.0.2.77"),
        (("--lan", "--peer", "nonsense"), "HOST:PORT"),
    ],
)
def test_what_cannot_work_is_said(pair: Pair, arguments: tuple[str, ...], said: str) -> None:
    other = Home(pair.first.path.parent / "wrong")
    assert said in other.call("up", *arguments, code=2).stderr
    assert not (other.path / "network.json").exists()
