"""Vectors for LangChain: over a gateway, or by an engine or market of this very process."""

from __future__ import annotations

import json
from typing import Any, Final

import httpx
from langchain_core.embeddings import Embeddings
from langchain_core.utils import secret_from_env
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from coase.agents.compute.ports import Compute
from coase.protocol.errors import ComputeFailed, ConfigurationError

from .chat import GATEWAY, TIMEOUT_S, refusal

# So many texts go into one request; more are asked for one after the other.
BATCH_MAX: Final = 256


class CoaseEmbeddings(BaseModel, Embeddings):
    """Vectors made on this machine or bought, by whatever ``coase gateway`` decides.

    ``compute`` takes the place of the gateway; it lives in one event loop, and so can be asked
    asynchronously only.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: str = "auto"
    base_url: str = GATEWAY
    api_key: SecretStr | None = Field(
        default_factory=secret_from_env("COASE_API_KEY", default=None)
    )
    timeout: float = TIMEOUT_S
    max_retries: int = 2
    """How often a gateway is asked again that could not be reached."""
    compute: Compute | None = Field(default=None, exclude=True)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return a vector for each text.

        :raises ComputeFailed: if nobody makes them
        """
        if self.compute is not None:
            raise ConfigurationError(
                "an engine lives in one event loop: use aembed_documents, or a gateway"
            )
        transport = httpx.HTTPTransport(retries=self.max_retries)
        with httpx.Client(transport=transport, timeout=self.timeout) as client:
            return [
                vector
                for batch in _batches(texts)
                for vector in _vectors(client.post(**self._request(batch)), len(batch))
            ]

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of one text; raises what ``embed_documents`` raises."""
        return self.embed_documents([text])[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return a vector for each text; raises what ``embed_documents`` raises."""
        found: list[list[float]] = []
        if self.compute is not None:
            model = None if self.model == "auto" else self.model
            for batch in _batches(texts):
                made = await self.compute.embed(batch, model)
                found += [list(vector) for vector in made.vectors]
            return found
        transport = httpx.AsyncHTTPTransport(retries=self.max_retries)
        async with httpx.AsyncClient(transport=transport, timeout=self.timeout) as client:
            for batch in _batches(texts):
                found += _vectors(await client.post(**self._request(batch)), len(batch))
        return found

    async def aembed_query(self, text: str) -> list[float]:
        """Return the vector of one text; raises what ``embed_documents`` raises."""
        return (await self.aembed_documents([text]))[0]

    def _request(self, texts: list[str]) -> dict[str, Any]:
        headers = {}
        if self.api_key is not None:
            headers["authorization"] = f"Bearer {self.api_key.get_secret_value()}"
        body = {"model": self.model, "input": texts, "encoding_format": "float"}
        url = f"{self.base_url.rstrip('/')}/v1/embeddings"
        return {"url": url, "json": body, "headers": headers}


def _batches(texts: list[str]) -> list[list[str]]:
    return [texts[start : start + BATCH_MAX] for start in range(0, len(texts), BATCH_MAX)]


def _vectors(response: httpx.Response, count: int) -> list[list[float]]:
    if response.status_code != httpx.codes.OK:
        raise refusal(response.content)
    try:
        data = sorted(json.loads(response.content)["data"], key=lambda entry: int(entry["index"]))
        vectors = [[float(number) for number in entry["embedding"]] for entry in data]
    except (ValueError, LookupError, TypeError) as error:
        raise ComputeFailed(f"the gateway answered something else than vectors: {error}") from None
    if len(vectors) != count:
        raise ComputeFailed(f"the gateway answered {len(vectors)} vectors for {count} texts")
    return vectors
