"""The benchmark runs, and measures what it says; how fast anything is, is no matter for a test."""

import json

import pytest

import bench

pytest.importorskip("transformers", reason="transformers is an extra; the benchmark builds its models")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses what transformers is about to rename
def test_every_variant_is_measured(tmp_path, capsys):
    bench.main(bench.Bench(shapes=("small",), steps=2, out=tmp_path))
    table = capsys.readouterr().out
    told = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["variant"]: row for row in told["rows"]["small"]}
    assert list(rows) == [
        *("frozen floor", "lora", "olora", "alora", "lora2", "adalora", "lora, dropout 0.1", "lora2, dense product"),
        *("peft", "peft, dropout 0.1", "full fine-tuning"),
    ]
    assert rows["frozen floor"]["ratio"] == rows["frozen floor"]["forward"] == 1.0
    for name, row in rows.items():
        assert name in table
        assert 0 < row["low"] <= row["ratio"] <= row["high"]
