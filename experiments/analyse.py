"""What adapters learnt: section 7 of the LoRA paper, on any saved adapters of one base model.

    python experiments/analyse.py runs/embedded/cells/*/adapter
    python experiments/analyse.py RUN_A/adapter RUN_B/adapter --model PATH_OR_HUB_ID

Writes `analysis.json`, pictures, and the same pictures for `tensorboard --logdir`: how alike the directions of any two
adapters are, and two random ones; how much an update weighs in its own directions against what the weight has there;
singular values; size by layer and kind of matrix.
"""

from __future__ import annotations

import waiting  # noqa: F401 - before torch

# isort: split
import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import embedded
import lorafamily
from lorafamily.deploy.saved import read
from lorafamily.insight import analysis
from lorafamily.insight.drawing import COLOURS, pixels, save
from lorafamily.names import kind_labels
from pages.report import as_text

AT_MOST = 6  # pairs that are drawn; all are in the JSON


@dataclass(frozen=True)
class Analyse:
    """Look into saved adapters."""

    adapters: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders that `lorafamily.save` wrote, all for the same base model"""
    model: str | None = None
    """folder or hub id of a transformers model; None is the model that comes with the project"""
    side: analysis.Side = "down"
    """of the factors whose directions are compared: "down" reads the layer's input, "up" writes its output"""
    overlap: int = 16
    """strongest directions of the weight in which an update's share is told"""
    out: Path = Path("runs/analysis")
    """folder for the results"""


def main(given: Analyse) -> dict[str, Any]:
    names = _names(given.adapters)
    model = _base(given)
    placed = {name: f"number{i}" for i, name in enumerate(names)}  # a path is no name for an adapter
    for name, folder in names.items():
        lorafamily.load(model, folder, name=placed[name])
    layers = {name: analysis.layers_of(model, placed[name]) for name in names}
    told: dict[str, Any] = {"side": given.side, "adapters": {name: str(folder) for name, folder in names.items()}}
    told["norms"] = {name: [asdict(row) for row in analysis.norms(model, placed[name])] for name in names}
    told["spectra"] = {
        name: {at: analysis.spectrum(adapter).tolist() for at, (adapter, _) in own.items()}
        for name, own in layers.items()
    }
    told["amplification"] = {
        name: {at: _amplified(adapter, W, given.overlap) for at, (adapter, W) in own.items()}
        for name, own in layers.items()
    }
    alike = {pair: _alike(layers[pair[0]], layers[pair[1]], given.side) for pair in itertools.combinations(names, 2)}
    told["similarity"] = {
        f"{one} | {other}": {at: phi.tolist() for at, phi in by_layer.items()}
        for (one, other), by_layer in alike.items()
    }
    print(as_text(_table(told)))
    if alike:
        print("\n" + as_text(_pairs(alike, layers, given.side)))
    figures = {"spectra": _spectra(told["spectra"]), "norms": _norms(told["norms"])}
    if alike:
        figures["similarity"] = _heatmaps(alike, layers, given.side)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "analysis.json").write_text(json.dumps(told))
    with SummaryWriter(str(given.out)) as board:
        for name, figure in figures.items():
            save(figure, given.out / f"{name}.png")
            board.add_image(f"analysis/{name}", pixels(figure), dataformats="HWC")
    print(f"\n{given.out}/: analysis.json, {', '.join(f'{name}.png' for name in figures)}")
    return told


def _names(folders: Sequence[Path]) -> dict[str, Path]:
    """The shortest ends of the paths that tell them apart; `adapter`, which all have, tells nothing."""
    if not folders:
        raise SystemExit("name the folders of saved adapters, such as runs/embedded/cells/*/adapter")
    parts = [[part for part in folder.parts if part != "adapter"] for folder in folders]
    for length in range(1, 1 + max(len(own) for own in parts)):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, folders, strict=True))
    raise SystemExit("the same adapter is named twice")


def _base(given: Analyse) -> nn.Module:
    if given.model is None:
        return embedded.pretrained()
    import transformers

    architecture = read(given.adapters[0]).record["base"]["architecture"]
    model: nn.Module = getattr(transformers, architecture).from_pretrained(given.model)
    return model


def _amplified(adapter: lorafamily.Adapter, W: Tensor, k: int) -> dict[str, float]:
    found = analysis.amplification(adapter, W)
    return {**asdict(found), "factor": found.factor, "overlap": analysis.overlap(adapter, W, min(k, *W.shape))}


Layers = Mapping[str, tuple[lorafamily.Adapter, Tensor]]


def _alike(one: Layers, other: Layers, side: analysis.Side) -> dict[str, Tensor]:
    """φ of every layer that both adapt."""
    return {
        at: analysis.similarity(*(analysis.directions(own[at][0], side) for own in (one, other)))
        for at in one
        if at in other
    }


def _table(told: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A line for every adapter and kind of matrix: means over its layers."""
    lines: list[tuple[str, ...]] = [
        ("adapter, matrix", "rank", "effective", "‖ΔW‖ / ‖W‖", "factor", "in ΔW", "in W", "in random", "overlap")
    ]
    for name, rows in told["norms"].items():
        by_kind: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        kinds = kind_labels(row["module"] for row in rows)
        for row in rows:
            by_kind[kinds[row["module"]]].append((row, told["amplification"][name][row["module"]]))
        for kind, own in by_kind.items():
            sized = [statistics.fmean(row[key] for row, _ in own) for key in ("rank", "effective_rank", "relative")]
            columns = ("factor", "in_delta", "in_weight", "in_random", "overlap")
            seen = [_mean_of([found[key] for _, found in own]) for key in columns]
            lines.append((f"{name}, {kind}", *("–" if v is None else f"{v:.3g}" for v in (*sized, *seen))))
    return lines


def _mean_of(values: Sequence[float]) -> float | None:
    """Of those that are numbers; a layer without update has no factor."""
    return statistics.fmean(own) if (own := [value for value in values if not math.isnan(value)]) else None


def _pairs(
    alike: Mapping[tuple[str, str], Mapping[str, Tensor]], layers: Mapping[str, Layers], side: analysis.Side
) -> list[list[str]]:
    """A line for every pair: φ of the strongest directions and of all, means over layers; beside each a random pair."""
    lines = [["pair", "φ(1, 1)", "random", "φ(all, all)", "random"]]
    for (one, other), by_layer in alike.items():
        chance = _by_chance(by_layer, layers[one], side)
        grids = [(phi, chance[at]) for at, phi in by_layer.items() if phi.numel()]
        means = [statistics.fmean(float(g[at, at]) for g in own) for at in (0, -1) for own in zip(*grids, strict=True)]
        lines.append([f"{one} | {other}", *(f"{mean:.2f}" for mean in means or [math.nan] * 4)])
    return lines


def _spectra(spectra: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Singular values of every layer, thin, and their mean over layers, of the largest of each."""
    figure = Figure(figsize=(1 + 3 * len(spectra), 3.2), layout="constrained")
    for axes, (name, layers) in zip(
        figure.subplots(1, len(spectra), squeeze=False, sharey=True)[0], spectra.items(), strict=True
    ):
        shares = [np.array(values) / values[0] for values in layers.values() if values and values[0] > 0]
        for share in shares:
            axes.plot(range(1, 1 + len(share)), share, color=COLOURS[4], linewidth=0.8)
        if shares:
            longest = max(len(share) for share in shares)
            padded = [np.pad(share, (0, longest - len(share))) for share in shares]
            axes.plot(
                range(1, 1 + longest), np.mean(padded, 0), color=COLOURS[0], linewidth=2.2, marker="o", markersize=3
            )
        axes.set(title=name, xlabel="singular value", ylim=(0, 1.05))
        axes.title.set_fontsize(8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("of the layer's largest")
    figure.suptitle("Singular values of ΔW: every layer (thin), mean (thick)", fontsize=10)
    return figure


def _norms(norms: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """‖ΔW‖ / ‖W‖ over layers, a line for every kind of matrix."""
    figure = Figure(figsize=(2 + 3 * len(norms), 3.2), layout="constrained")
    kinds = kind_labels(row["module"] for rows in norms.values() for row in rows)
    for axes, rows in zip(figure.subplots(1, len(norms), squeeze=False, sharey=True)[0], norms.values(), strict=True):
        looks = itertools.cycle(itertools.product(("-", "--", ":"), COLOURS))  # where colours are used up, lines change
        for kind, (line, colour) in zip(dict.fromkeys(kinds.values()), looks, strict=False):
            own = [(row["layer"] or 0, row["relative"]) for row in rows if kinds[row["module"]] == kind]
            axes.plot(
                *zip(*sorted(own), strict=True), linestyle=line, color=colour, marker="o", markersize=3, label=kind
            ) if own else None
        axes.set(xlabel="layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    for axes, name in zip(figure.axes, norms, strict=True):
        axes.set_title(name, fontsize=8)
    figure.axes[0].set_ylabel("‖ΔW‖ / ‖W‖")
    figure.axes[-1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=3)
    return figure


def _heatmaps(
    alike: Mapping[tuple[str, str], Mapping[str, Tensor]], layers: Mapping[str, Layers], side: analysis.Side
) -> Figure:
    """φ(i, j), mean over the layers of a kind; a row for every pair, and what random directions would give."""
    pairs = list(alike.items())[:AT_MOST]
    of_kind: dict[str, list[str]] = defaultdict(list)
    for at, kind in kind_labels(at for _, by_layer in pairs for at in by_layer).items():
        of_kind[kind].append(at)
    kinds = [*of_kind]
    rows: list[tuple[str, dict[str, np.ndarray]]] = []
    for (one, other), by_layer in pairs:
        rows.append((f"{one}\n{other}", {kind: _mean(by_layer, own) for kind, own in of_kind.items()}))
    chance = _by_chance(pairs[0][1], layers[pairs[0][0][0]], side)
    rows.append(
        ("two random ones\n(sizes of the first row)", {kind: _mean(chance, own) for kind, own in of_kind.items()})
    )
    titles = {kind: kind.replace(", ", ",\n") for kind in kinds}
    across = max(1.5, *(0.075 * len(line) for title in titles.values() for line in title.split("\n")))
    figure = Figure(figsize=(3.2 + across * len(kinds), 0.9 + 1.2 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(kinds), squeeze=False)
    for own, (label, by_kind) in zip(panels, rows, strict=True):
        for axes, kind in zip(own, kinds, strict=True):
            image = axes.imshow(by_kind[kind], cmap="cividis", vmin=0, vmax=1, origin="lower", aspect="auto")
            axes.set_xticks([]), axes.set_yticks([])
        own[0].set_ylabel(label, fontsize=7, rotation=0, ha="right", va="center")
    for axes, kind in zip(panels[0], kinds, strict=True):
        axes.set_title(titles[kind], fontsize=8)
    figure.colorbar(image, ax=figure.axes, label="φ(i, j)", shrink=0.8)
    figure.suptitle(
        "How alike subspaces are: i directions of the one (up), j of the other (right), from 1", fontsize=10
    )
    return figure


def _mean(by_layer: Mapping[str, Tensor], layers: Sequence[str]) -> np.ndarray:
    """Over these layers, where they have as many directions; a single nan where there is none."""
    own = [by_layer[at].numpy() for at in layers if at in by_layer and by_layer[at].numel()]
    if not own:
        return np.full((1, 1), np.nan)
    shape = tuple(max(phi.shape[axis] for phi in own) for axis in (0, 1))
    grid = np.full((len(own), *shape), np.nan)
    for layer, phi in zip(grid, own, strict=True):
        layer[: phi.shape[0], : phi.shape[1]] = phi
    mean: np.ndarray = np.nanmean(grid, 0)
    return mean


def _by_chance(alike: Mapping[str, Tensor], layers: Layers, side: analysis.Side) -> dict[str, Tensor]:
    """φ of random directions, as many and in the same spaces."""
    generator, axis = torch.Generator().manual_seed(0), 1 if side == "down" else 0
    return {
        at: analysis.similarity(
            *(analysis.random_directions(k, layers[at][1].shape[axis], generator) for k in phi.shape)
        )
        for at, phi in alike.items()
    }


if __name__ == "__main__":
    main(tyro.cli(Analyse))
