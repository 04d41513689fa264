"""What streamed work costs: counted the same way by both sides, from the text alone.

An engine's own count can neither be checked by who has not that engine, nor is it known before the
end. So where text is paid while it is written, a token is four bytes of UTF-8 or part of four: what
English takes on average with the vocabularies of today. Prices are set for that unit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pydantic_core import from_json

from coase.negotiation.pricing import Tariff, Usage

from .transcript import MARK, Reading

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coase.protocol.messages import Task
    from coase.protocol.session import Thread
    from coase.protocol.terms import Terms

TOKENIZER: Final = "utf8/4"
BYTES_PER_TOKEN: Final = 4


def count_tokens(text: str) -> int:
    """Return how many tokens of ``utf8/4`` a text is."""
    return _tokens_of(len(text.encode("utf-8", "surrogatepass")))


def count_input(task: Task) -> int:
    """Return how many tokens of ``utf8/4`` a task has: of its texts, wherever they stand in it."""
    return _tokens_of(task.texts_size_bytes)


def is_counted(terms: Terms) -> bool:
    """Return whether both sides count the tokens of these terms from the text."""
    return terms.work.pricing == "tokens" and terms.work.tokenizer == TOKENIZER


def stream_units(terms: Terms, input_tokens: int, text: str) -> int:
    """Return what ``text`` costs, whole or as far as it was written; 0 if only the whole counts.

    Of work that is not counted from its text, nothing is due before the result.
    """
    if not is_counted(terms):
        return 0
    used = Usage(
        input_tokens=min(input_tokens, terms.work.input_max),
        output_tokens=min(count_tokens(_read(text)), terms.work.output_max),
    )
    tariff = Tariff.of_work(terms.work, price_units=terms.price_units)
    return tariff.charge_units(used, cap_units=terms.price_units)


def call_units(contract: Terms, *, input_max: int, output_max: int) -> int:
    """Return what one call under a rate contract costs at most, by the rates that it agrees.

    :raises ConfigurationError: if neither reading nor writing has a limit
    """
    units = units_at_most(contract, input_max=input_max, output_max=output_max)
    return min(units, contract.price_units)


def units_at_most(terms: Terms, *, input_max: int, output_max: int) -> int:
    """Return what work of this size costs at most by the rates of ``terms``, whatever its own size.

    :raises ConfigurationError: if neither reading nor writing has a limit
    """
    tariff = Tariff.of_work(terms.work, price_units=terms.price_units)
    if tariff.pricing != "tokens":
        return terms.price_units
    return max(1, tariff.cap_units(input_max=input_max, output_max=output_max))


def units_of(thread: Thread, text: str) -> int:
    """Return what a deal costs with ``text`` as its answer, whole or as far as it was written."""
    input_tokens = count_input(thread.task) if thread.task is not None else 0
    return stream_units(thread.agreed_terms, input_tokens, text)


def _tokens_of(size_bytes: int) -> int:
    return -(-size_bytes // BYTES_PER_TOKEN)


def _read(shown: str) -> str:
    """Return what of a shown text its reader sees: marks, and kinds that nobody knows, are free."""
    if MARK not in shown:
        return shown
    seen = Reading().take(shown)
    return seen.text + seen.thinking + seen.tool_calls


def text_of(result: str) -> str:
    """Return what of a result is its text: the field of that name, or else all of it."""
    try:
        made = from_json(result)  # A stranger's: this one bears any depth.
    except ValueError:
        return result
    text = made.get("text") if isinstance(made, dict) else None
    return text if isinstance(text, str) else result


def result_units(thread: Thread, result: str) -> int:
    """Return what a deal with this result costs: at least one unit.

    Its text counts, or what was shown if that is more, as where a model thinks.
    """
    return max(1, units_of(thread, thread.shown), units_of(thread, text_of(result)))


def fault_in_stream(thread: Thread) -> str:
    """Return what is wrong with what was delivered so far, as its buyer sees it, or nothing."""
    if thread.due_units > units_of(thread, thread.shown):
        return "it counts more tokens than its text has"
    if thread.result is None:
        return ""
    result = thread.result.result
    if not text_of(result).startswith(Reading().take(thread.shown).text):
        return "it delivered another text than it was paid for"
    counted = is_counted(thread.agreed_terms)
    if counted and int(thread.result.to_seller_units) > result_units(thread, result):
        return "it counts more tokens than its text has"
    return ""


def cost_units(thread: Thread, result: str, usage: Mapping[str, int]) -> int:
    """Return what a result costs, as its buyer will count it as well; nothing within a firm."""
    if thread.method == "none":
        return 0
    if is_counted(thread.agreed_terms):
        return result_units(thread, result)
    return usage_units(thread, usage)


def usage_units(thread: Thread, usage: Mapping[str, int]) -> int:
    """Return what metered work costs by its terms; fixed work costs its price."""
    terms = thread.agreed_terms
    if terms.work.pricing == "fixed":
        return terms.price_units
    tariff = Tariff.of_work(terms.work, price_units=terms.price_units)
    used = Usage(
        input_tokens=usage.get("input_tokens", 0),
        cached_input_tokens=usage.get("cached_input_tokens", 0),
        output_tokens=usage.get("output_tokens", 0),
        milliseconds=usage.get("milliseconds", 0),
    )
    return max(1, tariff.charge_units(used, cap_units=terms.price_units))
