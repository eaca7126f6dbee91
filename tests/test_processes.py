"""Several processes compute what one computes: losses, ranks, one set of files, resumed by any number of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lorafamily
from conftest import tiny

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
lorafamily.apply(model, method, rank=3, also_train="norm", seed=0, **schedule, **few_rounds(method))
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
    log_dir=folder, save_every=100, resume="auto", progress=False,
)
assert rank or all(p.grad is None for p in model.parameters())
if rank == 0:
    lorafamily.save(model, folder + "/adapter")
    told = {"losses": [s.loss for s in history.steps], "ranks": history.ranks_end, "metrics": history.metrics}
    told["decisions"] = [[d.step, d.after] for d in history.decisions]
    open(folder + "/told.json", "w").write(json.dumps(told))
"""


def start(processes: int, method: str, folder: Path, sharded: int = 0, stop: int = 0, die: int = 0) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    program = folder / "program.py"
    program.write_text(PROGRAM)
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here, here.parent / "experiments", here.parent)))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(program), method, str(folder), str(sharded), str(stop), str(die)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments, **named) -> dict:
    process = start(*arguments, **named)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error[-3000:]
    folder = arguments[2]
    return json.loads((folder / "told.json").read_text()) | {
        "tensors": load_file(folder / "adapter/adapter.safetensors")
    }


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


@pytest.mark.parametrize("sharded", [0, 1], ids=["replicated", "sharded"])
@pytest.mark.parametrize("method", ["adalora", "alora"])
def test_two_processes_compute_what_one_does(method, sharded, alone, tmp_path):
    found = run(2, method, tmp_path, sharded=sharded)
    assert len(found["losses"]) == 50
    assert len({tuple(after.values()) for _, after in found["decisions"]}) > 1
    assert_same(found, alone(method))
    # One set of files, whose tensors are whole.
    assert len({path.name.split(".")[-2] for path in tmp_path.glob("events.out.tfevents.*")}) == 1  # process numbers
    assert all(path.name in ("step-00000025", "step-00000050") for path in (tmp_path / "checkpoints").iterdir())
    lorafamily.load(tiny(dtype=torch.float64), tmp_path / "adapter")


@pytest.mark.parametrize("sharded", [0, 1], ids=["replicated", "sharded"])
def test_stopped_with_two_and_resumed_with_one(sharded, alone, tmp_path):
    process = start(2, "adalora", tmp_path, sharded=sharded, stop=25)
    _, error = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "stopped by a signal after step 25 of 50" in error
    assert not (tmp_path / "told.json").exists()
    assert_same(run(1, "adalora", tmp_path), alone("adalora"))


def test_a_process_that_dies_takes_the_others_along_and_a_restart_resumes(alone, tmp_path):
    begun = time.perf_counter()
    process = start(2, "adalora", tmp_path, die=30)
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert time.perf_counter() - begun < 60
    assert "lost the others, one of which has probably died" in error or "exitcode" in error
    assert_same(run(2, "adalora", tmp_path), alone("adalora"))


def test_processes_that_come_apart_are_noticed(tmp_path):
    process = start(2, "lora", tmp_path, sharded=2)
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert re.search(r"after step 25 process 1 has another [\w.]+ than process 0", error)
    assert not list((tmp_path / "checkpoints").glob("step*"))
