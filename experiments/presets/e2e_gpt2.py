"""E2E with GPT-2 medium at LoRA's settings (arXiv:2106.09685, Table 11): rank 4 on q and v of the fused c_attn.

It needs a GPU, the weights and the data (--data DIR). The authors smooth labels by 0.1; here they are not smoothed.
Full fine-tuning gets 5e-5, a customary rate.
"""

from cells.settings import Compare
from presets import SHORT, Preset

preset = Preset(
    Compare(
        task="e2e",
        model="openai-community/gpt2-medium",
        methods=("full", "lora", "olora", "alora", "adalora", "lora2"),
        budgets=("393216",),  # rank 4 on q and v
        targets=("qv",),
        fused=("c_attn$=q,k,v",),
        seeds=3,
        epochs=5.0,
        batch=8,
        length=512,
        lr=("2e-4", "full=5e-5"),
        weight_decay=0.01,
        warmup=0.019,  # 500 of its 26,289 steps
        dropout=0.1,
        evaluations=5,
        options=tuple(f"{method}.alpha=32" for method in ("lora", "olora", "alora", "adalora", "lora2")),
    ),
    quick=SHORT | {"held_out": 16},
)
