"""Every argument of the public loop functions has an effect, or is refused: a table, so that a new one needs a line."""

from __future__ import annotations

import contextlib
import inspect
import io
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lorafamily
from lorafamily.layers.placement import placement_of

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


LOW = {"monitor": "accuracy", "mode": "min"}

EFFECTS = {
    "model": lambda tmp: torch.equal(trained()[2], trained()[2]) and not torch.equal(trained()[2], untrained()),
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
    "monitor": lambda tmp: (
        trained(evaluate=accuracy, monitor="accuracy", mode="max")[1].best.metrics == {"accuracy": 0.5}
    ),
    "mode": lambda tmp: (
        trained(evaluate=rising([1, 3, 2]), evaluate_every=4, monitor="accuracy", mode="max")[1].best.step == 8
    ),
    "patience": lambda tmp: len(trained(evaluate=rising([1, 2, 3]), evaluate_every=4, **LOW, patience=1)[1].steps) == 8,
    "restore_best": lambda tmp: moved(evaluate=rising([1, 2, 3]), evaluate_every=4, **LOW, restore_best=True),
    "precision": lambda tmp: moved(precision="bfloat16"),
    "compile": lambda tmp: len(compiled(compile=True)) == 1 and compiled() == [],  # runs in tests/test_training.py
    "checkpoint_activations": lambda tmp: (forwards(True), forwards(False)) == (2 * STEPS, STEPS),
    "seed": lambda tmp: moved(seed=1),
    "skip_nonfinite": lambda tmp: (
        trained(data=[batch(), {**batch(), "x": torch.full((8, 8), torch.nan)}], skip_nonfinite=1)[1].skipped == 6
    ),
    "check_gradients": lambda tmp: not without_gradient_is_let_pass() and without_gradient_is_let_pass(False),
    "again": lambda tmp: settled_twice(again=True) and not settled_twice(again=False),
    "progress": lambda tmp: f"{STEPS}/{STEPS}" in shown(progress=True) and shown(progress=False) == "",
    "on_step": lambda tmp: called_with_every_step(),
    "log_dir": lambda tmp: trained(log_dir=tmp / "log") and (tmp / "log" / "steps.jsonl").exists(),
    "pictures": lambda tmp: (
        (
            trained(log_dir=tmp / "drawn") and (tmp / "drawn" / "rank-by-layer.png").exists(),
            trained(log_dir=tmp / "not", pictures=False) and not [*(tmp / "not").glob("*.png")],
        )
        == (True, True)
    ),
    "save_every": lambda tmp: trained(log_dir=tmp / "save", save_every=5) and (tmp / "save" / "checkpoints").is_dir(),
    "keep": lambda tmp: (
        trained(log_dir=tmp / "keep", save_every=2, keep=3) and len([*(tmp / "keep" / "checkpoints").iterdir()]) == 3
    ),
    "resume": lambda tmp: (
        trained(log_dir=tmp / "on", save_every=4)
        and len(trained(log_dir=tmp / "on", save_every=4, steps=16, resume="anyway")[1].steps) == 16
    ),
}


def untrained() -> torch.Tensor:
    model = lorafamily.apply(Classifier(), "lora", rank=3, targets="blocks", also_train="head", seed=0)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def compiled(**given) -> list[nn.Module]:
    """Models that were given to `torch.compile`."""
    seen: list[nn.Module] = []
    with mock.patch.object(torch, "compile", lambda model: seen.append(model) or model):
        trained(**given)
    return seen


def forwards(checkpoint_activations: bool) -> int:
    """How often a function inside a block was called in a run."""
    seen: list = []
    block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    block[1].register_forward_pre_hook(lambda *_: seen.append(1))
    model = nn.ModuleDict({"blocks": nn.ModuleList([block]), "head": nn.Linear(8, 3)})
    lorafamily.apply(model, "lora", rank=2, targets="blocks", also_train="head", seed=0)
    lorafamily.train(
        model,
        [batch()],
        steps=STEPS,
        loss_fn=lambda model, batch: F.cross_entropy(model["head"](model["blocks"][0](batch["x"])), batch["y"]),
        checkpoint_activations=checkpoint_activations,
        progress=False,
    )
    return len(seen)


def without_gradient_is_let_pass(check: bool = True) -> bool:
    """Of a run whose loss does not reach the blocks."""
    try:
        trained(loss_fn=lambda model, batch: model.head(batch["x"]).square().mean(), check_gradients=check)
    except lorafamily.TrainingError as error:
        return "got no gradient" not in str(error)
    return True


def shown(**given) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as written:
        trained(**given)
    return written.getvalue()


def settled_twice(**given) -> bool:
    model, _, _ = trained("adalora")
    before = {at: adapter.slices for at, adapter in placement_of(model).adapters.items()}
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
    ({"lr": 0.5, "optimizer": sgd}, "the optimizer has its own"),
    ({"head_lr": 0.5, "optimizer": sgd}, "the optimizer has its own"),
    ({"up_lr": 0.5, "optimizer": sgd}, "the optimizer has its own"),
    ({"up_lr": -0.5}, "up_lr=-0.5: must be zero or positive"),
    ({"weight_decay": 0.5, "optimizer": sgd}, "the optimizer has its own"),
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
    ({"monitor": "accuracy", "evaluate": accuracy}, 'monitor="accuracy" needs a mode: "max" if higher is better'),
    ({"monitor": "f1", "mode": "max", "validation": [batch()]}, 'watches "f1"'),
    ({"evaluate": lambda model: {"accuracy": None}}, "accuracy=None, which is no number"),
    ({"evaluate": lambda model: 0.5}, "evaluate gave a float"),
    ({"precision": "int8"}, "precision='int8'"),
    ({"save_every": 5}, "needs log_dir"),
    ({"resume": "always"}, "resume='always'"),
    ({"data": batch()}, "must be batches"),
    ({"validation": batch()}, "must be batches"),
    ({"validation": iter([batch()])}, "validation is a list_iterator, which gives its batches once"),
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
    with pytest.raises(lorafamily.TrainingError, match="of another optimizer"):
        lorafamily.train(model, [batch()], steps=3, optimizer=other, schedule=schedule, progress=False)
    for name, value in (("warmup", 0.06), ("floor", 0.1)):  # it alone sets the rates
        given = {"optimizer": optimizer, "schedule": schedule, name: value, "progress": False}
        with pytest.raises(lorafamily.TrainingError, match=f"{name}={value} has no effect: schedule=... is an LRSch"):
            lorafamily.train(model, [batch()], steps=3, **given)


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


def looped(method: str = "adalora", **given):
    """Four steps of a loop of one's own; the session, the numbers and whether its contexts were entered."""
    options = {
        "adalora": {"warmup": 0, "final": 1, "interval": 1},
        "alora": {"scorer": "exact", "rounds": 1, "warmup": 1, "interval": 1, "drop": 1},
        "lora": {},
    }[method]
    lr = given.pop("lr", 0.1)
    model = given.pop("model", None) or lorafamily.apply(
        Classifier().eval(), method, rank=3, targets="blocks", also_train="head", seed=0, **options
    )
    optimizer = given.pop("optimizer", None) or torch.optim.SGD(lorafamily.parameter_groups(model, lr=lr))
    session = lorafamily.session(model, optimizer, **{"steps": 4} | given)
    for step in range(4):
        session.backward(model(**batch(step)).loss)
        optimizer.step()
        session.step()
        optimizer.zero_grad()
    return session, torch.cat([p.detach().flatten() for p in model.parameters()])


def scored_with(validation=None, **given) -> list:
    session, _ = looped("alora", validation=[batch(9)] if validation is None else validation, **given)
    return [decision.scores for decision in session.decisions]


class Entered(contextlib.AbstractContextManager):
    times = 0

    def __exit__(self, *_):
        Entered.times += 1


def entered_while_scoring() -> bool:
    Entered.times = 0
    return bool(scored_with(autocast=Entered)) and Entered.times > 0


def settled_session(**given) -> bool:
    model = looped()[0].model
    return bool(looped(model=model, **given)[0].decisions)


def silent_part(**given) -> bool:
    """A run in which one kind of layer takes no part in the loss."""
    model = Classifier()
    model.unused = nn.Linear(8, 8)
    lorafamily.apply(model, "lora", rank=3, targets=["blocks", "unused"], seed=0)
    try:
        looped(model=model, **given)
    except lorafamily.TrainingError as error:
        return "unused" not in str(error)
    return True


SESSION_EFFECTS = {
    "model": lambda: looped()[0].decisions != [] == looped("lora")[0].decisions,
    "optimizer": lambda: not torch.equal(looped()[1], looped(lr=0.2)[1]),
    "steps": lambda: looped(steps=4)[0].decisions != looped(steps=400)[0].decisions,
    "validation": lambda: scored_with([batch(9)]) != scored_with([batch(10)]),
    "loss_fn": lambda: scored_with() != scored_with(loss_fn=lambda model, batch: 3 * model(**batch).loss),
    "scaler": lambda: scaled_gradient() == pytest.approx(8 * scaled_gradient(scaled=False), rel=1e-5),
    "autocast": entered_while_scoring,
    "seed": lambda: scored_with(shuffled()) == scored_with(shuffled()) != scored_with(shuffled(), seed=1),
    "check_gradients": lambda: not silent_part() and silent_part(check_gradients=False),
    "again": lambda: settled_session(again=True) and not settled_session(),
}


def shuffled():
    return torch.utils.data.DataLoader(Rows(), batch_size=8, shuffle=True)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, row):
        return {"x": batch(row)["x"][0], "y": batch(row)["y"][0]}


def scaled_gradient(scaled: bool = True) -> float:
    model = lorafamily.apply(Classifier().eval(), "lora", rank=3, targets="blocks", seed=0)
    optimizer = torch.optim.SGD(lorafamily.parameter_groups(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    lorafamily.session(model, optimizer, steps=1, scaler=scaler).backward(model(**batch()).loss)
    return sum(float(p.grad.norm()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", [*inspect.signature(lorafamily.session).parameters])
def test_every_argument_of_session_has_an_effect(name):
    assert SESSION_EFFECTS[name]()


SESSION_REFUSED = [
    ({"steps": 0}, lorafamily.TrainingError, "steps=0"),
    ({"steps": True}, lorafamily.TrainingError, "steps=True"),
    ({"method": "alora"}, lorafamily.AllocationError, "scored on validation data"),
    ({"model": Classifier()}, lorafamily.StateError, "has no adapters"),
    ({"optimizer": 1}, lorafamily.TrainingError, "optimizer is a int; it must be"),
    ({"optimizer": torch.optim.SGD(Classifier().parameters())}, lorafamily.TrainingError, "does not hold"),
]


@pytest.mark.parametrize(("given", "error", "message"), SESSION_REFUSED, ids=lambda given: str(given)[:20])
def test_what_a_session_cannot_work_with_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        looped(**given)


def applied(method: str = "lora", model=None, **given):
    settings = {"rank": 3, "targets": "blocks", "seed": 0} | given
    return lorafamily.apply(Classifier() if model is None else model, method, **settings)


def ranks(**given) -> list[int]:
    return [adapter.slices for adapter in placement_of(applied(**given)).adapters.values()]


def at(**given) -> list[str]:
    return [*placement_of(applied(**given)).adapters]


def trains(**given) -> list[str]:
    return [name for name, p in applied(**given).named_parameters() if p.requires_grad and "down" not in name]


def numbers(**given) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in applied(**given).parameters() if p.requires_grad])


def reading(model=None):
    """A model that reads a weight without calling its layer."""

    class Reading(Classifier):
        def __init__(self):
            super().__init__()
            self.read = nn.Linear(8, 8)

        def forward(self, x, y):
            return super().forward(F.linear(x, self.read.weight), y)

    return Reading()


def warned(**given) -> bool:
    with pytest.warns(UserWarning, match="read") as seen:
        applied(model=reading(), targets=None, **given)
    return bool(seen)


APPLY_EFFECTS = {
    "model": lambda: at() == ["blocks.0", "blocks.1", "blocks.2"],
    "method": lambda: (
        placement_of(applied("olora")).spec == "olora" and not torch.equal(numbers(), numbers(method="olora"))
    ),
    "budget": lambda: sum(ranks(rank=None, budget=3 * 16 * 2)) == 6,
    "rank": lambda: ranks(rank=2) == [2, 2, 2],
    "rank_budget": lambda: ranks(rank=None, rank_budget=12) == [4, 4, 4],
    "budget_at": lambda: (
        sum(ranks(method="adalora", rank=None, budget=200, budget_at="end"))
        > sum(ranks(method="adalora", rank=None, budget=200))
    ),
    "targets": lambda: at(targets=r"blocks\.1") == ["blocks.1"],
    "exclude": lambda: at(exclude=r"blocks\.1") == ["blocks.0", "blocks.2"],
    "fused": lambda: "blocks.0.k" in at(fused={"blocks": ["q", "k"]}),
    "example": lambda: warned(example=batch()),
    "also_train": lambda: (
        applied(also_train="head").head.weight.requires_grad and not applied().head.weight.requires_grad
    ),
    "dropout": lambda: dropped(dropout=0.5) and not dropped(),
    "dropout_kind": lambda: (
        placement_of(applied(dropout=0.5, dropout_kind="features")) is not None and features_dropped()
    ),
    "name": lambda: placement_of(applied(name="mine")).name == "mine",
    "seed": lambda: not torch.equal(numbers(seed=0), numbers(seed=1)) and torch.equal(numbers(seed=0), numbers(seed=0)),
    "data": lambda: not torch.equal(numbers(method="eva", data=[batch(1)]), numbers(method="eva", data=[batch(2)])),
    "loss_fn": lambda: (
        not torch.equal(
            numbers(method="gora", data=[batch(1)]), numbers(method="gora", data=[batch(1)], loss_fn=to_second_class)
        )
    ),
    "evidence": lambda: torch.equal(
        numbers(method="eva", data=[batch(1)]),
        numbers(
            method="eva", evidence=lorafamily.gather(Classifier(), "eva", [batch(1)], rank=3, targets="blocks", seed=0)
        ),
    ),
    "method_options": lambda: placement_of(applied(alpha=7)).method.options()["alpha"] == 7,
}


def to_second_class(model, batch) -> torch.Tensor:
    return F.cross_entropy(model(**batch).logits, torch.ones_like(batch["y"]))


def perturbed(**given):
    model = applied(**given).train()
    with torch.no_grad():
        for adapter in placement_of(model).adapters.values():
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn_like(parameter))
    return model


def dropped(**given) -> bool:
    """Whether two passes through an adapted layer differ."""
    layer, x = perturbed(**given).blocks[0], batch()["x"]
    return not torch.equal(layer(x), layer(x))


def features_dropped() -> bool:
    """The mask is the same for every row: rows that are equal stay equal."""
    rows = batch()["x"][:1].expand(8, 8)
    whole = perturbed(dropout=0.5, dropout_kind="features").blocks[0](rows)
    entries = perturbed(dropout=0.5, dropout_kind="entries").blocks[0](rows)
    return bool((whole - whole[0]).abs().max() < 1e-5 < (entries - entries[0]).abs().max())


@pytest.mark.parametrize("name", [*inspect.signature(lorafamily.apply).parameters])
def test_every_argument_of_apply_has_an_effect(name):
    assert APPLY_EFFECTS[name]()


APPLY_REFUSED = [
    ({"method": "lorra"}, lorafamily.MethodError, r'no method named "lorra" .* did you mean lora or'),
    ({"rank": 3, "budget": 200}, lorafamily.BudgetError, "budget=200 and rank=3 are both given"),
    ({"rank": 0}, lorafamily.BudgetError, "rank=0: must be a whole number of at least 1"),
    ({"rank": None, "budget": 3}, lorafamily.BudgetError, "budget 3 is too small: .* the smallest .* that works is 48"),
    ({"rank": None, "budget": -3}, lorafamily.BudgetError, "budget=-3: must be a positive number"),
    ({"budget_at": "end"}, lorafamily.BudgetError, 'budget_at="end" has no effect without budget'),
    ({"budget_at": "start"}, lorafamily.BudgetError, "budget_at='start': must be"),
    ({"targets": "nothing"}, lorafamily.TargetError, 'target "nothing" matches no layer; .* end in: 0, 1, 2, head'),
    ({"exclude": "nothing"}, lorafamily.TargetError, '"nothing" matches no layer'),
    ({"fused": {"nothing": ["q", "k"]}}, lorafamily.TargetError, "fused='nothing' matches no linear layer"),
    ({"fused": {"blocks": ["q", "k", "v"]}}, lorafamily.TargetError, "does not fit blocks.0, which has 8 rows"),
    ({"also_train": "nothing"}, lorafamily.TargetError, r'also_train="nothing" matches no .* nearest: head\.weight'),
    ({"dropout": 1.0}, lorafamily.MethodError, r"dropout=1\.0: must be a probability in \[0, 1\)"),
    ({"dropout": 0.1, "dropout_kind": "rows"}, lorafamily.MethodError, "dropout_kind='rows': must be one of entries"),
    ({"dropout_kind": "features"}, lorafamily.MethodError, "dropout_kind='features' has no effect without dropout"),
    ({"name": "a.b"}, lorafamily.StateError, r"name='a\.b': must be of letters"),
    ({"alhpa": 3}, lorafamily.MethodError, "unknown option alhpa; this method takes alpha"),
    ({"method": "eva"}, lorafamily.MethodError, '"eva" looks at inputs before training: pass data=batches'),
    ({"data": [batch()]}, lorafamily.MethodError, '"lora" looks at no data before training; leave out data'),
    ({"loss_fn": to_second_class}, lorafamily.MethodError, '"lora" looks at no data before .*; leave out loss_fn'),
    ({"method": "eva", "evidence": {}}, lorafamily.MethodError, "evidence is a dict; it must be what"),
]


@pytest.mark.parametrize(("given", "error", "message"), APPLY_REFUSED, ids=lambda given: str(given)[:40])
def test_what_apply_cannot_do_or_would_ignore_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        applied(**given)


SIGNATURES = {
    "session": "model optimizer steps validation loss_fn scaler autocast seed check_gradients again",
    "parameter_groups": "model lr head_lr up_lr weight_decay",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_signatures_are_pinned(name):
    assert " ".join(inspect.signature(getattr(lorafamily, name)).parameters) == SIGNATURES[name]
