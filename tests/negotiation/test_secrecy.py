"""Reservation values never leave the process: not by a message, a log line, a repr or a pickle."""

from __future__ import annotations

import copy
import dataclasses
import io
import logging
import pickle
import pprint
import traceback
from typing import TYPE_CHECKING

import pytest
from pydantic import BaseModel
from rich.console import Console
from rich.pretty import pretty_repr

from coase.negotiation.award import Plan, Ranking, Round
from coase.negotiation.issues import Preferences, Private, Proposal, Weights
from coase.negotiation.policy import (
    Budget,
    DeadlineLimit,
    Limit,
    Policy,
    PriceLimit,
    QualityFloor,
    SpendLimit,
)
from coase.negotiation.scores import Scorebook
from coase.negotiation.strategy import FixedPrice, Reciprocating, Strategy, TimeDependent
from coase.negotiation.tournament import play
from coase.protocol.errors import CoaseError
from coase.protocol.states import Role
from tests.negotiation.sides import view

if TYPE_CHECKING:
    from collections.abc import Callable

# Numbers that nothing else could produce by chance.
BUYER_SECRETS = (31_337_731, 86_243, 43)
SELLER_SECRETS = (15_485_863, 21_701, 89)
BUYER = Preferences(
    Role.BUYER,
    price_units=(10_000_019, BUYER_SECRETS[0]),
    deliver_within_s=(11_213, BUYER_SECRETS[1]),
    quality=(97, BUYER_SECRETS[2]),
)
SELLER = Preferences(
    Role.SELLER,
    price_units=(49_979_687, SELLER_SECRETS[0]),
    deliver_within_s=(110_503, SELLER_SECRETS[1]),
    quality=(31, SELLER_SECRETS[2]),
    weights=Weights(price=40, deliver=40),
)
MAKERS: list[Callable[[Preferences], Strategy]] = [
    FixedPrice,
    lambda own: FixedPrice(own, price_value=0),
    lambda own: TimeDependent(own, e_permille=100),
    lambda own: TimeDependent(own, e_permille=5_000),
    Reciprocating,
]
SECRETS = tuple(str(secret) for secret in BUYER_SECRETS[:2] + SELLER_SECRETS[:2])
LIMITS: list[Limit] = [
    PriceLimit(Role.BUYER, BUYER_SECRETS[0]),
    DeadlineLimit(BUYER_SECRETS[1]),
    QualityFloor(BUYER_SECRETS[2]),
    SpendLimit(Budget({"day": BUYER_SECRETS[0]})),
]
HOLDERS: list[object] = [
    BUYER,
    SELLER,
    *(make(BUYER) for make in MAKERS),
    *LIMITS,
    Budget({"day": BUYER_SECRETS[0]}),
    Policy(LIMITS),
]


def clean(text: str) -> bool:
    plain = text.replace("_", "").replace(",", "")
    return not any(secret in plain for secret in SECRETS)


def a_round() -> Round:
    past = Round(
        strategy=TimeDependent(BUYER),
        policy=Policy(LIMITS),
        ranking=Ranking(),
        plan=Plan(),
        capability="inference-0123abcd",
        scores=Scorebook(),
        opened_ms=0,
        reply_by_ms=1_000,
        deadline_ms=30_000,
    )
    return past.offered("t0", "0x" + "11" * 20, SELLER.opening(), valid_until_ms=10**6, now_ms=0)


@pytest.mark.parametrize("buyer", range(len(MAKERS)))
@pytest.mark.parametrize("seller", range(len(MAKERS)))
def test_nothing_that_a_strategy_says_is_a_reservation_value(buyer: int, seller: int) -> None:
    played = play(MAKERS[buyer](BUYER), MAKERS[seller](SELLER))
    assert played.history
    for turn in played.history:
        secrets = BUYER_SECRETS if turn.by is Role.BUYER else SELLER_SECRETS
        said = (turn.proposal.price_units, turn.proposal.deliver_within_s, turn.proposal.quality)
        assert not set(said) & set(secrets)
    assert clean(repr(played))


def test_the_search_would_find_a_value_that_leaks() -> None:
    leak = Proposal(price_units=BUYER_SECRETS[0], deliver_within_s=1)
    assert not clean(repr(leak))
    assert not clean(f"{BUYER_SECRETS[0]:,}")


@pytest.mark.parametrize("holder", HOLDERS, ids=lambda holder: type(holder).__name__)
def test_no_text_of_a_holder_shows_a_value(holder: object) -> None:
    stream = io.StringIO()
    Console(file=stream).print(holder, {"held": [holder]})
    shown = [repr(holder), str(holder), f"{holder}", format(holder), pprint.pformat([holder])]
    shown += [pretty_repr(holder), stream.getvalue(), f"{holder!r:>40}"]
    assert all(clean(text) for text in shown)
    assert isinstance(holder, Private)
    assert not isinstance(holder, BaseModel)
    assert not dataclasses.is_dataclass(holder)
    assert not hasattr(holder, "__dict__")


@pytest.mark.parametrize("holder", HOLDERS, ids=lambda holder: type(holder).__name__)
def test_no_holder_can_be_pickled_or_copied(holder: object) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="private"):
            pickle.dumps(holder, protocol=protocol)
    for take in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="private"):
            take(holder)
    assert isinstance(holder, Private)
    with pytest.raises(TypeError, match="private"):
        holder.__getstate__()


def test_a_round_shows_and_pickles_none_either() -> None:
    past, decisions = a_round().step(0)
    assert all(clean(text) for text in (repr(past), str(past), repr(decisions)))
    with pytest.raises(TypeError, match="private"):
        pickle.dumps(past)
    with pytest.raises(TypeError, match="private"):
        dataclasses.asdict(past)


def test_errors_logs_and_trace_backs_with_locals_show_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = logging.getLogger("tests.negotiation")
    strategy = TimeDependent(BUYER)
    with caplog.at_level(logging.DEBUG):
        for wrong in (view(Role.SELLER, ()), view(Role.BUYER, ())):
            try:
                strategy.reply(wrong)
            except CoaseError as error:
                told = traceback.TracebackException.from_exception(error, capture_locals=True)
                assert clean("".join(told.format()))
                log.exception("strategy %r failed on %r", strategy, wrong)
        past, decisions = a_round().step(0)
        log.info("%s: %s", past, decisions)
        for limit in LIMITS:
            log.info("%r", limit)
    assert len(caplog.records) == 3 + len(LIMITS)
    assert clean(caplog.text)
