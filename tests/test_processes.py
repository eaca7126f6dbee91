"""Several processes compute what one computes: losses, ranks, one set of files, resumed by any number of them."""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

import lorafamily
from conftest import data, tiny, tokens
from launching import Launched
from lorafamily.training.batches import Batches
from lorafamily.training.processes import Processes

PROGRAM = """
import json, os, sys
import torch
import lorafamily
from conftest import few_rounds, tiny, tokens
from torch.utils.data import DataLoader

method, folder, sharded, stop, die = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
rank = int(os.environ.get("RANK", 0))
model = tiny(dtype=torch.float64).train()
schedule = {"warmup": 5, "final": 15, "interval": 5} if "ada" in method or "2" in method else {}
lorafamily.apply(model, method, rank=3, targets="blocks.1", also_train="norm", seed=0, **schedule, **few_rounds(method))
if sharded == 1:
    lorafamily.shard(model)
loader = DataLoader([{"bytes": row} for row in tokens(rows=40)], batch_size=8, shuffle=True)
seen = 0

def loss_fn(model, batch):
    global seen
    seen += model.training
    if model.training and seen == stop:
        os.kill(os.getpid(), 15)
    if model.training and seen == die and rank == 1:
        os._exit(9)
    if sharded == 2 and rank == 1 and seen == 10:
        next(p for p in model.parameters() if p.requires_grad).data.add_(1)
    return model(batch["bytes"]).loss

history = lorafamily.train(
    model, loader, steps=50, lr=1e-2, loss_fn=loss_fn, validation=[{"bytes": tokens()}], evaluate_every=25,
    log_dir=folder, save_every=25, resume="auto", seed=0, progress=False,
)
assert rank or all(p.grad is None for p in model.parameters())
if rank == 0:
    lorafamily.save(model, folder + "/adapter")
    told = {"losses": [s.loss for s in history.steps], "ranks": history.slices_end, "metrics": history.metrics}
    told["decisions"] = [[d.step, d.after] for d in history.decisions]
    open(folder + "/told.json", "w").write(json.dumps(told))
"""


def start(
    processes: int, method: str, folder: Path, sharded: int = 0, stop: int = 0, die: int = 0, program: str = PROGRAM
) -> Launched:
    return Launched(program, [method, str(folder), str(sharded), str(stop), str(die)], folder, processes)


def result(folder: Path) -> dict:
    return json.loads((folder / "told.json").read_text()) | {
        "tensors": load_file(folder / "adapter/adapter.safetensors")
    }


def run(processes: int, method: str, folder: Path, **named) -> dict:
    start(processes, method, folder, **named).done()
    return result(folder)


def by_torchrun(method: str, folder: Path, die: int = 0) -> subprocess.CompletedProcess:
    """Two processes, in the way that users start them."""
    (folder / "program.py").write_text(PROGRAM)
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here, here.parent / "experiments", here.parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(folder / "program.py"), method, str(folder), "0", "0", str(die)]
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process computes, by method."""
    done: dict[str, dict] = {}

    def of(method: str) -> dict:
        if method not in done:
            done[method] = run(1, method, tmp_path_factory.mktemp("alone"))
        return done[method]

    return of


def assert_same(found: dict, expected: dict) -> None:
    # float64: the mean over a batch is taken in two halves. Adam divides by the size of gradients, so that rounding
    # grows, by about a factor of ten in ten steps here.
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-6)
    assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-6)
    assert found["decisions"] == expected["decisions"]
    assert found["ranks"] == expected["ranks"]
    for name, value in expected["tensors"].items():
        torch.testing.assert_close(found["tensors"][name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "sharded"), [("adalora", 0), ("adalora", 1), ("alora", 1)])
def test_two_processes_compute_what_one_does(method, sharded, alone, tmp_path):
    found = run(2, method, tmp_path, sharded=sharded)
    assert len(found["losses"]) == 50
    assert len({tuple(after.values()) for _, after in found["decisions"]}) > 1
    assert_same(found, alone(method))
    # One set of files, whose tensors are whole.
    assert len({path.name.split(".")[-2] for path in tmp_path.glob("events.out.tfevents.*")}) == 1  # process numbers
    assert "step-00000050" in [path.name for path in (tmp_path / "checkpoints").iterdir()]
    lorafamily.load(tiny(dtype=torch.float64), tmp_path / "adapter")


def test_stopped_with_two_sharded_ones_and_resumed_with_one(alone, tmp_path):
    process = start(2, "adalora", tmp_path, sharded=1, stop=25)
    _, error = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "stopped by a signal after step 25 of 50" in error
    assert not (tmp_path / "told.json").exists()
    assert_same(run(1, "adalora", tmp_path), alone("adalora"))


def test_a_process_that_dies_is_noticed_by_the_others(tmp_path):
    process = start(2, "adalora", tmp_path, die=30)
    begun = time.perf_counter()
    _, error = process.communicate(timeout=60)
    assert time.perf_counter() - begun < 30
    assert [one.exitcode for one in process.processes] == [1, 9]
    assert "TrainingError: process 0 of 2 lost the others, one of which has probably died" in error


def test_torchrun_ends_what_one_process_left_and_a_restart_resumes(alone, tmp_path):
    assert by_torchrun("adalora", tmp_path, die=30).returncode != 0
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000025"]
    restarted = by_torchrun("adalora", tmp_path)
    assert restarted.returncode == 0, restarted.stderr[-3000:]
    assert_same(result(tmp_path), alone("adalora"))


def test_processes_that_come_apart_are_noticed(tmp_path):
    process = start(2, "lora", tmp_path, sharded=2)
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert re.search(r"after step 25 process 1 has another [\w.]+ than process 0", error)
    assert not list((tmp_path / "checkpoints").glob("step*"))


SHARES = """
import json, math, os, sys
import torch
import lorafamily
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from heads import gpt2, padded
from torch.utils.data import DataLoader, DistributedSampler
from transformers import BatchEncoding

AcceleratorState._reset_state(reset_partial_state=True)  # this process was forked off one that may have used it
folder = sys.argv[2]
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
torch.manual_seed(0)
base = gpt2().state_dict()
told = {}
all_rows = {key: torch.cat([padded(seed, 12)[key] for seed in range(4)]) for key in ("input_ids", "labels")}
all_rows["labels"][:3] = -100  # rows of process 0 without a label that counts
rows = [{"input_ids": i, "labels": l} for i, l in zip(all_rows["input_ids"], all_rows["labels"])]

def run(name, data, **arguments):
    torch.manual_seed(0)
    model = gpt2()
    model.load_state_dict(base)
    lorafamily.apply(model, "lora", rank=2, seed=0)
    seen = []
    model.register_forward_pre_hook(lambda m, a, k: seen.extend(k["input_ids"][:, 0].tolist()), with_kwargs=True)
    try:
        arguments = {"seed": 0, "loss_over": "tokens", **arguments}
        history = lorafamily.train(model, data, optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
            max_grad_norm=math.inf, progress=False, **arguments)
    except lorafamily.DataError as error:
        told[name] = str(error)
        return
    ends = [p.tolist() for p in model.parameters() if p.requires_grad]
    told[name] = {"losses": [s.loss for s in history.steps], "ends": ends, "seen": seen, **history.metrics}

def batches(*of):
    return [BatchEncoding({key: value[list(i)] for key, value in all_rows.items()}) for i in of]

# Rows that each takes of every batch: the first of process 0 have no label, batches are not as large as each other.
run("cut", batches(range(6), range(6, 16)), steps=3, accumulate=2, validation=batches(range(5), range(5, 16)))

# Rows that a sampler gives to each: those of both are the 8 of one process.
whole = DataLoader(rows, batch_size=8 // world)
sampler = DistributedSampler(rows, shuffle=False) if world > 1 else None
divided = whole if world == 1 else DataLoader(rows, batch_size=4, sampler=sampler)
run("sampler", divided, epochs=2, validation=divided)

if world > 1:
    all_rows["input_ids"][:, 0] = torch.arange(3, 19)
    rows = [{"input_ids": i, "labels": l} for i, l in zip(all_rows["input_ids"], all_rows["labels"])]
    run("shuffled", DataLoader(rows, batch_size=2, sampler=DistributedSampler(rows)), epochs=1)
    accelerator = Accelerator(cpu=True)
    run("accelerate", accelerator.prepare(DataLoader(rows, batch_size=2, shuffle=True)), epochs=1)
    seed = torch.Generator().manual_seed(rank)
    run("differing", DataLoader(rows, batch_size=16, shuffle=True, generator=seed), epochs=1)
    run("one part", DataLoader(rows, batch_size=2, sampler=DistributedSampler(rows, rank=0)), epochs=1)
    run("one longer", [batches(range(4))[0]] * (rank + 1), epochs=1)
open(f"{folder}/{world}-{rank}.json", "w").write(json.dumps(told))
"""


@pytest.fixture(scope="module")
def shares(tmp_path_factory):
    """What one process, and each of two, found in the same program."""
    folder = tmp_path_factory.mktemp("shares")
    for processes in (1, 2):
        start(processes, "lora", folder, program=SHARES).done()
    return [json.loads((folder / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")]


@pytest.mark.parametrize("named", ["cut", "sampler"])
def test_processes_weigh_by_tokens(named, shares):
    """Rows with few labels in one process and many in the other, and some with none: as one process has it."""
    alone, *both = (found[named] for found in shares)
    for found in both:
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-6)
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        for own, expected in zip(found["ends"], alone["ends"], strict=True):
            torch.testing.assert_close(torch.tensor(own), torch.tensor(expected), rtol=1e-6, atol=1e-6)
    assert both[0]["seen"] != both[1]["seen"]


@pytest.mark.parametrize("named", ["shuffled", "accelerate"])
def test_data_that_is_divided_is_seen_once(named, shares):
    _, first, second = (found.get(named) for found in shares)
    assert len(first["losses"]) == 4
    assert sorted(first["seen"] + second["seen"]) == list(range(3, 19))


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("differing", "process 1 draws other batches than process 0"),
        ("one part", "the processes' samplers draw the parts 0, 0; each must draw another"),
        ("one longer", "the processes have 1, 2 batches an epoch"),
    ],
)
def test_data_that_does_not_fit_the_processes_is_refused(named, message, shares):
    for found in shares[1:]:
        assert message in found[named]


def test_a_sampler_for_more_processes_than_there_are_is_refused():
    rows = [{"bytes": row} for row in tokens(rows=8)]
    loader = DataLoader(rows, batch_size=2, sampler=DistributedSampler(rows, num_replicas=2, rank=1))
    with pytest.raises(lorafamily.DataError, match="divides the data among 2 processes, and this run has 1"):
        lorafamily.train(lorafamily.apply(tiny(), "lora", rank=2), loader, steps=1, progress=False)


@pytest.mark.parametrize("batch_sampler", [False, True])
def test_every_round_of_a_distributed_sampler_is_another(batch_sampler):
    rows = [{"bytes": row} for row in tokens(rows=8)]
    sampler = DistributedSampler(rows, num_replicas=1, rank=0)
    loader = DataLoader(rows, batch_size=8, sampler=sampler)
    if batch_sampler:
        loader = DataLoader(rows, batch_sampler=BatchSampler(sampler, 8, drop_last=False))
    drawn = Batches(loader, Processes(torch.device("cpu")))
    first, second = (next(drawn)["bytes"] for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)


def test_a_run_divided_by_a_sampler_goes_on_with_as_many_processes():
    drawn = Batches(data(4), Processes(torch.device("cpu")))
    next(drawn)
    with pytest.raises(lorafamily.DataError, match="divided among 2 processes by its sampler, and is now among 1"):
        drawn.restore(drawn.state() | {"divided among": 2})


def test_each_process_takes_its_gpu(monkeypatch):
    taken, begun = [], []
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: begun.append((a, k)))
    monkeypatch.setattr(atexit, "register", lambda f: None)
    Processes(torch.device("cuda:2"))
    assert taken == [torch.device("cuda:2")]
    assert begun[0][0] == ("cpu:gloo,cuda:nccl",)
    assert begun[0][1]["device_id"] == torch.device("cuda:2")
    with pytest.raises(lorafamily.TrainingError, match=r"process 2 .* on cuda:0, the GPU of process 0"):
        Processes(torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # each process sees its own alone
    Processes(torch.device("cuda:0"))
