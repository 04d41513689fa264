"""Make or buy: each prompt goes to the engine here if that can take it, else to the market."""

from __future__ import annotations

import logging
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from coase.protocol.errors import ComputeFailed, WorldError

from .ports import Chunk, Compute, Estimate, ModelInfo, Prompt, PromptRefused, failed

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

log = logging.getLogger(__name__)

ANY_MODEL = ("", "auto")
_LATEST = ":latest"
Made = Literal["local", "bought"]


class ModelUnknown(PromptRefused):
    """No engine here and no seller in reach has the model that was asked for."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A model, and where its answers would come from first."""

    info: ModelInfo
    made: Made


class RouterCompute(Compute):
    """Local if there is a model and a place for it, else bought. Closes both with itself.

    :raises ComputeFailed: if it is given neither
    """

    def __init__(self, *, local: Compute | None = None, market: Compute | None = None) -> None:
        if local is None and market is None:
            raise failed("no prompt can be run", why="no engine, no market", todo="Give it one")
        self.local, self.market = local, market

    @property
    def name(self) -> str:
        """What it is and where."""
        parts = [compute.name for compute in (self.local, self.market) if compute is not None]
        return ", else ".join(parts)

    async def listed(self) -> list[Listed]:
        """Return all models that can be asked for, those of this machine first.

        :raises ComputeFailed: if neither can be asked
        """
        found: dict[str, Listed] = {}
        failure: WorldError | None = None
        sources: tuple[tuple[Compute | None, Made], ...] = (
            (self.local, "local"),
            (self.market, "bought"),
        )
        for compute, made in sources:
            if compute is None:
                continue
            try:
                for info in await compute.models():
                    found.setdefault(info.name, Listed(info, made))
            except WorldError as error:
                failure = error
                log.warning("no models of %s: %s", compute.name, error)
        if not found and failure is not None:
            raise failure
        return list(found.values())

    async def models(self) -> list[ModelInfo]:
        """Return what can be asked for, the models of this machine first."""
        return [entry.info for entry in await self.listed()]

    async def find(self, name: str) -> Listed | None:
        """Return the model that ``name`` means, None if any will do.

        :raises ModelUnknown: if there is none of that name
        :raises ComputeFailed: if neither engine nor market can be asked
        """
        if name in ANY_MODEL:
            return None
        entries = await self.listed()
        for entry in entries:
            if name.removesuffix(_LATEST) == entry.info.name.removesuffix(_LATEST):
                return entry
        have = ", ".join(entry.info.name for entry in entries) or "none"
        raise ModelUnknown(f"there is no model {name!r} here; there is: {have}")

    async def estimate(self, prompt: Prompt) -> Estimate:
        """Return what the prompt would take where it would go first."""
        prompt, first, _ = await self._ways(prompt)
        return await first.estimate(prompt)

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Chunk, None]:
        """Yield the answer; it comes from the market where the engine here cannot begin it.

        :raises BudgetExhausted: if it had to be bought and no limit covers it
        """
        prompt.check()
        prompt, first, second = await self._ways(prompt)
        begun = False
        try:
            async with aclosing(first.stream(prompt)) as chunks:
                async for chunk in chunks:
                    begun = True
                    yield chunk
            return
        except PromptRefused:
            raise
        except ComputeFailed as error:
            if begun or second is None:
                raise
            log.info("bought, since %s", error)
        async with aclosing(second.stream(prompt)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def close(self) -> None:
        """Close both."""
        for compute in (self.local, self.market):
            if compute is not None:
                await compute.close()

    async def _ways(self, prompt: Prompt) -> tuple[Prompt, Compute, Compute | None]:
        """Return the prompt with its model's own name, where it goes, and where it goes else."""
        entry = await self.find(prompt.model or "")
        prompt = replace(prompt, model=entry.info.name if entry is not None else None)
        local, market = self.local, self.market
        if entry is not None and entry.made == "bought":
            local = None
        if local is None:
            assert market is not None
            return prompt, market, None
        if prompt.logprobs or prompt.response_schema is not None:
            market = None  # Which has no words for them.
        return prompt, local, market
