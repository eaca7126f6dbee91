"""The callback inside a real transformers.Trainer: it prunes, grows, and a resumed run equals the uninterrupted one."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorafamily
from conftest import few_rounds
from launching import Launched
from lorafamily.layers.placement import placement_of

transformers = pytest.importorskip("transformers", reason="transformers is an extra; nothing to test without it")
pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")

from lorafamily.integrations import LoraFamilyCallback  # noqa: E402 - needs transformers
from test_transformers import model_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Trainer's own, of many kinds

STEPS = 24


def samples(n: int = 40) -> list[dict]:
    rows = torch.randint(1, 99, (n, 10), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": int(row[0]) % 3} for row in rows]


def adapted(method: str, double: bool = False, **given) -> nn.Module:
    schedule = {"warmup": 4, "final": 8, "interval": 3} if method in ("lora2", "adalora") else {}
    model = model_of("bert")
    if double:
        model.double().apply(lambda module: setattr(module, "p", 0.0) if isinstance(module, nn.Dropout) else None)
    options = {"rank": 3, "also_train": "classifier", "seed": 0} | schedule | few_rounds(method) | given
    return lorafamily.apply(model, method, **options)


def trainer_of(model: nn.Module, folder, **changes) -> tuple:
    callback = LoraFamilyCallback(model, validation=changes.pop("validation", None))
    settings = {"max_steps": STEPS, "save_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 5e-3}
    settings |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "seed": 0}
    args = transformers.TrainingArguments(output_dir=str(folder), **settings | changes)
    trainer = transformers.Trainer(model, args, train_dataset=samples(), eval_dataset=samples(8), callbacks=[callback])
    return trainer, callback


@pytest.mark.parametrize("method", ["lora2", "alora", "adalora", "olora"])
def test_a_trainer_prunes_and_grows_and_resumes_to_the_same_bytes(method, tmp_path):
    whole = adapted(method)
    validation = [{key: torch.stack([torch.as_tensor(s[key]) for s in samples(8)]) for key in ("input_ids", "labels")}]
    trainer, callback = trainer_of(whole, tmp_path / "whole", validation=validation)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    if method != "olora":
        before, after = callback.decisions[0].before, callback.decisions[-1].after
        assert after != before
        assert after == {at: adapter.slices for at, adapter in placement_of(whole).adapters.items()}
        if method == "alora":
            assert any(after[at] > before[at] for at in after)
            assert any(after[at] < before[at] for at in after)

    # The first half again, from the checkpoint in the middle: a fresh model, a fresh Trainer.
    (tmp_path / "resumed").mkdir()
    (tmp_path / "whole" / "checkpoint-12").rename(tmp_path / "resumed" / "checkpoint-12")
    resumed = adapted(method)
    trainer, again = trainer_of(resumed, tmp_path / "resumed", validation=validation)
    trainer.train(resume_from_checkpoint=True)
    assert [vars(d) for d in again.decisions] == [vars(d) for d in callback.decisions]
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == losses
    for name in ("adapter.safetensors", "adapter.json"):
        one, other = (lorafamily.save(m, tmp_path / n) / name for n, m in (("a", whole), ("b", resumed)))
        assert one.read_bytes() == other.read_bytes()


def test_a_best_checkpoint_from_before_the_ranks_were_settled_is_said(tmp_path):
    """It may be over the budget; what trains it further goes on allocating."""
    best = {"eval_strategy": "steps", "eval_steps": 6, "save_steps": 6, "load_best_model_at_end": True}
    best |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # a loss that falls: the first one
    model = adapted("adalora")
    trainer, callback = trainer_of(model, tmp_path, **best)
    with pytest.warns(UserWarning, match=r"checkpoint-6, the best checkpoint, is from before the ranks were settled"):
        trainer.train()
    adapters = placement_of(model).adapters
    assert sum(adapter.slices for adapter in adapters.values()) > sum(callback.decisions[-1].after.values())
    assert not any(adapter.settled for adapter in adapters.values())
    late = adapted("adalora")
    trainer, _ = trainer_of(late, tmp_path / "late", **best, eval_delay=18)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("default", module="torch|transformers")
        trainer.train()
    assert all(adapter.settled for adapter in placement_of(late).adapters.values())


def test_adafactor_with_modules_at_rank_zero_resumes_to_the_same_bytes(tmp_path):
    """Half the modules lose their only rank at the first decision, and the checkpoint has them so."""
    options = {"optim": "adafactor", "weight_decay": 0.1, "save_steps": 2, "max_steps": 8}
    options |= {
        "validation": [{key: torch.stack([torch.as_tensor(s[key]) for s in samples(8)]) for key in samples(1)[0]}]
    }
    ends = []
    for folder in ("whole", "resumed"):
        model = lorafamily.apply(model_of("bert"), "alora", rank=1, seed=0, rounds=2, warmup=1, interval=4)
        trainer, callback = trainer_of(model, tmp_path / folder, **options)
        trainer.train(resume_from_checkpoint=folder == "resumed")
        assert 0 in callback.decisions[0].after.values()
        ends.append((lorafamily.save(model, tmp_path / f"{folder}-adapter") / "adapter.safetensors").read_bytes())
        (tmp_path / "resumed").mkdir(exist_ok=True)
        if folder == "whole":
            (tmp_path / "whole" / "checkpoint-4").rename(tmp_path / "resumed" / "checkpoint-4")
    assert ends[0] == ends[1]


def test_weight_decay_pulls_to_the_base_where_the_start_is_not_zero():
    """Groups with and without decay, and a schedule that counts them, stay the Trainer's."""
    norms = []
    for decay in (0.0, 30.0):
        model = adapted("olora")
        trainer, _ = trainer_of(
            model, "/nonexistent", save_strategy="no", weight_decay=decay, lr_scheduler_type="constant"
        )
        trainer.train()
        norms.append(sum(adapter.norm() for adapter in placement_of(model).adapters.values()))
        assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [decay, 0.0]
    assert norms[1] < 0.5 * norms[0]  # towards zero instead of the start it would be many times as large


def test_lora_plus_by_the_recipe_of_the_docs_and_a_warning_without_it(tmp_path):
    """After one step of Adam every tensor has moved by its rate: U by 16 times the rate of V."""
    moved = {}
    for recipe in (True, False):
        model = adapted("loraplus")
        before = {name: p.clone() for name, p in model.named_parameters() if "adapters" in name and p.requires_grad}
        optimizer = torch.optim.AdamW(lorafamily.parameter_groups(model, lr=1e-3), weight_decay=0.0)
        trainer, _ = trainer_of(model, tmp_path / str(recipe), max_steps=1, lr_scheduler_type="constant")
        if recipe:
            trainer.optimizer = optimizer
            trainer.train()
        else:
            with pytest.warns(UserWarning, match="trains the tensors that make U at 16 times the rate of the others"):
                trainer.train()
        sizes = {name: (p - before[name]).abs().max().item() for name, p in model.named_parameters() if name in before}
        moved[recipe] = {role: max(v for name, v in sizes.items() if name.endswith(f".{role}")) for role in "AB"}
    assert moved[True]["B"] == pytest.approx(16e-3, rel=0.01)
    assert moved[False]["B"] == pytest.approx(5e-3, rel=0.01)  # the Trainer's own rate


def test_the_penalty_acts():
    errors = []
    for gamma in (0.0, 1.0):
        model = adapted("adalora", gamma=gamma)
        trainer, _ = trainer_of(model, "/nonexistent", save_strategy="no")
        trainer.train()
        frames = [f for a in placement_of(model).adapters.values() for f in a.update.frames() if len(f)]
        errors.append(sum(float((f @ f.T - torch.eye(len(f))).norm()) for f in frames) / len(frames))
    assert errors[1] < 0.7 * errors[0]


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(lorafamily.StateError, match="has no adapters"):
        LoraFamilyCallback(model_of("bert"))
    trainer, _ = trainer_of(adapted("lora2"), tmp_path, max_steps=2)
    with pytest.raises(lorafamily.AllocationError, match="nothing would ever be pruned"):
        trainer.train()
    trainer, _ = trainer_of(adapted("lora"), tmp_path / "plain", max_steps=4, save_steps=2)
    trainer.train()
    other = lorafamily.apply(model_of("bert"), "lora", rank=2, also_train="classifier")
    other, _ = trainer_of(other, tmp_path / "plain", max_steps=4)
    with pytest.raises(lorafamily.StateError, match="of a run with other adapters"):
        other.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))


def test_a_trainer_may_make_its_model_anew_for_every_training(tmp_path):
    """As hyperparameter_search does, where trials are also broken off."""
    whole = adapted("adalora", double=True)
    trainer, _ = trainer_of(whole, tmp_path / "whole")
    trainer.train()
    whole = (lorafamily.save(whole, tmp_path / "adapter") / "adapter.safetensors").read_bytes()

    class Broken(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **given):
            if state.global_step == 10 and not trainer.model.unbroken:
                raise InterruptedError

    made = []

    def model_init() -> nn.Module:
        made.append(adapted("adalora", double=True))
        made[-1].unbroken = len(made) != 2
        return made[-1]

    args = dataclasses.replace(trainer.args, output_dir=str(tmp_path / "anew"))
    trainer = transformers.Trainer(None, args, train_dataset=samples(), model_init=model_init)
    callback = LoraFamilyCallback(trainer)
    trainer.add_callback(callback)
    trainer.add_callback(Broken)
    with pytest.raises(InterruptedError):
        trainer.train()
    for i in range(2):
        trainer.train()
        assert callback.model is made[-1] is trainer.model
        saved = lorafamily.save(made[-1], tmp_path / f"adapter {i}")
        assert (saved / "adapter.safetensors").read_bytes() == whole
    assert len(made) == 4
    assert not made[0]._load_state_dict_pre_hooks
    with pytest.raises(lorafamily.StateError, match="can neither resume nor change its ranks"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "anew" / "checkpoint-12"))
    made.clear()
    trainer.model_init = lambda: model_of("bert")
    with pytest.raises(lorafamily.StateError, match="has no adapters"):
        trainer.train()
    trainer, _ = trainer_of(adapted("lora"), tmp_path / "other")
    trainer.add_callback(LoraFamilyCallback(adapted("lora")))
    with pytest.raises(lorafamily.StateError, match=r"another model than .* LoraFamilyCallback\(trainer\)"):
        trainer.train()


DDP = """
import json, os, sys
import torch, transformers
import lorafamily
from accelerate.state import AcceleratorState
from lorafamily.integrations import LoraFamilyCallback
from test_integrations import adapted, samples

AcceleratorState._reset_state(reset_partial_state=True)  # this process was forked off one that has used it
method, head, folder = sys.argv[1], sys.argv[2] == "head", sys.argv[3]
world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
model = adapted(method, double=True, also_train="classifier" if head else None, seed=rank)  # the first process's counts
batch = {key: torch.stack([torch.as_tensor(s[key]) for s in samples(8)]) for key in ("input_ids", "labels")}
callback = LoraFamilyCallback(model, validation=[batch])
args = transformers.TrainingArguments(
    output_dir=folder, max_steps=20, per_device_train_batch_size=8 // world, learning_rate=5e-3, report_to="none",
    disable_tqdm=True, use_cpu=True, logging_steps=100, save_steps=10, average_tokens_across_devices=False,
)
trainer = transformers.Trainer(model, args, train_dataset=samples(), callbacks=[callback])
trainer.train(resume_from_checkpoint=len(sys.argv) > 4)
if rank == 0:
    lorafamily.save(model, folder)
    print("ranks", json.dumps(callback.decisions[-1].after))
"""


@pytest.mark.parametrize(("method", "head"), [("adalora", "alone"), ("alora", "head")])
def test_two_processes_under_ddp_train_what_one_does_while_ranks_change(method, head, tmp_path):
    """DDP does not know the tensors that a decision makes; the session averages their gradients."""

    def ranks(n: int, folder: str, *resume: str) -> list[str]:
        launched = Launched(DDP, [method, head, str(tmp_path / folder), *resume], tmp_path / f"{folder}-said", n)
        return [line for line in launched.done().splitlines() if line.startswith("ranks")]

    assert ranks(1, "1") == ranks(2, "2")
    # From the checkpoint in the middle, which both processes read.
    (tmp_path / "again").mkdir()
    (tmp_path / "2" / "checkpoint-10").rename(tmp_path / "again" / "checkpoint-10")
    assert len(ranks(2, "again", "resume")) == 1
    whole, again = ((tmp_path / at / "adapter.safetensors").read_bytes() for at in ("2", "again"))
    assert whole == again
    one, two = (load_file(tmp_path / str(n) / "adapter.safetensors") for n in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-9)  # sums of 4 + 4 rows instead of 8, 20 steps


def test_ddp_that_cannot_lose_a_tensor_is_refused(tmp_path, monkeypatch):
    model = adapted("adalora", also_train=None)
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", 2)
    with pytest.raises(lorafamily.StateError, match="ddp_find_unused_parameters=True"):
        trainer_of(model, tmp_path, ddp_find_unused_parameters=False)
    trainer_of(adapted("adalora"), tmp_path, ddp_find_unused_parameters=False)  # the head is DDP's
    trainer_of(adapted("lora", also_train=None), tmp_path, ddp_find_unused_parameters=False)  # nothing is replaced
