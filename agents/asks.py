"""What a buyer asks for: its wish, the request made of it, and how its offers are decided on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from coase.protocol.errors import BudgetExhausted, ConfigurationError
from coase.protocol.messages import Request, canonical_json, capability_id, schemas_hash
from coase.protocol.session import NO_CHARGE, Charge, Thread

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import BaseModel

    from coase.negotiation.issues import Proposal
    from coase.protocol.types import AgentId

MODELS_KEPT_MAX: Final = 256  # Pairs of models that a program buys by.


class Verdict(StrEnum):
    """What a buyer decides on one offer."""

    ACCEPT = "accept"
    COUNTER = "counter"
    REJECT = "reject"
    WAIT = "wait"


@dataclass(frozen=True, slots=True)
class Decision:
    """A decision on the offer that lies in one thread.

    A counter-offer says ``proposal``, or else the seller's terms at ``price_units``. ``until_ms``
    is how long an accept waits. ``unpaid`` says that it may be the purse that stood in the way.
    """

    deal: str
    verdict: Verdict
    price_units: int = 0
    deliver_within_s: int = 0
    reason: str = ""
    proposal: Proposal | None = None
    until_ms: int = 0
    unpaid: bool = False


class BuyerStrategy(ABC):
    """Decides on the offers of one request. Its reservation values never leave the process."""

    @abstractmethod
    def decide(
        self, offers: list[Thread], *, closing: bool, opened_ms: int, now_ms: int
    ) -> list[Decision]:
        """Return decisions on ``offers`` (all in state offered).

        ``closing`` says that no more offers are waited for. At most one accept. There is at least
        one offer, unless the strategy itself asked for another look by ``next_ms``.
        """

    def undone(self, deal: str) -> None:  # noqa: B027
        """Take note that what was decided on a thread could not be done."""

    def agreed(self, thread: Thread) -> None:  # noqa: B027
        """Take note that the seller confirmed our accept."""

    def ended(self, thread: Thread, *, now_ms: int) -> None:  # noqa: B027
        """Take note that a thread is over."""

    def next_ms(self) -> int | None:
        """Return when to be asked again if nothing happens before, or None for soon."""
        return None


class DeclineAll(BuyerStrategy):
    """Takes no offer: what is left of a request whose bargain died with its process."""

    def decide(
        self, offers: list[Thread], *, closing: bool, opened_ms: int, now_ms: int
    ) -> list[Decision]:
        """Return a no to each."""
        return [Decision(thread.deal, Verdict.REJECT) for thread in offers]


@dataclass(frozen=True, slots=True)
class Wish:
    """What a buyer wants done, and what of it bidders may know."""

    capability: str
    schemas: bytes
    task: str = field(repr=False)
    input_schema: str = "{}"
    output_schema: str = "{}"
    """Both as canonical JSON: kept with the request, so that a restart can still check."""
    features: dict[str, int] = field(default_factory=dict)
    deliver_within_s: int = 60
    quality_min: int = 0
    input_max: int = 0
    output_max: int = 0
    model: str = ""
    verifications: tuple[str, ...] = ("schema",)
    """What of it an arbiter must be able to check; ``none`` gives up every dispute."""
    kept: bool = True
    """Whether somebody may still want it after a crash, as what has a key."""
    stake_permille: int = 0
    """How much a seller has to stake for each thousand of its price, to lose if it fails."""
    settlements: tuple[str, ...] = ("escrow",)
    """How it may be paid, what we like best first."""
    reply_within_ms: int = 5_000
    """When the request lapses, if nobody offers."""
    decide_after_ms: int = 1_000
    """When the round closes, if there are ``bids_min`` offers by then."""
    bids_min: int = 1
    bids_max: int = 16
    blocked: frozenset[str] = frozenset()
    allowed: frozenset[str] = frozenset()
    """With any, offers of nobody else are read."""
    most_units: int = 0
    """The most that the buyer pays, if it says so. It stays here: no request holds it."""
    charge: Charge = NO_CHARGE
    """Who within the buyer's own house pays for it."""

    def reads(self, seller: AgentId) -> bool:
        """Return whether offers of ``seller`` are looked at."""
        return seller not in self.blocked and (not self.allowed or seller in self.allowed)


class AskState(StrEnum):
    """Where a buyer's request stands, as its owner sees it."""

    OPEN = "open"
    ACCEPTING = "accepting"
    BOUND = "bound"
    ENDED = "ended"


@dataclass(slots=True)
class Ask:
    """One request of ours and what came of it."""

    request_id: str
    wish: Wish
    salt: bytes
    secret: bytes = field(repr=False)
    request: Request
    opened_ms: int
    strategy: BuyerStrategy
    state: AskState = AskState.OPEN
    offers: list[str] = field(default_factory=list)
    bids: int = 0
    dear: int = 0
    """Those of them that ask for more than the buyer pays: they may come down."""
    sent: int = 0
    level: int = 0
    """How narrow the shard is in which we asked last; 0 asks every seller."""
    widen_ms: int = 0
    everybody_ms: int = 0
    """When every seller was first asked: repetitions count from then."""
    closing_ms: int = 0
    """When to look again at a round whose time is up."""
    wire: bytes = b""
    chosen: str = ""
    why: str = ""
    unpaid: BudgetExhausted | None = None
    """Which limit kept us from taking an offer, if one did."""
    outcome: Thread | None = None
    deciding: bool = False

    @property
    def full(self) -> bool:
        """Whether no more offers are read; those that are too dear keep nobody out."""
        return self.bids - self.dear >= self.wish.bids_max

    @property
    def closes_ms(self) -> int:
        """When the round closes: soon if there are enough offers, else when the request lapses."""
        if self.full:
            return self.opened_ms
        if self.bids < self.wish.bids_min:
            return self.request.reply_by_ms
        early_ms = self.opened_ms + self.wish.decide_after_ms
        return min(early_ms, self.request.reply_by_ms)


@dataclass(frozen=True, slots=True)
class Schemas:
    """The schemas of a capability's tasks and results, as canonical JSON, and the hash of both."""

    digest: bytes
    input: str
    output: str

    @classmethod
    def of(cls, input_schema: Mapping[str, Any], output_schema: Mapping[str, Any]) -> Schemas:
        """Return two JSON schemas in the form in which they are compared and kept."""
        digest = schemas_hash(input_schema, output_schema)
        return cls(digest, canonical_json(input_schema), canonical_json(output_schema))


@lru_cache(maxsize=MODELS_KEPT_MAX)
def schemas_of(task: type[BaseModel], returns: type[BaseModel]) -> Schemas:
    """Return the schemas of two models; they are made once, since that takes milliseconds."""
    return Schemas.of(task.model_json_schema(), returns.model_json_schema())


def wish_of(
    capability: str,
    task: Mapping[str, Any],
    schemas: Schemas,
    features: dict[str, int] | None,
) -> Wish:
    """Return what is wanted, before its limits."""
    plain = canonical_json(task)
    return Wish(
        capability=_full_id(capability, schemas.digest),
        schemas=schemas.digest,
        task=plain,
        input_schema=schemas.input,
        output_schema=schemas.output,
        features=features or {"bytes": len(plain.encode())},
    )


def _full_id(capability: str, digest: bytes) -> str:
    """Return the capability's id; one that was given whole must be of these very schemas.

    :raises ConfigurationError: if it is of other schemas
    """
    name, _, tail = capability.rpartition("-")
    if not name or len(tail) != 8 or not set(tail) <= set("0123456789abcdef"):
        return capability_id(capability, digest)
    if tail != digest[:4].hex():
        raise ConfigurationError(
            f"{capability} has other schemas than the models that were given for it"
        )
    return capability
