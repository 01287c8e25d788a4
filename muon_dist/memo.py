"""What costs the host much to find, remembered until what it was found for is no longer the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Memo(Generic[T]):
    """Findings by key, each with what it was found for."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[object, T]] = {}

    def get(self, key: Hashable, seen: object, find: Callable[[], T]) -> T:
        """What ``find`` says, or what it said when ``seen`` was last another."""
        known = self._known.get(key)
        if known is None or known[0] != seen:
            known = self._known[key] = seen, find()
        return known[1]
