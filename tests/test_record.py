"""What a run leaves in its folder: the allocation comes back from it without the model."""

from __future__ import annotations

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lorafamily
from conftest import data, every_method, few_rounds, tiny
from lorafamily.insight.figures import rank_by_kind, rank_heatmap
from lorafamily.insight.record import read_decisions, read_steps

PICTURES = {"rank-by-layer.png", "rank-history.png", "course.png"}


@every_method
def test_ranks_and_pictures_come_back_without_the_model(method, tmp_path):
    model = lorafamily.apply(tiny(), method, rank=3, seed=0, **few_rounds(method))
    history = lorafamily.train(model, data(), steps=40, validation=data(1), log_dir=tmp_path, progress=False)
    ranks = {0: history.ranks_start} | {decision.step: decision.after for decision in history.decisions}
    for step in range(41):
        assert lorafamily.ranks_at(tmp_path, step) == ranks[max(known for known in ranks if known <= step)]
        if step:
            assert sum(lorafamily.ranks_at(tmp_path, step).values()) == history.steps[step - 1].rank
    assert read_decisions(tmp_path)[1:] == history.decisions
    assert read_steps(tmp_path) == history.steps
    drawn = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert set(drawn) == PICTURES | ({"scores.png"} if history.decisions else set())
    for path in tmp_path.glob("*.png"):
        path.unlink()
    assert {path.name: path.read_bytes() for path in lorafamily.redraw(tmp_path)} == drawn


def test_a_decision_is_a_line_that_reads_without_us(tmp_path):
    model = lorafamily.apply(tiny(), "adalora", rank=3, seed=0)
    history = lorafamily.train(model, data(), steps=40, log_dir=tmp_path, progress=False)
    start, *lines = [json.loads(line) for line in (tmp_path / "allocation.jsonl").read_text().splitlines()]
    assert (start["step"], start["reason"], set(start["after"].values())) == (0, "start", {3})
    assert len(lines) == len(history.decisions)
    changed = next(line for line in lines if line["before"] != line["after"])
    lost = sum(changed["before"].values()) - sum(changed["after"].values())
    scores = sorted(score for own in changed["scores"].values() for score in own)
    assert changed["threshold"] == scores[lost - 1]


def test_a_plain_model_leaves_steps_and_no_pictures(tmp_path):
    lorafamily.train(tiny(), data(1), steps=3, log_dir=tmp_path, progress=False)
    assert len(read_steps(tmp_path)) == 3
    assert not list(tmp_path.glob("*.png"))


def test_a_damaged_record_is_refused_with_its_line(tmp_path):
    with pytest.raises(lorafamily.FileError, match=r"allocation\.jsonl does not exist; train\(\.\.\., log_dir"):
        lorafamily.ranks_at(tmp_path, 3)
    model = lorafamily.apply(tiny(), "adalora", rank=3, seed=0)
    lorafamily.train(model, data(), steps=40, log_dir=tmp_path, progress=False)
    lines = (tmp_path / "allocation.jsonl").read_text().splitlines()
    (tmp_path / "allocation.jsonl").write_text("\n".join([*lines[:2], lines[2][:40]]))
    with pytest.raises(lorafamily.FileError, match=r"allocation\.jsonl, line 3: not a record of a decision"):
        lorafamily.redraw(tmp_path)
    (tmp_path / "allocation.jsonl").write_text("")
    with pytest.raises(lorafamily.FileError, match="empty"):
        lorafamily.ranks_at(tmp_path, 3)


def test_tensorboard_shows_the_run(tmp_path):
    model = lorafamily.apply(tiny(), "adalora", rank=3, seed=0)
    history = lorafamily.train(model, data(), steps=40, validation=data(1), log_dir=tmp_path, progress=False)
    shown = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "scalars": 0, "histograms": 0}).Reload()

    def curve(tag: str) -> list[float]:
        return [event.value for event in shown.Scalars(tag)]

    assert curve("rank/total") == [step.rank for step in history.steps]
    assert curve("train/loss (nats)") == pytest.approx([step.loss for step in history.steps])  # stored as float32
    assert curve("train/orthogonality error") == pytest.approx([step.orthogonality for step in history.steps])
    assert {"train/penalty", "train/learning rate", "rank/trainable numbers", "validation/loss"} <= set(
        shown.Tags()["scalars"]
    )
    changes = [d for d in history.decisions if d.before != d.after]
    assert len(changes) > 5
    assert [event.step for event in shown.Images("rank/by layer")] == [0, *(d.step for d in changes)]
    assert [event.step for event in shown.Images("rank/history")] == [40]
    assert [event.step for event in shown.Images("rank/scores at decisions")] == [40]
    tags = [tag for kind in ("scalars", "images", "histograms") for tag in shown.Tags()[kind]]
    assert len(tags) == len(set(tags))  # of two things under one tag TensorBoard shows one
    assert [event.step for event in shown.Histograms("rank/scores")] == [d.step for d in history.decisions]
    for kind, start in rank_by_kind(history.ranks_start).items():
        assert curve(f"rank by kind/{kind}") == [start, *(rank_by_kind(d.after)[kind] for d in changes)]


def test_runs_sort_by_their_final_metrics_in_the_hparams_tab(tmp_path):
    model = lorafamily.apply(tiny(), "lora2", budget=3_000, seed=0)
    history = lorafamily.train(model, data(), steps=40, lr=0.02, validation=data(1), log_dir=tmp_path, progress=False)
    finals, settings = {}, {}
    for file in tmp_path.glob("events*"):  # all in the run's own folder, so that the tab has one line a run
        events = EventAccumulator(str(file)).Reload()
        finals |= {t: events.Scalars(t)[-1].value for t in events.Tags()["scalars"] if t.startswith("final/")}
        content = events.summary_metadata.get("_hparams_/session_start_info")
        if content is not None:
            from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

            info = HParamsPluginData.FromString(content.plugin_data.content).session_start_info
            settings = {name: value.number_value or value.string_value for name, value in info.hparams.items()}
    # TensorBoard stores float32.
    assert finals["final/loss"] == pytest.approx(history.metrics["loss"])
    assert finals["final/rank"] == history.steps[-1].rank
    assert finals["final/trainable numbers"] == history.steps[-1].trainable
    assert (settings["method"], settings["budget"], settings["lr"]) == ("lora2", 3_000, 0.02)
    assert settings["beta1"] == 0.85


def test_wide_models_stack_their_grids():
    ranks = {f"h.{i}.{kind}": i % 5 for i in range(24) for kind in ("q", "k", "v")}
    figure = rank_heatmap(ranks, dict.fromkeys(ranks, 0), "title")
    start, now, *_ = (axes.get_position() for axes in figure.axes)
    assert start.x0 == pytest.approx(now.x0)
    assert start.y0 > now.y1
