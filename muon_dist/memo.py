"""What costs the host much to find, remembered until what it was found for is no longer the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Memo(Generic[T]):
    """A finding, and what it was found for."""

    def __init__(self) -> None:
        self._known: tuple[object, T] | None = None

    def get(self, seen: object, find: Callable[[], T]) -> T:
        """What ``find`` says, or what it said when ``seen`` was last another."""
        if self._known is None or self._known[0] != seen:
            self._known = seen, find()
        return self._known[1]
