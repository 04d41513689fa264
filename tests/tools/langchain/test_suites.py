"""LangChain's own suites, run against a gateway whose engine repeats the question."""

from __future__ import annotations

import re
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import httpx
import pytest
from anyio.from_thread import start_blocking_portal
from langchain_tests.integration_tests import (
    ChatModelIntegrationTests,
    EmbeddingsIntegrationTests,
)
from langchain_tests.unit_tests import ChatModelUnitTests, EmbeddingsUnitTests

from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.router import RouterCompute
from coase.tools.gateway.server import application, serving
from coase.tools.langchain import ChatCoase, CoaseEmbeddings

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

    from langchain_core.embeddings import Embeddings
    from langchain_core.language_models import BaseChatModel

    from coase.agents.compute.ports import Chunk, Prompt

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(120),
    pytest.mark.xdist_group("langchain"),
]

PIXEL: Final = b"\x89PNG\r\n\x1a\n" + zlib.compress(b"one pixel")


class Eager(EchoCompute):
    """Does as it is told, as a model does that takes its question seriously.

    It calls the first tool that it is offered, and of JSON it makes the fields that are asked for.
    """

    def stream(self, prompt: Prompt) -> AsyncGenerator[Chunk, None]:
        if prompt.tools and prompt.tool_choice == "auto" and prompt.messages[-1].role == "user":
            prompt = replace(prompt, tool_choice="required")
        if prompt.response_schema == {"type": "object"}:
            names = re.findall(r"'(\w+)'", prompt.messages[-1].content)
            fields = {name: {"type": "string"} for name in names}
            prompt = replace(prompt, response_schema={"type": "object", "properties": fields})
        return super().stream(prompt)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A gateway that runs beside the tests, most of which know no event loop."""
    with start_blocking_portal("asyncio") as portal:
        app = portal.call(lambda: application(RouterCompute(local=Eager())))
        running = serving(app, host="127.0.0.1", port=0)
        with portal.wrap_async_context_manager(running) as address:
            yield address


@pytest.fixture
def benchmark() -> Callable[[Callable[[], Any]], Any]:
    """What the suites time; we measure elsewhere."""
    return lambda measured: measured()


@pytest.fixture
def vcr() -> None:
    """What the suites would replay a stranger's server from; ours runs here."""


@pytest.fixture
def snapshot() -> None:
    """What a stored model looks like; LangChain stores only those of its own partners."""


class _Chat:
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatCoase

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_image_inputs(self) -> bool:
        return True

    @property
    def supports_image_tool_message(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return True


class TestChatUnit(_Chat, ChatModelUnitTests):
    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"COASE_API_KEY": "secret"}, {}, {"api_key": "secret", "model": "auto"}


class TestChatIntegration(_Chat, ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def address(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.url = url
        picture = httpx.Response(200, content=PIXEL)
        monkeypatch.setattr(httpx, "get", lambda *_, **__: picture)  # Nothing is fetched here.

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"base_url": self.url}

    @property
    def model_override_value(self) -> str:
        return "echo"

    @property
    def supported_usage_metadata_details(self) -> Any:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> Any:
        model = ChatCoase(base_url=self.url)
        if not stream:
            return model.invoke("Hello")
        first, *rest = model.stream("Hello")
        return sum(rest, first)


class _Embeddings:
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return CoaseEmbeddings


class TestEmbeddingsUnit(_Embeddings, EmbeddingsUnitTests):
    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"COASE_API_KEY": "secret"}, {}, {"api_key": "secret", "model": "auto"}


class TestEmbeddingsIntegration(_Embeddings, EmbeddingsIntegrationTests):
    @pytest.fixture(autouse=True)
    def address(self, url: str) -> None:
        self.url = url

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"base_url": self.url}
