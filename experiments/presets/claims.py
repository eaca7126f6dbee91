"""The runs from which `experiments/claims.py` writes docs/claims.md: the papers' claims in small settings.

Every method gets the same learning rates, tried with a seed that is used for nothing else, and is judged at its best
rate with other seeds. "Small" is LoRA² at width 1, as the paper's 0.17M is on DeBERTaV3-base; "large" is rank 8.
"""

from cells.settings import Compare
from presets import Preset

MINILM = {
    "name": "claims-sst2",
    "budgets": ("340e3", "lora=43e3", "lora=340e3", "lora2=43e3"),
    "batch": 16,
    "length": 64,
    "steps": 100,
    "seeds": 5,
    "lr": ("1e-4", "3.2e-4", "1e-3", "3.2e-3", "1e-2", "3.2e-2"),
    "evaluations": 15,
}

preset = Preset(
    Compare(
        name="claims-code",
        methods=("full", "lora", "olora", "alora", "lora2", "adalora"),
        budgets=("80e3", "lora=10e3", "lora=80e3", "lora2=10e3"),
        seeds=8,
        lr=("3.2e-4", "1e-3", "3.2e-3", "1e-2", "3.2e-2", "1e-1"),
        tuning_seed=100,
        evaluations=15,
    ),
    quick={"steps": 30, "seeds": 2, "evaluations": 2, "lr": ("2e-3", "1e-2"), "name": "claims-quick"},
    by_task={"sst2": MINILM, "rte": MINILM | {"name": "claims-rte", "steps": 40}},
)
