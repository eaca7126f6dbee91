"""The benchmarks run, and measure what they say; how fast anything is, is no matter for a test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import bench, bench_gpu

pytest.importorskip("transformers", reason="transformers is an extra; the benchmarks build its models")
pytest.importorskip("peft", reason="peft is an extra; the benchmarks measure it beside")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses what transformers is about to rename


def test_every_variant_is_measured(tmp_path, capsys):
    parts = ("steps", "forwards", "products", "scaling")
    bench.main(
        bench.Bench(parts=parts, shapes=("small",), rounds=2, widths=(16,), ranks=(1, 2), tokens=(8, 64), out=tmp_path)
    )
    table = capsys.readouterr().out
    told = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["variant"]: row for row in told["steps"]["small"]}
    assert list(rows) == [
        *("frozen floor", "lora", "olora", "alora", "lora2", "adalora"),
        *("lora, dropout 0.1", "lora, dropout 0.1 of features"),
        *("lora, dropout 0.1, plain formulation", "lora, plain formulation", "lora, factored"),
        *("inputs kept, no update", "lora2, dense product"),
        *("peft", "peft, dropout 0.1", "full fine-tuning"),
    ]
    assert rows["frozen floor"]["ratio"] == 1.0
    assert all(row["memory"] > 0 for row in rows.values())
    forwards = {row["variant"]: row for row in told["forwards"]["small"]}
    assert {"frozen model", "lora", "lora, factored", "lora, merged", "peft", "peft, merged"} < forwards.keys()
    for name, row in (rows | forwards).items():
        assert name in table
        assert 0 < row["low"] <= row["ratio"] <= row["high"]
    assert [(row["d_in"], row["d_out"], row["layers"]) for row in told["products"]["small"]] == [
        *((64, 64, 4), (64, 256, 1), (256, 64, 1))
    ]
    assert [(cell["width"], cell["tokens"], cell["rank"]) for cell in told["scaling"]] == [
        *((16, 8, 1), (16, 8, 2), (16, 64, 1), (16, 64, 2))
    ]
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("steps", "forwards", "scaling"))


def test_starts_are_measured_and_right():
    found = bench.starts(64)
    assert found["largest difference of B A"] < 1e-5 * found["largest entry of B A"] * 64  # float32, sums of 64
    assert found["LLaMA-2-7B on the meta device (s)"] > 0


def test_the_gpu_script_on_a_cpu(tmp_path):
    """In a process of its own: the shape checks of these tests wrap functions in what torch.compile cannot trace."""
    script = Path(bench_gpu.__file__)
    small = {"layers": 1, "width": 64, "inner": 128, "tokens": 16, "rounds": 2, "vocabulary": 100}
    options = [f"--{name}={value}" for name, value in small.items()]
    done = subprocess.run(
        [sys.executable, script, "--device=cpu", *options, f"--out={tmp_path}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    told = json.loads((tmp_path / "bench_gpu.json").read_text())
    assert len(told["checks"]) == 4 * len(bench_gpu.CHECKED) + 6
    assert {"peft", "frozen floor"} < {row["variant"] for row in told["steps"]}
    assert not bench_gpu.Check("anything", float("nan"), 1.0).holds


def test_a_wrong_gradient_is_noticed(monkeypatch):
    """The checks of the GPU script can fail."""
    from lorafamily import functional

    down, folded = functional._down, functional._folded
    monkeypatch.setattr(functional, "_down", lambda rows, V, mask: 1.5 * down(rows, V, mask))
    monkeypatch.setattr(functional, "_folded", lambda W, U, V, scale: folded(W, U, V, 1.5 * scale))
    output, gradients = bench_gpu._against_float64("lora", "cpu", torch.float32, 1e-4)
    assert not output.holds
    assert not gradients.holds
