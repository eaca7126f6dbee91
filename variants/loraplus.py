"""LoRA+ (Hayou et al. 2024, arXiv:2402.12354):   ΔW = s · B A, as LoRA;   B learns at λ times A's rate.

At one rate for both, B's updates are too small where a layer is wide (sec. 4); λ of about 16 is the paper's advice. The
rate itself is the optimiser's: `train` and `lorafamily.parameter_groups` set it, and a session warns of an optimiser
that has another.
Trainable parameters: r (d_in + d_out).   Axes: d_in, d_out of the weight; r = rank.
"""

from lorafamily.variants.lora import lora

loraplus = lora.but(up_ratio=16.0)
