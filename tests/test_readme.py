"""The README, held to what it says: its code is the examples, its tables are the sources, and its
commands are run here, one after the other, with an engine that repeats the question."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

import pytest

from coase.agents.compute.find import Kind
from coase.agents.config import NatsAddress, Network
from coase.protocol.states import SILENCE, STREAM_SILENCE
from coase.tools.cli import app as cli
from coase.tools.gateway.wishes import WISHES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = (ROOT / "README.md").read_text()
BIN: Final = Path(sys.executable).parent
READY_MAX_S: Final = 90.0
COMMAND_MAX_S: Final = 90.0
SERVICES: Final = ("coase up", "coase agent run")  # They run until the end of the session.


# ---- Reading the page --------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def marked(name: str) -> str:
    """What follows a mark, up to the next blank line outside of code."""
    after = PAGE.partition(f"<!-- {name} -->\n")[2]
    assert after, f"the page has no mark {name}"
    fenced = re.match(r"```python\n(.*?)^```", after, flags=re.MULTILINE | re.DOTALL)
    return fenced[1] if fenced else after.partition("\n\n")[0]


def rows(name: str) -> list[list[str]]:
    """The rows of a marked table, without its head."""
    lines = [line for line in marked(name).splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def words(cells: list[str]) -> set[str]:
    """What stands in code spans."""
    return {word for cell in cells for word in re.findall(r"`([^`]+)`", cell)}


@dataclass
class Typed:
    """One command of the page and the lines that it is said to print."""

    command: str
    lines: list[str] = field(default_factory=list)


def typed() -> list[Typed]:
    """The commands of all console blocks, in order."""
    found: list[Typed] = []
    for line in "".join(blocks("console")).splitlines():
        if line.startswith("$ "):
            found.append(Typed(line.removeprefix("$ ")))
        elif line.strip():
            found[-1].lines.append(line)
    return found


def shape(line: str) -> str:
    """A line without what differs from run to run: keys, ids, numbers, folders, engines."""
    line = re.sub(r"engine: .*", "engine", line)
    line = re.sub(r"\S*/\S*", "PATH", line)
    line = re.sub(r"\b(?:0x[0-9a-f]{6,}|[0-9a-f]{8,})\b", "ID", line)
    line = re.sub(r"\d+(?:\.\d+)?", "N", line)
    return " ".join(re.sub("─+", "─", line).split())


# ---- Tables and code ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["seller.py", "buyer.py"])
def test_the_code_is_the_example(name: str) -> None:
    source = (ROOT / "examples" / name).read_text()
    code = re.sub(r'\A""".*?"""\n+', "", source, flags=re.DOTALL)
    assert marked(f"examples/{name}") == code
    assert len([line for line in code.splitlines() if line.strip()]) <= 24


def test_the_other_code_runs() -> None:
    snippets = [code for code in blocks("python") if "__main__" not in code]
    assert snippets
    for code in snippets:
        exec(compile(code, "README.md", "exec"), {})  # noqa: S102 - our own page


def test_the_table_of_silence_is_the_source() -> None:
    calls = {"": "the clock", "poke": "`poke`, by anybody"}
    assert rows("protocol/states.py") == [
        [str(state), silence.who, silence.by, silence.outcome, calls[silence.call]]
        for state, silence in SILENCE.items()
    ]


def test_the_table_of_silence_in_streams_is_the_source() -> None:
    assert rows("streams") == [
        [str(state), silence.who, silence.by, silence.outcome]
        for state, silence in STREAM_SILENCE.items()
    ]


def test_the_exit_codes_are_those_of_the_command() -> None:
    codes = {value for name, value in vars(cli).items() if name.startswith("EXIT_")}
    assert {int(row[0]) for row in rows("tools/cli/app.py")} == codes | {0}


def test_the_fields_are_those_of_a_network_file() -> None:
    named = words([cell for row in rows("agents/config.py") for cell in row])
    assert named == {*Network.model_fields, *NatsAddress.model_fields}


def test_the_engines_are_those_that_can_be_chosen() -> None:
    assert words([row[0] for row in rows("agents/compute/find.py")]) == set(get_args(Kind))


def test_the_wishes_are_those_that_a_request_may_have() -> None:
    assert words([row[0] for row in rows("tools/gateway/wishes.py")]) == set(WISHES)


def test_the_map_has_every_folder() -> None:
    mapped = {name.rstrip("/") for name in words([row[0] for row in rows("folders")])}
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("a copy without its history cannot tell its own folders from others")
    tops = {name.partition("/")[0] for name in listed.stdout.split("\0") if "/" in name}
    assert mapped == {name for name in tops if not name.startswith(".")}


def test_every_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", PAGE, flags=re.MULTILINE))
    assert named
    assert named <= targets


def test_every_variable_is_read_somewhere() -> None:
    named = set(re.findall(r"`(COASE_[A-Z_]+|OLLAMA_[A-Z_]+)`", PAGE))
    source = "".join(path.read_text() for path in (ROOT / "agents").rglob("*.py"))
    assert named
    assert {name for name in named if f'"{name}"' not in source} == set()


# ---- Figures and pictures ----------------------------------------------------------------------


@pytest.fixture
def figures() -> ModuleType:
    """The script that writes the figures."""
    spec = importlib.util.spec_from_file_location("figures", ROOT / ".ci" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_come_with_machine_and_date(figures: ModuleType) -> None:
    place = PAGE.partition(figures.BEGIN)[2].partition(figures.END)[0]
    assert place
    if "| figure |" in place:
        assert re.match(r"Measured on \d{4}-\d\d-\d\d, .*cores.*Python", place)
    else:
        assert place.startswith("No figures here yet")


def test_figures_are_written_into_their_place(figures: ModuleType) -> None:
    line = json.dumps({"figure": "agreements", "value": 95.0, "unit": "1/s", "bare": 4000})
    kept = json.dumps({"figure": "gas", "value": 1, "unit": "gas", "source": "a file"})
    found = figures.figures_of(["make: something", "{}", kept, line])
    assert [each["figure"] for each in found] == ["agreements"]
    table = figures.table_of(found, machine="2 cores of a kind, Python 3.11", date="2026-01-02")
    page = figures.with_table(PAGE, table)
    assert "| agreements | 95 1/s | bare 4000 |" in page
    assert figures.with_table(page, table) == page
    with pytest.raises(ValueError, match="no place"):
        figures.with_table("no marks", table)


@pytest.mark.parametrize("name", re.findall(r"\]\((examples/pictures/[^)]+)\)", PAGE))
def test_pictures_ask_nobody_for_anything(name: str) -> None:
    drawn = (ROOT / name).read_text()
    addresses = set(re.findall(r"https?://[^\"' )]+", drawn))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert len(drawn) < 300_000
    words = ("conserved", "deals&#160;in&#160;flight", "each mark: one way of choosing")
    assert any(word in drawn for word in words)


# ---- Commands ----------------------------------------------------------------------------------


class Session:
    """The page's terminals: services that stay, and commands one after the other."""

    def __init__(self, home: Path) -> None:
        self.home = home
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("COASE_", "OLLAMA_"))}
        path = f"{BIN}{os.pathsep}{kept.get('PATH', '')}"
        self.env = {**kept, "COASE_HOME": str(home), "COLUMNS": "160", "PATH": path}
        self.services: list[subprocess.Popen[str]] = []
        self.said: dict[str, str] = {}
        self.codes: dict[str, int] = {}
        self.deal = ""

    def play(self, command: str) -> None:
        """Run one command of the page as it stands there, but for the engine and the deal."""
        arguments = shlex.split(command)
        if arguments[:2] == ["coase", "replay"]:
            arguments[2] = self.deal
        if arguments[:3] == ["coase", "agent", "run"]:
            arguments += ["--engine", "echo"]
        if command.startswith(SERVICES):
            self.said[command] = self._serve(arguments)
            return
        done = subprocess.run(
            arguments,
            cwd=ROOT,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_MAX_S,
        )
        self.said[command], self.codes[command] = done.stdout, done.returncode
        if not self.deal and (bought := re.search(r"\(deal ([0-9a-f]+)\)", done.stdout)):
            self.deal = bought[1]

    def _serve(self, arguments: list[str]) -> str:
        """Start what stays, and return what it says until it is ready."""
        log = self.home / f"{len(self.services)}.log"
        with log.open("w") as sink:
            process = subprocess.Popen(
                arguments, cwd=ROOT, env=self.env, stdout=sink, stderr=sink, text=True
            )
        self.services.append(process)
        deadline = time.monotonic() + READY_MAX_S
        while not re.search(r"^ready|engine:", said := log.read_text(), flags=re.MULTILINE):
            assert process.poll() is None, f"{arguments} ended: {said}"
            assert time.monotonic() < deadline, f"{arguments} is not ready: {said}"
            time.sleep(0.05)
        return said

    def close(self) -> None:
        """End the services, the market last."""
        for process in reversed(self.services):
            process.send_signal(signal.SIGINT)
            try:
                self.codes[f"service {shlex.join(map(str, process.args))}"] = process.wait(30)  # type: ignore[arg-type]
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """The page, played from top to bottom."""
    played = Session(tmp_path_factory.mktemp("readme"))
    try:
        for step in typed():
            played.play(step.command)
        yield played
    finally:
        played.close()


pytestmark = pytest.mark.xdist_group("readme")


def test_the_page_has_the_commands_that_a_newcomer_needs() -> None:
    verbs = {step.command.split()[1] for step in typed() if step.command.startswith("coase ")}
    assert verbs >= {"up", "agent", "ask", "hire", "status", "replay", "doctor"}
    assert verbs >= {"wallet", "budget", "withdraw", "audit"}


def test_one_worker_has_the_whole_group(request: pytest.FixtureRequest) -> None:
    # Or the page is played once by each worker, and every other shared market with it.
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@readme")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("step", typed(), ids=lambda step: step.command)
def test_a_command_does_what_the_page_shows(session: Session, step: Typed) -> None:
    said = session.said[step.command]
    assert session.codes.get(step.command, 0) == 0, said
    shapes = {shape(line) for line in said.splitlines()}
    # An answer is the engine's, and how long they haggle depends on what they know of each other.
    shown = [line for line in step.lines if not re.match(r".*…$|countered with", line)]
    assert shown
    assert [line for line in shown if shape(line) not in shapes] == [], said
