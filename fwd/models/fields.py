"""Fields of a config.json, each checked as it is read. No torch here."""

from collections.abc import Iterable, Mapping
from typing import Any

from fwd.errors import ModelError


class Fields:
    """The fields of one JSON object; whatever is wrong with one raises ModelError, one line that names it."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self._table = table

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value, unchecked; null is as good as absent."""
        value = self._table.get(key)
        return default if value is None else value

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """Return a whole number from `low` to `high`."""
        value = self.get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise ModelError(f"config.json: {key} must be an integer from {low} to {high}, found {short(value)}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """Return a number from `low` to `high`."""
        value = self.get(key, default)
        if type(value) not in {int, float} or not low <= value <= high:
            raise ModelError(f"config.json: {key} must be a number from {low:g} to {high:g}, found {short(value)}")
        return float(value)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """Return true or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ModelError(f"config.json: {key} must be true or false, found {short(value)}")
        return value

    def words(self, key: str, known: Iterable[str], count: int) -> list[str] | None:
        """Return a list of `count` words, each a known one; None where there is no list."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or any(not isinstance(word, str) or word not in known for word in value):
            raise ModelError(f"config.json: {key} must be a list of {' or '.join(known)}")
        if len(value) != count:
            raise ModelError(f"config.json: {key} names {len(value)} layers, num_hidden_layers {count}")
        return value

    def refuse(self, neutral: Mapping[str, tuple[object, ...]]) -> None:
        """Refuse fields that change the mathematics: those whose value is none of those that do not."""
        for key, values in neutral.items():
            found = self.get(key)
            if found is not None and found not in values:
                raise ModelError(f"config.json: {key} = {short(found, 80)} is not supported")


def short(value: object, length: int = 40) -> str:
    """Return the beginning of a value as it may stand in a line."""
    return repr(value)[:length]
