"""Several endpoints of one chain behind one face: who is away, lags or lies is passed over.

The first of the list is asked as long as it answers sensibly; then the next, and the first again
after a while. An endpoint is asked for its chain's id before its answers count, and again whenever
it was away. What all of them say alike is believed: this is no light client.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from coase.protocol.errors import ChainUnavailable, ConfigurationError

from .rpc import ChainBlock, Endpoint, RpcFailed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

log = logging.getLogger(__name__)

AWAY_S: Final = 15.0  # How long one that failed is asked last; doubled each time that it does.
AWAY_MAX_S: Final = 300.0
ENDPOINTS_MAX: Final = 8
# Four blocks a second is the quickest public chain; a number that leaps further was made up.
HEAD_RATE_MAX_BLOCKS_S: Final = 20
HEAD_LEAP_MAX_BLOCKS: Final = 1_000
_BUSY: Final = ("rate limit", "too many requests", "request limit", "capacity")
_BUSY_CODES: Final = frozenset({-32005, -32029, 429})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Trust:
    """How far the newest block is believed. The default believes all, as of one's own chain."""

    head_age_max_s: int = 0
    """By this machine's clock, in both directions; 0 for any age."""
    head_back_max_blocks: int = 0
    """How far the newest block's number may fall: a fork goes some blocks back. 0 for any."""


class _OtherChain(ChainUnavailable):
    """The endpoint serves another chain than the others, or than was expected."""


@dataclass(slots=True)
class _Member:
    endpoint: Endpoint
    met: bool = False
    away_until: float = 0.0
    failures: int = 0
    why: str = ""


class Endpoints(Endpoint):
    """Asks the first of several endpoints that answers sensibly.

    ``now_s`` is the clock that a block's age is measured by.

    :raises ConfigurationError: if one of them is no address of an endpoint
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        chain_id: int | None = None,
        trust: Trust | None = None,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        names = parse_urls(urls)
        super().__init__(names[0])
        self.chain_id = chain_id
        self._trust = trust or Trust()
        self._now_s = now_s
        self._members = [_Member(Endpoint(name)) for name in names]
        self.connection = self._members[0].endpoint.connection
        self._highest: tuple[int, float] | None = None

    async def meet(self) -> int:
        """Return the chain's id, as the first endpoint tells it that serves the right chain.

        :raises ConfigurationError: if those that answer serve another chain than was expected
        :raises ChainUnavailable: if none answers
        """
        try:
            return int(await self.ask("eth_chainId"), 16)
        except _OtherChain as error:
            raise ConfigurationError(
                f"{error}: check the endpoint's address, or the chain id in the network file"
            ) from error
        except (RpcFailed, TypeError, ValueError) as error:
            raise ChainUnavailable(f"{self.url} is no endpoint of a chain: {error}") from error

    async def ask(self, method: str, *params: Any) -> Any:
        """Return the result of one request.

        :raises RpcFailed: if the endpoint answers with an error
        """
        return await self._by_any(method, lambda endpoint: endpoint.ask(method, *params))

    async def ask_many(self, requests: Sequence[tuple[str, list[Any]]]) -> list[Any]:
        """Return the results of several requests, all from one endpoint, in their order.

        :raises RpcFailed: if any of them fails
        """
        return await self._by_any("", lambda endpoint: endpoint.ask_many(requests))

    async def close(self) -> None:
        """Close the connections. Safe to repeat."""
        await super().close()
        for member in self._members:
            await member.endpoint.close()

    # -- who is asked ------------------------------------------------------------------------

    def _in_order(self) -> list[_Member]:
        clock = asyncio.get_running_loop().time()
        # In the user's order; those that failed a moment ago only if nobody else answers.
        return sorted(self._members, key=lambda member: member.away_until > clock)

    async def _by_any(self, method: str, request: Callable[[Endpoint], Awaitable[T]]) -> T:
        order = self._in_order()
        failed: list[ChainUnavailable] = []
        for place, member in enumerate(order):
            try:
                if not member.met:
                    await self._meet(member)
                result = await request(member.endpoint)
            except ChainUnavailable as error:
                self._leave(member, str(error))
                failed.append(error)
            except RpcFailed as error:
                if place == len(order) - 1 or method == "eth_getLogs" or not _is_busy(error):
                    raise
                self._leave(member, str(error))
            else:
                self._use(member)
                return result
        raise _none_of(failed)

    async def _meet(self, member: _Member) -> None:
        """See to it that the endpoint serves our chain."""
        url = member.endpoint.url
        try:
            found = int(await member.endpoint.ask("eth_chainId"), 16)
        except (RpcFailed, TypeError, ValueError) as error:
            raise ChainUnavailable(f"{url} is no endpoint of a chain: {error}") from error
        if self.chain_id is None:
            self.chain_id = found
        elif found != self.chain_id:
            raise _OtherChain(f"{url} serves chain {found}, and {self.chain_id} was expected")
        member.met = True

    def _use(self, member: _Member) -> None:
        member.away_until, member.failures, member.why = 0.0, 0, ""
        if self.url != member.endpoint.url:
            log.warning("the chain is asked at %s now", member.endpoint.url)
            self.url, self.connection = member.endpoint.url, member.endpoint.connection

    def _leave(self, member: _Member, why: str) -> None:
        clock = asyncio.get_running_loop().time()
        if clock >= member.away_until:  # Else several asked at the same time.
            pause_s = min(AWAY_S * 2 ** min(member.failures, 10), AWAY_MAX_S)
            member.away_until, member.failures = clock + pause_s, member.failures + 1
        member.met = False
        if why != member.why:
            member.why = why
            log.warning("an endpoint of the chain is passed over for now: %s", why)

    # -- what is believed --------------------------------------------------------------------

    async def _fetch_latest(self) -> ChainBlock:
        failed: list[ChainUnavailable] = []
        for _ in self._members:
            try:
                block = await self.block("latest")
            except ChainUnavailable as error:
                if not self._current().met:
                    raise  # All were asked.
                failed.append(error)  # It answers, and what it says is no block.
            else:
                fault = self._fault_of(block)
                if not fault:
                    self._highest = (block.number, asyncio.get_running_loop().time())
                    return block
                failed.append(ChainUnavailable(f"{self.url} {fault}"))
            self._leave(self._current(), str(failed[-1]))
        raise _none_of(failed)

    def _current(self) -> _Member:
        return next(member for member in self._members if member.endpoint.url == self.url)

    def _fault_of(self, block: ChainBlock) -> str:
        """Return why the block cannot be the newest one, or nothing."""
        trust = self._trust
        if trust.head_age_max_s:
            age_s = int(self._now_s()) - block.time_s
            if age_s > trust.head_age_max_s:
                return (
                    f"is stale: its newest block {block.number} is {age_s} s old. Use another"
                    " endpoint; if they all say so the chain has stopped, or this machine's clock"
                    " is wrong (timedatectl set-ntp true)"
                )
            if age_s < -trust.head_age_max_s:
                return (
                    f"says that its newest block {block.number} is of {-age_s} s from now: it"
                    " lies, or this machine's clock is wrong (timedatectl set-ntp true)"
                )
        if trust.head_back_max_blocks and self._highest is not None:
            number, seen_at = self._highest
            if block.number < number - trust.head_back_max_blocks:
                return (
                    f"went back from block {number} to {block.number}: it lags, was restored, or"
                    " lies. Use another endpoint, or start again if that is right"
                )
            passed_s = asyncio.get_running_loop().time() - seen_at
            leap = HEAD_LEAP_MAX_BLOCKS + int(passed_s * HEAD_RATE_MAX_BLOCKS_S)
            if block.number > number + leap:
                return f"leapt from block {number} to {block.number} in {passed_s:.0f} s: it lies"
        return ""


def parse_urls(urls: str | Sequence[str]) -> tuple[str, ...]:
    """Return the addresses in a list, or in a text with commas, each once.

    :raises ConfigurationError: if there is none, or there are too many
    """
    parts = urls.split(",") if isinstance(urls, str) else urls
    names = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if not 0 < len(names) <= ENDPOINTS_MAX:
        raise ConfigurationError(
            f"{len(names)} endpoints of the chain: give 1 to {ENDPOINTS_MAX}, with commas between"
        )
    return names


def _is_busy(error: RpcFailed) -> bool:
    said = error.message.lower()
    return error.code in _BUSY_CODES or any(words in said for words in _BUSY)


def _none_of(failed: list[ChainUnavailable]) -> ChainUnavailable:
    """Return one error for all endpoints: another chain only if none was merely away."""
    if len(failed) == 1:
        return failed[0]
    text = "; ".join(str(error) for error in failed)
    if failed and all(isinstance(error, _OtherChain) for error in failed):
        return _OtherChain(text)
    return ChainUnavailable(f"none of {len(failed)} endpoints of the chain can be used: {text}")
