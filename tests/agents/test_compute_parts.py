"""Tools, pictures, thinking and vectors on the wires of the servers, and what a model's file says.

The wires are written by the servers' documentation: no Ollama and no model that thinks can be
installed from a package.
"""

from __future__ import annotations

import base64
import json
import struct
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from coase.agents.compute.calls import call_in, call_schema, linked
from coase.agents.compute.gguf import Facts, facts_of
from coase.agents.compute.ollama import OllamaCompute
from coase.agents.compute.openai import OpenAICompute
from coase.agents.compute.ports import (
    Completion,
    Image,
    Message,
    Prompt,
    PromptTooLong,
    Tool,
    ToolCall,
    Unsupported,
)
from coase.agents.compute.template import template_for
from coase.protocol.errors import ComputeFailed
from tests.conformance.compute_servers import Die, Request, Status, serving, small_model

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from pathlib import Path

    from coase.agents.compute.ports import Compute

pytestmark = pytest.mark.anyio

PICTURE = Image(b"\x89PNG\r\n\x1a\n" + bytes(range(50)))
ENCODED = base64.b64encode(PICTURE.data).decode()
TOOL = Tool(name="add", description="The sum", parameters={"type": "object", "properties": {}})
CALL = ToolCall(name="add", arguments='{"a": 3}', id="call_7")
ASKED = Prompt(
    messages=(
        Message("user", "What is this?", images=(PICTURE,)),
        Message("assistant", "Let me add", thinking="hm", tool_calls=(CALL,)),
        Message("tool", "7", tool_call_id="call_7"),
    ),
    model="m",
    tools=(TOOL,),
    thinking="high",
    top_k=5,
    top_p_permille=250,
    logprobs=True,
    top_logprobs=2,
)


class Talk:
    """A server that answers with fixed lines and keeps what it was asked."""

    def __init__(self, *lines: Any, status: int = 200, sse: bool = True) -> None:
        self._lines, self._status, self._sse = lines, status, sse
        self.asked: list[Any] = []

    async def __call__(self, request: Request) -> AsyncGenerator[bytes, None]:
        """Answer one request."""
        self.asked.append(request.body)
        if self._status != 200:
            raise Status(self._status, self._lines[0])
        for line in self._lines:
            text = json.dumps(line)
            yield (f"data: {text}\n\n" if self._sse else f"{text}\n").encode()
        if self._sse and len(self._lines) > 1:
            yield b"data: [DONE]\n\n"


async def complete(talk: Talk, compute: type[Any], prompt: Prompt, **options: Any) -> Completion:
    async with serving(talk) as server:
        engine: Compute = compute(server.url, **options)
        try:
            return await engine.complete(prompt)
        finally:
            await engine.close()


def delta(reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def part(index: int, **function: str) -> dict[str, Any]:
    return {"index": index, "function": function}


USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 12}}


async def test_openai_servers_get_all_of_it_and_calls_come_together_from_pieces() -> None:
    talk = Talk(
        delta(role="assistant", content=None),
        delta(reasoning_content="I "),
        delta(reasoning="wonder"),
        delta(content="Two calls."),
        delta(tool_calls=[{**part(0, name="add", arguments=""), "id": "a"}]),
        delta(tool_calls=[part(0, arguments='{"a":')]),
        delta(tool_calls=[part(0, arguments=" 1}")]),
        delta(tool_calls=[{**part(1, name="sub", arguments="{}"), "id": "b"}]),
        delta("tool_calls"),
        USAGE,
    )
    made = await complete(talk, OpenAICompute, ASKED)
    assert (made.thinking, made.text, made.done_reason) == ("I wonder", "Two calls.", "tool_calls")
    assert made.tool_calls == (
        ToolCall(name="add", arguments='{"a": 1}', id="a"),
        ToolCall(name="sub", arguments="{}", id="b"),
    )
    assert (made.usage.input_tokens, made.usage.output_tokens) == (9, 12)
    (body,) = talk.asked
    seen, called, result = body["messages"]
    assert seen["content"] == [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{ENCODED}"}},
    ]
    assert called["tool_calls"] == [
        {"id": "call_7", "type": "function", "function": {"name": "add", "arguments": '{"a": 3}'}}
    ]
    assert result == {"role": "tool", "content": "7", "tool_call_id": "call_7"}
    assert body["tools"][0]["function"]["name"] == "add"
    assert (body["tool_choice"], body["reasoning_effort"]) == ("auto", "high")
    assert body["chat_template_kwargs"] == {"enable_thinking": True}
    assert (body["top_k"], body["top_p"], body["top_logprobs"]) == (5, 0.25, 2)


async def test_a_call_that_a_schema_forces_is_a_call_and_no_text() -> None:
    forced = Prompt.ask("3?", model="m", tools=(TOOL,), tool_choice="required")
    talk = Talk(delta(content='{"name": "add", '), delta("stop", content='"arguments": {"a": 3}}'))
    made = await complete(talk, OpenAICompute, forced, calls_by_schema=True)
    assert (made.text, made.done_reason) == ("", "tool_calls")
    assert made.tool_calls == (ToolCall(name="add", arguments='{"a": 3}'),)
    (body,) = talk.asked
    assert body["tool_choice"] == "none"
    assert body["response_format"]["json_schema"]["schema"] == call_schema((TOOL,))
    half = Talk(delta("length", content='{"name": "add", "argu'), delta())
    cut = await complete(half, OpenAICompute, forced, calls_by_schema=True)
    assert (cut.text, cut.done_reason) == ('{"name": "add", "argu', "length")
    assert not cut.tool_calls
    native = Talk(delta("tool_calls", tool_calls=[part(0, name="add", arguments="{}")]), delta())
    assert (await complete(native, OpenAICompute, forced)).tool_calls[0].name == "add"
    assert native.asked[0]["tool_choice"] == "required"


def line(done: bool = False, **message: Any) -> dict[str, Any]:
    said = {"role": "assistant", "content": "", **message}
    return {"model": "m", "created_at": "", "message": said, "done": done}


async def test_ollama_gets_all_of_it_and_gives_thoughts_and_calls() -> None:
    talk = Talk(
        line(thinking="I "),
        line(thinking="wonder"),
        line(tool_calls=[{"function": {"name": "add", "arguments": {"a": 1}}}]),
        {**line(True), "done_reason": "stop", "prompt_eval_count": 9, "eval_count": 12},
        sse=False,
    )
    made = await complete(talk, OllamaCompute, ASKED)
    assert (made.thinking, made.text, made.done_reason) == ("I wonder", "", "tool_calls")
    assert made.tool_calls == (ToolCall(name="add", arguments='{"a": 1}'),)
    assert made.usage.output_tokens == 12
    (body,) = talk.asked
    seen, called, result = body["messages"]
    assert seen["images"] == [ENCODED]
    assert called["thinking"] == "hm"
    assert called["tool_calls"] == [{"function": {"name": "add", "arguments": {"a": 3}}}]
    assert (result["role"], result["content"], result["tool_name"]) == ("tool", "7", "add")
    assert body["tools"][0]["function"]["name"] == "add"
    assert (body["think"], body["top_logprobs"]) == ("high", 2)
    assert (body["options"]["top_k"], body["options"]["top_p"]) == (5, 0.25)


async def test_ollama_is_made_to_call_by_a_schema_since_it_has_no_word_for_it() -> None:
    forced = Prompt.ask("3?", model="m", tools=(TOOL,), tool_choice="required")
    end = {**line(True), "done_reason": "stop", "eval_count": 5}
    talk = Talk(line(content='{"name": "add", "arguments": {"a": 3}}'), end, sse=False)
    made = await complete(talk, OllamaCompute, forced)
    assert made.tool_calls == (ToolCall(name="add", arguments='{"a": 3}'),)
    assert (made.text, made.done_reason) == ("", "tool_calls")
    assert talk.asked[0]["format"] == call_schema((TOOL,))
    never = Prompt.ask("3?", model="m", tools=(TOOL,), tool_choice="none")
    quiet = Talk(line(content="7"), end, sse=False)
    assert (await complete(quiet, OllamaCompute, never)).text == "7"
    assert not quiet.asked[0].get("tools")


async def test_a_connection_that_is_let_go_as_it_is_taken_is_no_failure() -> None:
    count = 0

    async def moody(request: Request) -> AsyncGenerator[bytes, None]:
        nonlocal count
        count += 1
        if count in (1, 3, 4):
            raise Die
        yield f"data: {json.dumps(delta('stop', content='here'))}\n\n".encode()
        yield b"data: [DONE]\n\n"

    async with serving(moody) as server:
        compute = OpenAICompute(server.url, model="m")
        assert (await compute.complete(Prompt.ask("?"))).text == "here"
        with pytest.raises(ComputeFailed, match="broke off"):  # Twice is no chance.
            await compute.complete(Prompt.ask("?"))
        await compute.close()
    assert count == 4


REFUSALS: tuple[tuple[Any, int, Any, type[Exception]], ...] = (
    (OllamaCompute, 400, {"error": '"m" does not support thinking'}, Unsupported),
    (OpenAICompute, 501, {"error": {"message": "does not support embeddings"}}, Unsupported),
    (OpenAICompute, 500, {"error": {"message": "image input is not supported"}}, Unsupported),
    (
        OpenAICompute,
        400,
        {"error": {"message": "too long", "type": "exceed_context_size_error"}},
        PromptTooLong,
    ),
    (
        OpenAICompute,
        400,
        {"error": {"message": "too long", "code": "context_length_exceeded"}},
        PromptTooLong,
    ),
)


@pytest.mark.parametrize(("compute", "status", "body", "error"), REFUSALS)
async def test_what_a_server_cannot_do_is_told_from_what_is_too_long(
    compute: type[Any], status: int, body: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        await complete(Talk(body, status=status, sse=False), compute, ASKED)


@pytest.mark.parametrize(
    "data",
    [
        [{"index": 0, "embedding": [1.0]}],
        [{"index": 0, "embedding": [1.0]}, {"index": 1, "embedding": [1.0, 2.0]}],
        [{"index": 0, "embedding": []}, {"index": 1, "embedding": []}],
        [{"index": 0, "embedding": ["x"]}, {"index": 1, "embedding": [1.0]}],
        {"0": 1},
    ],
)
async def test_vectors_that_are_none_are_an_error(data: Any) -> None:
    async with serving(Talk({"data": data}, sse=False)) as server:
        compute = OpenAICompute(server.url, model="m")
        with pytest.raises(ComputeFailed, match="does not speak"):
            await compute.embed(["a", "b"])
        await compute.close()


async def test_vectors_come_in_the_order_of_the_texts() -> None:
    data = [{"index": 1, "embedding": [2.0]}, {"index": 0, "embedding": [1.0]}]
    talk = Talk({"data": data, "usage": {"prompt_tokens": 4}}, sse=False)
    async with serving(talk) as server:
        compute = OpenAICompute(server.url, model="m")
        made = await compute.embed(["a", "b"])
        await compute.close()
    assert (made.vectors, made.usage.input_tokens) == (((1.0,), (2.0,)), 4)
    assert talk.asked == [{"model": "m", "input": ["a", "b"], "encoding_format": "float"}]


# ---- Calls ------------------------------------------------------------------------------------


def names(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(m.tool_call_id, m.tool_name) for m in messages if m.role == "tool"]


def test_results_find_their_calls_by_id_by_name_or_by_turn() -> None:
    add, sub = ToolCall(name="add"), ToolCall(name="sub", id="x")
    called = Message("assistant", "", tool_calls=(add, sub))
    asked = Message("user", "?")
    made = linked((asked, called, Message("tool", "2"), Message("tool", "1", tool_call_id="x")))
    assert [call.id for call in made[1].tool_calls] == ["call_1_0", "x"]
    assert names(made) == [("call_1_0", "add"), ("x", "sub")]
    named = (asked, called, Message("tool", "1", tool_name="sub"), Message("tool", "2"))
    assert names(linked(named)) == [("x", "sub"), ("call_1_0", "add")]
    astray = (asked, Message("tool", "1", tool_call_id="y"), Message("tool", "2"))
    assert names(linked(astray)) == [("y", ""), ("", "")]


def test_the_schema_of_a_call_holds_the_tools_and_their_references() -> None:
    tree = Tool(
        name="plant",
        parameters={
            "type": "object",
            "properties": {"root": {"$ref": "#/$defs/Node"}},
            "required": ["root"],
            "$defs": {
                "Node": {
                    "type": "object",
                    "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/Node"}}},
                    "required": ["kids"],
                }
            },
        },
    )
    schema = call_schema((tree, TOOL))
    jsonschema.Draft202012Validator.check_schema(schema)
    good = {"name": "plant", "arguments": {"root": {"kids": [{"kids": []}]}}}
    jsonschema.validate(good, schema)
    jsonschema.validate({"name": "add", "arguments": {}}, schema)
    for bad in (
        {"name": "plant", "arguments": {"root": {"kids": [3]}}},
        {"name": "plant", "arguments": {}},
        {"name": "burn", "arguments": {}},
        {"name": "add"},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)
    assert call_in(json.dumps(good)) == ToolCall(
        name="plant", arguments=json.dumps(good["arguments"])
    )
    assert [call_in(text) for text in ("", "[]", '{"name": 3}', '{"name"')] == [None] * 4


# ---- What a file says -------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(entries: dict[str, Any], *, tensors: tuple[tuple[int, ...], ...] = ((2, 3),)) -> bytes:
    """Return the head of a GGUF file with these entries."""
    content = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries))
    for key, value in entries.items():
        content += text(key)
        if isinstance(value, str):
            content += struct.pack("<I", 8) + text(value)
        elif isinstance(value, list):
            content += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        else:
            content += struct.pack("<II", 4, value)
    for dimensions in tensors:
        content += text("t") + struct.pack("<I", len(dimensions))
        content += struct.pack(f"<{len(dimensions)}Q", *dimensions) + struct.pack("<IQ", 0, 0)
    return content


def test_a_file_tells_what_its_model_is_and_can(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    entries = {
        "general.architecture": "qwen3",
        "tokenizer.ggml.tokens": ["a", "b", "c"],
        "qwen3.context_length": 40_960,
        "qwen3.embedding_length": 1_024,
        "tokenizer.chat_template": "{% if tools %}…{% endif %}{% if enable_thinking %}<think>",
    }
    path.write_bytes(gguf(entries, tensors=((2, 3), (10,))))
    facts = facts_of(path)
    assert (facts.architecture, facts.parameter_count) == ("qwen3", 16)
    assert (facts.context_tokens, facts.embedding_length) == (40_960, 1_024)
    assert facts.capabilities == ("completion", "tools", "thinking", "embedding")
    assert template_for(facts) == ""
    path.write_bytes(gguf({"general.architecture": "bert", "bert.pooling_type": 1}))
    assert facts_of(path).capabilities == ("embedding",)
    real = facts_of(small_model())
    assert (real.architecture, real.parameter_count) == ("llama", 134_515_008)
    assert real.capabilities == ("completion", "tools", "embedding")
    assert template_for(real).endswith(f"{{%- else %}}{real.chat_template}{{%- endif %}}")


def test_a_broken_file_tells_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    whole = gguf({"general.architecture": "llama", "a": ["x"] * 3})
    huge = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a")
    broken = [whole[:size] for size in range(0, len(whole), 7)]
    broken += [b"GGUF" + struct.pack("<IQQ", 9, 0, 0), b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60)]
    broken += [huge + struct.pack("<IIQ", 9, 8, 2**60), huge + struct.pack("<IQ", 8, 2**60)]
    broken += [huge + struct.pack("<I", 99), b"", b"not at all"]
    for number, content in enumerate(broken):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(content)
        assert facts_of(path) == Facts()
