"""Lets the site show parameters that a docstring lists in groups ("Optimisation:", "Evaluation:") as parameters."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

KNOWN = {"Args", "Raises", "Returns", "Yields", "Attributes", "Example", "Examples", "Note", "Notes", "Warning"}
GROUP = re.compile(r"^(?P<title>[A-Z][a-z ]+):\n(?=[ \t]+[a-z_]+(, [a-z_]+)*: )", re.MULTILINE)


def as_parameters(found: re.Match[str]) -> str:
    return found[0] if found["title"] in KNOWN else f"Args: {found['title']}\n"


class GroupedParameters(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = GROUP.sub(as_parameters, obj.docstring.value)
