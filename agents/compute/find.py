"""Choosing the engine: the user's Ollama if it is there and has a model, else the embedded one."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, get_args

import anyio
import httpx

from coase.protocol.errors import ComputeFailed, ConfigurationError

from .echo import EchoCompute
from .llamacpp import LlamaCppCompute
from .model import find_model
from .ollama import OllamaCompute, host_from_environment
from .openai import OpenAICompute

if TYPE_CHECKING:
    from collections.abc import Callable

    from .gate import Limits
    from .ports import Compute

# An Ollama on this machine or the LAN answers in a few milliseconds, and a machine without one
# refuses at once. The rest is for a busy machine; a start on a plane must not be slow.
PROBE_MAX_S: Final = 1
# Asking what models it has reads some small files; once it answered, it may take its time.
LIST_MAX_S: Final = 5
Kind = Literal["auto", "ollama", "openai", "llamacpp", "echo"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeConfig:
    """Which engine to use. Empty fields are looked up or chosen."""

    kind: Kind = "auto"
    url: str = ""
    """Of Ollama (else OLLAMA_HOST) or of an OpenAI-compatible server (with its ``/v1``)."""
    model: str = ""
    """A model's name; for the embedded engine the path of a GGUF file."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key of an OpenAI-compatible server."""
    limits: Limits | None = None


async def find_compute(
    config: ComputeConfig | None = None, *, say: Callable[[str], None] | None = None
) -> Compute:
    """Return the engine that ``config`` asks for, or the best one here, and ``say`` why.

    Nothing is loaded or fetched yet. ``say`` gets one line in plain words; by default the log.

    :raises ConfigurationError: if what was asked for lacks something that can be given
    :raises ComputeFailed: if there is no engine or no model
    """
    config = config or ComputeConfig()
    say = say or _log.info
    match config.kind:
        case "echo":
            say("Using the echo, as configured: it repeats the question and runs no model.")
            return EchoCompute(limits=config.limits)
        case "openai":
            return _openai(config, say)
        case "llamacpp":
            return _embedded(config, say, why="as configured")
        case "ollama":
            return await _ollama(config, say)
        case "auto":
            return await _best(config, say)


async def open_compute(kind: str = "auto", *, say: Callable[[str], None] | None = None) -> Compute:
    """Return the engine of that kind with its model loaded, so that the first prompt is quick.

    :raises ConfigurationError: if there is no such kind, or it needs more than its name
    :raises ComputeFailed: if it is not here or does not start
    """
    for known in get_args(Kind):
        if kind == known:
            compute = await find_compute(ComputeConfig(kind=known), say=say)
            if isinstance(compute, LlamaCppCompute):
                try:
                    await compute.start()
                except BaseException:
                    with anyio.CancelScope(shield=True):
                        await compute.close()
                    raise
            return compute
    raise ConfigurationError(
        f"there is no engine {kind!r}: choose one of {', '.join(get_args(Kind))}"
    )


async def _best(config: ComputeConfig, say: Callable[[str], None]) -> Compute:
    if config.model.endswith(".gguf"):
        return _embedded(config, say, why="since the model is a GGUF file")
    host = config.url or host_from_environment()
    if not await _answers(host):
        why = f"since no Ollama answers at {host}"
    else:
        compute = OllamaCompute(host, model=config.model or None, limits=config.limits)
        try:
            with anyio.fail_after(LIST_MAX_S):
                models = await compute.models()
            # One that only makes vectors is of use to whoever names it, and answers nobody else.
            names = [
                info.name for info in models if config.model or "completion" in info.capabilities
            ]
        except (ComputeFailed, TimeoutError) as error:
            names, why = [], f"since the Ollama at {host} does not tell its models ({error})"
        else:
            why = f"since the Ollama at {host} has no {config.model or 'model of its own'}"
        if names and (not config.model or config.model in names):
            say(f"Using Ollama at {host} with {config.model or names[0]}, since it answers there.")
            return compute
        await compute.close()
    if config.model:
        raise ConfigurationError(
            f"the model {config.model!r} is not here, {why}. Run `ollama pull {config.model}`, or "
            "name no model to use the embedded one"
        )
    return _embedded(config, say, why=why)


async def _ollama(config: ComputeConfig, say: Callable[[str], None]) -> Compute:
    host = config.url or host_from_environment()
    if not await _answers(host):
        raise ComputeFailed(
            f"no Ollama answers at {host}. Run `ollama serve`, set OLLAMA_HOST, or use the "
            "embedded engine"
        )
    say(f"Using Ollama at {host}, as configured.")
    return OllamaCompute(host, model=config.model or None, limits=config.limits)


def _openai(config: ComputeConfig, say: Callable[[str], None]) -> Compute:
    if not config.url:
        raise ConfigurationError(
            "an OpenAI-compatible server needs its address: set `url`, for example to "
            "http://127.0.0.1:8000/v1"
        )
    say(f"Using the OpenAI-compatible server at {config.url}, as configured.")
    return OpenAICompute(
        config.url,
        api_key=os.environ.get(config.api_key_env, ""),
        model=config.model or None,
        limits=config.limits,
    )


def _embedded(config: ComputeConfig, say: Callable[[str], None], *, why: str) -> Compute:
    path = Path(config.model) if config.model else find_model()
    if path is None or not path.is_file():
        missing = f"there is no file {path}" if path else "the small model is not here"
        raise ComputeFailed(
            f"nothing can run a prompt here: {missing}, and the embedded engine was chosen {why}. "
            "Run `coase model get` (93 MB, once), or start Ollama with a model"
        )
    say(f"Using the embedded engine with {path.stem}, {why}.")
    return LlamaCppCompute(path, limits=config.limits)


async def _answers(host: str) -> bool:
    url = (host if "://" in host else f"http://{host}").rstrip("/")
    if url.count(":") == 1:  # No port given: Ollama's own.
        url += ":11434"
    try:
        with anyio.fail_after(PROBE_MAX_S):
            async with httpx.AsyncClient(trust_env=False) as client:
                response = await client.get(f"{url}/api/version")
                return response.status_code == httpx.codes.OK and "version" in response.json()
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError):
        return False
