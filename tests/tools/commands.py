"""The installed command, as a person or a script would call it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer.testing import CliRunner

if TYPE_CHECKING:
    from collections.abc import Iterator

    import typer

COASE = str(Path(sys.executable).with_name("coase"))
ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE_S = 200  # Far beyond what anything takes; only a defect ever waits that long.
POLL_S = 0.05
PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Background jobs would ignore it.


def command() -> typer.Typer:
    """Return the command line with all commands."""
    from coase.tools.cli import app

    app.load()
    return app.app


@dataclass(slots=True)
class Home:
    """One user's state, and the commands that this user runs."""

    path: Path
    environment: dict[str, str] = field(default_factory=dict)
    before: tuple[str, ...] = ()
    """What every command is run by, such as ``ip netns exec NAME``."""

    def _environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("COASE_")}
        # Nothing of this machine's Ollama, terminal or colours may change what is tested.
        fixed = {"COASE_HOME": str(self.path), "COLUMNS": "80", "NO_COLOR": "1"}
        return kept | fixed | self.environment

    def run(
        self, *args: str, stdin: bytes = b"", code: int | None = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; unless ``code`` is None it must end with that."""
        done = subprocess.run(
            [*self.before, COASE, *args],
            input=stdin,
            capture_output=True,
            env=self._environment(),
            timeout=PATIENCE_S,
            preexec_fn=_die_with_parent,
        )
        out, err = done.stdout.decode(), done.stderr.decode()
        assert code is None or done.returncode == code, f"{done.returncode}: {out}\n{err}"
        assert "Traceback" not in err, err
        return subprocess.CompletedProcess(done.args, done.returncode, out, err)

    def json(self, *args: str, code: int = 0) -> Any:
        """Return the one document that a command prints, called within this process if it can."""
        if self.before:
            return json.loads(self.run(*args, "--json", code=code).stdout)
        return json.loads(self.call(*args, "--json", code=code).stdout)

    def call(
        self, *args: str, stdin: bytes = b"", code: int = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command within this process: for the many ways to call one wrongly."""
        fixed = {"COASE_HOME": str(self.path), "COASE_NETWORK": "", "COLUMNS": "80"}
        done = CliRunner().invoke(command(), args, input=stdin, env=fixed | self.environment)
        assert done.exit_code == code, f"{done.exit_code}: {done.output} {done.exception!r}"
        return subprocess.CompletedProcess(args, done.exit_code, done.stdout, done.stderr)

    @contextlib.contextmanager
    def running(self, *args: str) -> Iterator[Running]:
        """Run a command beside the test, and end it afterwards."""
        log = self.path.parent / f"{self.path.name}-{'-'.join(args)[:20].replace('/', '_')}.err"
        with log.open("w") as err:
            process = subprocess.Popen(
                [*self.before, COASE, *args],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=err,
                env=self._environment(),
                preexec_fn=_die_with_parent,
            )
        running = Running(process, log)
        try:
            yield running
        finally:
            running.end()


@dataclass(slots=True)
class Running:
    """A command that runs beside the test."""

    process: subprocess.Popen[bytes]
    log: Path

    def ready(self) -> Any:
        """Return the JSON line that it prints when it is ready."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it ended: {self.said()}"
        return json.loads(line)

    def said(self) -> str:
        """Return what it wrote to standard error so far."""
        return self.log.read_text()

    def until_said(self, text: str) -> str:
        """Wait until it says something; return all that it said."""
        eventually(lambda: text in self.said() or self.process.poll() is not None)
        assert text in self.said(), self.said()
        return self.said()

    def end(self, number: int = signal.SIGINT) -> int:
        """End it as Ctrl-C does, and return its exit code. Safe to repeat."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(PATIENCE_S)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code


def eventually(happened: Any) -> Any:
    """Return what ``happened`` gives as soon as it is true."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not (found := happened()):
        assert time.monotonic() < deadline_s, "it did not come about"
        time.sleep(POLL_S)
    return found


def processes_below(path: Path) -> list[str]:
    """Return the command lines of all processes that name a path."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if str(path) in line:
                    found.append(line)
    return found
