"""What adapters learnt: the analyses of section 7 of the LoRA paper, for any saved adapters of one base model.

    python experiments/analyse.py runs/embedded/cells/*/adapter
    python experiments/analyse.py RUN_A/adapter RUN_B/adapter --model PATH_OR_HUB_ID

Writes `analysis.json` and pictures, also for `tensorboard --logdir`: how similar the directions of any two adapters
are, compared with random ones; how large an update is in its own directions compared with the weight there; singular
values; sizes by layer and matrix.
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
from lorafamily.names import matrix_labels
from pages.report import as_text

DRAWN_PAIRS = 6  # at most; the JSON has all pairs


@dataclass(frozen=True)
class Analyse:
    """Analyse saved adapters."""

    adapters: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders that `lorafamily.save` wrote, all for the same base model"""
    model: str | None = None
    """folder or hub id of a transformers model; None: the embedded model"""
    side: analysis.Side = "down"
    """the factors whose directions are compared: "down" reads the layer's input, "up" writes its output"""
    overlap: int = 16
    """number of the weight's strongest directions in which the update's share is computed"""
    out: Path = Path("runs/analysis")
    """folder for the results"""


def main(given: Analyse) -> dict[str, Any]:
    names = _names(given.adapters)
    model = _base(given)
    loaded_as = {name: f"number{i}" for i, name in enumerate(names)}  # a path cannot be an adapter's name
    for name, folder in names.items():
        lorafamily.load(model, folder, name=loaded_as[name])
    layers = {name: analysis.layers_of(model, loaded_as[name]) for name in names}
    results: dict[str, Any] = {"side": given.side, "adapters": {name: str(folder) for name, folder in names.items()}}
    results["norms"] = {name: [asdict(row) for row in analysis.norms(model, loaded_as[name])] for name in names}
    results["spectra"] = {
        name: {at: analysis.spectrum(adapter).tolist() for at, (adapter, _) in by_layer.items()}
        for name, by_layer in layers.items()
    }
    results["amplification"] = {
        name: {at: _amplified(adapter, W, given.overlap) for at, (adapter, W) in by_layer.items()}
        for name, by_layer in layers.items()
    }
    similarities = {
        (one, other): _similarity(layers[one], layers[other], given.side)
        for one, other in itertools.combinations(names, 2)
    }
    results["similarity"] = {
        f"{one} | {other}": {at: phi.tolist() for at, phi in by_layer.items()}
        for (one, other), by_layer in similarities.items()
    }
    print(as_text(_table(results)))
    if similarities:
        print("\n" + as_text(_pairs(similarities, layers, given.side)))
    figures = {"spectra": _spectra(results["spectra"]), "norms": _norms(results["norms"])}
    if similarities:
        figures["similarity"] = _heatmaps(similarities, layers, given.side)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "analysis.json").write_text(json.dumps(results))
    with SummaryWriter(str(given.out)) as board:
        for name, figure in figures.items():
            save(figure, given.out / f"{name}.png")
            board.add_image(f"analysis/{name}", pixels(figure), dataformats="HWC")
    print(f"\n{given.out}/: analysis.json, {', '.join(f'{name}.png' for name in figures)}")
    return results


def _names(folders: Sequence[Path]) -> dict[str, Path]:
    """Each folder by the shortest end of its path that is unique; the part `adapter`, which all have, is left out."""
    if not folders:
        raise SystemExit("name the folders of saved adapters, such as runs/embedded/cells/*/adapter")
    parts = [[part for part in folder.parts if part != "adapter"] for folder in folders]
    for length in range(1, 1 + max(map(len, parts))):
        names = ["/".join(path[-length:]) for path in parts]
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
Similarities = Mapping[tuple[str, str], Mapping[str, Tensor]]
"""φ by pair of adapters and layer."""


def _similarity(one: Layers, other: Layers, side: analysis.Side) -> dict[str, Tensor]:
    """φ of every layer that both adapt."""
    return {
        at: analysis.similarity(*(analysis.directions(layers[at][0], side) for layers in (one, other)))
        for at in one
        if at in other
    }


def _table(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A line for every adapter and matrix of a block: means over the blocks."""
    lines: list[tuple[str, ...]] = [
        ("adapter, matrix", "slices", "effective", "‖ΔW‖ / ‖W‖", "factor", "in ΔW", "in W", "in random", "overlap")
    ]
    for name, rows in results["norms"].items():
        by_matrix: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        matrices = matrix_labels(row["module"] for row in rows)
        for row in rows:
            by_matrix[matrices[row["module"]]].append((row, results["amplification"][name][row["module"]]))
        for matrix, pairs in by_matrix.items():
            sizes = [statistics.fmean(row[key] for row, _ in pairs) for key in ("slices", "effective_rank", "relative")]
            columns = ("factor", "in_delta", "in_weight", "in_random", "overlap")
            amplified = [_mean_of([found[key] for _, found in pairs]) for key in columns]
            lines.append((f"{name}, {matrix}", *("–" if v is None else f"{v:.3g}" for v in (*sizes, *amplified))))
    return lines


def _mean_of(values: Sequence[float]) -> float | None:
    """The mean without nan, which is the factor of a layer without update; None if all are nan."""
    numbers = [value for value in values if not math.isnan(value)]
    return statistics.fmean(numbers) if numbers else None


def _pairs(similarities: Similarities, layers: Mapping[str, Layers], side: analysis.Side) -> list[list[str]]:
    """A line for every pair: φ of the strongest directions and of all, each with φ of random ones; means over
    layers."""
    lines = [["pair", "φ(1, 1)", "random", "φ(all, all)", "random"]]
    for (one, other), by_layer in similarities.items():
        chance = _by_chance(by_layer, layers[one], side)
        grids = [(phi, chance[at]) for at, phi in by_layer.items() if phi.numel()]
        means = [
            statistics.fmean(float(g[at, at]) for g in phis) for at in (0, -1) for phis in zip(*grids, strict=True)
        ]
        lines.append([f"{one} | {other}", *(f"{mean:.2f}" for mean in means or [math.nan] * 4)])
    return lines


def _spectra(spectra: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Singular values of every layer (thin) and their mean over layers (thick), relative to each layer's largest."""
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
    """‖ΔW‖ / ‖W‖ over blocks, a line for every matrix of a block."""
    figure = Figure(figsize=(2 + 3 * len(norms), 3.2), layout="constrained")
    matrices = matrix_labels(row["module"] for rows in norms.values() for row in rows)
    for axes, rows in zip(figure.subplots(1, len(norms), squeeze=False, sharey=True)[0], norms.values(), strict=True):
        looks = itertools.cycle(itertools.product(("-", "--", ":"), COLOURS))  # a new line style when colours run out
        for matrix, (line, colour) in zip(dict.fromkeys(matrices.values()), looks, strict=False):
            points = [(row["layer"] or 0, row["relative"]) for row in rows if matrices[row["module"]] == matrix]
            if points:
                x, y = zip(*sorted(points), strict=True)
                axes.plot(x, y, linestyle=line, color=colour, marker="o", markersize=3, label=matrix)
        axes.set(xlabel="layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    for axes, name in zip(figure.axes, norms, strict=True):
        axes.set_title(name, fontsize=8)
    figure.axes[0].set_ylabel("‖ΔW‖ / ‖W‖")
    figure.axes[-1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=3)
    return figure


def _heatmaps(similarities: Similarities, layers: Mapping[str, Layers], side: analysis.Side) -> Figure:
    """φ(i, j), mean over blocks, a column for every matrix of a block; a row for every pair and one for random ones."""
    pairs = list(similarities.items())[:DRAWN_PAIRS]
    by_matrix: dict[str, list[str]] = defaultdict(list)
    for at, matrix in matrix_labels(at for _, by_layer in pairs for at in by_layer).items():
        by_matrix[matrix].append(at)
    matrices = [*by_matrix]
    rows: list[tuple[str, dict[str, np.ndarray]]] = []
    for (one, other), by_layer in pairs:
        rows.append((f"{one}\n{other}", {matrix: _mean(by_layer, ats) for matrix, ats in by_matrix.items()}))
    chance = _by_chance(pairs[0][1], layers[pairs[0][0][0]], side)
    rows.append(
        ("two random ones\n(sizes of the first row)", {matrix: _mean(chance, ats) for matrix, ats in by_matrix.items()})
    )
    titles = {matrix: matrix.replace(", ", ",\n") for matrix in matrices}
    across = max(1.5, *(0.075 * len(line) for title in titles.values() for line in title.split("\n")))
    figure = Figure(figsize=(3.2 + across * len(matrices), 0.9 + 1.2 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(matrices), squeeze=False)
    for line, (label, grids) in zip(panels, rows, strict=True):
        for axes, matrix in zip(line, matrices, strict=True):
            image = axes.imshow(grids[matrix], cmap="cividis", vmin=0, vmax=1, origin="lower", aspect="auto")
            axes.set_xticks([]), axes.set_yticks([])
        line[0].set_ylabel(label, fontsize=7, rotation=0, ha="right", va="center")
    for axes, matrix in zip(panels[0], matrices, strict=True):
        axes.set_title(titles[matrix], fontsize=8)
    figure.colorbar(image, ax=figure.axes, label="φ(i, j)", shrink=0.8)
    figure.suptitle(
        "Similarity of subspaces: i directions of the one (up), j of the other (right), from 1", fontsize=10
    )
    return figure


def _mean(by_layer: Mapping[str, Tensor], layers: Sequence[str]) -> np.ndarray:
    """The mean over these layers; each entry over those that have so many directions. A single nan if there are
    none."""
    phis = [by_layer[at].numpy() for at in layers if at in by_layer and by_layer[at].numel()]
    if not phis:
        return np.full((1, 1), np.nan)
    shape = tuple(max(phi.shape[axis] for phi in phis) for axis in (0, 1))
    grid = np.full((len(phis), *shape), np.nan)
    for layer, phi in zip(grid, phis, strict=True):
        layer[: phi.shape[0], : phi.shape[1]] = phi
    mean: np.ndarray = np.nanmean(grid, 0)
    return mean


def _by_chance(similarity: Mapping[str, Tensor], layers: Layers, side: analysis.Side) -> dict[str, Tensor]:
    """φ of equally many random directions in the same spaces."""
    generator, axis = torch.Generator().manual_seed(0), 1 if side == "down" else 0
    return {
        at: analysis.similarity(
            *(analysis.random_directions(k, layers[at][1].shape[axis], generator) for k in phi.shape)
        )
        for at, phi in similarity.items()
    }


if __name__ == "__main__":
    main(tyro.cli(Analyse))
