"""A network, a seller and buyers, each a command: what a newcomer does in the first hour."""

from __future__ import annotations

import json
import signal
import sqlite3
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from coase.agents.receipt import Receipt
from coase.tools.cli import arbiter_commands
from tests.tools.commands import ROOT, Home, Running, eventually, processes_below

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.xdist_group("cli")

SLOW = """
import anyio
from pydantic import BaseModel
from coase.agents import Agent, Job, Price

class Words(BaseModel):
    text: str

slow = Agent("slow")

@slow.offers("shout", price=Price.per_task("0.02"))
async def shout(task: Words, job: Job) -> Words:
    await anyio.sleep(3)
    return Words(text=task.text.upper())

@slow.offers("cheat", price=Price.per_task("0.01"))
async def cheat(task: Words, job: Job) -> Words:
    return Job.__new__(Job)

@slow.offers("costly", price=Price.per_task("150"))
async def costly(task: Words, job: Job) -> Words:
    return task

@slow.offers("tight", price=Price.per_task("95"))
async def tight(task: Words, job: Job) -> Words:
    return task
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    # A space in it, since somebody's has one.
    return Home(tmp_path_factory.mktemp("cli") / "my home")


@pytest.fixture(scope="module")
def market(home: Home) -> Iterator[Running]:
    with home.running("up", "--state", str(home.path / "state"), "--json") as up:
        up.ready()
        yield up


@pytest.fixture(scope="module")
def oracle(home: Home, market: Running) -> Iterator[Running]:
    path = str(ROOT / "examples" / "inference.py")
    with home.running("agent", "run", path, "--engine", "echo", "--json") as agent:
        agent.ready()
        yield agent


@pytest.fixture(scope="module")
def slow(home: Home, market: Running) -> Iterator[Running]:
    path = home.path / "slow.py"
    path.write_text(SLOW)
    with home.running("agent", "run", f"{path}:slow", "--engine", "none", "--json") as agent:
        agent.ready()
        yield agent


def test_the_network_file_is_for_its_owner_only(home: Home, market: Running) -> None:
    path = home.path / "network.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["pid"] == market.process.pid


def test_a_second_network_is_refused_and_leaves_the_first_alone(
    home: Home, market: Running
) -> None:
    done = home.call("up", code=2)
    assert f"process {market.process.pid}" in done.stderr
    assert (home.path / "network.json").exists()


def test_a_taken_port_is_named(home: Home, market: Running) -> None:
    known = json.loads((home.path / "network.json").read_text())
    other = Home(home.path, {"COASE_NETWORK": str(home.path / "other.json")})
    for option, url in (("--rpc-port", known["rpc"]), ("--nats-port", known["nats"]["url"])):
        port = url.rpartition(":")[2]
        assert port in other.call("up", option, port, code=2).stderr
    assert not (home.path / "other.json").exists()


def test_a_state_directory_serves_one_network(home: Home, market: Running) -> None:
    other = Home(home.path, {"COASE_NETWORK": str(home.path / "other.json")})
    done = other.call("up", "--state", str(home.path / "state"), code=2)
    assert f"process {market.process.pid}" in done.stderr


def test_ask_buys_inference_and_says_what_it_did(home: Home, oracle: Running) -> None:
    done = home.run("ask", "Why is the sky blue?", "--max-price", "0.01")
    assert done.stdout == "Why is the sky blue?\n"
    for said in ("asking for inference", "offers at", "agreed with", "locked", "paid"):
        assert said in done.stderr
    oracle.until_said("oracle: earned ")


def test_ask_prints_one_document(home: Home, oracle: Running) -> None:
    bought = home.json("ask", "Why?", "--max-price", "0.01")
    assert bought["result"]["text"] == "Why?"
    assert 0 < int(bought["paid_units"]) <= int(bought["price_units"]) <= 10_000
    rows = home.json("replay", bought["deal"])
    assert {row["side"] for row in rows} == {"buyer", "seller"}
    assert all(row["state"] == "settled" for row in rows)


def test_ask_reads_standard_input(home: Home, oracle: Running) -> None:
    done = home.call("ask", "-", "--max-price", "0.01", stdin="How grün?".encode())
    assert done.stdout == "How grün?\n"


def test_hire_sends_a_text_to_whoever_sells(home: Home, slow: Running) -> None:
    task = home.path / "task.txt"
    task.write_text("hello")
    assert (
        home.call("hire", "shout", "--input", str(task), "--max-price", "0.05").stdout == "HELLO\n"
    )
    task.write_text('{"text": "json"}')
    bought = home.json("hire", "shout", "--input", str(task), "--max-price", "0.05")
    assert bought["result"] == {"text": "JSON"}


def test_status_shows_network_sellers_and_deals(home: Home, oracle: Running, slow: Running) -> None:
    found = home.json("status")
    assert found["network"]["chain_id"] == 31337
    assert {"oracle", "slow"} <= {seller["agent"] for seller in found["sellers"]}
    screen = home.call("status").stdout
    assert "2 in, 8 out, a million tokens" in screen
    assert max(map(len, screen.splitlines()[1:])) <= 80


def test_to_look_makes_no_key(home: Home, market: Running, tmp_path: Path) -> None:
    guest = Home(tmp_path / "guest", {"COASE_NETWORK": str(home.path / "network.json")})
    assert guest.json("status")["deals"] == []
    assert not list(tmp_path.rglob("*"))


def test_a_panel_whose_members_do_not_answer_is_not_named(
    home: Home, market: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arbiter_commands, "AWAKE_MAX_S", 1)
    nobody, before = "0x" + "9" * 40, (home.path / "network.json").read_bytes()
    done = home.call("panel", "1", nobody, code=2)
    assert f"there is no answer from {nobody}" in done.stderr
    assert (home.path / "network.json").read_bytes() == before


def test_a_purchase_that_was_killed_is_finished_by_the_next_command(
    home: Home, slow: Running
) -> None:
    task = home.path / "killed.txt"
    task.write_text("killed")
    order = ("hire", "shout", "--input", str(task), "--max-price", "0.05")
    with home.running(*order) as buyer:
        buyer.until_said("locked 0.02")
        assert buyer.end(signal.SIGKILL) == -signal.SIGKILL
    open_rows = [row for row in home.json("replay") if row["open"] and row["side"] == "buyer"]
    assert [row["state"] for row in open_rows] == ["locked"]
    deal = open_rows[0]["deal"]
    again = home.call(*order)
    assert f"an earlier purchase is still open: {deal[:8]}" in again.stderr
    assert again.stdout == "KILLED\n"
    sides = {row["side"]: row["state"] for row in home.json("replay", deal)}
    assert sides["buyer"] == "settled"
    # It was taken up, and not bought a second time.
    shouts = [row for row in home.json("replay") if "KILLED" in row["result"]]
    assert {row["deal"] for row in shouts} == {deal}


def test_a_purchase_is_finished_by_status_too(home: Home, slow: Running) -> None:
    order = ("hire", "shout", "--input", "-", "--max-price", "0.05")
    task = home.path / "status.txt"
    task.write_text("status")
    order = ("hire", "shout", "--input", str(task), "--max-price", "0.05")
    with home.running(*order) as buyer:
        buyer.until_said("locked 0.02")
        buyer.end(signal.SIGKILL)
    done = home.call("status", "--json")
    assert "an earlier purchase is still open" in done.stderr
    mine = [row for row in json.loads(done.stdout)["deals"] if "STATUS" in row["result"]]
    assert [row["state"] for row in mine if row["side"] == "buyer"] == ["settled"]


def test_a_bad_result_is_disputed_before_the_command_ends(home: Home, slow: Running) -> None:
    task = home.path / "cheat.txt"
    task.write_text("x")
    done = home.call("hire", "cheat", "--input", str(task), "--max-price", "0.05", code=1)
    rows = [row for row in home.json("replay") if row["capability"].startswith("cheat")]
    assert done.stdout == ""
    assert all(row["to_seller_units"] == 0 for row in rows)


def test_what_cannot_be_paid_is_not_agreed(home: Home, slow: Running) -> None:
    task = home.path / "dear.txt"
    task.write_text("x")
    done = home.call("hire", "costly", "--input", str(task), "--max-price", "200", code=1)
    assert "less than --max-price 200" in done.stderr
    assert "agreed" not in done.stderr


def test_a_price_that_leaves_nothing_for_a_dispute_is_not_agreed(home: Home, slow: Running) -> None:
    task = home.path / "tight.txt"
    task.write_text("x")
    done = home.call("hire", "tight", "--input", str(task), "--max-price", "95", code=1)
    assert "which must pay for the bond of a dispute" in done.stderr
    assert "balance" in done.stderr
    assert "agreed" not in done.stderr


@pytest.mark.parametrize("price", ["abc", "-1", "0", "1e9", "0.0000001", ""])
def test_a_price_that_is_none(home: Home, market: Running, price: str) -> None:
    done = home.call("ask", "hi", f"--max-price={price}", code=2)
    assert done.stderr.startswith("coase: ")
    assert done.stdout == ""


def test_what_nobody_sells(home: Home, slow: Running) -> None:
    task = home.path / "t.txt"
    task.write_text("x")
    done = home.call("hire", "nothing", "--input", str(task), "--max-price", "1", code=1)
    assert "nobody sells 'nothing'" in done.stderr
    assert "shout" in done.stderr


def test_a_task_that_does_not_fit(home: Home, slow: Running) -> None:
    task = home.path / "misfit.json"
    task.write_text('{"txt": 1}')
    done = home.call("hire", "shout", "--input", str(task), "--max-price", "1", code=2)
    assert "'text' is a required property" in done.stderr


def test_an_agent_runs_once(home: Home, oracle: Running) -> None:
    done = home.call("agent", "run", str(ROOT / "examples" / "inference.py"), code=2)
    assert f"process {oracle.process.pid}" in done.stderr


def test_doctor_finds_the_network(home: Home, market: Running) -> None:
    found = {finding["what"]: finding for finding in home.json("doctor")}
    for what in ("broker", "chain", "clock", "broker listens on"):
        assert found[what]["level"] == "ok", found[what]


def test_what_was_killed_comes_back_on_the_same_ports(home: Home, tmp_path: Path) -> None:
    other = Home(tmp_path / "home")
    state = str(tmp_path / "state")
    path = str(ROOT / "examples" / "inference.py")
    with other.running("up", "--state", state, "--json") as up:
        first = up.ready()
        with other.running("agent", "run", path, "--engine", "echo", "--json") as agent:
            agent.ready()
            up.end(signal.SIGKILL)
            # Neither broker nor chain outlive whoever started them.
            eventually(lambda: not processes_below(tmp_path / "state"))
            agent.until_said("the broker does not answer")
            done = other.call("status", code=69)
            assert f"coase up --state {state}" in done.stderr
            with other.running("up", "--state", state, "--json") as again:
                second = again.ready()
                assert {k: second[k] for k in ("nats", "rpc", "contracts")} == {
                    k: first[k] for k in ("nats", "rpc", "contracts")
                }
                agent.until_said("the broker is back")
                assert other.call("ask", "Back?", "--max-price", "0.01").stdout == "Back?\n"
                assert agent.end() == 0
                assert "oracle stopped; earned" in agent.said()
                assert again.end() == 0
    assert not (other.path / "network.json").exists()
    assert sqlite3.connect(Path(state) / "journal.sqlite").execute("SELECT 1").fetchone() == (1,)


def test_a_plan_is_bought_piece_by_piece_and_no_piece_twice(home: Home, oracle: Running) -> None:
    path = home.path / "long.txt"
    path.write_text("\n\n".join(f"{number} sheep and " + "so on " * 200 for number in range(6)))
    plan = ("plan", "summarise", str(path), "--engine", "none", "--budget", "0.5", "--words", "10")
    first = home.json(*plan)
    receipt = Receipt.from_json(json.dumps(first["receipt"]))
    receipt.check()
    assert first["covers"] == "2 of 2 parts"
    assert len({part.deal for part in receipt.parts}) == 3
    assert 0 < receipt.total_units <= 500_000
    again = Receipt.from_json(json.dumps(home.json(*plan)["receipt"]))
    assert [part.deal for part in again.parts] == [part.deal for part in receipt.parts]
    assert again.total_units == receipt.total_units
