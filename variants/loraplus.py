"""LoRA+ (Hayou et al. 2024, arXiv:2402.12354):   ΔW = s · B A, as LoRA;   B learns at λ times A's learning rate.

At one learning rate for both, B's updates are too small where a layer is wide (sec. 4); the paper advises a λ of about
16. `train` and `lorafamily.parameter_groups` give the optimizer these rates, and a session warns if its optimizer has
others.
Trainable parameters: r (d_in + d_out).   Axes: d_in, d_out of the weight; r = rank.
"""

from lorafamily.variants.lora import lora

loraplus = lora.but(up_ratio=16.0)
