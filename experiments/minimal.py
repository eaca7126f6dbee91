"""AdaLoRA in a plain PyTorch loop without abstractions: this file shows everything that a run does.

    python experiments/minimal.py            # 200 steps
    python experiments/minimal.py 60         # fewer

A byte-level decoder that was pretrained on English prose is adapted to Python code; model and data are included.
AdaLoRA begins with half again as many slices as the budget allows, and prunes the least important ones during the run.
The method adds one object to a loop, the session, with two calls: `backward` and `step`.
"""

from __future__ import annotations

import math
import sys
from itertools import islice

import torch
from torch.nn.utils import clip_grad_norm_

import embedded
import lorafamily

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
BATCH = 16  # sequences of 128 bytes
BUDGET = 20_000  # trainable parameters when training ends
LR = 5e-3  # peak rate, cosine schedule after a tenth of the steps to warm up

torch.manual_seed(0)

# The base model, and what it is adapted to: the standard library's source, one module in ten held out for validation.
model = embedded.pretrained()
train = embedded.batches(embedded.code(validation=False), BATCH, seed=0)
validation = list(islice(embedded.batches(embedded.code(validation=True), 32), 8))
print(f"base model: {sum(p.numel() for p in model.parameters()):,} parameters")


@torch.no_grad()
def bits_per_byte() -> float:
    """Mean loss on the validation batches, converted from nats to bits."""
    model.eval()
    losses = [float(model(**batch).loss) for batch in validation]
    model.train()
    return sum(losses) / len(losses) / math.log(2)


print(f"before training: {bits_per_byte():.3f} bits per byte")

# Freeze the base and put an adapter on every linear layer. ΔW is zero at first, so the outputs are still the base's.
lorafamily.apply(model, method="adalora", budget=BUDGET, budget_at="end", seed=0)
print(f"with adapters:   {bits_per_byte():.3f} bits per byte\n")
print(lorafamily.summary(model), "\n")

# An optimizer over the adapters alone. The session gets it, since pruning ranks must prune optimizer state too.
optimizer = torch.optim.AdamW(lorafamily.parameter_groups(model, lr=LR))
trainable = [p for p in model.parameters() if p.requires_grad]
warmup = max(1, STEPS // 10)
schedule = torch.optim.lr_scheduler.LambdaLR(
    optimizer,
    lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / STEPS))),
)

# The session knows the method's schedule: when pruning begins, how often it decides and when it ends, for STEPS steps.
session = lorafamily.session(model, optimizer, steps=STEPS, seed=0)

model.train()
seen = 0  # decisions printed so far
step = 0
while step < STEPS:
    for batch in islice(train, STEPS - step):
        loss = model(**batch).loss  # the task loss alone, which is what we log
        session.backward(loss)  # adds AdaLoRA's orthogonality penalty to the gradient
        grad_norm = clip_grad_norm_([p for p in trainable if p.grad is not None], 1.0)
        optimizer.step()
        session.step()  # scores slices by sensitivity; prunes parameters and optimizer state when it is time
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        step += 1

        for decision in session.decisions[seen:]:
            before, after = sum(decision.before.values()), sum(decision.after.values())
            if before != after:
                print(f"step {step:>4}: {before} slices → {after}")
        seen = len(session.decisions)
        if step % max(1, STEPS // 10) == 0:
            print(f"step {step:>4}: loss {loss.item():.3f} nats per byte, gradient norm {float(grad_norm):.2f}")

print(f"\nafter training:  {bits_per_byte():.3f} bits per byte\n")
print(lorafamily.summary(model))

# Fold the updates into the weights: the same outputs without adapters. `unmerge` would restore the base bit for bit.
lorafamily.merge(model)
print(f"\nmerged:          {bits_per_byte():.3f} bits per byte")
