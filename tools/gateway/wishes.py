"""What a request wishes of the router: an object ``coase`` in its body, or headers.

::

    {"model": "a", "messages": [...], "coase": {"models": ["b"], "data": "firm", "deadline_s": 20}}

Each field may come as a header instead, for clients whose bodies are not one's own to fill:
``x-coase-models: b``, ``x-coase-data: firm``, ``x-coase-deadline-s: 20``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from coase.agents.compute.router import RouterCompute
from coase.agents.compute.routing import Wish
from coase.agents.compute.ways import Place
from coase.protocol.errors import ConfigurationError

NAMES_MAX: Final = 64
NAME_MAX_CHARS: Final = 200
DEADLINE_MAX_S: Final = 24 * 3600
_LISTS: Final = ("models", "sellers", "ban", "regions", "quantisations")
WISHES: Final = (*_LISTS, "data", "max_price", "second", "deadline_s")
_PLACES: Final = {place.name.lower(): place for place in Place}


class BadWish(ValueError):
    """A wish that cannot be read; ``field`` says which part of it."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field = field


def wish_of(
    body: Mapping[str, Any], headers: Mapping[str, str], router: RouterCompute
) -> Wish | None:
    """Return what a request wishes, or None if it says nothing.

    :raises BadWish: if that cannot be read
    """
    said = dict(_said(body, headers))
    if not said:
        return None
    lists = {name: _names(name, said.get(name)) for name in _LISTS}
    place = said.get("data", "market")
    if place not in _PLACES:
        raise BadWish("coase.data", f"it is one of {', '.join(_PLACES)}")
    return Wish(
        models=lists["models"],
        sellers=frozenset(lists["sellers"]),
        banned=frozenset(lists["ban"]),
        regions=frozenset(lists["regions"]),
        quantisations=frozenset(lists["quantisations"]),
        reach=_PLACES[place],
        most_units=_units("max_price", said.get("max_price"), router),
        second_units=_units("second", said.get("second"), router) or 0,
        deadline_ms=_deadline_ms(said.get("deadline_s")),
    )


def _said(body: Mapping[str, Any], headers: Mapping[str, str]) -> Mapping[str, Any]:
    said: dict[str, Any] = {}
    for name in WISHES:
        text = headers.get("x-coase-" + name.replace("_", "-"))
        if text is not None:
            said[name] = text.split(",") if name in _LISTS else text
    # A list of models at the top is how other routers take fallbacks.
    if isinstance(body.get("models"), list):
        said["models"] = body["models"]
    held = body.get("coase")
    if held is None:
        return said
    if not isinstance(held, dict):
        raise BadWish("coase", "it must be an object")
    unknown = [name for name in held if name not in WISHES]
    if unknown:
        raise BadWish(f"coase.{unknown[0]}", f"there is only {', '.join(WISHES)}")
    return said | held


def _names(field: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadWish(f"coase.{field}", "it must be a list of names")
    names = tuple(text.strip() for text in texts if text.strip())
    if len(names) > NAMES_MAX or any(len(name) > NAME_MAX_CHARS for name in names):
        raise BadWish(f"coase.{field}", f"at most {NAMES_MAX} names of {NAME_MAX_CHARS} letters")
    return names


def _units(field: str, value: Any, router: RouterCompute) -> int | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadWish(f"coase.{field}", 'it must be an amount as text, such as "0.01"')
    if router.buys is None:
        return None  # Nothing is bought at all.
    try:
        return router.buys.asset.money(value.strip()).units
    except ConfigurationError as error:
        raise BadWish(f"coase.{field}", str(error)) from None


def _deadline_ms(value: Any) -> int:
    if value is None:
        return 0
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = 0.0
    if isinstance(value, bool) or not 0 < seconds <= DEADLINE_MAX_S:
        raise BadWish("coase.deadline_s", f"it must be a number of seconds up to {DEADLINE_MAX_S}")
    return max(round(seconds * 1_000), 1)
