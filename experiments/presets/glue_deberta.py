"""GLUE with DeBERTaV3-base at LoRA²'s settings (arXiv:2408.06854): `--task` names one of them.

It needs a GPU and the weights. All adapters get one learning rate for each task, as in the papers of AdaLoRA and LoRA².
Target rank, inner rank, γ, t_i, t_f, Δ_T and alpha are the paper's; AdaLoRA gets those that it has. Full fine-tuning
gets 2e-5, a customary rate that is in neither paper; the head has the papers' rate under every method.
"""

from cells.settings import Compare
from presets import SHORT, Preset

METHODS = ("lora", "olora", "alora", "adalora", "lora2")


def paper(
    *, target: int, inner: int, gamma: float, begin: int, last: int, every: int, alpha: int, tokens: int, rate: str,
    epochs: float,
) -> dict[str, object]:  # fmt: skip
    """A task's settings. `begin`, `last`, `every`: t_i, t_f and Δ_T in optimizer steps."""
    schedule = (f"gamma={gamma}", f"warmup={begin}", f"final={last}", f"interval={every}")
    options = [f"{method}.{option}" for method in ("lora2", "adalora") for option in schedule]
    options += [f"lora2.target={target}", f"lora2.slices={inner}"]
    options += [f"{method}.alpha={alpha}" for method in METHODS]
    return {
        "length": tokens,
        "lr": (rate, "full=2e-5"),
        "head_lr": float(rate),
        "epochs": epochs,
        "options": tuple(options),
    }


TASKS = {
    "mnli": paper(
        target=3, inner=8, gamma=0.1, begin=8000, last=50000, every=100, alpha=16, tokens=256, rate="5e-4", epochs=7
    ),
    "sst2": paper(
        target=2, inner=8, gamma=0.1, begin=6000, last=22000, every=100, alpha=16, tokens=128, rate="8e-4", epochs=24
    ),
    "cola": paper(
        target=3, inner=4, gamma=0.1, begin=800, last=3500, every=10, alpha=32, tokens=64, rate="8e-4", epochs=25
    ),
    "qnli": paper(
        target=2, inner=8, gamma=0.1, begin=2000, last=8000, every=100, alpha=32, tokens=512, rate="1.2e-3", epochs=5
    ),
    "rte": paper(
        target=3, inner=4, gamma=0.3, begin=600, last=1800, every=1, alpha=32, tokens=320, rate="1.2e-3", epochs=50
    ),
    "mrpc": paper(
        target=1, inner=8, gamma=0.1, begin=600, last=1800, every=1, alpha=32, tokens=320, rate="1e-3", epochs=30
    ),
    "stsb": paper(
        target=1, inner=4, gamma=0.3, begin=800, last=2000, every=10, alpha=32, tokens=128, rate="2.2e-3", epochs=25
    ),
}

preset = Preset(
    Compare(
        task="rte",
        model="microsoft/deberta-v3-base",
        methods=("full", *METHODS),
        budgets=("0.17e6", "1336896"),  # LoRA²: outer width 1 and 8
        seeds=5,
        batch=32,
        evaluations=10,
    ),
    quick=SHORT | {"length": 64, "held_out": 64, "budgets": ("0.17e6",)},
    by_task=TASKS,
)
