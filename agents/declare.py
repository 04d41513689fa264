"""What a seller's function must look like, and what is said to its author if it does not."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any, Final, get_type_hints

from pydantic import BaseModel

from coase.negotiation.pricing import Price
from coase.protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,31}\Z")
SHAPE: Final = "async def work(task: MyTask, job: Job) -> MyResult"


def require_ware(name: object, price: object) -> None:
    """Return if ``name`` can be a capability's and ``price`` is a price.

    :raises ConfigurationError: otherwise; says how to write it
    """
    if not isinstance(name, str) or not _NAME.match(name):
        raise ConfigurationError(
            f"{name!r} is no name for a capability: up to 32 lower-case letters, digits and"
            " hyphens, a letter first, such as 'summarise'"
        )
    if not isinstance(price, Price):
        raise ConfigurationError(
            f"the price of {name} is {price!r}: write Price.per_task('0.02'),"
            " Price.per_million(input='2', output='8') or Price.per_second('0.001')"
        )


def models_of(handler: Callable[..., Any]) -> tuple[type[BaseModel], type[BaseModel]]:
    """Return the models of a handler's task and result, from its annotations.

    :raises ConfigurationError: if it has not the shape of a handler; says what to change
    """
    called = getattr(handler, "__name__", str(handler))
    if not inspect.iscoroutinefunction(handler):
        raise ConfigurationError(f"{called} must be a coroutine function: {SHAPE}")
    parameters = list(inspect.signature(handler).parameters.values())
    needed = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if len(parameters) < 2 or len(needed) > 2:
        raise ConfigurationError(f"{called} must take a task and a job, and no more: {SHAPE}")
    try:
        hints = get_type_hints(handler)
    except NameError as error:
        raise ConfigurationError(
            f"the annotations of {called} cannot be read ({error}): its models must be imported or"
            " defined at the top of the module, and not under TYPE_CHECKING"
        ) from error
    task = _model(hints.get(parameters[0].name), "first argument", called)
    return task, _model(hints.get("return"), "result", called)


def _model(found: object, what: str, called: str) -> type[BaseModel]:
    if inspect.isclass(found) and issubclass(found, BaseModel):
        return found
    has = "nothing" if found is None else getattr(found, "__name__", str(found))
    raise ConfigurationError(
        f"the {what} of {called} is annotated with {has} and must be a pydantic model: {SHAPE}"
    )
