"""What a header says, checked: a bad value becomes one line that names it and never shows it."""

from __future__ import annotations

import math
from typing import Any

from cdt_runtime.errors import SeriesError

EXPORT_AGAIN = "export the series again from the archive"


class Fields:
    """Checked access to the attributes of one file or of one frame in it.

    Args:
        name: how messages call the file or frame.
        sources: pydicom data sets; the first that holds an attribute wins.
    """

    def __init__(self, name: str, *sources: Any) -> None:
        self.name = name
        self._sources = sources

    def error(self, keyword: str, problem: str, cure: str = EXPORT_AGAIN) -> SeriesError:
        """The error for a bad attribute, ready to be raised."""
        return SeriesError(f"{self.name}: {keyword} {problem}: {cure}")

    def get(self, keyword: str) -> Any:
        """The value as pydicom gives it, or None where it is absent or empty."""
        for source in self._sources:
            try:
                value = source.get(keyword)
            except Exception:  # any kind: pydicom converts on access, from bytes of any content
                raise self.error(keyword, "can't be read") from None
            if value is not None and not (hasattr(value, "__len__") and len(value) == 0):
                return value
        return None

    def need(self, keyword: str) -> Any:
        """As `get`, but an absent value is an error."""
        value = self.get(keyword)
        if value is None:
            raise self.error(keyword, "is missing, a CT slice needs it")
        return value

    def text(self, keyword: str) -> str:
        """The value as text, empty where it is absent."""
        value = self.get(keyword)
        return "" if value is None else str(value).strip()

    def words(self, keyword: str) -> frozenset[str]:
        """The values of a multi-valued code string, in capitals."""
        value = self.get(keyword)
        try:
            values = [value] if value is None or isinstance(value, str) else list(value)
        except TypeError:  # its VR is that of a number
            raise self.error(keyword, "is not text") from None
        return frozenset(str(v).strip().upper() for v in values if v is not None)

    def numbers(self, keyword: str, count: int) -> tuple[float, ...]:
        """Exactly `count` finite numbers."""
        value = self.need(keyword)
        values = [value] if isinstance(value, str | int | float) else value
        try:
            numbers = tuple(float(v) for v in values)
        except (TypeError, ValueError, OverflowError):
            numbers = ()
        if len(numbers) != count or not all(map(math.isfinite, numbers)):
            raise self.error(keyword, f"is not {count} finite number{'s' * (count > 1)}")
        return numbers

    def number(self, keyword: str) -> float | None:
        """One finite number, or None where it is absent."""
        return None if self.get(keyword) is None else self.numbers(keyword, 1)[0]

    def integer(self, keyword: str, default: int | None = None) -> int:
        """One whole number; the default stands in for an absent one."""
        if default is not None and self.get(keyword) is None:
            return default
        value = self.numbers(keyword, 1)[0]
        if value != int(value):
            raise self.error(keyword, "is not a whole number")
        return int(value)

    def items(self, keyword: str) -> list[Any]:
        """The items of a sequence, none where it is absent."""
        value = self.get(keyword)
        if value is None:
            return []
        try:
            items = [] if isinstance(value, str | bytes) else list(value)
        except TypeError:  # its VR is that of a number
            items = []
        if not items or not all(hasattr(item, "get_item") for item in items):
            raise self.error(keyword, "is not a sequence")
        return items

    def stored_value(self, keyword: str, signed: bool) -> int | None:
        """A 16-bit stored value, in the pixels' own sign.

        PixelPaddingValue is often written as the other of US and SS (63536 for -2000), so that
        only its bytes can be trusted.
        """
        value = self.get(keyword)
        if value is None:
            return None
        # Implicit VR leaves US or SS open, then pydicom hands out the two bytes.
        raw = isinstance(value, bytes) and len(value) == 2
        number = int.from_bytes(value, "little") if raw else self.integer(keyword)
        if not -(1 << 15) <= number < 1 << 16:
            raise self.error(keyword, "does not fit 16 bits")
        wrapped = number & 0xFFFF
        return wrapped - (1 << 16) if signed and wrapped >> 15 else wrapped
