"""The results of architectures.py as text: the page docs/architectures.md, and lines for a terminal."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from checks.architectures_checks import CHECKS, MERGED, START, stands
from pages.page import Heading, Part, Table, Text

METHODS = ("lora", "olora", "alora", "lora2", "adalora")


@dataclass(frozen=True)
class Row:
    """The results for one architecture. `left_out`: its matrices without adapter, in words; `reached`: the share of its
    parameters that is in adapted matrices; `results`: by method and check."""

    name: str
    family: str
    model: str
    targets: str | None
    parameters: int
    layers: int
    reached: float
    left_out: str
    generates: bool
    results: dict[str, dict[str, str]]

    def failed(self, method: str) -> dict[str, str]:
        """Checks that do not hold, with their reasons."""
        return {check: result for check, result in self.results[method].items() if not stands(result)}


def line_of(row: Row) -> str:
    """A row as text for a terminal."""
    failed = {method: row.failed(method) for method in row.results}
    head = f"{row.name:<20} {row.parameters:>7,} parameters, {row.layers:>2} layers"
    if not any(failed.values()):
        return f"{head}: all hold"
    each = (f"\n    {m} {check}: {why}" for m, found in failed.items() for check, why in found.items())
    return f"{head}:{''.join(each)}"


def totals(rows: Sequence[Row], methods: Sequence[str]) -> list[str]:
    """How much holds: in all, by method, by check."""
    whole = sum(not any(row.failed(method) for method in methods) for row in rows)
    lines = [f"{whole} of {len(rows)} architectures hold under all of {', '.join(methods)}."]
    per_method = (f"{m} {sum(not row.failed(m) for row in rows)}" for m in methods)
    lines.append(f"By method, of {len(rows)}: {', '.join(per_method)}.")
    counted = Counter(check for row in rows for method in methods for check in row.failed(method))
    cells = len(rows) * len(methods)
    lines.append(f"By check, of {cells}: {', '.join(f'{check} {cells - counted[check]}' for check in CHECKS)}.")
    return lines


@dataclass
class Notes:
    """Reasons of failures, numbered in order. Reasons that are the same but for a measured difference share a note,
    which has the largest difference."""

    found: dict[str, list[float]] = field(default_factory=dict)

    def cell(self, failed: Mapping[str, str]) -> str:
        """The failed checks with the numbers of their reasons."""
        checks: dict[int, list[str]] = {}
        for check, why in failed.items():
            checks.setdefault(self._number(why), []).append(check)
        return "; ".join(f"{', '.join(same)} ({number})" for number, same in checks.items()) or "all"

    def _number(self, why: str) -> int:
        reason = DIFFERENCE.sub(PLACE, why)
        self.found.setdefault(reason, []).extend(float(number) for number in DIFFERENCE.findall(why))
        return list(self.found).index(reason) + 1

    def lines(self) -> list[str]:
        return [
            f"{i}. {reason.replace(PLACE, f'up to {max(numbers):.0e}' if numbers else '')}"
            for i, (reason, numbers) in enumerate(self.found.items(), 1)
        ]


DIFFERENCE, PLACE = re.compile(r"\b\de[+-]\d\d\b"), "\0"


def page_of(rows: Sequence[Row], about: Mapping[str, str]) -> list[Part]:
    notes = Notes()
    lines = [["architecture", "family", "parameters", "adapted layers", "left out", *METHODS]]
    for row in rows:
        cells = [notes.cell(row.failed(method)) for method in METHODS]
        share = f"{row.layers} ({row.reached:.0%})"
        lines.append([row.name, row.family, f"{row.parameters:,}", share, row.left_out, *cells])
    versions = ", ".join(f"{name} {about[name]}" for name in about if name != "date")
    speaking = sum(row.generates for row in rows)
    unvisited = [row.name for row in rows if "unvisited" in str(row.results)]
    stacked = any("expert stack" in row.left_out for row in rows)
    named = ", ".join(f"{row.name} (`targets={row.targets!r}`)" for row in rows if row.targets)
    parts: list[Part] = [
        Text(
            f"What holds for {len(rows)} architectures of `transformers` under {len(METHODS)} methods. Written by "
            f"`python experiments/checks/architectures.py --page docs/architectures.md` on {about['date']} with "
            f"{versions}; do not edit."
        ),
        Text(
            "Each model is random, from a small configuration, on the CPU in float32, adapted with rank 2 and the "
            f"default targets{f', except {named}' if named else ''}. Checks, each on a model of its own; all but "
            "*start* with random numbers added to every trainable tensor:"
        ),
        Text("\n".join(f"- *{name}*: {what}" for name, what in explained(speaking, len(rows)).items())),
        Text(
            "**all**: every check holds. Otherwise the failed checks are named, with the numbers of their reasons "
            "below the table. *Adapted layers*: their number, and the share of the model's parameters that is in their "
            "weights. *Left out*: matrices that get no adapter."
            + (" An expert stack holds the weights of all experts in one tensor of three axes." if stacked else "")
            + (f" Experts that no token of the batch chose: {', '.join(unvisited)}." if unvisited else "")
        ),
        Table(lines),
    ]
    if notes.found:
        parts += [Heading("What does not hold"), Text("\n".join(notes.lines()))]
    return [*parts, Heading("Totals"), Text("\n".join(f"- {line}" for line in totals(rows, METHODS)))]


def explained(speaking: int, total: int) -> dict[str, str]:
    """The checks in words, with the bounds that they are held to."""
    return {
        "start": "in eval mode outputs are those of the base with frozen parameters, bit for bit; "
        + ", ".join(f"within {bound:.0e} relative for {method}" for method, bound in START.items()),
        "gradients": "after a forward and backward in train mode every adapter has a gradient, but those of experts "
        "that no token chose",
        "effect": f"outputs differ from the base's by more than {10 * MERGED:.0e} relative, and in eval mode no "
        "adapter's gradient is missing or all zero, but for the same experts",
        "merge": f"merged outputs are within {MERGED:.0e} relative of the adapted ones, and unmerging gives these back "
        "bit for bit",
        "generate": f"five greedy tokens with a cache are the same adapted and merged; {speaking} of the {total} can "
        "generate",
        "file": "saved, and loaded without a warning into another copy of the base, the outputs are the same bits",
        "peft": f"exported, and loaded by `peft`, the outputs are within {MERGED:.0e} relative",
        "remove": "every parameter and persistent buffer has the base's bits, modules have the base's names and "
        "classes, and outputs are the base's, bit for bit",
    }
