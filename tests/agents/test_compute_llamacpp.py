"""The embedded engine's process: shared, started anew, stopped for good, and quiet.

Everything here is real: the engine, its process and the small model.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from coase.agents.compute.gate import Limits
from coase.agents.compute.llamacpp import GOMP_ADVICE, LlamaCppCompute
from coase.agents.compute.ports import (
    Message,
    Prompt,
    PromptRefused,
    PromptTooLong,
    Tool,
    ToolCall,
)
from coase.protocol.errors import ComputeFailed
from tests.conformance.compute_servers import small_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("compute")]

LONG = Prompt.ask("Tell me a very long story about a lighthouse.", max_tokens=1_000)
SHORT = Prompt.ask("Why is the sky blue?", max_tokens=4)
_DEADLINE_S = 60


async def until(is_so: Callable[[], Awaitable[bool]]) -> None:
    """Wait for something outside of this process, which no event of ours can tell."""
    async with asyncio.timeout(_DEADLINE_S):
        while not await is_so():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
async def compute() -> AsyncIterator[LlamaCppCompute]:
    compute = LlamaCppCompute(small_model())
    await compute.start()
    yield compute
    await compute.close()


async def test_agents_of_one_process_share_one_engine(compute: LlamaCppCompute) -> None:
    other = LlamaCppCompute(small_model())
    await other.start()
    assert other.pid == compute.pid
    await other.close()
    assert compute.pid is not None  # The last one to close ends it.
    assert (await compute.complete(SHORT)).text


async def test_a_closed_stream_stops_the_engine_at_work(compute: LlamaCppCompute) -> None:
    async with aclosing(compute.stream(LONG)) as stream:
        await anext(stream)
    assert compute._shared is not None
    api = await compute._shared.running()
    slots = f"{compute._shared._address}/slots"

    async def is_idle() -> bool:
        return not any(slot["is_processing"] for slot in await api.ask("GET", slots))

    await until(is_idle)


async def test_an_answer_that_was_begun_goes_on(compute: LlamaCppCompute) -> None:
    begun = "Sure: 1, 2, 3, 4,"
    messages = (Message("user", "Count from 1 to 8."), Message("assistant", begun))
    completion = await compute.complete(Prompt(messages=messages, max_tokens=12))
    assert completion.text.strip().startswith("5")


@pytest.mark.slow
async def test_a_model_that_was_shown_how_may_call_a_tool_of_its_own_accord(
    compute: LlamaCppCompute,
) -> None:
    tool = Tool(
        name="get_weather",
        description="The weather of a town",
        parameters={
            "type": "object",
            "properties": {"town": {"type": "string"}},
            "required": ["town"],
        },
    )
    shown: list[Message] = []
    for town in ("Ulm", "Rome", "Oslo"):
        call = ToolCall(name="get_weather", arguments=f'{{"town": "{town}"}}')
        shown += [
            Message("user", f"What is the weather in {town}?"),
            Message("assistant", "", tool_calls=(call,)),
            Message("tool", "sunny", tool_name="get_weather"),
            Message("assistant", "It is sunny."),
        ]
    asked = Message("user", "What is the weather in Paris?")
    prompt = Prompt(messages=(*shown, asked), tools=(tool,), max_tokens=60)
    assert (await compute.estimate(prompt)).input_tokens_exact
    made = await compute.complete(prompt)
    # So small a model may also just talk; what it must not is show us how it would call.
    assert "tool_call" not in made.text
    for call in made.tool_calls:
        assert (call.name, call.read()) == ("get_weather", {"town": "Paris"})
        assert (made.text.strip(), made.done_reason) == ("", "tool_calls")


async def test_vectors_are_made_by_a_process_of_their_own_that_ends_with_the_rest() -> None:
    compute = LlamaCppCompute(small_model(), limits=Limits(queue_max=2))
    with pytest.raises(PromptRefused, match="has no model"):
        await compute.embed(["x"], "gpt")
    assert compute._embedder is not None
    assert compute._embedder.pid is None  # It starts with the first text, and not before.
    near, far, same = (await compute.embed(["a cat", "interest rates", "a cat"])).vectors
    assert near == pytest.approx(same, abs=1e-3)
    assert near != pytest.approx(far, abs=1e-3)
    pid = compute._embedder.pid
    assert pid is not None
    assert compute.pid is None  # Nothing was written.
    with pytest.raises(PromptTooLong):
        await compute.embed(["word " * 3_000])
    await compute.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_what_is_cached_is_told_and_changes_nothing(compute: LlamaCppCompute) -> None:
    prompt = Prompt.ask("Bread rises because " + "yeast eats sugar " * 20, max_tokens=16)
    fresh = await compute.complete(prompt)
    again = await compute.complete(prompt)
    assert again.usage.cached_input_tokens > fresh.usage.cached_input_tokens
    assert again.text == fresh.text


async def test_the_estimate_counts_with_the_models_own_tokenizer(compute: LlamaCppCompute) -> None:
    for prompt in (SHORT, Prompt(text="The capital of France is", max_tokens=1)):
        estimate = await compute.estimate(prompt)
        assert estimate.input_tokens_exact
        assert estimate.input_tokens == (await compute.complete(prompt)).usage.input_tokens


async def test_a_prompt_beyond_the_context_is_refused_with_its_size(
    compute: LlamaCppCompute,
) -> None:
    with pytest.raises(ComputeFailed, match="2048 tokens"):
        await compute.complete(Prompt.ask("word " * 4_000))


async def test_another_model_is_refused(compute: LlamaCppCompute) -> None:
    with pytest.raises(ComputeFailed, match="has no model 'gpt'"):
        await compute.complete(Prompt.ask("hello", model="gpt"))


async def test_an_engine_that_is_killed_is_an_error_now_and_a_new_engine_next() -> None:
    # Limits of its own, so that it is nobody else's engine.
    compute = LlamaCppCompute(small_model(), limits=Limits(queue_max=1))
    async with aclosing(compute.stream(LONG)) as stream:
        await anext(stream)
        killed = compute.pid
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        with pytest.raises(ComputeFailed, match=r"died in the middle of an answer: exit code -9"):
            async for _ in stream:
                pass
    assert (await compute.complete(SHORT)).text
    assert compute.pid not in (None, killed)
    await compute.close()


async def test_the_engine_ends_with_its_parent_however_that_ends() -> None:
    source = """
        import asyncio, sys
        from pathlib import Path
        from coase.agents.compute.llamacpp import LlamaCppCompute
        async def main():
            compute = LlamaCppCompute(Path(sys.argv[1]))
            await compute.start()
            print(compute.pid, flush=True)
            await asyncio.sleep(600)
        asyncio.run(main())
    """
    command = [sys.executable, "-c", textwrap.dedent(source), str(small_model())]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:  # noqa: ASYNC220 - short
        assert parent.stdout is not None
        engine = int(await asyncio.to_thread(parent.stdout.readline))
        os.kill(engine, 0)  # It lives.
        parent.kill()

    async def is_dead() -> bool:
        return not _lives(engine)

    await until(is_dead)


def _lives(pid: int) -> bool:
    # An orphan whose new parent does not collect it stays as a zombie: dead all the same.
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


async def test_a_cancelled_start_leaves_no_process() -> None:
    compute = LlamaCppCompute(small_model(), limits=Limits(queue_max=2))
    starting = asyncio.create_task(compute.start())

    async def is_starting() -> bool:
        return compute._shared is not None and compute._shared._process is not None

    await until(is_starting)
    assert compute._shared is not None
    process = compute._shared._process
    assert process is not None
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert process.poll() is not None
    await compute.close()


async def test_a_file_that_is_no_model_is_said_in_plain_words(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF and then nothing")
    for path, why in ((broken, "did not start"), (tmp_path / "none.gguf", "has no model")):
        compute = LlamaCppCompute(path)
        with pytest.raises(ComputeFailed, match=why):
            await compute.complete(SHORT)
        await compute.close()


@pytest.mark.parametrize(
    ("missing", "advice"),
    [
        ("libgomp.so.1: cannot open shared object file", GOMP_ADVICE),
        ("No module named 'xllamacpp'", "pip install xllamacpp"),
    ],
    ids=["libgomp1", "package"],
)
async def test_a_missing_library_is_one_line_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, advice: str
) -> None:
    (tmp_path / "xllamacpp.py").write_text(f"raise ImportError({missing!r})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    compute = LlamaCppCompute(small_model(), limits=Limits(queue_max=3))
    with pytest.raises(ComputeFailed, match=advice) as caught:
        await compute.start()
    assert "\n" not in str(caught.value)
    await compute.close()


async def test_the_engine_prints_nothing(
    compute: LlamaCppCompute, capfd: pytest.CaptureFixture[str]
) -> None:
    noisy = LlamaCppCompute(small_model(), limits=Limits(queue_max=4))
    await noisy.complete(SHORT)
    await noisy.close()
    assert capfd.readouterr() == ("", "")


async def test_a_stranger_on_the_machine_is_not_served(compute: LlamaCppCompute) -> None:
    from coase.agents.compute.openai import OpenAICompute

    assert compute._shared is not None
    stranger = OpenAICompute(f"{compute._shared._address}/v1", model="x")
    with pytest.raises(ComputeFailed, match="key"):
        await stranger.complete(SHORT)
    await stranger.close()


def test_nothing_of_the_engine_is_imported_before_it_is_used() -> None:
    source = "import coase.agents.compute.find, sys; sys.exit('xllamacpp' in sys.modules)"
    subprocess.run([sys.executable, "-c", source], check=True)
