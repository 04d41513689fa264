"""web3 on the connections of an endpoint, for whatever our own client does not ask.

Nothing else loads web3: that takes a second, and most commands are done in less.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

# A part of web3 raises Python's limit of recursion to 100,000 when it is loaded. With that, a few
# bytes of deeply nested JSON from a stranger run a parser out of its stack and end the process.
_recursion_limit = sys.getrecursionlimit()
from web3 import AsyncHTTPProvider, AsyncWeb3  # noqa: E402

sys.setrecursionlimit(_recursion_limit)

if TYPE_CHECKING:
    from web3.types import RPCEndpoint, RPCResponse

    from .rpc import Connection


class _Provider(AsyncHTTPProvider):
    """web3's provider without retries or a cache; its own session would keep no connection."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(
            connection.url, exception_retry_configuration=None, cache_allowed_requests=False
        )
        self._connection = connection

    async def _make_request(self, method: RPCEndpoint, request_data: bytes) -> bytes:
        return await self._connection.post(request_data)

    async def make_batch_request(
        self, batch_requests: list[tuple[RPCEndpoint, Any]]
    ) -> list[RPCResponse] | RPCResponse:
        body = self.encode_batch_rpc_request(batch_requests)
        answer = self.decode_rpc_response(await self._connection.post(body))
        return cast("list[RPCResponse]", answer)


def web3_on(connection: Connection) -> AsyncWeb3[Any]:
    """Return a web3 object that asks through ``connection``, which stays its owner's to close."""
    return AsyncWeb3(_Provider(connection))
