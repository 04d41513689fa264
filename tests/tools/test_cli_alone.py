"""Commands without a network: quick, clear about what is wrong, and nothing left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.commands import COASE, ROOT, Home, eventually, processes_below


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


COMMANDS = [
    ("demo",),
    ("up",),
    ("agent", "run"),
    ("ask",),
    ("hire",),
    ("status",),
    ("replay",),
    ("doctor",),
    ("model", "get"),
    ("join",),
    ("leave",),
    ("lan", "status"),
    ("lan", "code"),
    ("keys", "new"),
    ("keys", "import"),
    ("keys", "list"),
    ("keys", "export"),
    ("wallet",),
    ("export",),
    ("audit",),
    ("withdraw",),
    ("deploy",),
    ("dispute",),
    ("keeper",),
    ("budget",),
    ("plan", "summarise"),
    ("plan", "classify"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_an_example_and_json(home: Home, command: tuple[str, ...]) -> None:
    shown = home.call(*command, "--help").stdout
    assert f"Example: coase {' '.join(command)}" in shown
    assert "--json" in shown


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['coase', '--help']\n"
        "from coase.tools.cli.app import run\n"
        "try: run()\n"
        "except SystemExit: pass\n"
        "names = {'web3', 'nats', 'httpx', 'pydantic', 'coase.agents', 'eth_abi'}\n"
        "heavy = names & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("ask", "hi", "--max-price", "1"),
        ("hire", "summarise", "--input", "-", "--max-price", "1"),
        ("status",),
        ("agent", "run", str(ROOT / "examples" / "seller.py")),
    ],
    ids=lambda command: command[0],
)
def test_without_a_network_it_says_how_to_start_one(home: Home, command: tuple[str, ...]) -> None:
    done = home.call(*command, stdin=b"text", code=2)
    assert "start one with: coase up" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "content", [b"garbage", b"[]", b"", b'{"net": "x"}', b"\xff\xfe\0", b"{" * 70_000]
)
def test_a_network_file_that_is_none(home: Home, content: bytes) -> None:
    home.path.mkdir()
    path = home.path / "network.json"
    path.write_bytes(content)
    path.chmod(0o600)
    assert str(path) in home.call("status", code=2).stderr
    assert str(path) in home.call("up", code=2).stderr
    assert path.read_bytes() == content


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o602])
def test_a_network_file_that_others_may_read_or_write(home: Home, mode: int) -> None:
    home.path.mkdir()
    path = home.path / "network.json"
    address = "0x" + "1" * 40
    network = {
        "nats": {"url": "nats://127.0.0.1:1", "password": "p"},
        "rpc": "http://127.0.0.1:1",
        "chain_id": 1,
        "token": address,
        "factory": address,
        "escrow": address,
    }
    path.write_text(json.dumps(network))
    path.chmod(mode)
    assert f"chmod 600 {path}" in home.call("status", code=2).stderr
    path.chmod(0o600)
    # A look needs no pass phrase, on no chain: it is the broker that is missing now.
    assert "no broker answers" in home.call("status", code=69).stderr


def test_a_home_that_cannot_be_written(home: Home) -> None:
    blocked = Home(Path("/proc/nowhere"))
    assert "/proc/nowhere" in blocked.call("up", code=2).stderr
    assert json.loads(blocked.call("replay", "--json").stdout) == []


FILES = {
    "syntax": ("x = (", ":1 does not load: SyntaxError"),
    "imports": ("import nope_nope", ":1 does not load: ModuleNotFoundError"),
    "raises": ("def f():\n    return 1 / 0\nf()\n", ":2 does not load: ZeroDivisionError"),
    "exits": ("raise SystemExit(3)", "ends the program"),
    "none": ("x = 1", "declares no agent"),
    "twice": (
        "from coase.agents import Agent\na = Agent('x')\nb = Agent('x')",
        "two agents called 'x'",
    ),
    "name": ("from coase.agents import Agent\na = Agent('bad name!')", "no name for an agent"),
}
HEAD = """
from coase.agents import Agent, Job, Price
from coase.agents.wares import Summarise, Summary
a = Agent("a")
"""
FILES |= {
    "annotations": (
        HEAD + "@a.offers('x', price=Price.per_task('1'))\n"
        "async def work(task: str, job: Job) -> Summary: ...",
        "first argument of work is annotated with str",
    ),
    "no result": (
        HEAD + "@a.offers('x', price=Price.per_task('1'))\n"
        "async def work(task: Summarise, job: Job): ...",
        "result of work is annotated with nothing",
    ),
    "not async": (
        HEAD + "@a.offers('x', price=Price.per_task('1'))\n"
        "def work(task: Summarise, job: Job) -> Summary: ...",
        "must be a coroutine function",
    ),
    "one argument": (
        HEAD + "@a.offers('x', price=Price.per_task('1'))\n"
        "async def work(task: Summarise) -> Summary: ...",
        "must take a task and a job",
    ),
    "price": (
        HEAD + "@a.offers('x', price=0.5)\n"
        "async def work(task: Summarise, job: Job) -> Summary: ...",
        "Price.per_task(",
    ),
    "capability": (
        HEAD + "@a.offers('Bad Name', price=Price.per_task('1'))\n"
        "async def work(task: Summarise, job: Job) -> Summary: ...",
        "no name for a capability",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_agent(home: Home, tmp_path: Path, case: str) -> None:
    content, said = FILES[case]
    path = tmp_path / "seller.py"
    path.write_text(content)
    done = home.call("agent", "run", str(path), code=2)
    assert said in done.stderr
    assert str(path) in done.stderr


def test_a_file_that_is_not_there(home: Home, tmp_path: Path) -> None:
    assert "does not exist" in home.call("agent", "run", str(tmp_path / "gone.py"), code=2).stderr
    assert "is no file" in home.call("agent", "run", str(tmp_path), code=2).stderr
    notes = tmp_path / "notes.txt"
    notes.write_text("hello")
    assert "must end in .py" in home.call("agent", "run", str(notes), code=2).stderr


INPUTS = {
    "binary": (bytes(range(256)), "UTF-8"),
    "latin": (b"caf\xe9", "UTF-8"),
    "nul": (b"a\0b", "NUL"),
    "empty": (b" \n", "empty"),
    "huge": (b"a" * (4 * 1024 * 1024 + 1), "4 MiB"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_an_input_that_is_no_task(home: Home, tmp_path: Path, case: str) -> None:
    content, said = INPUTS[case]
    path = tmp_path / "input"
    path.write_bytes(content)
    done = home.call("hire", "summarise", "--input", str(path), "--max-price", "1", code=2)
    assert said in done.stderr
    done = home.call("demo", "--engine", "echo", "--input", str(path), code=2)
    assert done.stderr.startswith("coase: ")


def test_a_deal_that_is_not_there(home: Home) -> None:
    assert "no deal begins with" in home.call("replay", "abc", code=2).stderr
    assert "hex" in home.call("replay", "xyz", code=2).stderr
    assert "does not exist" in home.call("replay", "--journal", "gone.sqlite", code=2).stderr


def test_doctor_without_a_network(home: Home) -> None:
    found = {finding["what"]: finding for finding in home.json("doctor")}
    assert found["python"]["level"] == "ok"
    assert "coase up" in found["network"]["text"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_network_ends_when_it_is_told(home: Home, tmp_path: Path, number: int) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    home.environment["TMPDIR"] = str(scratch)
    with home.running("up", "--json") as up:
        up.ready()
        assert list(scratch.iterdir())
        assert up.end(number) == 0
    assert not (home.path / "network.json").exists()
    assert list(scratch.iterdir()) == []
    assert processes_below(scratch) == []


def test_what_a_killed_network_left_is_put_away(home: Home, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    home.environment["TMPDIR"] = str(scratch)
    with home.running("up", "--json") as up:
        up.ready()
        up.end(signal.SIGKILL)
    left = list(scratch.iterdir())
    assert left
    eventually(lambda: not processes_below(scratch))
    with home.running("up", "--json") as again:
        again.ready()
        assert not left[0].exists()


def test_a_reader_that_goes_away_ends_the_demo(home: Home, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    home.environment["TMPDIR"] = str(scratch)
    with home.running("demo", "--engine", "echo") as demo:
        assert demo.process.stdout is not None
        assert b"engine" in demo.process.stdout.readline()
        demo.process.stdout.close()
        assert demo.process.wait(100) == 128 + signal.SIGPIPE
        assert "Traceback" not in demo.said()
    assert list(scratch.iterdir()) == []
    assert processes_below(scratch) == []


def test_the_command_is_installed() -> None:
    assert Path(COASE).is_file()
