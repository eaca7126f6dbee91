"""The arms and controls of the studies, as data.

Sizes are in units of a study's budget. An arm is tuned on its own unless `rates_of` names the one whose rate it takes:
controls differ from the arm that they control in one thing only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Dropped = Literal["state", "state and schedule"]


@dataclass(frozen=True)
class Arm:
    """One way to train with adapters.

    `method`, `options`: as `lorafamily.apply` takes them. `size`: budget at the end, in units of the study's;
    `budget_at`: when it holds. `up_ratio`: rate of U over that of V (LoRA+). `cut_from`: trained with so many times
    `size`, then cut to it through all layers. `pattern`: ranks by layer are those another arm of the same seed ended
    with; `shuffle`: permuted among layers of equal shape, by this number. `dropped`: what the optimizer loses whenever
    ranks change. `control`: an arm that lacks what this one is about, and is compared with it, too. `start`: log10 of
    the rate around which tuning begins.
    """

    name: str
    method: str = "lora"
    options: tuple[tuple[str, Any], ...] = ()
    size: float = 1.0
    budget_at: Literal["peak", "end"] = "peak"
    up_ratio: float | None = None
    cut_from: float | None = None
    pattern: str | None = None
    shuffle: int | None = None
    dropped: Dropped | None = None
    control: str | None = None
    rates_of: str | None = None
    start: float = -2.0


def _found(name: str) -> list[Arm]:
    """Plain LoRA trained from step 0 with the pattern that an arm found, and with three shuffles of it."""
    anew = Arm(f"{name}'s pattern anew", pattern=name, rates_of="uniform")
    return [anew] + [
        Arm(f"{name}'s pattern shuffled {i}", pattern=name, shuffle=i, rates_of="uniform") for i in (1, 2, 3)
    ]


UNIFORM = Arm("uniform")
"""Plain LoRA, the same rank everywhere: what everything is held against."""
ALORA = Arm("ALoRA", "alora", (("scorer", "exact"),))
ADALORA = Arm("AdaLoRA", "adalora", budget_at="end", start=-1.75)
SVD = Arm("SVD form, equal ranks", "svd")
"""AdaLoRA's form and penalty without its allocation."""
ONE = ("drop", 1)
"""ALoRA's n_A on the planted problem. The paper's, the layers of one block, is a 256th of all slices in LLaMA-2-7B;
here it would be half of them, and every second round would undo the one before."""

PLANTED: tuple[Arm, ...] = (
    UNIFORM,
    Arm("uniform at the peak size", size=1.5),
    Arm("ALoRA", "alora", (("scorer", "exact"), ONE)),
    Arm("ALoRA first-order", "alora", (("scorer", "first-order"), ONE)),
    Arm("ALoRA, eight slices a round", "alora", (("scorer", "exact"),), rates_of="ALoRA"),
    Arm("ALoRA, random scores", "alora", (("scorer", "random"), ONE)),
    Arm("ALoRA, state dropped", "alora", (("scorer", "exact"), ONE), dropped="state", rates_of="ALoRA"),
    Arm(
        "ALoRA, state and schedule dropped",
        "alora",
        (("scorer", "exact"), ONE),
        dropped="state and schedule",
        rates_of="ALoRA",
    ),
    ADALORA,
    Arm("AdaLoRA, task-only scores", "adalora", (("gradient_of", "task"),), budget_at="end", start=-1.75),
    Arm("AdaLoRA, random scores", "adalora", (("scorer", "random"),), budget_at="end", start=-1.75),
    Arm("ElaLoRA", "elalora", start=-1.75),
    Arm("FlexLoRA", "flexlora", start=-1.75),
    Arm("EVA", "eva"),
    Arm("GoRA", "gora"),
    Arm("LoRA then cut", cut_from=1.5),
    *_found("ALoRA"),
    *_found("AdaLoRA"),
    *_found("EVA"),
    *_found("GoRA"),
)

EMBEDDED: tuple[Arm, ...] = (
    UNIFORM,
    Arm("uniform, rank 1", size=1 / 8),
    Arm("uniform, rank 2", size=1 / 4),
    Arm("uniform, rank 4", size=1 / 2),
    Arm("uniform at the peak size", size=1.5),
    Arm("rsLoRA", "rslora", start=-2.25),
    Arm("LoRA+", up_ratio=16.0, start=-2.75),
    ALORA,
    Arm("ALoRA first-order", "alora", (("scorer", "first-order"),)),
    Arm("ALoRA, random scores", "alora", (("scorer", "random"),)),
    Arm(
        "ALoRA, optimizer state dropped",
        "alora",
        (("scorer", "first-order"),),
        dropped="state",
        rates_of="ALoRA first-order",
    ),
    Arm(
        "ALoRA, state and schedule dropped",
        "alora",
        (("scorer", "first-order"),),
        dropped="state and schedule",
        rates_of="ALoRA first-order",
    ),
    SVD,
    Arm("SVD form without its penalty", "svd", (("gamma", 0.0),), control=SVD.name),
    replace(ADALORA, control=SVD.name),
    Arm(
        "AdaLoRA, task-only scores",
        "adalora",
        (("gradient_of", "task"),),
        budget_at="end",
        control=SVD.name,
        start=-1.75,
    ),
    Arm("AdaLoRA, budget at the peak", "adalora", start=-1.75),
    Arm("AdaLoRA, budget at the peak, task-only scores", "adalora", (("gradient_of", "task"),), start=-1.75),
    # Width 1 is a little larger than 1/8.
    Arm("LoRA² at 1/8", "lora2", size=0.1325, control="uniform, rank 1", start=-1.75),
    Arm("LoRA²", "lora2", start=-1.75),
    Arm("ElaLoRA", "elalora", control=SVD.name, start=-1.75),
    Arm("FlexLoRA", "flexlora", control=SVD.name, start=-1.75),
    Arm("OLoRA", "olora", start=-3.0),
    Arm("EVA", "eva"),
    Arm("GoRA", "gora", start=-2.25),
    Arm("LoRA then cut", cut_from=1.5),
    *_found("ALoRA first-order"),
    *_found("AdaLoRA"),
    *_found("EVA"),
    *_found("GoRA"),
)
"""On the embedded model; the budget is LoRA's at rank 8."""

PRETRAINED: tuple[Arm, ...] = (
    replace(UNIFORM, start=-3.25),
    Arm("uniform at the peak size", size=1.5, start=-3.25),
    Arm("ALoRA first-order", "alora", (("scorer", "first-order"),), start=-3.25),
    replace(ADALORA, start=-2.75),
    Arm("LoRA²", "lora2", start=-2.75),
    Arm("EVA", "eva", start=-3.5),
    Arm("LoRA then cut", cut_from=1.5, start=-3.25),
    *_found("ALoRA first-order"),
    *_found("AdaLoRA"),
    *_found("EVA"),
)
"""On sentences, where the budget is LoRA's at rank 4, and on language models, where it is that at rank 8."""

ARMS = {
    **{"planted": PLANTED, "misleading": PLANTED, "embedded": EMBEDDED},
    **{"sst2": PRETRAINED, "mrpc": PRETRAINED, "llm-gsm8k": PRETRAINED, "llm-text": PRETRAINED},
}
"""By problem."""
