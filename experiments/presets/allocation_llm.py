"""Rank allocation on a causal language model of 0.6B parameters: MetaMathQA, judged on GSM8K; or `--task text`.

It needs a GPU, the weights and the data. Every method gets the same quarter decades, tried with a seed that the
comparison does not use. AdaLoRA appears twice, with its paper's budget, which holds at the end, and with the others'
budget. The controls (patterns anew and shuffled) are in study.py's problems llm-gsm8k and llm-text.

peft's benchmark on the same data trains LLaMA-3.2-3B for 5,000 steps of 4 rows, rank 32 on q and v, AdamW at 1e-4 with
weight decay 0.1 and a tenth of warmup: `--batch 4 --steps 5000 --length 768 --targets qv --weight-decay 0.1 --warmup
0.1`.
"""

from cells.settings import Compare
from presets import SHORT, Preset

RATES = ("1e-4", "1.8e-4", "3.2e-4", "5.6e-4", "1e-3", "1.8e-3", "3.2e-3")
METHODS = ("lora", "lora:train_times=2", "alora", "adalora", "adalora:budget_at=end", "lora2", "eva")

preset = Preset(
    Compare(
        task="gsm8k",
        model="Qwen/Qwen3-0.6B-Base",
        methods=METHODS,
        budgets=("5e6",),
        seeds=5,
        tuning_seed=100,
        lr=RATES,
        steps=1000,
        batch=16,
        length=512,
        evaluations=4,
    ),
    quick=SHORT | {"held_out": 8, "length": 128, "lr": RATES[2:4]},
    by_task={"text": {"evaluations": 20}},
)
