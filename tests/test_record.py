"""What a run leaves in its folder: the allocation comes back from it without the model."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D
from matplotlib.text import Text
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lorafamily
from conftest import data, few_rounds, tiny
from lorafamily import cli
from lorafamily.history import Decision, History, Step
from lorafamily.insight.drawing import pixels
from lorafamily.insight.grids import COLUMNS, ROWS, STACKS, slices_by_matrix, small_grids
from lorafamily.insight.heatmaps import rank_heatmap
from lorafamily.insight.pictures import POINTS, pictures_of
from lorafamily.insight.record import read_decisions, read_steps
from lorafamily.training import board
from pages.groups import Group
from pages.plots import allocation

PICTURES = {"rank-by-layer.png", "rank-history.png", "course.png"}


@pytest.mark.parametrize("method", ["lora", "adalora", "alora", "lora2+olora"])  # what decides, and what does not
def test_ranks_and_pictures_come_back_without_the_model(method, tmp_path):
    model = lorafamily.apply(tiny(), method, rank=3, seed=0, **few_rounds(method))
    history = lorafamily.train(model, data(), steps=40, validation=data(1), log_dir=tmp_path, progress=False)
    ranks = {0: history.slices_start} | {decision.step: decision.after for decision in history.decisions}
    for step in range(41):
        assert lorafamily.slices_at(tmp_path, step) == ranks[max(known for known in ranks if known <= step)]
        if step:
            assert sum(lorafamily.slices_at(tmp_path, step).values()) == history.steps[step - 1].slices
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
        lorafamily.slices_at(tmp_path, 3)
    model = lorafamily.apply(tiny(), "adalora", rank=3, seed=0)
    lorafamily.train(model, data(), steps=12, log_dir=tmp_path, progress=False)
    lines = (tmp_path / "allocation.jsonl").read_text().splitlines()
    (tmp_path / "allocation.jsonl").write_text("\n".join([*lines[:2], lines[2][:40]]))
    with pytest.raises(lorafamily.FileError, match=r"allocation\.jsonl, line 3: not a record of a decision"):
        lorafamily.redraw(tmp_path)
    (tmp_path / "allocation.jsonl").write_text("")
    with pytest.raises(lorafamily.FileError, match="empty"):
        lorafamily.slices_at(tmp_path, 3)


def test_tensorboard_shows_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(board, "SHARE", 1e9)  # as in a long run
    model = lorafamily.apply(tiny(), "adalora", rank=3, seed=0)
    history = lorafamily.train(model, data(), steps=40, validation=data(1), log_dir=tmp_path, progress=False)
    shown = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "scalars": 0, "histograms": 0}).Reload()

    def curve(tag: str) -> list[float]:
        return [event.value for event in shown.Scalars(tag)]

    assert curve("rank/slices") == [step.slices for step in history.steps]
    assert curve("train/loss (nats)") == pytest.approx([step.loss for step in history.steps])  # stored as float32
    assert curve("train/orthogonality error") == pytest.approx([step.orthogonality for step in history.steps])
    assert {"train/penalty", "train/learning rate", "rank/trainable parameters", "validation/loss"} <= set(
        shown.Tags()["scalars"]
    )
    changes = [d for d in history.decisions if d.before != d.after]
    assert len(changes) > 5
    assert [event.step for event in shown.Images("rank/slices by layer")] == [d.step for d in changes]
    assert [event.step for event in shown.Images("rank/history of slices")] == [40]
    assert [event.step for event in shown.Images("rank/scores at decisions")] == [40]
    tags = [tag for kind in ("scalars", "images", "histograms") for tag in shown.Tags()[kind]]
    assert len(tags) == len(set(tags))  # of two things under one tag TensorBoard shows one
    assert [event.step for event in shown.Histograms("rank/scores")] == [d.step for d in history.decisions]
    for kind, start in slices_by_matrix(history.slices_start).items():
        assert curve(f"slices by matrix/{kind}") == [start, *(slices_by_matrix(d.after)[kind] for d in changes)]


@pytest.mark.parametrize(("method", "room"), [("adalora", 1), ("elalora", 2)])
def test_the_colour_scale_has_room_for_ranks_that_grow(method, room, tmp_path, monkeypatch):
    monkeypatch.setattr(board, "SHARE", 1e9)  # as in a long run
    model = lorafamily.apply(tiny(), method, rank=3, seed=0, warmup=2, final=10, interval=5)
    history = lorafamily.train(model, data(), steps=20, log_dir=tmp_path, progress=False)
    first = next(decision for decision in history.decisions if decision.before != decision.after)
    title = f"Slices by layer and matrix, step {first.step}: {first.reason}"
    wanted = pixels(rank_heatmap(history.slices_start, first.after, title, room * 3))
    shown = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload().Images("rank/slices by layer")
    found = imread(io.BytesIO(shown[0].encoded_image_string))[..., :3]
    assert np.array_equal(np.round(found * 255), wanted[..., :3])


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
    assert finals["final/slices"] == history.steps[-1].slices
    assert finals["final/trainable parameters"] == history.steps[-1].trainable
    assert (settings["method"], settings["budget"], settings["lr"]) == ("lora2", 3_000, 0.02)
    assert settings["beta1"] == 0.85


def test_wide_models_stack_their_grids():
    ranks = {f"h.{i}.{kind}": i % 5 for i in range(24) for kind in ("q", "k", "v")}
    figure = rank_heatmap(ranks, dict.fromkeys(ranks, 0), "title")
    start, now, *_ = (axes.get_position() for axes in figure.axes)
    assert start.x0 == pytest.approx(now.x0)
    assert start.y0 > now.y1


T5 = {"encoder": ("q", "k", "wi"), "decoder": ("q", "k", "wi", "cross.q")}


def cells(axes, labelled=None) -> dict[tuple[str, int], int]:
    """Ranks in a panel, by row's label and column; a panel beside one with labels has none of its own."""
    rows = [label.get_text() for label in (labelled or axes).get_yticklabels()]
    at = {text.get_position(): int(text.get_text()) for text in axes.texts}
    return {(rows[row], column): rank for (column, row), rank in at.items()}


@pytest.mark.parametrize("layers", [(2, 3), (12, 24)])  # start and now side by side, and one above the other
def test_every_stack_has_a_panel_whose_cells_are_its_ranks(layers):
    start, now = (
        {f"{s}.block.{i}.{k}": i + j for s, n in zip(T5, layers, strict=True) for i in range(n) for k in T5[s]}
        for j in (1, 2)
    )
    figure = rank_heatmap(start, now, "title")
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.texts}
    assert len(panels) == 4
    for stack in T5:
        first = next(axes for title, axes in panels.items() if title.startswith(f"{stack}, start"))
        for when, ranks in (("start", start), ("now", now)):
            own = {tuple(name.split(".", 3)): rank for name, rank in ranks.items() if name.startswith(stack)}
            shown = cells(panels[f"{stack}, {when}: {sum(own.values())} in all"], first)
            assert shown == {(kind, int(layer)): rank for (_, _, layer, kind), rank in own.items()}
    pixels(figure)
    assert {text.get_fontsize() for axes in panels.values() for text in axes.get_xticklabels()} == {8.0}


def test_what_is_outside_the_blocks_of_two_stacks_has_its_own_panel():
    ranks = {"encoder.block.0.q": 3, "decoder.block.0.q": 4, "lm_head": 5}
    titles = {axes.get_title(loc="left"): cells(axes) for axes in rank_heatmap(ranks, None, "title").axes if axes.texts}
    assert titles == {
        "encoder, start: 3 in all": {("q", 0): 3},
        "decoder, start: 4 in all": {("q", 0): 4},
        "outside blocks, start: 5 in all": {("lm_head", 0): 5},
    }
    assert slices_by_matrix(ranks) == {"encoder, q": 3, "decoder, q": 4, "lm_head": 5}
    start = Decision(step=0, reason="start", threshold=None, before=ranks, after=ranks, scores={})
    legend = pictures_of([start], [])["rank-history"].axes[0].get_legend()
    said = [text.get_text() for text in legend.get_texts()]
    assert said[1:] == ["lm_head: 5 → 5", "decoder, q: 4 → 4", "encoder, q: 3 → 3"]


def test_one_stack_has_one_panel_and_no_name():
    ranks = {f"bert.encoder.layer.{i}.{kind}": i for i in range(4) for kind in ("query", "value")} | {"classifier": 7}
    (start, now) = (axes for axes in rank_heatmap(ranks, ranks, "title").axes if axes.texts)
    assert (start.get_title(), now.get_title()) == ("start: 19 in all", "now: 19 in all")
    assert cells(start) == {(kind, i): i for i in range(4) for kind in ("query", "value")} | {("classifier", 4): 7}
    assert [label.get_text() for label in start.get_xticklabels()] == ["0", "1", "2", "3", "–"]


MANY = {
    "experts": [f"layers.{i}.experts.{e}.{k}" for i in range(8) for e in range(80) for k in ("gate", "up", "down")],
    "a sequence": [f"net.{i}" for i in range(2000)],
    "blocks": [f"blocks.{i}.{k}" for i in range(500) for k in "qkvo"],
    "stacks": [f"experts.{i}.layers.{j}.w" for i in range(900) for j in range(2)],
    "all of it": [
        f"s{'abcdefghij'[i % 10]}.blocks.{i // 10}.x{j}{'abcde'[j % 5]}" for i in range(900) for j in range(9)
    ],
}


def artists(figure) -> int:
    return len(figure.findobj())


@pytest.mark.parametrize("kind", MANY)
def test_a_picture_of_very_many_modules_has_some_hundred_rows(kind):
    names = MANY[kind]
    start, now = {name: 2 + i % 7 for i, name in enumerate(names)}, {name: i % 5 for i, name in enumerate(names)}
    grids = small_grids(names, [start, now])
    rows, columns = (
        sum(len(own[0].matrices) for own in grids.values()),
        max(len(own[0].layers) for own in grids.values()),
    )
    assert rows <= ROWS
    assert columns <= COLUMNS
    assert len(grids) <= STACKS
    for number, ranks in enumerate((start, now)):  # nothing is lost: every module is in one cell
        assert sum(own[number].total for own in grids.values()) == sum(ranks.values())
    cells = sum(int((grids[at][0].ranks >= 0).sum()) for at in grids)
    figure = rank_heatmap(start, now, "title")
    assert f"{len(names):,} modules in {cells:,} cells" in figure.get_suptitle()
    many = [Decision(0, {}, start, "start"), *(Decision(i, start, now, "cut") for i in range(1, 1001))]
    steps = [Step(i, 1.0, 0.0, 0.1, 1.0, 1000 - i // 50, 9) for i in range(1, 30_001)]
    drawn = pictures_of(many, steps)
    assert "decision that changed ranks (1000 in all)" in str(
        [t.get_text() for t in drawn["rank-history"].findobj(Text)]
    )
    for name, picture in drawn.items():
        assert artists(picture) < 6_000, name
        assert max(len(line.get_xdata()) for line in picture.findobj(Line2D)) <= POINTS, name
        assert picture.dpi * max(picture.get_size_inches()) < 6_000, name


def test_a_cell_is_the_mean_of_the_modules_it_stands_for():
    names = [f"layers.{i}.experts.{e}.{k}" for i in range(130) for e in range(50) for k in ("up", "down")]
    ranks = {name: i % 11 for i, name in enumerate(names)}
    (grid,) = small_grids(names, [ranks])[""]
    assert grid.matrices == ["experts.*.up", "experts.*.down"]
    assert (grid.layers[0], grid.layers[-1]) == ("0–2", "128–129")
    own = [rank for name, rank in ranks.items() if name.endswith("down") and name.split(".")[1] in ("0", "1", "2")]
    assert grid.ranks[1, 0] == pytest.approx(sum(own) / len(own))


class Clock:
    """Time as it is said to go by."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(
    "slow", [0.3, 40.0]
)  # seconds that a picture takes, as with some and with thousands of modules
def test_pictures_take_at_most_two_hundredths_of_a_run(slow, tmp_path, monkeypatch):
    clock, drawn = Clock(), []

    def draw(*arguments):
        clock.now += slow
        drawn.append(clock.now)
        return Figure()

    monkeypatch.setattr(board, "rank_heatmap", draw)
    monkeypatch.setattr(board, "pixels", lambda figure: np.zeros((4, 4, 3), np.uint8))
    start = Decision(0, {}, {"layers.0.q": 4, "layers.1.q": 4}, "start")
    shown = board.Board(tmp_path, start, 4, allowance=board.Allowance(clock))
    shares = []
    for step in range(1, 3001):  # a second each, with a decision that changes ranks after every one
        clock.now += 1.0
        decision = Decision(
            step, {"layers.0.q": step % 4, "layers.1.q": 4}, {"layers.0.q": (step + 1) % 4, "layers.1.q": 4}, ""
        )
        shown.step(Step(step, 1.0, 0.0, 0.1, 1.0, 8, 99), decision)
        shares.append(len(drawn) * slow / clock.now)
    assert len(drawn) == round(shown.allowance.spent / slow)
    assert 3 / slow < len(drawn)  # and they are drawn, where there is time
    assert max(shares[1000:]) <= 0.02 + (slow > 1) * 0.02  # the first one's time cannot be known
    assert shares[-1] <= 0.02
    # Every change is in the record and the curves; the last one is drawn at the end.
    expected = len(drawn) + (not shown.shown)
    shown.close(History(), {}, {"rank-by-layer": Figure()})
    assert len(drawn) == expected
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert [event.step for event in events.Scalars("slices by matrix/q")] == list(range(3001))
    assert [event.step for event in events.Images("rank/slices by layer")][-1] == 3000


def test_a_short_run_draws_each_picture_once_at_its_end(tmp_path, monkeypatch):
    calls = []
    draw = FigureCanvasAgg.draw
    monkeypatch.setattr(FigureCanvasAgg, "draw", lambda canvas: calls.append(1) or draw(canvas))
    model = lorafamily.apply(tiny(), "adalora", rank=3, seed=0, interval=1)
    history = lorafamily.train(model, data(), steps=40, log_dir=tmp_path, progress=False)
    changes = [d for d in history.decisions if d.before != d.after]
    assert len(changes) > 5
    assert len(calls) == len(list(tmp_path.glob("*.png"))) == 4
    assert read_decisions(tmp_path)[1:] == history.decisions
    shown = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in shown.Images("rank/slices by layer")] == [changes[-1].step]


def test_a_comparison_draws_a_line_of_panels_for_every_stack():
    """Mean over seeds; a method that adapts one stack alone has no panel in the other's line."""
    ranks = {"encoder.block.0.q": 2, "encoder.block.1.q": 4, "decoder.block.0.q": 6}
    encoder = {name: rank for name, rank in ranks.items() if name.startswith("encoder")}
    groups = [
        Group("lora", "9,000", targets, 0.1, tuple({"ranks_start": of, "ranks_end": {n: r + i for n, r in of.items()}}
              for i in (0, 2)))
        for targets, of in ((None, ranks), ("encoder", encoder))
    ]  # fmt: skip
    panels = {axes.get_title(loc="left"): cells(axes) for axes in allocation(groups).axes if axes.texts}
    assert panels == {
        "lora @ 9,000\nencoder": {("q", 0): 3, ("q", 1): 5},
        "lora @ 9,000\ndecoder": {("q", 0): 7},
        "lora @ 9,000 on encoder\nencoder": {("q", 0): 3, ("q", 1): 5},
    }


def test_the_command_shows_a_map_for_every_stack():
    ranks = {"encoder.block.0.q": 1, "encoder.block.1.q": 2, "decoder.block.0.cross": 4, "lm_head": 0}
    assert cli._heatmap(ranks).splitlines() == [
        "encoder: slices by layer, 0 to 1; █ = 4",
        "q        ▂▄",
        "decoder: slices by layer, 0 to 0; █ = 4",
        "cross    █",
        "outside blocks: slices by layer; █ = 4",
        "lm_head   ",
    ]
