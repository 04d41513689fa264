"""What the gateway costs: the same engine called directly and through it, in turns.

A backend of fixed speed shows the gateway's own share; the embedded model, if it is here, what
of that is left to notice.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio
import httpx

from coase.agents.compute import engine
from coase.agents.compute.model import find_model
from tests.bench.parts import emit

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE: Final = Path(__file__).parent
ENGINE: Final = engine.__file__
MODEL: Final = "-"  # As the embedded engine's server calls its only model.
KEY: Final = "bench"
GAP_MS: Final = 20
TOKENS: Final = 32
CALLERS: Final = (1, 4, 16)
AIM_ADDED_MS: Final = {1: 3, 4: 10, 16: 30}
AIM_RATE_PERCENT: Final = 97
SHORT_ANSWERS: Final = 600
START_MAX_S: Final = 120  # A chain and its contracts, or a model, on a slow machine.
END_MAX_S: Final = 10  # A seller ends what it sold first, and is not waited for longer.
TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


@contextmanager
def process(*command: str, said: str = "", **more: str) -> Iterator[tuple[int, str]]:
    """Run a program, tell it a line, and yield its id with the first line that it prints."""
    ran = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **more},
    )
    assert ran.stdin is not None
    assert ran.stdout is not None
    silent = threading.Timer(START_MAX_S, ran.kill)
    silent.start()
    try:
        ran.stdin.write(said)
        ran.stdin.flush()
        line = ran.stdout.readline().strip()
        silent.cancel()
        if not line:
            raise RuntimeError(f"{' '.join(command)} said nothing")
        # Nobody reads what else it says, and who cannot say it stands still.
        threading.Thread(target=ran.stdout.read, daemon=True).start()
        yield ran.pid, line
    finally:
        silent.cancel()
        if ran.poll() is not None:
            print(f"{command[0]} ended before its time with {ran.returncode}", file=sys.stderr)
        ran.terminate()
        try:
            ran.wait(END_MAX_S)
        except subprocess.TimeoutExpired:
            ran.kill()  # It waits for the other side, which may be what failed.
            ran.wait()
        ran.stdin.close()


def client_of() -> httpx.AsyncClient:
    """Return a client for as many as ask at once; engines that want a key get it."""
    headers = {"authorization": f"Bearer {KEY}"}
    limits = httpx.Limits(max_keepalive_connections=max(CALLERS))
    return httpx.AsyncClient(timeout=300, limits=limits, headers=headers)


async def one(client: httpx.AsyncClient, url: str, model: str, tokens: int) -> tuple[float, float]:
    """Ask once and return the milliseconds until the first token and until the end.

    An engine that has just let a kept connection go is asked again, as every client of it does.
    """
    try:
        return await _one(client, url, model, tokens)
    except (httpx.RemoteProtocolError, httpx.ReadError):
        return await _one(client, url, model, tokens)


async def _one(client: httpx.AsyncClient, url: str, model: str, tokens: int) -> tuple[float, float]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Count upwards in words."}],
        "max_tokens": tokens,
        "stream": True,
        "temperature": 0,
    }
    began, first = time.perf_counter(), 0.0
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not first and '"content": "' in line.replace('"content":"', '"content": "'):
                if '"content": ""' not in line and '"content":""' not in line:
                    first = time.perf_counter()
    return (first - began) * 1_000, (time.perf_counter() - began) * 1_000


async def callers(url: str, model: str, count: int, rounds: int) -> tuple[list[float], float]:
    """Return the first tokens' milliseconds, and tokens a second, of so many at once."""
    firsts: list[float] = []
    async with client_of() as client:
        await one(client, url, model, 2)

        async def caller() -> None:
            for _ in range(rounds):
                first, _ = await one(client, url, model, TOKENS)
                firsts.append(first)

        began = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(count)))
        rate = count * rounds * TOKENS / (time.perf_counter() - began)
    return firsts, rate


async def side_by_side(
    name: str,
    direct: str,
    through: str,
    model: str,
    *,
    rounds: int,
    at_once: tuple[int, ...] = CALLERS,
    aims: tuple[int, int] | None = None,
) -> None:
    """Measure both in turns and print what the way through the gateway adds.

    ``aims`` are milliseconds added and percent of the tokens a second.
    """
    for count in at_once:
        added, shares = list[float](), list[float]()
        direct_ms = list[float]()
        for _ in range(3):
            firsts, rate = await callers(direct, model, count, rounds)
            firsts_through, rate_through = await callers(through, model, count, rounds)
            direct_ms.append(statistics.median(firsts))
            added.append(statistics.median(firsts_through) - statistics.median(firsts))
            shares.append(100 * rate_through / rate)
        emit(
            f"gateway_{name}_{count}_callers_added_to_first_token",
            statistics.median(added),
            "ms",
            direct_ms=statistics.median(direct_ms),
            aim_ms=aims[0] if aims else AIM_ADDED_MS[count],
            tokens_per_s_percent=statistics.median(shares),
            aim_percent=aims[1] if aims else AIM_RATE_PERCENT,
        )


async def answers_a_second(url: str, model: str, count: int) -> float:
    """Return how many answers of one token a second it gives to sixteen callers."""
    numbers = iter(range(count))
    async with client_of() as client:

        async def caller() -> None:
            for _ in numbers:
                await one(client, url, model, 1)

        await one(client, url, model, 1)
        began = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(16)))
        return count / (time.perf_counter() - began)


def cpu_s(pid: int) -> float:
    """Return the processor's seconds that a process took."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def memory_mb(pid: int) -> float:
    """Return the memory that a process holds."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1_024


@contextmanager
def gateway_on(engine: str) -> Iterator[tuple[int, str, float]]:
    """Run a gateway on an engine behind OpenAI's API; yield pid, address and seconds to start."""
    coase = str(Path(sys.executable).with_name("coase"))
    command = [coase, "gateway", "--json", "--port", "0", "--at-once", str(max(CALLERS))]
    command += ["--engine", "openai", "--url", f"{engine}/v1"]
    with tempfile.TemporaryDirectory(prefix="coase-bench-") as home:
        began = time.perf_counter()
        with process(*command, COASE_HOME=home, OPENAI_API_KEY=KEY) as (pid, line):
            yield pid, json.loads(line)["url"], time.perf_counter() - began


@contextmanager
def engine_of(model: Path) -> Iterator[str]:
    """Run the embedded engine in a process of its own and yield its address."""
    settings = {
        "model": str(model),
        "name": model.stem,
        "api_key": KEY,
        "slots": 4,
        "context_tokens": 1_024,
        "threads": len(os.sched_getaffinity(0)),
    }
    said = json.dumps(settings) + "\n"
    # Threads that spin at barriers would take the processor away from what is measured.
    with process(sys.executable, ENGINE, said=said, OMP_WAIT_POLICY="passive") as (_, line):
        yield json.loads(line)["address"]


async def fixed(*, quick: bool) -> None:
    """Measure the gateway before a backend of fixed speed."""
    rounds = 3 if quick else 12
    with (
        process(sys.executable, str(HERE / "backend.py"), str(GAP_MS)) as (_, direct),
        gateway_on(direct) as (pid, through, ready_s),
    ):
        emit("gateway_ready", ready_s, "s", aim_s=1.5)
        await side_by_side("fixed", direct, through, "fixed", rounds=rounds)
        before, tokens = cpu_s(pid), 16 * rounds * TOKENS
        await callers(through, "fixed", 16, rounds)
        emit("gateway_cpu_per_token", (cpu_s(pid) - before) * 1_000 / tokens, "ms", aim_ms=0.25)
        count = SHORT_ANSWERS // 4 if quick else SHORT_ANSWERS
        bare = await answers_a_second(direct, "fixed", count)
        rate = await answers_a_second(through, "fixed", count)
        emit("gateway_short_answers", rate, "1/s", direct_per_s=bare, aim_per_s=300)
        emit("gateway_memory", memory_mb(pid), "MB", aim_mb=100)


async def real(*, quick: bool) -> None:
    """Measure the gateway before the embedded engine, if its model is here."""
    model = find_model()
    if model is None:
        return
    with engine_of(model) as direct, gateway_on(direct) as (_, through, _):
        await side_by_side(
            "smollm2",
            direct,
            through,
            MODEL,
            rounds=1 if quick else 3,
            at_once=CALLERS[:1] if quick else CALLERS,
        )


async def bought(*, quick: bool) -> None:
    """Measure a gateway that buys each answer from a seller in a process of its own."""
    coase = str(Path(sys.executable).with_name("coase"))
    sell = [coase, "sell", "--json", "--engine", "openai", "--price-input", "0.1"]
    sell += ["--price-output", "0.1", "--capacity", str(2 * max(CALLERS))]
    buy = [coase, "gateway", "--json", "--no-local", "--port", "0"]
    buy += ["--max-price", "0.01", "--budget", "50"]
    with (
        tempfile.TemporaryDirectory(prefix="coase-bench-") as home,
        process(sys.executable, str(HERE / "backend.py"), str(GAP_MS)) as (_, direct),
        process(coase, "up", "--json", COASE_HOME=home),
        process(*sell, "--url", f"{direct}/v1", COASE_HOME=home, OPENAI_API_KEY=KEY),
        process(*buy, COASE_HOME=home) as (_, line),
    ):
        through = json.loads(line)["url"]
        # The first purchase opens the channel; of what is paid then nothing is measured.
        await callers(through, "fixed", 1, 2)
        await side_by_side(
            "bought", direct, through, "fixed", rounds=2 if quick else 6, aims=(15, 95)
        )


def gateway(*, quick: bool) -> None:
    """Measure all of it."""
    anyio.run(lambda: fixed(quick=quick))
    anyio.run(lambda: bought(quick=quick))
    anyio.run(lambda: real(quick=quick))
