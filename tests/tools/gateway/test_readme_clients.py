"""What the README says to write in three lines for each client, run against a gateway."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest

from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.router import RouterCompute
from coase.tools.gateway.server import application, serving

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

PAGE = (Path(__file__).parents[3] / "README.md").read_text()
URL = "http://127.0.0.1:11435"
BLOCKS = re.findall(r"^```py\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
SNIPPETS = [block for block in BLOCKS if URL in block]


def test_there_are_three_lines_for_each_of_three_clients() -> None:
    lines = [[line for line in snippet.splitlines() if line] for snippet in SNIPPETS]
    assert [len(each) for each in lines] == [3, 3, 3]
    assert [snippet.split()[1] for snippet in SNIPPETS] == ["openai", "ollama", "anthropic"]


@pytest.mark.parametrize("snippet", SNIPPETS)
async def test_three_lines_are_enough(snippet: str) -> None:
    found: dict[str, Any] = {}
    *_, last = snippet.strip().splitlines()
    async with serving(
        application(RouterCompute(local=EchoCompute())), host="127.0.0.1", port=0
    ) as url:
        code = snippet.replace(URL, url).replace(last, f"answer = {last}")
        await anyio.to_thread.run_sync(exec, compile(code, "README.md", "exec"), found)
        await anyio.to_thread.run_sync(_close, found["client"])
    assert "Why?" in str(found["answer"])


def _close(client: Any) -> None:
    getattr(client, "close", lambda: client._client.close())()
