"""GLUE with RoBERTa-base at LoRA's settings (arXiv:2106.09685, Table 9): `--task` names one of them.

It needs a GPU and the weights. Rank 8 on q and v, 512 tokens, 6 % warm-up. Weight decay and alpha = 16 are those of the
scripts, whose batches are eight times as large; the table has alpha 8. The scripts begin MRPC, RTE and STS-B with the
adapter trained on MNLI; here each task begins with a new one. Full fine-tuning gets 2e-5, a customary rate. The head
has the rate of the paper's adapters under every method.
"""

from cells.settings import Compare
from presets import SHORT, Preset

# task: batch, epochs, rate
PAPER = {
    "mnli": (16, 30, "5e-4"),
    "sst2": (16, 60, "5e-4"),
    "mrpc": (16, 30, "4e-4"),
    "cola": (32, 80, "4e-4"),
    "qnli": (32, 25, "4e-4"),
    "qqp": (16, 25, "5e-4"),
    "rte": (32, 80, "5e-4"),
    "stsb": (16, 40, "4e-4"),
}

preset = Preset(
    Compare(
        task="rte",
        model="FacebookAI/roberta-base",
        methods=("full", "lora", "olora", "alora", "adalora", "lora2"),
        budgets=("294912",),  # rank 8 on q and v
        targets=("qv",),
        seeds=5,
        length=512,
        weight_decay=0.1,
        evaluations=10,
        options=(),
    ),
    quick=SHORT | {"length": 64, "held_out": 64},
    by_task={
        task: {"batch": batch, "epochs": float(epochs), "lr": (rate, "full=2e-5"), "head_lr": float(rate)}
        for task, (batch, epochs, rate) in PAPER.items()
    },
)
