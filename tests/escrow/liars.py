"""An endpoint in front of the embedded chain that lags, lies, loses and refuses as it is told."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from coase.escrow.backends.devchain_http import HttpServer

if TYPE_CHECKING:
    from collections.abc import Callable

    from coase.escrow.backends.devchain_node import DevNode


class Busy(Exception):
    """The proxy answers with this error instead of a result."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class Liar:
    """Serves a chain and changes what ``twists`` names: method -> (params, result) -> result."""

    def __init__(self, node: DevNode) -> None:
        self.node = node
        self.twists: dict[str, Callable[[list[Any], Any], Any]] = {}
        self.asked: list[str] = []
        self.url = ""
        self._http = HttpServer(self._answer)
        self._port = 0

    async def open(self) -> Liar:
        self._port = await self._http.start(self._port)
        self.url = f"http://127.0.0.1:{self._port}"
        return self

    async def close(self) -> None:
        await self._http.close()

    def _answer(self, body: bytes) -> bytes:
        requests = json.loads(body)
        if isinstance(requests, list):
            return json.dumps([self._one(request) for request in requests]).encode()
        return json.dumps(self._one(requests)).encode()

    def _one(self, request: dict[str, Any]) -> dict[str, Any]:
        method, params = request["method"], request.get("params", [])
        self.asked.append(method)
        answer: dict[str, Any] = json.loads(self.node.rpc.answer(json.dumps(request).encode()))
        twist = self.twists.get(method)
        if twist is not None and "error" not in answer:
            try:
                answer["result"] = twist(params, answer["result"])
            except Busy as busy:
                del answer["result"]
                answer["error"] = {"code": busy.code, "message": busy.message}
        return answer
