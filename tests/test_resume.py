"""A run that was interrupted and goes on ends with the numbers of one that was not, to the last bit."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

import lorafamily
from conftest import METHODS, data, few_rounds, tiny, tokens
from lorafamily.history import Decision, Step
from lorafamily.insight.record import Record
from lorafamily.layers.placement import placement_of
from lorafamily.training.board import Board
from lorafamily.training.folder_lock import FolderLock
from lorafamily.training.interrupt import EXIT_CODE, Interrupted
from lorafamily.training.schedule import lr_factor
from lorafamily.training.state import random_state, set_random_state

STEPS = 20


def loader() -> DataLoader:
    """Seven batches, so that the run goes round, shuffled anew each time."""
    return DataLoader([{"bytes": row} for row in tokens(rows=28)], batch_size=4, shuffle=True)


def model_of(method: str, **options):
    model = tiny()
    if method == "full":
        return model
    schedule = {"warmup": 2, "final": 8, "interval": 3} if "lora2" in method or "adalora" in method else {}
    return lorafamily.apply(
        model, method, rank=3, dropout=0.1, also_train="norm", seed=0, **schedule, **few_rounds(method), **options
    )


def train(
    model, folder: Path, stop_at: int | None = None, by: signal.Signals = signal.SIGTERM, **options
) -> lorafamily.History:
    """Train; with `stop_at` a signal comes in the middle of that step."""
    seen = 0

    def loss_fn(model, batch):
        nonlocal seen
        seen += model.training
        if model.training and seen == stop_at:
            os.kill(os.getpid(), by)
        return model(batch["bytes"]).loss

    arguments = {"steps": STEPS, "validation": data(1), "evaluate_every": 5, "save_every": 100}
    arguments |= {} if "optimizer" in options else {"lr": 1e-2, "head_lr": 1e-2}
    # Pictures take most of the time, and nothing here looks at them.
    arguments |= {"log_dir": folder, "pictures": False, "resume": "auto", "progress": False, "loss_fn": loss_fn}
    arguments |= options
    return lorafamily.train(model, arguments.pop("loader", None) or loader(), **arguments)


def without_time(history: lorafamily.History) -> dict:
    return dataclasses.asdict(dataclasses.replace(history, seconds=0.0))


def same_end(model, history, folder: Path, expected: tuple, tmp_path: Path) -> None:
    whole_model, whole_history, whole_folder = expected
    assert without_time(history) == without_time(whole_history)
    for name in ("allocation.jsonl", "steps.jsonl"):
        assert (folder / name).read_bytes() == (whole_folder / name).read_bytes()
    a, b = model.state_dict(), whole_model.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)
    if "default" in "".join(a):
        files = [lorafamily.save(m, tmp_path / n) for n, m in (("resumed", model), ("whole", whole_model))]
        for name in ("adapter.safetensors", "adapter.json"):
            assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes()


# RsLoRA's scale and OLoRA's start of AdaLoRA bring no state that these have not.
STATEFUL = [method for method in METHODS if "rslora" not in method and method != "adalora+olora"]


@pytest.mark.parametrize("method", [*STATEFUL, "full"])
def test_interrupted_again_and_again_and_the_same_to_the_last_bit(method, tmp_path):
    whole = model_of(method)
    expected = (whole, train(whole, tmp_path / "whole"), tmp_path / "whole")
    folder = tmp_path / "broken"
    for stop_at, reached, by in ((7, 7, signal.SIGTERM), (2, 9, signal.SIGINT)):
        with pytest.raises(Interrupted, match=f"stopped by a signal after step {reached} of 20"):
            train(model_of(method), folder, stop_at, by)
    model = model_of(method)
    history = train(model, folder)
    same_end(model, history, folder, expected, tmp_path)


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.Adagrad, torch.optim.AdamW])
def test_whatever_the_optimiser_with_decay_and_modules_at_rank_zero(make, tmp_path):
    """A frozen start to decay to, and so many ranks dropped that some modules have none when it is saved."""
    options = {"optimizer": lambda parameters: make(parameters, lr=1e-2, weight_decay=0.5)}
    whole = model_of("olora+alora", drop=20, scorer="sensitivity")
    expected = (whole, train(whole, tmp_path / "whole", **options), tmp_path / "whole")
    assert 0 in expected[1].decisions[0].after.values()
    with pytest.raises(Interrupted):
        train(model_of("olora+alora", drop=20, scorer="sensitivity"), tmp_path / "broken", 7, **options)
    model = model_of("olora+alora", drop=20, scorer="sensitivity")
    same_end(model, train(model, tmp_path / "broken", **options), tmp_path / "broken", expected, tmp_path)


def test_a_run_that_is_done_gives_what_it_gave(uninterrupted, tmp_path):
    _, first, folder = uninterrupted
    shutil.copytree(folder, tmp_path / "run")
    assert without_time(train(model_of("adalora"), tmp_path / "run")) == without_time(first)


def test_a_checkpoint_is_an_adapter_that_loads(uninterrupted):
    model, _, folder = uninterrupted
    loaded = lorafamily.load(tiny(), folder / "checkpoints" / "step-00000020")
    model.eval()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    train(model_of("lora"), tmp_path, evaluate=lambda m: {"loss": next(losses)}, evaluate_every=2, save_every=1, keep=3)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in (4, 18, 19, 20)]
    assert not (tmp_path / "lock").exists()


DAMAGE = {
    "a flipped bit in the state": ("state.safetensors", lambda raw: raw[:-5] + bytes([raw[-5] ^ 16]) + raw[-4:]),
    "a flipped bit in the adapters": ("adapter.safetensors", lambda raw: raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:]),
    "a number that is another": (
        "state.json",
        lambda raw: raw.replace(b'"lr",\n', b'"lr" ,\n').replace(b"0.01", b"0.02"),
    ),
    "half a file": ("state.safetensors", lambda raw: raw[: len(raw) // 2]),
    "an empty file": ("adapter.json", lambda raw: b""),
    "no file": ("state.json", None),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple:
    """AdaLoRA's run to the end: the model, its history and its folder, which nothing here changes."""
    model, folder = model_of("adalora"), tmp_path_factory.mktemp("uninterrupted")
    return model, train(model, folder), folder


def stopped_run(folder: Path, method: str, step: int, **options) -> Path:
    with pytest.raises(Interrupted):
        train(model_of(method), folder, step, **options)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """The folder of the same run, stopped after step 13, with checkpoints of steps 5, 10 and 13."""
    return stopped_run(tmp_path_factory.mktemp("stopped"), "adalora", 13, save_every=5, keep=3)


@pytest.fixture(scope="module")
def lora_stopped(tmp_path_factory) -> Path:
    """That of a run with LoRA, stopped after step 4."""
    return stopped_run(tmp_path_factory.mktemp("stopped"), "lora", 4)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_taken(damage, uninterrupted, stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    name, harm = DAMAGE[damage]
    path = folder / "checkpoints" / "step-00000013" / name
    if harm is None:
        path.unlink()
    else:
        raw = path.read_bytes()
        path.write_bytes(harm(raw))
        assert path.read_bytes() != raw
    model = model_of("adalora")
    with pytest.warns(UserWarning, match=r"step-00000013.*Going on from step-00000010 instead"):
        history = train(model, folder, save_every=5, keep=3)
    same_end(model, history, folder, uninterrupted, tmp_path)
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "state.json").write_text("{}")
    with pytest.raises(lorafamily.FileError, match=r"no checkpoint can be read: .*step-00000020.*remove them"):
        train(model_of("adalora"), folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 2e-2}, r"other settings: lr was 0.01, is 0.02. Set them as they were"),
        ({"steps": 30}, "steps was 20, is 30"),
        ({"method": "adalora"}, "is of a run with other adapters than these"),
        ({"alpha": 8}, "alpha was 16.0, is 8"),
        ({"base": 1}, "frozen base weights are not what they were"),
        ({"resume": "never"}, 'has checkpoints of an earlier run; resume="auto" goes on from step-00000004'),
        ({"resume": "yes"}, 'must be "never", "auto" or "anyway"'),
        ({"save_every": None}, "needs checkpoints: pass log_dir and save_every"),
        ({"save_every": 0}, "save_every=0 must be"),
        ({"keep": 0}, "keep=0: must be"),
    ],
)
def test_going_on_with_something_else_is_refused(changed, message, lora_stopped, tmp_path):
    shutil.copytree(lora_stopped, tmp_path, dirs_exist_ok=True)
    arguments = dict(changed)
    method, alpha = arguments.pop("method", "lora"), arguments.pop("alpha", None)
    model = model_of(method, **({} if alpha is None else {"alpha": alpha}))
    if arguments.pop("base", None):
        with torch.no_grad():
            model.blocks[1].mlp.up.weight[0, 0] += 1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(lorafamily.LoraFamilyError, match=message):
        train(model, tmp_path, **arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


def test_other_settings_can_be_accepted(lora_stopped, tmp_path):
    shutil.copytree(lora_stopped, tmp_path, dirs_exist_ok=True)
    with pytest.warns(UserWarning, match="with other settings: steps was 20, is 6"):
        history = train(model_of("lora"), tmp_path, steps=6, resume="anyway")
    assert [step.step for step in history.steps] == [1, 2, 3, 4, 5, 6]


class TwoLayers(torch.nn.Module):
    """So small that a run of some steps costs nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 2)
        self.norm = torch.nn.BatchNorm1d(6)

    def forward(self, x):
        return SimpleNamespace(loss=(self.head(self.norm(self.b(torch.tanh(self.a(x))))) - 1).square().mean())


def small(method: str = "lora", **options) -> TwoLayers:
    options = {"rank": 3, "targets": ["^a$", "^b$"], "also_train": ["head", "norm"], **options}
    return lorafamily.apply(TwoLayers(), method, seed=0, **options)


def points(batches: int = 3, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(4, 6, generator=generator)} for _ in range(batches)]


def run_small(model, folder=None, *, batches=None, **options):
    settings = {"steps": 12, "progress": False, "log_dir": folder, "pictures": False, **options}
    settings |= {} if "optimizer" in options else {"lr": options.get("lr", 1e-2)}
    return lorafamily.train(model, points() if batches is None else batches, **settings)


PRUNED = {"warmup": 0, "final": 4, "interval": 2}


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_a_second_run_does_not_write_over_the_first_one_s_record(method, tmp_path):
    run_small(small(method), tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {"steps.jsonl", "allocation.jsonl"} < written.keys()
    with pytest.raises(
        lorafamily.StateError, match=r"has the record of an earlier run \(steps\.jsonl\).*another log_dir"
    ):
        run_small(small(method), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == written
    # As where its checkpoints were removed, or it was killed before the first: what it left is kept beside.
    for number in (1, 2):
        run_small(small(method), tmp_path, save_every=100, resume="auto", steps=8)
        earlier = {path.name: path.read_bytes() for path in (tmp_path / f"earlier-{number}").iterdir()}
        assert earlier == written
        shutil.rmtree(tmp_path / "checkpoints")
        written = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        assert len(written["steps.jsonl"].splitlines()) == 8


def test_a_run_that_made_no_step_leaves_nothing_in_the_way(tmp_path):
    with pytest.raises(lorafamily.DataError):
        run_small(small(), tmp_path, batches=[{"y": torch.zeros(4, 6)}])
    assert list(tmp_path.iterdir()) == []
    run_small(small(), tmp_path)


def test_a_folder_without_checkpoints_has_one_run_at_a_time_too(tmp_path):
    with FolderLock(tmp_path), pytest.raises(lorafamily.StateError, match="another run is writing there"):
        run_small(small(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["lora", "adalora", "alora"])
def test_a_run_that_was_done_can_be_made_longer(method, tmp_path):
    options = {"adalora": PRUNED, "alora": {"rounds": 4, "warmup": 0.25, "interval": 0.125, "drop": 1}}.get(method, {})
    settings = {"save_every": 5, "validation": points(1)}
    first = run_small(small(method, **options), tmp_path, steps=16, **settings)
    with pytest.raises(lorafamily.StateError, match="steps was 16, is 40"):
        run_small(small(method, **options), tmp_path, steps=40, resume="auto", **settings)
    with pytest.warns(
        UserWarning, match=r"steps was 16, is 40\. The learning rate .* at step 17 of a schedule of 40 steps"
    ):
        history = run_small(small(method, **options), tmp_path, steps=40, resume="anyway", **settings)
    assert (len(history.steps), history.stopped) == (40, "all 40 steps done")
    assert history.steps[:16] == first.steps
    assert history.decisions == first.decisions  # settled, and stays so: ALoRA's later rounds are at other steps now
    assert history.slices_end == first.slices_end
    assert history.steps[16].lr == pytest.approx(1e-2 * lr_factor(17, 40, 0.06 * 40, "linear"))
    assert [evaluation.step for evaluation in history.evaluations] == [16, 40]
    again = run_small(small(method, **options), tmp_path, steps=40, resume="anyway", **settings)
    assert without_time(again) == without_time(history)


@pytest.mark.parametrize("steps", [3, 6])
def test_a_run_cannot_be_made_shorter_than_it_is(steps, tmp_path):
    stopping = {"patience": 1, "evaluate_every": 2, "evaluate": lambda model: {"loss": 1.0}}
    stopped = run_small(small(), tmp_path, save_every=1, **stopping)
    assert len(stopped.steps) == 4
    if steps > 4:  # it had stopped by itself, and is over for as many steps as it had
        assert run_small(small(), tmp_path, save_every=1, resume="anyway", **stopping).stopped == stopped.stopped
        return
    with pytest.raises(lorafamily.StateError, match=r"^steps=3: the run of .*step-00000004 has made 4 steps and"):
        run_small(small(), tmp_path, save_every=1, steps=steps, resume="anyway", **stopping)


def adam(**options):
    return lambda parameters: torch.optim.Adam(parameters, **options)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5)}, "optimizer was Adam, is SGD"),
        ({"optimizer": adam(betas=(0.8, 0.9))}, r"optimizer's betas was \(0\.9, 0\.999\), is \(0\.8, 0\.9\)"),
        ({"optimizer": adam(eps=1e-4, lr=0.5)}, r"lr was 0\.001, is 0\.5; .*optimizer's eps was 1e-08, is 0\.0001"),
        ({"optimizer": adam(weight_decay=0.5)}, r"weight decay was 0, is 0\.5"),
        ({"batches": points(5)}, "length of the data was 3, is 5"),
        ({"batches": points(seed=2)}, "first batch of the data is another"),
        ({"batches": points(1)}, "length of the data was 3, is 1; first batch|length of the data was 3, is 1"),
    ],
)
def test_another_optimiser_and_other_data_are_named(changed, message, tmp_path):
    run_small(small(), tmp_path, save_every=8, optimizer=adam(), steps=8)
    settings = {"save_every": 8, "optimizer": adam(), **changed}
    with pytest.raises(lorafamily.StateError, match=message):
        run_small(small(), tmp_path, resume="auto", steps=8, **settings)
    used = []
    if "optimizer" in changed:
        settings["optimizer"] = lambda p: used.append(changed["optimizer"](p)) or used[0]
    with pytest.warns(UserWarning, match=message):
        history = run_small(small(), tmp_path, resume="anyway", steps=10, **settings)
    assert len(history.steps) == 10
    if used:  # what was given now is what it worked with, not what the checkpoint had
        fresh = changed["optimizer"]([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
        assert {k: v for k, v in used[0].param_groups[0].items() if k not in ("params", "lr")} == {
            k: v for k, v in fresh.items() if k not in ("params", "lr")
        }


def test_dropout_and_what_a_function_gives_are_settings_too(tmp_path):
    def run(dropout=0.0, power=1, resume="auto"):
        schedule = lambda step: (1 - step / 16) ** power  # noqa: E731
        return run_small(small(dropout=dropout), tmp_path, save_every=4, steps=8, schedule=schedule, resume=resume)

    run(resume="never")
    assert len(run().steps) == 8
    with pytest.raises(lorafamily.StateError, match=r"dropout was 0.0, is 0.9"):
        run(dropout=0.9)
    with pytest.raises(lorafamily.StateError, match=r"schedule was '<lambda> 0.875 0.75 .*', is '<lambda> 0.7656 "):
        run(power=2)


@pytest.mark.parametrize("where", ["memory", "folder", "resumed"])
@pytest.mark.parametrize("method", ["full", "olora", "adalora"])
def test_the_best_weights_come_back_to_the_last_bit(method, where, tmp_path):
    seen = {}

    def evaluate(model):
        step = 2 * (len(seen) + 1)
        seen[step] = {name: value.clone() for name, value in model.state_dict().items()}
        return {"accuracy": {10: 0.9}.get(step, step / 100)}

    def fresh():
        return (
            TwoLayers() if method == "full" else small(method, **(PRUNED | {"final": 5} if method == "adalora" else {}))
        )

    settings = {"evaluate": evaluate, "evaluate_every": 2, "check_gradients": False}
    settings |= {"monitor": "accuracy", "mode": "max", "restore_best": True}
    settings |= {} if where == "memory" else {"save_every": 4, "keep": 1}
    folder, model = (None if where == "memory" else tmp_path), fresh()
    history = run_small(model, folder, steps=14, **settings)
    if where == "resumed":
        model = fresh()
        history = run_small(model, folder, steps=14, resume="auto", **settings)
    assert (history.best.step, history.best.metrics) == (10, {"accuracy": 0.9})
    assert history.best.folder == (None if where == "memory" else "checkpoints/step-00000010")
    assert (history.last.step, history.last.metrics) == (14, {"accuracy": 0.14})
    last, restored = seen[14], model.state_dict()
    assert restored.keys() == seen[10].keys()
    assert all(torch.equal(value, seen[10][name]) for name, value in restored.items())
    assert any(not torch.equal(value, last[name]) for name, value in restored.items())
    assert json.dumps(history.to_dict())  # plain, without the tensors
    if method != "full":
        assert history.slices_end == {at: placement_of(model).adapters[at].slices for at in ("a", "b")}
        assert all(
            torch.equal(history.last.tensors[f"head.{name}"], last[f"head.{name}"]) for name in ("weight", "bias")
        )
    if folder is not None and method != "full":
        loaded = lorafamily.load(TwoLayers(), folder / history.best.folder)
        assert torch.equal(loaded.eval()(**points(1)[0]).loss, model.eval()(**points(1)[0]).loss)


def test_what_the_best_is_judged_by_must_be_there():
    history = run_small(small(), validation=points(1))
    assert history.best.step == history.last.step == 12
    with pytest.raises(lorafamily.TrainingError, match='monitor watches "f1", but evaluate gave loss'):
        run_small(small(), validation=points(1), monitor="f1", mode="max")
    with pytest.raises(lorafamily.TrainingError, match="mode='most': must be \"min\""):
        run_small(small(), validation=points(1), mode="most")


CHILD = """
import sys, os, signal
import lorafamily
from test_resume import model_of, train
from pathlib import Path
print("ready", flush=True)
train(model_of("adalora"), Path(sys.argv[1]), save_every=1, steps=int(sys.argv[2]))
"""


def child(folder: Path, steps: int, before: str = "") -> subprocess.Popen:
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here, here.parent / "experiments", here.parent)))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", before + CHILD, str(folder), str(steps)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_checkpoints(folder: Path, process: subprocess.Popen, number: int = 2) -> None:
    while process.poll() is None:
        if len(list(folder.glob("checkpoints/step-*[0-9]"))) >= number:
            return
        time.sleep(0.02)  # the child needs the core


def test_a_signal_ends_the_process_with_a_code_of_its_own_and_a_run_has_its_folder_alone(tmp_path):
    process = child(tmp_path, 100_000)
    wait_for_checkpoints(tmp_path, process)
    with pytest.raises(lorafamily.StateError, match=rf"another run is writing there \(process {process.pid}\)"):
        train(model_of("adalora"), tmp_path)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE == 75
    assert error.splitlines()[-1].startswith("lorafamily: stopped by a signal after step")
    assert not (tmp_path / "lock").exists()


def test_two_signals_end_it_at_once_and_the_files_are_whole(tmp_path):
    process = child(tmp_path, 100_000, before="import time\ntime.sleep(0)\n")
    wait_for_checkpoints(tmp_path, process)
    for _ in range(1000):
        process.send_signal(signal.SIGTERM)
        if process.poll() is not None:
            break
    process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGTERM, EXIT_CODE)
    newest = sorted(tmp_path.glob("checkpoints/step-*[0-9]"))[-1]
    lorafamily.load(tiny(), newest)


def test_files_that_cannot_grow_are_named_and_the_checkpoint_before_loads(tmp_path):
    """A limit on the size of files, as a full disk would be, at some places of what is written."""
    with pytest.raises(Interrupted):
        train(model_of("adalora"), tmp_path / "run", stop_at=4)
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "run" / "checkpoints" / "step-00000004").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, share in (("state.safetensors", 0.9), ("adapter.safetensors", 0.5)):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "run", folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sizes[name] * share), hard))
        try:
            with pytest.raises(
                lorafamily.FileError, match=rf"{name}: cannot write its [\d,]+ bytes \(.*large.*are free"
            ):
                train(model_of("adalora"), folder, stop_at=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000004"]
        assert len(train(model_of("adalora"), folder).steps) == STEPS


def test_a_folder_that_is_read_only_is_named_and_its_checkpoint_loads():
    """In a process without root's rights, who may write anywhere."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        with pytest.raises(Interrupted):
            train(model_of("adalora"), folder, stop_at=4)
        for path in (Path(place), folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        receive, send = multiprocessing.Pipe(duplex=False)

        def attempt() -> None:
            if os.getuid() == 0:
                os.setuid(65534)
            try:
                train(model_of("adalora"), folder)
            except lorafamily.FileError as error:
                send.send(str(error))

        process = multiprocessing.get_context("fork").Process(target=attempt)
        process.start()
        process.join(60)
        assert receive.poll()
        assert re.search(r"run: a run cannot write there \(.*Permission denied: .*run/lock", receive.recv())
        for path in (Path(place), folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        assert len(train(model_of("adalora"), folder).steps) == STEPS


def test_a_record_that_cannot_grow_is_named(tmp_path):
    record = Record(tmp_path, [Decision(0, {}, {"layer": 3}, "start")])
    step = Step(step=1, loss=1.0, penalty=0.0, lr=0.1, gradient=1.0, slices=3, trainable=9)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        record.step(step)
        with pytest.raises(lorafamily.FileError, match=r"steps\.jsonl: cannot write \d+ bytes more \(.*too large"):
            record.step(step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    record.close()


def test_events_that_cannot_be_written_are_named(tmp_path, monkeypatch):
    def full(board, step, decision):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Board, "step", full)
    with pytest.raises(lorafamily.FileError, match=r"cannot write TensorBoard's events \(.*No space left"):
        train(model_of("lora"), tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_with_a_generator_and_workers_of_its_own_goes_on_where_it_was(workers, tmp_path):
    def noisy() -> DataLoader:
        """Each sample depends on what its worker has drawn before."""
        generator = torch.Generator().manual_seed(5)
        return DataLoader(Noisy(), batch_size=4, shuffle=True, generator=generator, num_workers=workers)

    def run(folder, stop_at=None):
        model = model_of("lora")
        return model, train(model, folder, stop_at, loader=noisy(), steps=10)

    whole, history = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "broken", 9)
    resumed, again = run(tmp_path / "broken")
    assert without_time(history) == without_time(again)
    assert len({step.loss for step in history.steps}) == 10
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


class Noisy(torch.utils.data.Dataset):
    def __len__(self):
        return 28

    def __getitem__(self, index):
        return {"bytes": torch.randint(256, (24,))}


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(lorafamily.FileError, match=r"checkpoints/step-00000005: cannot write the checkpoint"):
        train(model_of("lora"), tmp_path)


def test_signals_are_left_alone_without_checkpoints_and_outside_the_main_thread(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def look(model, batch):
        if model.training:
            found.append(signal.getsignal(signal.SIGTERM))
        return model(batch["bytes"]).loss

    train(model_of("lora"), tmp_path / "a", steps=1, loss_fn=look)
    assert found.pop() != before
    train(model_of("lora"), tmp_path / "b", steps=1, loss_fn=look, save_every=None, resume="never")
    thread = threading.Thread(
        target=train, args=(model_of("lora"), tmp_path / "c"), kwargs={"steps": 1, "loss_fn": look}
    )
    thread.start()
    thread.join()
    assert found == [before, before]
    assert signal.getsignal(signal.SIGTERM) == before


def test_accumulating_batches_resumes_in_the_middle_of_a_round(tmp_path):
    method = "lora2+olora"
    whole = model_of(method)
    expected = (whole, train(whole, tmp_path / "whole", accumulate=3), tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(model_of(method), tmp_path / "broken", 10, accumulate=3)
    model = model_of(method)
    history = train(model, tmp_path / "broken", accumulate=3)
    same_end(model, history, tmp_path / "broken", expected, tmp_path)


def test_the_record_is_the_uninterrupted_one_s(tmp_path):
    with pytest.raises(Interrupted):
        train(model_of("adalora"), tmp_path, stop_at=9)
    with open(
        tmp_path / "steps.jsonl", "a"
    ) as file:  # as a process that was killed after its last checkpoint leaves it
        file.write('{"step": 10, "lo')
    train(model_of("adalora"), tmp_path)
    steps = [json.loads(line)["step"] for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    assert lorafamily.slices_at(tmp_path, 0) != lorafamily.slices_at(tmp_path, STEPS)
    assert len(lorafamily.redraw(tmp_path)) == 4


class TwoDevices:
    """Generators of an accelerator, as torch.cuda has them."""

    def __init__(self):
        self.generators = [torch.Generator().manual_seed(i) for i in range(2)]

    def device_count(self):
        return 2

    def get_rng_state_all(self):
        return [generator.get_state() for generator in self.generators]

    def set_rng_state(self, state, i):
        self.generators[i].set_state(state)

    def draw(self):
        return [torch.rand((), generator=generator).item() for generator in self.generators]


def test_random_states_are_those_of_every_device(monkeypatch):
    """A model may be on several; the one that trains need not be the current one."""
    accelerator, device = TwoDevices(), torch.device("cuda", 1)
    monkeypatch.setattr(torch, "get_device_module", lambda device: accelerator)
    before = random_state(device)
    drawn = accelerator.draw()
    set_random_state(before, device)
    assert accelerator.draw() == drawn
