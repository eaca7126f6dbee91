"""What a study found, in three sentences and a table of verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from studies.arms import SVD, UNIFORM
from studies.figures import COLOUR
from studies.results import LEVEL, Comparison, Study, pattern_shuffled, puts_it_there

FINDERS = ("ALoRA", "AdaLoRA", "EVA", "GoRA")
MOVES = ("ALoRA", "ALoRA first-order", "AdaLoRA", "LoRA²", "ElaLoRA", "FlexLoRA", "EVA", "GoRA", "LoRA then cut")
"""Arms that end with unequal ranks, without controls."""
REAL = ("embedded", "sst2", "mrpc")
Found = Sequence[tuple[Study, Sequence[Comparison]]]
"""Problems, each with its comparisons."""


def sentences(studies: Sequence[Study], compared: Sequence[Sequence[Comparison]]) -> list[str]:
    """What was found: a sentence each for the planted, the misleading and the other problems; failures first."""
    found = {study.problem.name: (study, list(judged)) for study, judged in zip(studies, compared, strict=True)}
    said = [planted(*found["planted"])] if "planted" in found else []
    if "misleading" in found:
        verdicts = verdicts_of(found["misleading"][1], FINDERS)
        said.append(
            "Where inputs vary most in the layers that need nothing, against equal ranks: "
            f"{grouped(verdicts) or 'too few runs to say'}."
        )
    said.append(on_models([found[name] for name in REAL if name in found]))
    return said


def planted(study: Study, comparisons: Sequence[Comparison]) -> str:
    """Whether methods find the layers that can help, and gain from it."""
    solved, failed, shares = [], [], []
    for name in FINDERS:
        share = puts_it_there(study.of(name))
        verdicts = {c.other: c.verdict for c in comparisons if c.arm == name}
        against = [verdicts.get(other) for other in (UNIFORM.name, pattern_shuffled(name))]
        if share is None or None in against:
            continue
        if against == ["better", "better"] and share[1] < LEVEL:
            solved.append(name)
            shares.append(round(100 * share[0]))
        else:
            failed.append(name)
    said = [f"{listed(failed)} fail"] if failed else []
    if solved:
        said.append(
            f"{listed(solved)} put {min(shares)} to {max(shares)} % of the rank into these layers and beat equal ranks "
            "and their own patterns shuffled"
        )
    random = {c.arm: c.verdict for c in comparisons if "random scores" in c.arm and c.other == UNIFORM.name}
    if random:
        said.append(f"against equal ranks, random scores are {listed(sorted(set(random.values())))}")
    return "On a planted problem, where only half of the layers can help: " + "; ".join(said) + "."


def on_models(found: Found) -> str:
    """What allocation is worth on models that were not made for the question, the answer first."""
    moved, formed, anew = (chosen(found, by) for by in GROUPS.values())
    if not moved:
        return "Too few runs say whether it matters on a model that was not made for the question."
    problems = listed(list(dict.fromkeys(where for _, where in moved)))
    said = [
        f"At equal budgets, each at its own best rate, on {problems}: {who('nothing that moves rank', moved)} uniform "
        f"LoRA ({counted(moved)})"
    ]
    if formed:
        said.append(f"{who('no allocation', formed)} equal ranks in the same form ({counted(formed)})")
    if anew:
        said.append(f"{who('no found pattern, trained anew,', anew)} the same ranks shuffled ({counted(anew)})")
    return ", and ".join(filter(None, [", ".join(said[:-1]), said[-1]])) + "."


def moves(c: Comparison) -> bool:
    """Whether an arm that ends with unequal ranks is compared with uniform LoRA."""
    return c.arm in MOVES and c.other == UNIFORM.name


def moves_in_its_form(c: Comparison) -> bool:
    """Whether it is compared with equal ranks in the same form."""
    return c.arm in MOVES and c.other == SVD.name


def trained_anew(c: Comparison) -> bool:
    """Whether a found pattern, trained anew, is compared with itself shuffled."""
    return c.arm.endswith("anew") and c.other != UNIFORM.name


GROUPS: dict[str, Callable[[Comparison], bool]] = {
    "uniform LoRA": moves,
    "the same form, equal ranks": moves_in_its_form,
    "the same ranks shuffled": trained_anew,
}
"""The comparisons that answer the question, by what is compared with."""


def chosen(found: Found, by: Callable[[Comparison], bool]) -> list[tuple[Comparison, str]]:
    """Comparisons, each with its problem."""
    return [(c, study.problem.name) for study, comparisons in found for c in comparisons if by(c)]


def who(nothing: str, found: Sequence[tuple[Comparison, str]]) -> str:
    """Who beats the other, or that nothing does."""
    better = [f"{c.arm} ({where})" for c, where in found if c.verdict == "better"]
    return f"{listed(better)} {'beat' if len(better) > 1 else 'beats'}" if better else f"{nothing} beats"


def counted(found: Sequence[tuple[Comparison, str]]) -> str:
    """How many comparisons have each verdict."""
    verdicts = [c.verdict for c, _ in found]
    return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in COLOUR if verdict in verdicts)


def verdict_table(found: Found) -> list[list[str]]:
    """Arms by problem and verdict, in groups."""
    lines = [["problem", "against", *COLOUR]]
    for other, by in GROUPS.items():
        judged = chosen(found, by)
        for problem in dict.fromkeys(where for _, where in judged):
            own = [c for c, where in judged if where == problem]
            arms = [", ".join(c.arm for c in own if c.verdict == verdict) or "–" for verdict in COLOUR]
            lines.append([problem, other, *arms])
    return lines


def verdicts_of(comparisons: Sequence[Comparison], names: Sequence[str]) -> dict[str, str]:
    """Against uniform LoRA."""
    found = {c.arm: c.verdict for c in comparisons if c.other == UNIFORM.name}
    return {name: found[name] for name in names if name in found}


def grouped(verdicts: Mapping[str, str]) -> str:
    """Names by verdict, in words."""
    by = {verdict: [name for name, given in verdicts.items() if given == verdict] for verdict in COLOUR}
    return ", ".join(f"{listed(names)} {'is' if len(names) == 1 else 'are'} {v}" for v, names in by.items() if names)


def listed(names: Sequence[object]) -> str:
    words = list(map(str, names))
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
