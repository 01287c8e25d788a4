"""Launches that skip Triton's own look-up of what it compiled: it is half of what a launch costs the host, and a step
has hundreds."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any


class Compiled:
    """A kernel, and what was compiled of it."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._found: dict[Hashable, Any] = {}

    def launch(self, key: Hashable, grid: tuple[int, int], arguments: tuple[Any, ...], **options: int) -> None:
        """Runs the kernel.

        Args:
            grid: programs along both axes.
            key: all that compilation depends on, ``options`` too.
            arguments: of the kernel, constants too.
            options: of compilation.
        """
        if compiled := self._found.get(key):
            compiled[(*grid, 1)](*arguments)
        else:  # always so in Triton's interpreter, which compiles nothing
            self._found[key] = self._kernel[grid](*arguments, **options)
