"""All problems, by name."""

from __future__ import annotations

from studies.language import Maths, OwnText
from studies.planted import Misleading, Planted
from studies.problem import Problem
from studies.small import Embedded, Sentences

MINILM = (
    "all-MiniLM-L6-v2 (22M parameters, six layers of width 384) with a new head whose rate is 0.01 under every arm, on "
)
PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for problem in (
        Planted(),
        Misleading(),
        Embedded(),
        Sentences("sst2", MINILM + "SST-2: is the sentence of a film review positive or negative?", 0.15, 909 / 1821),
        Sentences("mrpc", MINILM + "MRPC: do two sentences say the same?", 0.25, 578 / 1725),
        Maths(),
        OwnText(),
    )
}
