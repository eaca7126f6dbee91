"""Every argument of the public loop functions has an effect, or is refused: a table, so that a new one needs a line."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lorafamily
from lorafamily.placement import placement_of

STEPS = 12


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x, y):
        for block in self.blocks:
            x = F.dropout(torch.tanh(block(x)), 0.1, self.training)
        return SimpleNamespace(loss=F.cross_entropy(self.head(x), y), logits=self.head(x))


def batch(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(8, 8, generator=generator), "y": torch.randint(3, (8,), generator=generator)}


def trained(method: str = "lora", data=None, **given):
    options = {"warmup": 2, "final": 3, "interval": 2} if method == "adalora" else {}
    model = lorafamily.apply(Classifier(), method, rank=3, targets="blocks", also_train="head", seed=0, **options)
    given = {"steps": STEPS, "seed": 0, "progress": False} | given
    given = {name: value for name, value in given.items() if value is not None or name in ("seed", "max_grad_norm")}
    history = lorafamily.train(model, data or [batch(i) for i in range(3)], **given)
    numbers = torch.cat([p.detach().flatten() for p in model.parameters()])
    return model, history, numbers


def lr_of(**given) -> list[float]:
    return [step.lr for step in trained(**given)[1].steps]


def moved(**given) -> bool:
    return not torch.equal(trained()[2], trained(**given)[2])


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def accuracy(model) -> dict:
    return {"accuracy": np.float32(0.5)}


def rising(values):
    given = iter(values)
    return lambda model: {"accuracy": next(given)}


EFFECTS = {
    "model": lambda tmp: trained()[0] is not None,
    "data": lambda tmp: moved(data=[batch(7)]),
    "steps": lambda tmp: len(trained(steps=np.int64(5))[1].steps) == 5,
    "epochs": lambda tmp: len(trained(steps=None, epochs=2)[1].steps) == 6,
    "lr": lambda tmp: max(lr_of(lr=torch.tensor(0.5), warmup=0)) == 0.5,
    "head_lr": lambda tmp: moved(head_lr=1e-4),
    "up_lr": lambda tmp: moved(up_lr=16e-3) and not moved(up_lr=1e-3),
    "weight_decay": lambda tmp: moved(weight_decay=0.5),
    "warmup": lambda tmp: lr_of(warmup=5, lr=1.0)[0] == pytest.approx(1 / 6) and lr_of(warmup=0.5, lr=1.0)[5] < 1,
    "schedule": lambda tmp: lr_of(schedule=lambda step: step / 100, lr=1.0, warmup=0)[3] == pytest.approx(0.04),
    "floor": lambda tmp: lr_of(floor=0.5, lr=1.0)[-1] == 0.5,
    "optimizer": lambda tmp: moved(optimizer=sgd),
    "loss_fn": lambda tmp: moved(loss_fn=lambda model, batch: 2 * model(**batch).loss),
    "loss_over": lambda tmp: moved(accumulate=2, loss_over=lambda b: float(b["x"][0, 0].abs())) and moved(accumulate=2),
    "accumulate": lambda tmp: moved(accumulate=2),
    "max_grad_norm": lambda tmp: (
        moved(max_grad_norm=1e-9, optimizer=sgd)
        and torch.equal(trained(max_grad_norm=0)[2], trained(max_grad_norm=None)[2])
    ),
    "validation": lambda tmp: "loss" in trained(validation=[batch()])[1].metrics,
    "evaluate": lambda tmp: trained(evaluate=accuracy)[1].metrics == {"accuracy": 0.5},
    "evaluate_every": lambda tmp: len(trained(validation=[batch()], evaluate_every=4)[1].evaluations) == 3,
    "monitor": lambda tmp: trained(evaluate=accuracy, monitor="accuracy")[1].best.metrics == {"accuracy": 0.5},
    "mode": lambda tmp: (
        trained(evaluate=rising([1, 3, 2]), evaluate_every=4, monitor="accuracy", mode="max")[1].best.step == 8
    ),
    "patience": lambda tmp: (
        len(trained(evaluate=rising([1, 2, 3]), evaluate_every=4, monitor="accuracy", patience=1)[1].steps) == 8
    ),
    "restore_best": lambda tmp: moved(
        evaluate=rising([1, 2, 3]), evaluate_every=4, monitor="accuracy", restore_best=True
    ),
    "precision": lambda tmp: moved(precision="bfloat16"),
    "compile": lambda tmp: "compile" in inspect.signature(lorafamily.train).parameters,  # tests/test_training.py
    "checkpoint_activations": lambda tmp: len(trained(checkpoint_activations=True)[1].steps) == STEPS,
    "seed": lambda tmp: moved(seed=1),
    "skip_nonfinite": lambda tmp: (
        trained(data=[batch(), {**batch(), "x": torch.full((8, 8), torch.nan)}], skip_nonfinite=1)[1].skipped == 6
    ),
    "check_gradients": lambda tmp: trained(check_gradients=False)[1].stopped != "",  # tests/test_session.py
    "again": lambda tmp: settled_twice(again=True) and not settled_twice(again=False),
    "progress": lambda tmp: trained(progress=True)[1].stopped != "",
    "on_step": lambda tmp: called_with_every_step(),
    "log_dir": lambda tmp: trained(log_dir=tmp / "log") and (tmp / "log" / "steps.jsonl").exists(),
    "save_every": lambda tmp: trained(log_dir=tmp / "save", save_every=5) and (tmp / "save" / "checkpoints").is_dir(),
    "keep": lambda tmp: (
        trained(log_dir=tmp / "keep", save_every=2, keep=3) and len([*(tmp / "keep" / "checkpoints").iterdir()]) == 3
    ),
    "resume": lambda tmp: (
        trained(log_dir=tmp / "on", save_every=4)
        and len(trained(log_dir=tmp / "on", save_every=4, steps=16, resume="anyway")[1].steps) == 16
    ),
}


def settled_twice(**given) -> bool:
    model, _, _ = trained("adalora")
    before = {at: adapter.rank for at, adapter in placement_of(model).adapters.items()}
    assert sum(before.values()) == 6
    data = [batch(i) for i in range(3)]
    return bool(lorafamily.train(model, data, steps=STEPS, seed=0, progress=False, **given).decisions)


def called_with_every_step() -> bool:
    seen: list = []
    history = trained(on_step=seen.append)[1]
    return seen == history.steps


REFUSED = [
    ({"steps": 0}, "steps=0"),
    ({"epochs": 1}, "give one of them"),
    ({"steps": True}, "steps=True"),
    ({"lr": -1.0}, "lr=-1.0"),
    ({"lr": 0.5, "optimizer": sgd}, "the optimiser has its own"),
    ({"head_lr": 0.5, "optimizer": sgd}, "the optimiser has its own"),
    ({"up_lr": 0.5, "optimizer": sgd}, "the optimiser has its own"),
    ({"up_lr": -0.5}, "up_lr=-0.5: must be zero or positive"),
    ({"weight_decay": 0.5, "optimizer": sgd}, "the optimiser has its own"),
    ({"optimizer": lambda parameters: 1}, "gave a int"),
    ({"warmup": -1}, "warmup=-1"),
    ({"warmup": 1.5}, "warmup=1.5"),
    ({"warmup": 600}, "warmup=600"),
    ({"schedule": "steps"}, "schedule='steps'"),
    ({"floor": 2.0}, "floor=2.0"),
    ({"accumulate": 0}, "accumulate=0"),
    ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0"),
    ({"loss_over": "words"}, "loss_over='words'"),
    ({"patience": 1}, "nothing is evaluated"),
    ({"patience": 1, "validation": [batch()]}, "evaluation is at the end only"),
    ({"patience": 0, "validation": [batch()], "evaluate_every": 1}, "patience=0"),
    ({"evaluate_every": 0, "validation": [batch()]}, "evaluate_every=0"),
    ({"evaluate_every": 5}, "nothing is evaluated"),
    ({"restore_best": True}, "nothing is evaluated"),
    ({"mode": "low", "validation": [batch()]}, "mode='low'"),
    ({"monitor": "f1", "validation": [batch()]}, 'watches "f1"'),
    ({"evaluate": lambda model: {"accuracy": None}}, "accuracy=None, which is no number"),
    ({"evaluate": lambda model: 0.5}, "evaluate gave a float"),
    ({"precision": "int8"}, "precision='int8'"),
    ({"save_every": 5}, "needs log_dir"),
    ({"resume": "always"}, "resume='always'"),
    ({"data": batch()}, "must be batches"),
    ({"validation": batch()}, "must be batches"),
]


@pytest.mark.parametrize("name", [*inspect.signature(lorafamily.train).parameters])
@pytest.mark.filterwarnings("ignore:going on from")
def test_every_argument_of_train_has_an_effect(name, tmp_path):
    assert EFFECTS[name](tmp_path)


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[str(next(iter(given))) for given, _ in REFUSED])
def test_what_has_no_effect_is_refused(given, message):
    with pytest.raises(lorafamily.LoraFamilyError, match=message):
        trained(**given)


def test_an_lr_scheduler_of_an_optimiser_given():
    model = lorafamily.apply(Classifier(), "lora", rank=3, targets="blocks", seed=0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    history = lorafamily.train(model, [batch()], steps=3, optimizer=optimizer, schedule=schedule, progress=False)
    assert [step.lr for step in history.steps] == [1.0, 0.5, 0.25]
    other = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with pytest.raises(lorafamily.TrainingError, match="of another optimiser"):
        lorafamily.train(model, [batch()], steps=3, optimizer=other, schedule=schedule, progress=False)


def test_a_seed_leaves_everybody_s_generators_alone():
    model = lorafamily.apply(Classifier(), "lora", rank=3, targets="blocks", also_train="head", seed=0)
    torch.manual_seed(3)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    lorafamily.train(model, [batch()], steps=2, seed=5, progress=False)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    lorafamily.train(model, [batch()], steps=2, progress=False)  # dropout draws from where they are
    assert not torch.equal(torch.get_rng_state(), before[0])


SIGNATURES = {
    "session": "model optimizer steps validation loss_fn scaler autocast seed check_gradients again",
    "parameter_groups": "model lr head_lr up_lr weight_decay",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_signatures_are_pinned(name):
    assert " ".join(inspect.signature(getattr(lorafamily, name)).parameters) == SIGNATURES[name]
