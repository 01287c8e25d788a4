"""Sphinx's roles in docstrings, as plain code on the site: :func:`assign` is `assign`."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Roles(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r":(?:mod|class|func|meth):(`[^`]+`)", r"\1", obj.docstring.value)
