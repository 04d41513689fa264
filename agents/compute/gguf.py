"""What a GGUF file says of its model, read from its head without loading it.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pathlib import Path

    from .ports import Capability

ENTRIES_MAX: Final = 65_536
ARRAY_MAX: Final = 16_000_000  # The largest vocabularies have some hundred thousands.
TENSORS_MAX: Final = 1_000_000
DIMENSIONS_MAX: Final = 8
TEXT_MAX_BYTES: Final = 4 * 1024 * 1024
_NUMBERS: Final = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is of use of it; zeroes and empty texts where the file does not say."""

    architecture: str = ""
    context_tokens: int = 0
    embedding_length: int = 0
    parameter_count: int = 0
    chat_template: str = ""
    pooled: bool = False
    """Whether it was made for embeddings and writes nothing."""

    @property
    def speaks_tools(self) -> bool:
        """Whether its own template has a place for tools."""
        return "tools" in self.chat_template

    @property
    def is_chatml(self) -> bool:
        """Whether its turns begin as ChatML's do."""
        return "<|im_start|>" in self.chat_template

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What the embedded engine can do with it."""
        if self.pooled:
            return ("embedding",)
        found: list[Capability] = ["completion"]
        if self.speaks_tools or self.is_chatml:
            found.append("tools")
        if "enable_thinking" in self.chat_template or "<think>" in self.chat_template:
            found.append("thinking")
        return (*found, "embedding")


def facts_of(path: Path) -> Facts:
    """Return what the file says; nothing if it is no GGUF file, or a broken one.

    :raises OSError: if it cannot be read
    """
    path = path.resolve()
    stat = path.stat()
    return _facts(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _facts(path: Path, size_bytes: int, changed_ns: int) -> Facts:
    if not size_bytes:
        return Facts()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _Head(data).facts()
        except (ValueError, struct.error, IndexError):
            return Facts()


class _Head:
    """Reads a file from its beginning on."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def facts(self) -> Facts:
        if self._data[:4] != b"GGUF":
            raise ValueError("no GGUF")
        self._at = 4
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError("an unknown version")
        tensors, entries = self._number("<Q"), self._number("<Q")
        if entries > ENTRIES_MAX or tensors > TENSORS_MAX:
            raise ValueError("too much")
        found: dict[str, Any] = {}
        for _ in range(entries):
            key, kind = self._text(), self._number("<I")
            found[key] = self._value(kind)
        parameters = sum(self._tensor() for _ in range(tensors))
        if self._at > len(self._data):
            raise ValueError("cut off")
        name = str(found.get("general.architecture") or "")
        template = found.get("tokenizer.chat_template")
        return Facts(
            architecture=name,
            context_tokens=_whole(found.get(f"{name}.context_length")),
            embedding_length=_whole(found.get(f"{name}.embedding_length")),
            parameter_count=parameters,
            chat_template=template if isinstance(template, str) else "",
            pooled=f"{name}.pooling_type" in found,
        )

    def _number(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value  # type: ignore[no-any-return]

    def _text(self, *, keep: bool = True) -> str:
        size = self._number("<Q")
        if size > TEXT_MAX_BYTES:
            raise ValueError("too long a text")
        start, self._at = self._at, self._at + size
        return self._data[start : self._at].decode("utf-8", "replace") if keep else ""

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind != _ARRAY:
            if kind not in _NUMBERS:
                raise ValueError("an unknown kind")
            return self._number(_NUMBERS[kind])
        of, count = self._number("<I"), self._number("<Q")
        if count > ARRAY_MAX:
            raise ValueError("too long an array")
        if of == _TEXT:
            for _ in range(count):
                self._text(keep=False)
        elif of in _NUMBERS:
            self._at += count * struct.calcsize(_NUMBERS[of])
        else:
            raise ValueError("an array of what it cannot be")
        return None

    def _tensor(self) -> int:
        """Pass over one tensor's description and return how many numbers it has."""
        self._text(keep=False)
        dimensions = self._number("<I")
        if dimensions > DIMENSIONS_MAX:
            raise ValueError("too many dimensions")
        size = math.prod(self._number("<Q") for _ in range(dimensions))
        self._at += 12  # Its type and where it is.
        return size


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0
