"""One machine's chain for all: JSON-RPC as questions over the joined brokers.

The machine that holds the chain runs a `ChainDesk`; on every other a `ChainWindow` is the endpoint
that chain clients use, on loopback. No further port is open to anybody, and it does not matter
which of two machines could dial the other.

A question is 16 hex digits, the id of the machine that asks, 16 bytes of chance, and the body as a
client posted it. The answer is one or more parts. Before each stand what became of the question
(one byte), the number of this part and how many there are (two each), and 65 bytes of signature
over keccak256 of ``coase/chain/v1\\0``, the first byte, and keccak256 of the question and of the
whole answer. The key is the one that the network's card names: another machine of the network may
hold the code, and can still not say what is on the chain.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import struct
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import httpx
from pydantic_core import from_json

from coase.escrow.backends.devchain_http import HttpServer, NoAnswer
from coase.protocol.backends.calls import NobodyListens
from coase.protocol.errors import BadSignature, ConfigurationError, TransportUnavailable
from coase.protocol.identity import keccak256, recover
from coase.protocol.subjects import chain_subject

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from coase.protocol.backends.calls import Answers, Calls, Question
    from coase.protocol.identity import Identity
    from coase.protocol.types import AgentId

log = logging.getLogger(__name__)

REQUEST_SIZE_MAX_BYTES: Final = 768 * 1024  # A broker takes 1 MiB; a deployment is 100 KiB.
PART_SIZE_MAX_BYTES: Final = 256 * 1024  # Deals' messages come in between on the same route.
ANSWER_SIZE_MAX_BYTES: Final = 16 * 1024 * 1024  # Far above a hundred receipts.
PARTS_MAX: Final = ANSWER_SIZE_MAX_BYTES // PART_SIZE_MAX_BYTES
BATCH_MAX: Final = 100  # As public endpoints have it, and our own client.
AT_ONCE_MAX: Final = 8  # The embedded chain answers one at a time; a real node a few.
WAITING_MAX: Final = 64  # Of one machine: a swarm of agents, each with a call or two.
REFUSALS_MAX: Final = 64  # On their way at a time; beyond that nobody is told.
MACHINES_MAX: Final = 64  # Twice what a mesh may have.
ANSWER_WAIT_MAX_S: Final = 8.0  # Chain clients give an endpoint ten.
INTEREST_WAIT_MAX_S: Final = 1.5  # A machine that has just come is known after 0.1 s.
_ASK_AGAIN_S: Final = 0.1
_ID_LENGTH: Final = 16
_CHANCE_LENGTH: Final = 16
_ANSWERS_MAX: Final = 4  # To one question; a stranger's do not count, and must not fill memory.
_HEAD_LENGTH: Final = _ID_LENGTH + _CHANCE_LENGTH
_DOMAIN: Final = b"coase/chain/v1\0"

_PART: Final = struct.Struct(">BHH65s")
_FULL, _AWAY, _BUSY, _REFUSED = range(4)
_WHY: Final = {
    _AWAY: "The chain is being started again",
    _BUSY: "The machine that holds the chain is busy",
}

METHODS: Final = frozenset(
    "eth_blockNumber eth_call eth_chainId eth_estimateGas eth_feeHistory eth_gasPrice"
    " eth_getBalance eth_getBlockByHash eth_getBlockByNumber eth_getBlockReceipts eth_getCode"
    " eth_getLogs eth_getStorageAt eth_getTransactionByHash eth_getTransactionCount"
    " eth_getTransactionReceipt eth_maxPriorityFeePerGas eth_sendRawTransaction eth_syncing"
    " net_listening net_peerCount net_version web3_clientVersion coase_faucet".split()
)
"""What another machine may ask of the chain: nothing that signs, and nothing that rules it."""

# JSON-RPC's own codes, and those that endpoints use for limits.
_INVALID: Final = -32600
_NO_METHOD: Final = -32601
_TOO_LARGE: Final = -32005
_NOT_NOW: Final = -32000


class ChainDesk:
    """Answers other machines' questions to the chain of this one, fairly.

    Machines take turns, so that one with a thousand questions delays another by one.
    """

    def __init__(self, calls: Calls, net: str, rpc: str, *, identity: Identity) -> None:
        self._calls, self._subject, self._rpc = calls, chain_subject(net), rpc
        self._identity = identity
        self._waiting: dict[str, deque[tuple[float, Question]]] = {}
        self._turns: deque[str] = deque()
        self._some = asyncio.Semaphore(0)
        self._notes: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Answer until cancelled."""
        await self._calls.serve(self._subject, self._take)
        limits = httpx.Limits(max_connections=AT_ONCE_MAX)
        # A proxy of the environment is for the world outside, not for this machine.
        async with (
            httpx.AsyncClient(timeout=ANSWER_WAIT_MAX_S, limits=limits, trust_env=False) as client,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(AT_ONCE_MAX):
                group.create_task(self._work(client))

    def _take(self, question: Question) -> None:
        """Put a question in its machine's line, or say at once that the line is too long."""
        asker = question.body[:_ID_LENGTH].decode("latin-1")
        line = self._waiting.get(asker)
        if line is None:
            if len(self._waiting) >= MACHINES_MAX:
                return self._say_busy(question)
            line = self._waiting[asker] = deque()
        if len(line) >= WAITING_MAX:
            return self._say_busy(question)
        if not line:
            self._turns.append(asker)
        line.append((asyncio.get_running_loop().time(), question))
        self._some.release()
        return None

    def _say_busy(self, question: Question) -> None:
        if len(self._notes) >= REFUSALS_MAX:
            return  # Its asker will find out by itself.
        (busy,) = self._parts(question.body, _BUSY, b"")
        task = asyncio.ensure_future(question.answer(busy))
        self._notes.add(task)
        task.add_done_callback(self._notes.discard)

    def _next(self) -> tuple[float, Question]:
        asker = self._turns.popleft()
        line = self._waiting[asker]
        taken = line.popleft()
        if line:
            self._turns.append(asker)
        else:
            del self._waiting[asker]
        return taken

    async def _work(self, client: httpx.AsyncClient) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            await self._some.acquire()
            taken_at, question = self._next()
            if clock() - taken_at < ANSWER_WAIT_MAX_S:  # Else nobody waits any more.
                kind, answer = await self._answer(client, question.body[_HEAD_LENGTH:])
                for part in self._parts(question.body, kind, answer):
                    await question.answer(part)

    def _parts(self, question: bytes, kind: int, answer: bytes) -> list[bytes]:
        """Return an answer as the messages that carry it."""
        signature = self._identity.sign(digest_of(question, kind, answer))
        starts = range(0, max(len(answer), 1), PART_SIZE_MAX_BYTES)
        return [
            _PART.pack(kind, index, len(starts), signature)
            + answer[start : start + PART_SIZE_MAX_BYTES]
            for index, start in enumerate(starts)
        ]

    async def _answer(self, client: httpx.AsyncClient, body: bytes) -> tuple[int, bytes]:
        if (refusal := refused(body)) is not None:
            return _FULL, refusal
        try:
            response = await client.post(
                self._rpc, content=body, headers={"Content-Type": "application/json"}
            )
        except httpx.HTTPError as error:
            log.warning("the chain at %s does not answer: %r", self._rpc, error)
            return _AWAY, b""
        if response.status_code != httpx.codes.OK:
            return _REFUSED, str(response.status_code).encode()
        answer = response.content
        if len(answer) > ANSWER_SIZE_MAX_BYTES:
            answer = rpc_error(
                body,
                _TOO_LARGE,
                f"the answer has {len(answer)} bytes and {ANSWER_SIZE_MAX_BYTES} is the most that"
                " travels between machines: ask for a smaller range",
            )
        return _FULL, answer


class ChainWindow:
    """The endpoint of a chain that is on another machine: HTTP on loopback.

    A client sees what it would see of the chain itself. While the chain's machine is away it
    answers 503, which clients take for an endpoint that is down, and ask again.
    """

    def __init__(self, calls: Calls, net: str, *, node: str, holder: AgentId) -> None:
        assert len(node) == _ID_LENGTH
        self._calls, self._subject, self._node = calls, chain_subject(net), node.encode()
        self._holder = holder
        self._server = HttpServer(self.post)

    @contextlib.asynccontextmanager
    async def open(self, port: int = 0) -> AsyncIterator[str]:
        """Listen for the length of the block, and yield the URL.

        :raises ConfigurationError: if the port cannot be used
        """
        try:
            port = await self._server.start(port)
        except OSError as error:
            raise ConfigurationError(
                f"port {port} on 127.0.0.1 cannot be used: {error.strerror}"
            ) from error
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            await self._server.close()

    async def post(self, body: bytes) -> bytes:
        """Return the chain's answer to a posted body.

        :raises NoAnswer: if there is none now
        """
        if len(body) > REQUEST_SIZE_MAX_BYTES:
            why = f"at most {REQUEST_SIZE_MAX_BYTES} bytes travel to the chain's machine"
            return rpc_error(body, _TOO_LARGE, why)
        clock = asyncio.get_running_loop().time
        began = clock()
        question = self._node + secrets.token_bytes(_CHANCE_LENGTH) + body
        while True:
            left = ANSWER_WAIT_MAX_S - (clock() - began)
            try:
                async with asyncio.timeout(left):
                    async with self._calls.asking(self._subject, question) as answers:
                        kind, answer = await self._assemble(answers, question)
                break
            except NobodyListens:
                if clock() - began > INTEREST_WAIT_MAX_S:
                    raise _no_answer(body, "The machine that holds the chain is away") from None
            except TransportUnavailable:
                if clock() - began > INTEREST_WAIT_MAX_S:
                    raise _no_answer(body, "The broker of this machine is away") from None
            except TimeoutError:
                raise _no_answer(body, "The machine that holds the chain says nothing") from None
            await asyncio.sleep(_ASK_AGAIN_S)
        if kind == _FULL:
            return answer
        raise _no_answer(body, _WHY.get(kind, "") or f"The chain refused with {_plain(answer)}")

    async def _assemble(self, answers: Answers, question: bytes) -> tuple[int, bytes]:
        """Put the parts together, in whatever order they come, and believe only the holder."""
        heard: dict[bytes, dict[int, bytes]] = {}
        while True:
            raw = await answers.next(ANSWER_WAIT_MAX_S)
            if len(raw) < _PART.size:
                continue
            kind, index, count, signature = _PART.unpack_from(raw)
            if index >= count or count > PARTS_MAX:
                continue
            if signature not in heard and len(heard) >= _ANSWERS_MAX:
                continue
            parts = heard.setdefault(signature, {})
            parts[index] = raw[_PART.size :]
            if len(parts) == count:
                answer = b"".join(parts[number] for number in sorted(parts))
                if self._is_holders(question, kind, answer, signature):
                    return kind, answer
                log.warning("somebody else than the chain's machine answers in its place")

    def _is_holders(self, question: bytes, kind: int, answer: bytes, signature: bytes) -> bool:
        try:
            return recover(digest_of(question, kind, answer), signature) == self._holder
        except BadSignature:
            return False


def digest_of(question: bytes, kind: int, answer: bytes) -> bytes:
    """Return what the chain's machine signs."""
    return keccak256(_DOMAIN + bytes((kind,)) + keccak256(question) + keccak256(answer))


def refused(body: bytes) -> bytes | None:
    """Return the answer to what no other machine may ask, or None if it may be asked."""
    try:
        asked = from_json(body)
    except ValueError:
        return rpc_error(b"", _INVALID, "this is no JSON")
    calls = asked if isinstance(asked, list) else [asked]
    if not calls or len(calls) > BATCH_MAX:
        return rpc_error(b"", _INVALID, f"a batch has 1 to {BATCH_MAX} calls")
    for call in calls:
        method = call.get("method") if isinstance(call, dict) else None
        if not isinstance(method, str) or method not in METHODS:
            return rpc_error(body, _NO_METHOD, "the chain of another machine has no such method")
    return None


def rpc_error(body: bytes, code: int, message: str) -> bytes:
    """Return JSON-RPC's error for the call in ``body``, or for whatever it holds."""
    call_id: Any = None
    with contextlib.suppress(ValueError):
        call = from_json(body)
        found = call.get("id") if isinstance(call, dict) else None
        call_id = found if isinstance(found, str | int) else None
    error = {"code": code, "message": message}
    return json.dumps({"jsonrpc": "2.0", "id": call_id, "error": error}).encode()


def _no_answer(body: bytes, why: str) -> NoAnswer:
    return NoAnswer(f"503 {why}", rpc_error(body, _NOT_NOW, why))


def _plain(raw: bytes) -> str:
    """Return what may stand in a status line."""
    return "".join(c for c in raw[:40].decode("ascii", "replace") if c.isalnum() or c == " ")
