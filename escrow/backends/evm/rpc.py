"""One JSON-RPC endpoint: kept connections, named failures, and blocks as they come.

Requests are plain JSON-RPC. web3's formatters cost more than the network here, and loading web3 a
second of every command's time: whoever wants it is given it on the same connections.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar
from urllib.parse import urlsplit

import aiohttp

from coase.protocol.errors import ChainUnavailable, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from web3 import AsyncWeb3

REQUEST_MAX_S: Final = 10.0  # An endpoint that needs longer is as good as gone; we ask again.
CONNECTIONS_MAX: Final = 16
BATCH_SIZE_MAX: Final = 100  # What public endpoints allow.
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_REVERTED: Final = 3

T = TypeVar("T")


class RpcFailed(Exception):
    """The endpoint answered with an error."""

    def __init__(self, method: str, code: int, message: str, data: Any = None) -> None:
        super().__init__(f"{method}: {message}")
        self.code, self.message, self.data = code, message, data

    @property
    def revert_data(self) -> bytes | None:
        """What the contract gave as its reason, or None if it was not the contract."""
        data = self.data
        while isinstance(data, dict):  # Some development chains wrap it.
            data = data.get("data")
        if isinstance(data, str) and data.startswith("0x"):
            return bytes.fromhex(data[2:])
        if self.code == _REVERTED or "revert" in self.message.lower():
            return b""
        return None


@dataclass(frozen=True, slots=True)
class ChainBlock:
    """What we need of a block."""

    number: int
    hash: str
    parent_hash: str
    time_s: int
    base_fee: int
    tx_hashes: frozenset[str] = field(repr=False, default=frozenset())


def block_of(raw: dict[str, Any]) -> ChainBlock:
    """Read a block as the endpoint gives it."""
    return ChainBlock(
        number=int(raw["number"], 16),
        hash=raw["hash"],
        parent_hash=raw["parentHash"],
        time_s=int(raw["timestamp"], 16),
        base_fee=int(raw.get("baseFeePerGas") or "0x0", 16),
        tx_hashes=frozenset(tx for tx in raw.get("transactions", ()) if isinstance(tx, str)),
    )


class Shared(Generic[T]):
    """Runs one request for all who ask at the same time.

    Nobody is given an answer to a request that began before he asked, so that who has seen a
    receipt also sees the block that holds it.
    """

    def __init__(self, fetch: Callable[[], Awaitable[T]]) -> None:
        self._fetch = fetch
        self._running: asyncio.Future[T] | None = None
        self._next: asyncio.Future[T] | None = None

    async def get(self) -> T:
        """Return the answer to a request that starts now or later."""
        if self._next is None:
            self._next = asyncio.ensure_future(self._after(self._running))
            self._next.add_done_callback(_retrieved)
        return await asyncio.shield(self._next)

    async def _after(self, running: asyncio.Future[T] | None) -> T:
        if running is not None:
            await asyncio.wait([running])
        self._running, self._next = self._next, None
        return await self._fetch()

    async def close(self) -> None:
        """Cancel what runs and wait for its end."""
        left = [task for task in (self._running, self._next) if task is not None]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


def _retrieved(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()  # Whoever waited has seen it; if nobody did, nobody cared.


class Connection:
    """Carries JSON-RPC over kept connections, without retries."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._session: aiohttp.ClientSession | None = None
        self._ids = itertools.count(1)

    async def post(self, body: bytes) -> bytes:
        """Send one body and return the answer's."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=CONNECTIONS_MAX),
                timeout=aiohttp.ClientTimeout(total=REQUEST_MAX_S),
                headers={"Content-Type": "application/json"},
                # A proxy of the environment is for the world outside, not for this machine.
                trust_env=urlsplit(self.url).hostname not in _LOOPBACK,
            )
        async with self._session.post(self.url, data=body) as response:
            response.raise_for_status()
            return await response.read()

    async def call(self, requests: Sequence[tuple[str, list[Any]]]) -> Any:
        """Return the answer to one request, or to a batch of several, as the endpoint gives it.

        :raises ValueError: if it is no JSON
        """
        bodies = [
            {"jsonrpc": "2.0", "id": next(self._ids), "method": method, "params": params}
            for method, params in requests
        ]
        answer = await self.post(json.dumps(bodies[0] if len(bodies) == 1 else bodies).encode())
        try:
            return json.loads(answer)
        except RecursionError as error:
            raise ValueError("its answer is nested too deeply") from error

    async def close(self) -> None:
        """Close what is open. Safe to repeat."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()


class Endpoint:
    """Asks one endpoint. Every method raises ChainUnavailable if it does not answer sensibly."""

    def __init__(self, url: str) -> None:
        if urlsplit(url).scheme not in ("http", "https"):
            raise ConfigurationError(f"{url!r} is no http or https endpoint of a chain")
        self.url = url
        self.connection = Connection(url)
        self._latest = Shared(self._fetch_latest)

    @property
    def web3(self) -> AsyncWeb3[Any]:
        """A web3 object on the same connections, for whatever else one wants to ask."""
        from .stock import web3_on  # Late: see the head of this module.

        return web3_on(self.connection)

    async def ask(self, method: str, *params: Any) -> Any:
        """Return the result of one request.

        :raises RpcFailed: if the endpoint answers with an error
        """
        try:
            response = await self.connection.call([(method, list(params))])
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise self.unavailable(error) from error
        return self._result(method, response)

    async def ask_many(self, requests: Sequence[tuple[str, list[Any]]]) -> list[Any]:
        """Return the results of several requests, in their order.

        :raises RpcFailed: if any of them fails
        """
        results: list[Any] = []
        for start in range(0, len(requests), BATCH_SIZE_MAX):
            part = requests[start : start + BATCH_SIZE_MAX]
            if len(part) == 1:
                results.append(await self.ask(part[0][0], *part[0][1]))
                continue
            try:
                answers = await self.connection.call(part)
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                raise self.unavailable(error) from error
            if not isinstance(answers, list):
                self._result("batch", answers)
                raise ChainUnavailable(f"{self.url} does not answer a batch with a list")
            if len(answers) != len(part):
                raise ChainUnavailable(f"{self.url} left out answers of a batch")
            answers.sort(key=lambda answer: int(answer.get("id") or 0))
            results += [
                self._result(method, answer)
                for (method, _), answer in zip(part, answers, strict=True)
            ]
        return results

    def _result(self, method: str, response: Any) -> Any:
        if not isinstance(response, dict):
            raise ChainUnavailable(f"{self.url} answers {method} with something else than JSON-RPC")
        error = response.get("error")
        if error is None:
            return response.get("result")
        if not isinstance(error, dict):
            raise RpcFailed(method, 0, str(error))
        raise RpcFailed(
            method, int(error.get("code") or 0), str(error.get("message")), error.get("data")
        )

    def unavailable(self, error: Exception) -> ChainUnavailable:
        """Return what ``error`` means for who wanted something of the chain."""
        if isinstance(error, aiohttp.ClientResponseError):
            cause = f"it answered {error.status} {error.message}"
            if error.status == 429:
                cause += ": its limit of requests is reached, use another endpoint or a key"
        elif isinstance(error, TimeoutError):
            cause = f"no answer within {REQUEST_MAX_S:.0f} s"
        elif isinstance(error, aiohttp.ClientConnectorError | ConnectionError):
            cause = f"no connection ({error}): is the chain's process running?"
        else:
            cause = f"{type(error).__name__}: {error}"
        return ChainUnavailable(f"the chain at {self.url} cannot be reached: {cause}")

    async def latest(self) -> ChainBlock:
        """Return the newest block, by one request for all who ask at the same time."""
        return await self._latest.get()

    async def _fetch_latest(self) -> ChainBlock:
        return await self.block("latest")

    async def block(self, tag: str) -> ChainBlock:
        """Return the block of a tag, or of a number in hex."""
        block = await self.find_block(tag)
        if block is None:
            raise ChainUnavailable(f"{self.url} has no block {tag} (yet): it lags behind")
        return block

    async def find_block(self, tag: str) -> ChainBlock | None:
        """Return the block of a tag or of a number in hex, or None."""
        try:
            raw = await self.ask("eth_getBlockByNumber", tag, False)
            return None if raw is None else block_of(raw)
        except (RpcFailed, KeyError, TypeError, ValueError) as error:
            raise ChainUnavailable(f"{self.url} gives no sensible block {tag}: {error}") from error

    async def close(self) -> None:
        """Close the connections. Safe to repeat."""
        await self._latest.close()
        await self.connection.close()
