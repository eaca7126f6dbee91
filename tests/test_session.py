"""The session: what a method does during training is the same in `train`, in a loop of one's own, and in a Trainer."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lorafamily
from conftest import data, few_rounds, tiny
from lorafamily.layers.placement import placement_of
from lorafamily.training.processes import Processes
from lorafamily.training.schedule import lr_factor

STEPS = 24
SCHEDULE = {"warmup": 4, "final": 8, "interval": 3}
METHODS = ["lora", "olora", "alora", "lora2", "adalora", "olora+alora"]


def options(method: str) -> dict:
    return (SCHEDULE if method in ("lora2", "adalora") else {}) | few_rounds(method)


def adapted(method: str, **given) -> nn.Module:
    model = tiny(dtype=torch.float64).train()
    return lorafamily.apply(model, method, **{"rank": 3, "targets": "blocks.1", "seed": 0} | options(method) | given)


def batches() -> list:
    return data(4)


def loop(model: nn.Module, steps: int = STEPS, begin: int = 0, saved: dict | None = None, lr: float = 5e-3):
    """Everything that is needed: no more lines than these."""
    optimizer = torch.optim.AdamW(lorafamily.parameter_groups(model, lr=lr), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: lr_factor(done + 1, STEPS, 0, "linear"))
    session = lorafamily.session(model, optimizer, steps=STEPS, validation=batches())
    if saved is not None:
        session.load_state_dict(saved["session"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
    for step in range(begin, steps):
        session.backward(model(**batches()[step % 4]).loss)
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        session.step()
        scheduler.step()
        optimizer.zero_grad()
    return session, {
        "session": session.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{at} {name}": p for at, a in placement_of(model).adapters.items() for name, p in a.named_parameters()}


def same(one: nn.Module, other: nn.Module, tolerance: float) -> None:
    assert_close(tensors(one), tensors(other), rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_train_and_a_loop_of_ones_own_come_to_the_same(method):
    ours, own = adapted(method), adapted(method)
    history = lorafamily.train(
        ours, batches(), steps=STEPS, lr=5e-3, warmup=0, validation=batches(), seed=0, progress=False
    )
    session, _ = loop(own)
    assert session.decisions == history.decisions
    assert bool(history.decisions) == (method not in ("lora", "olora"))
    same(ours, own, 0)


@pytest.mark.parametrize("method", METHODS)
def test_a_loop_goes_on_from_what_was_saved_to_the_same_bits(method):
    whole, half, rest = adapted(method), adapted(method), adapted(method)
    session, _ = loop(whole)
    _, saved = loop(half, STEPS // 2)
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    again, _ = loop(rest, begin=STEPS // 2, saved=torch.load(file, weights_only=True))
    assert again.decisions == session.decisions
    same(whole, rest, 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore")  # the Trainer's own, of many kinds
def test_the_trainer_comes_to_the_same(method, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is an extra; without it no Trainer")
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    from lorafamily.integrations import LoraFamilyCallback
    from test_integrations import samples
    from test_transformers import model_of

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    rows = [{**row, "labels": torch.tensor(row["labels"])} for row in samples(16)]
    batches = [{key: torch.stack([row[key] for row in rows[i : i + 4]]) for key in rows[0]} for i in range(0, 16, 4)]
    models = []
    for _ in range(2):
        bert = model_of("bert").double()
        for module in bert.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        models.append(lorafamily.apply(bert, method, rank=3, seed=0, also_train="classifier", **options(method)))
    ours, theirs = models
    history = lorafamily.train(
        ours, batches, steps=STEPS, lr=5e-3, warmup=0, validation=batches, seed=0, progress=False
    )
    optimizer = torch.optim.AdamW(lorafamily.parameter_groups(theirs, lr=5e-3))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: lr_factor(done + 1, STEPS, 0, "linear"))
    callback = LoraFamilyCallback(theirs, validation=batches)
    args = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    InOrder(theirs, args, train_dataset=rows, callbacks=[callback], optimizers=(optimizer, scheduler)).train()
    assert [d.after for d in callback.decisions] == [d.after for d in history.decisions]
    same(ours, theirs, 1e-10)  # the penalty's gradient is added before the task's there, and after it here
    assert_close(ours.classifier.weight, theirs.classifier.weight, rtol=0, atol=1e-10)


def test_what_cannot_work_is_refused_at_once():
    model = adapted("alora")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(lorafamily.AllocationError, match="scored on validation data"):
        lorafamily.session(model, optimizer, steps=STEPS)
    with pytest.raises(lorafamily.TrainingError, match="steps=0"):
        lorafamily.session(model, optimizer, steps=0, validation=batches())
    lora2 = adapted("lora2")
    of_lora2 = torch.optim.SGD([*lora2.parameters()], lr=0.1)
    with pytest.raises(lorafamily.AllocationError, match="nothing would ever be pruned"):
        lorafamily.session(lora2, of_lora2, steps=5)
    with pytest.raises(lorafamily.StateError, match="has no adapters"):
        lorafamily.session(tiny(), optimizer, steps=STEPS)
    half = torch.optim.SGD([p for p in model.parameters() if p.requires_grad][1:], lr=0.1)
    with pytest.raises(lorafamily.TrainingError, match=r"does not hold 1 of the tensors that train \(.*: A"):
        lorafamily.session(model, half, steps=STEPS, validation=batches())
    with pytest.raises(lorafamily.TrainingError, match="optimizer is a int; it must be"):
        lorafamily.session(model, 1, steps=STEPS, validation=batches())


def test_a_forgotten_penalty_is_said():
    model = adapted("adalora")
    optimizer = torch.optim.AdamW(lorafamily.parameter_groups(model))
    session = lorafamily.session(model, optimizer, steps=STEPS)
    model(**batches()[0]).loss.backward()
    optimizer.step()
    with pytest.raises(lorafamily.TrainingError, match="lacks the method's penalty"):
        session.step()


def test_the_penalty_in_the_loss_is_the_penalty_of_backward():
    gradients = []
    for own in (False, True):
        model = adapted("adalora")
        with torch.no_grad():
            for at in placement_of(model).adapters.values():
                at.update.singular.add_(0.1)
        optimizer = torch.optim.AdamW(lorafamily.parameter_groups(model))
        session = lorafamily.session(model, optimizer, steps=STEPS)
        loss = model(**batches()[0]).loss
        if own:
            (loss + session.penalty()).backward()
        else:
            session.backward(loss / 2)
            session.backward(model(**batches()[0]).loss / 2)  # the penalty counts once a step
        gradients.append({name: p.grad.clone() for name, p in tensors(model).items()})
    assert any(gradient.any() for gradient in gradients[0].values())
    assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_a_wrapped_model_and_a_wrapped_optimiser_are_found():
    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, **batch):
            return self.inner(**batch)

    class Wrapped:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self):
            self.optimizer.step()

    model = adapted("adalora")
    optimizer = torch.optim.AdamW(lorafamily.parameter_groups(model))
    outer = Outer(model)
    session = lorafamily.session(outer, Wrapped(optimizer), steps=STEPS)
    for step in range(STEPS):
        session.backward(outer(**batches()[step % 4]).loss)
        optimizer.step()
        session.step()
        optimizer.zero_grad()
    assert session.decisions
    assert sum(session.allocator.slices.values()) < sum(session.start.values())


class Experts(nn.Module):
    """Routes every batch to one of four experts; the last is never visited."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.experts[self.calls // 5 % 3](x).square().mean()


def test_what_later_batches_reach_is_no_fault_and_what_none_reaches_is_named():
    model = lorafamily.apply(Experts(), "lora", rank=2, targets="experts", seed=0)
    with pytest.warns(UserWarning, match=r"no batch of the run reached 1 of 4 adapters: experts\.3\."):
        lorafamily.train(model, [torch.ones(2, 4)], steps=20, loss_fn=lambda m, x: m(x), progress=False)


def test_an_adapter_that_lost_its_rank_unvisited_is_named_too():
    schedule = {"warmup": 2, "final": 2, "interval": 1, "target": 0.5}
    model = lorafamily.apply(Experts(), "adalora", rank=2, targets="experts", seed=0, **schedule)
    with pytest.warns(UserWarning, match=r"reached 1 of 4 adapters: experts\.3 \(1 of them lost all of their rank\)"):
        history = lorafamily.train(model, [torch.ones(2, 4)], steps=20, loss_fn=lambda m, x: m(x), progress=False)
    assert history.slices_end["experts.3"] == 0


@pytest.mark.parametrize("method", ["adalora", "lora2"])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_guard_tells_the_task_from_a_penalty_in_the_loss(method, scaled):
    """An adapter that only the penalty reaches is refused, whoever adds the penalty, and those of the task are not."""

    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.cut = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x).square().mean() + self.cut(x).detach().mean()

    model = lorafamily.apply(Cut(), method, rank=2, targets="used|cut", seed=0)
    with torch.no_grad():
        for adapter in placement_of(model).adapters.values():
            for parameter in adapter.update.parameters():
                parameter.add_(0.1)  # the penalty of orthonormal frames has no gradient
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=3.0, enabled=scaled)
    session = lorafamily.session(model, optimizer, steps=40, scaler=scaler if scaled else None)
    for step in range(1, 11):
        scaler.scale((model(torch.ones(2, 4)) + session.penalty()) / 7).backward()
        scaler.step(optimizer)
        scaler.update()
        if step == 10:
            with pytest.raises(lorafamily.TrainingError, match=r"1 of 2 adapters got no gradient.*: cut\."):
                session.step()
        else:
            session.step()
        optimizer.zero_grad()


def test_ranks_that_something_holds_on_to_are_refused():
    class DistributedDataParallel(nn.Module):  # by its name, as a process group would be needed for a real one
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = adapted("adalora")
    optimizer = torch.optim.AdamW(lorafamily.parameter_groups(model))
    with pytest.raises(lorafamily.StateError, match="DDP holds on to the tensors"):
        lorafamily.session(DistributedDataParallel(model), optimizer, steps=STEPS)
    fixed = adapted("lora")
    optimizer = torch.optim.AdamW(lorafamily.parameter_groups(fixed))
    lorafamily.session(DistributedDataParallel(fixed), optimizer, steps=STEPS)


def test_other_adapters_do_not_go_on():
    model = adapted("lora")
    _, saved = loop(model, 2)
    other = adapted("lora", rank=4)
    with pytest.raises(lorafamily.StateError, match="other adapters than these"):
        loop(other, saved=copy.deepcopy(saved))


def test_parameter_groups_and_roles():
    model = lorafamily.apply(tiny(), "adalora", rank=2, also_train=r"^norm\.", seed=0)
    trained = lorafamily.Trained(model)
    adapters = placement_of(model).adapters.values()
    assert {id(p) for p in trained.up} == {id(a.update.P) for a in adapters}
    assert {id(p) for p in trained.down} == {id(a.update.Q) for a in adapters}
    assert {id(p) for p in trained.gate} == {id(a.update.singular) for a in adapters}
    assert [trained.names[p] for p in trained.head] == ["norm.weight"]
    assert len(trained.others(trained.up, trained.head)) == 2 * len(adapters)
    groups = lorafamily.parameter_groups(model, lr=1e-3, up_lr=0.016, weight_decay=0.1)
    assert [(group["lr"], len(group["params"])) for group in groups] == [(1e-3, 24), (0.016, 12), (1e-2, 1)]
    assert all(group["weight_decay"] == 0.1 for group in groups)
    lora2 = next(iter(placement_of(lorafamily.apply(tiny(), "lora2", rank=2)).adapters.values())).update
    assert {name: lora2.role(name) for name, _ in lora2.named_parameters()} == {
        **{"A": "down", "B": "down", "E": "gate", "aa": "up", "bb": "up"}
    }


def test_gradients_are_laid_out_as_the_parameters_are():
    """Fused optimisers walk through both side by side; the penalty's gradient of P comes out transposed."""
    model = adapted("adalora")
    optimizer = torch.optim.AdamW(lorafamily.parameter_groups(model), fused=True)
    session = lorafamily.session(model, optimizer, steps=STEPS)
    assert session.add_penalty() > 0
    given = [p for p in tensors(model).values() if p.grad is not None]
    assert given
    assert all(p.grad.stride() == p.stride() for p in given)
    processes = Processes(torch.device("cpu"))
    processes.world, processes._collective = 2, lambda operation: None
    for parameter in given:
        parameter.grad = parameter.grad.t().contiguous().t() if parameter.dim() == 2 else parameter.grad
    processes.add_up_gradients(given)
    assert all(p.grad.stride() == p.stride() for p in given)


SETTLED = STEPS - 6  # after which the importances' slices are really gone, not only off


def trained_a_while(method: str, steps: int = SETTLED):
    model = adapted(method)
    optimizer = torch.optim.AdamW(lorafamily.parameter_groups(model, lr=5e-3))
    session = lorafamily.session(model, optimizer, steps=STEPS, validation=batches())
    for step in range(steps):
        session.backward(model(**batches()[step % 4]).loss)
        optimizer.step()
        session.step()
        optimizer.zero_grad()
    return model, optimizer, session


@pytest.mark.parametrize("method", ["lora2", "adalora", "olora+alora"])
def test_the_models_state_dict_may_be_loaded_first(method):
    """As accelerate does it: the model's, the optimiser's, and what was registered last."""
    whole, _, _ = trained_a_while(method, STEPS)
    half, of_half, session_of_half = trained_a_while(method)
    assert any(a.slices != a.initial_slices for a in placement_of(half).adapters.values())
    saved = copy.deepcopy([half.state_dict(), of_half.state_dict(), session_of_half.state_dict()])
    model, optimizer, session = trained_a_while(method, 0)
    for one, state in zip((nn.Sequential(model)[0], optimizer, session), saved, strict=True):
        one.load_state_dict(state)
    for step in range(SETTLED, STEPS):
        session.backward(model(**batches()[step % 4]).loss)
        optimizer.step()
        session.step()
        optimizer.zero_grad()
    same(whole, model, 0)


def test_a_session_that_was_left_behind_by_its_model_is_refused():
    half, _, _ = trained_a_while("adalora")
    model, optimizer, session = trained_a_while("adalora", 0)
    model.load_state_dict(half.state_dict())
    session.backward(model(**batches()[0]).loss)
    optimizer.step()
    with pytest.raises(lorafamily.StateError, match="adapters of other ranks, and the session did not"):
        session.step()


def test_a_state_dict_that_differs_in_more_than_ranks_is_refused_by_torch():
    model, _, _ = trained_a_while("adalora", 0)
    state = model.state_dict()
    name = next(name for name in state if name.endswith("update.P"))
    state[name] = torch.zeros(len(state[name]) + 1, 2)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(state)
    other = copy.deepcopy(model)  # has no session: nothing would follow there
    half, _, _ = trained_a_while("adalora")
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(half.state_dict())


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("method", ["lora2", "adalora", "elalora"])
def test_gradients_that_are_cleared_before_the_session_sees_them_are_missed(method, to_none):
    """Scores would be zeros, and slices would go in the order of their modules."""
    model = adapted(method)
    optimizer = torch.optim.AdamW(lorafamily.parameter_groups(model, lr=1e-2))
    session = lorafamily.session(model, optimizer, steps=STEPS)
    session.backward(model(**batches()[0]).loss)
    optimizer.step()
    optimizer.zero_grad(set_to_none=to_none)
    with pytest.raises(lorafamily.TrainingError, match=r"session.step\(\) after optimizer.step\(\) and before"):
        session.step()


class Normed(nn.Module):
    """A frozen layer, statistics, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.first(x)))


@pytest.mark.parametrize("also_train", [["norm", "head"], ["head"]])
def test_a_loop_goes_on_with_the_statistics_that_were_saved(also_train):
    """Those of a trained norm are saved; a frozen one stays in eval mode."""
    x = torch.randn(12, 16, 6, generator=torch.Generator().manual_seed(1))

    def begun():
        model = lorafamily.apply(Normed(), "olora", rank=2, seed=0, targets="first", also_train=also_train).train()
        optimizer = torch.optim.AdamW(lorafamily.parameter_groups(model, lr=1e-2))
        return model, optimizer, lorafamily.session(model, optimizer, steps=len(x))

    def go_on(model, optimizer, session, end):
        for batch in x[session.steps_done : end]:
            session.backward(model(batch).square().mean())
            optimizer.step()
            session.step()
            optimizer.zero_grad()
        return {name: value.clone() for name, value in model.state_dict().items()}

    whole, stopped, resumed = begun(), begun(), begun()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "training moved 3 buffers of the frozen base")
        after_all = go_on(*whole, len(x))
        halfway = go_on(*stopped, 6)
        saved = copy.deepcopy((stopped[2].state_dict(), stopped[1].state_dict()))
        for _ in range(2):  # into a new model, then back from the end
            resumed[2].load_state_dict(saved[0])
            resumed[1].load_state_dict(copy.deepcopy(saved[1]))
            assert_close(dict(resumed[0].state_dict()), halfway, rtol=0, atol=0)
            assert_close(go_on(*resumed, len(x)), after_all, rtol=0, atol=0)


def test_a_frozen_norm_stays_in_eval_mode_in_loops_that_call_train_at_every_step():
    """As transformers' Trainer does, which trained on the statistics of batches and left the base's in the model."""
    model = lorafamily.apply(Normed(), "lora", rank=2, seed=0, targets="first", also_train="head")
    optimizer = torch.optim.AdamW(lorafamily.parameter_groups(model, lr=1e-2))
    session = lorafamily.session(model, optimizer, steps=4)
    x, means = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)) + 2, []

    def train():
        for _ in range(4):
            model.train()
            session.backward(model(x).square().mean())
            optimizer.step()
            session.step()
            optimizer.zero_grad()
            means.append(float(model.norm.running_mean.abs().max()))

    with pytest.warns(UserWarning, match="training moved 3 buffers of the frozen base") as said:
        train()
    assert len(said) == 1
    assert means == [0.0] * 4
    assert not copy.deepcopy(model).norm.training
    pickle.dumps(model)
    hooks = len(model._forward_pre_hooks)
    session = lorafamily.session(model, optimizer, steps=4)  # the next run leaves no second hook
    with pytest.warns(UserWarning, match="training moved 3 buffers of the frozen base"):
        train()
    assert len(model._forward_pre_hooks) == hooks
    model.train()(x)  # the run is over
    assert model.norm.training
    assert model.norm.running_mean.any()


@pytest.mark.parametrize("what", ["adapters", "head"])
def test_tensors_that_the_optimizer_does_not_hold_any_more_are_missed(what):
    """The optimizer would go on with the old ones, and nothing would be learnt."""
    model = lorafamily.apply(Normed(), "lora", rank=2, seed=0, targets="first", also_train="head")
    optimizer = torch.optim.AdamW(lorafamily.parameter_groups(model, lr=1e-2))
    session = lorafamily.session(model, optimizer, steps=STEPS)
    if what == "adapters":
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    else:
        model.head = nn.Linear(8, 3)
    session.backward(model(torch.randn(16, 6)).square().mean())
    optimizer.step()
    named = "first; head.weight; head.bias" if what == "adapters" else "head.weight; head.bias"
    with pytest.raises(lorafamily.TrainingError, match=f"does not hold the tensors of {named}, replaced since"):
        session.step()


def test_a_session_goes_with_the_optimizer_and_not_with_batches():
    model = adapted("lora")
    optimizer = torch.optim.AdamW(lorafamily.parameter_groups(model, lr=1e-2))
    session = lorafamily.session(model, optimizer, steps=STEPS)
    session.backward(model(**batches()[0]).loss)
    with pytest.raises(lorafamily.TrainingError, match=r"no step since the last session.step\(\)"):
        session.step()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(torch.inf)
    session.step()  # a loop may leave out a step for that


def test_a_session_trains_what_is_active():
    model = adapted("lora", name="a")
    optimizer = torch.optim.AdamW(lorafamily.parameter_groups(model, lr=1e-2))
    session = lorafamily.session(model, optimizer, steps=STEPS)
    session.backward(model(**batches()[0]).loss)
    optimizer.step()
    lorafamily.apply(model, "lora", rank=2, name="b")
    with pytest.raises(lorafamily.StateError, match='"b" is active, and this session trains "a": switch'):
        session.step()
    lorafamily.switch(model, "a")
    session.step()
    lorafamily.compress(model, rank=1)
    with pytest.raises(lorafamily.StateError, match=r'adapters of "a" were replaced \(lorafamily.compress'):
        session.step()


def test_the_scaler_of_accelerate_s_optimizer_scales_the_penalty():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is an extra")
    added = []
    for scale in (1.0, 1024.0):
        model = adapted("adalora")
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        inner = torch.optim.AdamW(lorafamily.parameter_groups(model, lr=1e-2))
        wrapped = accelerate.optimizer.AcceleratedOptimizer(inner, scaler=scaler)
        session = lorafamily.session(model, wrapped, steps=STEPS)
        session.add_penalty()
        added.append(torch.cat([a.update.P.grad.flatten() for a in session.adapters.values()]))
    assert_close(added[1], 1024 * added[0], rtol=1e-12, atol=0)


def test_a_budget_for_the_end_that_was_not_reached_is_said_when_the_adapter_is_used(tmp_path):
    def stopped_after(steps):
        model = adapted("adalora", rank=None, budget=2000, budget_at="end", targets="blocks")
        optimizer = torch.optim.AdamW(lorafamily.parameter_groups(model, lr=1e-2))
        session = lorafamily.session(model, optimizer, steps=STEPS)
        for i in range(steps):
            session.backward(model(**batches()[i % 4]).loss)
            optimizer.step()
            session.step()
            optimizer.zero_grad()
        return model

    says = r"has [\d,]+ parameters, more than its budget of 2,000 for the end, since its run stopped"
    early = stopped_after(2)
    lorafamily.save(early, tmp_path / "to go on from")  # as a checkpoint is
    with pytest.warns(UserWarning, match=says):
        lorafamily.merge(early)
    lorafamily.merge(stopped_after(STEPS))
