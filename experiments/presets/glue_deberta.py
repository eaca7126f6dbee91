"""GLUE with DeBERTaV3-base at LoRA²'s settings (arXiv:2408.06854): `--task` names one of them.

It needs a GPU and the weights. All adapters get one learning rate for each task, as in the papers of AdaLoRA and LoRA².
Target rank, inner rank, γ, t_i, t_f, Δ_T and alpha are the paper's; AdaLoRA gets those that it has. Full fine-tuning
gets 2e-5, a customary rate that is in neither paper; the head has the papers' rate under every method.
"""

from cells.settings import Compare
from presets import SHORT, Preset

METHODS = ("lora", "olora", "alora", "adalora", "lora2")


def paper(
    target: int, inner: int, gamma: float, begin: int, last: int, every: int, alpha: int, tokens: int, rate: str,
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


# task: target rank, inner rank, γ, t_i, t_f, Δ_T, alpha, tokens, rate, epochs
TASKS = {
    "mnli": paper(3, 8, 0.1, 8000, 50000, 100, 16, 256, "5e-4", 7),
    "sst2": paper(2, 8, 0.1, 6000, 22000, 100, 16, 128, "8e-4", 24),
    "cola": paper(3, 4, 0.1, 800, 3500, 10, 32, 64, "8e-4", 25),
    "qnli": paper(2, 8, 0.1, 2000, 8000, 100, 32, 512, "1.2e-3", 5),
    "rte": paper(3, 4, 0.3, 600, 1800, 1, 32, 320, "1.2e-3", 50),
    "mrpc": paper(1, 8, 0.1, 600, 1800, 1, 32, 320, "1e-3", 30),
    "stsb": paper(1, 4, 0.3, 800, 2000, 10, 32, 128, "2.2e-3", 25),
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
