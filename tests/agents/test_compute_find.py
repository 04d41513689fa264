"""Which engine is chosen, and what is said about it."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import TYPE_CHECKING, Any

import pytest

from coase.agents.compute import find
from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.find import ComputeConfig, find_compute, open_compute
from coase.agents.compute.llamacpp import LlamaCppCompute
from coase.agents.compute.ollama import OllamaCompute, host_from_environment
from coase.agents.compute.openai import OpenAICompute
from coase.protocol.errors import ComputeFailed, ConfigurationError
from tests.conformance.compute_servers import Request, serving

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

pytestmark = pytest.mark.anyio


@pytest.fixture
def model_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "small.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(find, "find_model", lambda: path)
    return path


def ollama_with(*names: str, able: str = "completion") -> Any:
    async def ollama(request: Request) -> AsyncGenerator[bytes, None]:
        entries = [{"model": name, "name": name, "size": 1} for name in names]
        answers: dict[str, Any] = {
            "/api/version": {"version": "0.33.0"},
            "/api/tags": {"models": entries},
            "/api/ps": {"models": []},
            "/api/show": {"capabilities": [able], "model_info": {}},
        }
        yield json.dumps(answers[request.path]).encode()

    return ollama


async def test_an_ollama_that_answers_and_has_a_model_is_used(model_file: Path) -> None:
    said: list[str] = []
    async with serving(ollama_with("llama3")) as server:
        compute = await find_compute(ComputeConfig(url=server.url), say=said.append)
        assert isinstance(compute, OllamaCompute)
        assert said == [f"Using Ollama at {server.url} with llama3, since it answers there."]
        await compute.close()


async def test_an_ollama_without_a_model_leaves_it_to_the_embedded_engine(
    model_file: Path,
) -> None:
    said: list[str] = []
    async with serving(ollama_with()) as server:
        compute = await find_compute(ComputeConfig(url=server.url), say=said.append)
    assert isinstance(compute, LlamaCppCompute)
    assert "embedded engine with small" in said[0]
    assert "has no model of its own" in said[0]
    await compute.close()


async def test_an_ollama_that_only_makes_vectors_is_used_by_those_who_name_its_model(
    model_file: Path,
) -> None:
    async with serving(ollama_with("minilm", able="embedding")) as server:
        compute = await find_compute(ComputeConfig(url=server.url))
        assert isinstance(compute, LlamaCppCompute)
        await compute.close()
        compute = await find_compute(ComputeConfig(url=server.url, model="minilm"))
        assert isinstance(compute, OllamaCompute)
        await compute.close()


async def test_where_no_ollama_is_the_embedded_engine_is_used(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with socket.socket() as taken:  # Bound and not listening: nobody else can answer there.
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{taken.getsockname()[1]}")
        compute = await find_compute(say=said.append)
    assert isinstance(compute, LlamaCppCompute)
    assert "no Ollama answers" in said[0]
    await compute.close()


async def test_an_ollama_that_hangs_does_not_hold_up_the_start(model_file: Path) -> None:
    async def hanging(request: Request) -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(600)
        yield b""

    async with serving(hanging) as server, asyncio.timeout(60):
        compute = await find_compute(ComputeConfig(url=server.url))
    assert isinstance(compute, LlamaCppCompute)
    await compute.close()


async def test_something_else_at_that_port_is_not_taken_for_ollama(model_file: Path) -> None:
    async def web(request: Request) -> AsyncGenerator[bytes, None]:
        yield b"<html>"

    async with serving(web) as server:
        compute = await find_compute(ComputeConfig(url=server.url))
    assert isinstance(compute, LlamaCppCompute)
    await compute.close()


async def test_a_model_that_is_nowhere_is_not_replaced_by_another(model_file: Path) -> None:
    async with serving(ollama_with("llama3")) as server:
        with pytest.raises(ConfigurationError, match="ollama pull gemma"):
            await find_compute(ComputeConfig(url=server.url, model="gemma"))


async def test_a_gguf_file_means_the_embedded_engine(model_file: Path) -> None:
    async with serving(ollama_with("llama3")) as server:
        config = ComputeConfig(url=server.url, model=str(model_file))
        compute = await find_compute(config)
    assert isinstance(compute, LlamaCppCompute)
    await compute.close()


async def test_without_any_engine_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "find_model", lambda: None)
    with pytest.raises(ComputeFailed, match="coase model get"):
        await find_compute(ComputeConfig(kind="llamacpp"))


async def test_what_is_configured_is_used_or_refused() -> None:
    assert isinstance(await find_compute(ComputeConfig(kind="echo")), EchoCompute)
    openai = await find_compute(ComputeConfig(kind="openai", url="http://127.0.0.1:1/v1"))
    assert isinstance(openai, OpenAICompute)
    await openai.close()
    with pytest.raises(ConfigurationError, match="set `url`"):
        await find_compute(ComputeConfig(kind="openai"))
    with pytest.raises(ComputeFailed, match="no Ollama answers"):
        await find_compute(ComputeConfig(kind="ollama", url="http://127.0.0.1:1"))


async def test_an_engine_is_opened_by_its_kind() -> None:
    assert isinstance(await open_compute("echo"), EchoCompute)
    with pytest.raises(ConfigurationError, match="choose one of auto, ollama"):
        await open_compute("abacus")


def test_the_address_that_a_server_listens_on_is_not_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "0.0.0.0:11434")
    assert host_from_environment() == "127.0.0.1:11434"
