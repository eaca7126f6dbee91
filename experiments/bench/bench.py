"""The cost of low-rank training beyond the frozen model, for our methods, peft and full fine-tuning, as ratios.

    python experiments/bench/bench.py                                 # everything, about ten minutes on two cores
    python experiments/bench/bench.py --parts steps --shapes bert --methods lora lora2 --rounds 30

Writes `bench.json` and pictures into one folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that rooms find each other

import waiting  # noqa: F401 - before torch

# isort: split
import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import lorafamily
from bench.measuring import COMPARED, Batch, Measured, Setting, bert, facts, forwards, llama, ready, steps, timed
from lorafamily.functional import adapted_linear
from lorafamily.insight.drawing import COLOURS, save
from lorafamily.layers.placement import placement_of
from lorafamily.targets import match
from pages.report import as_text

Part = Literal["steps", "forwards", "starts", "products", "scaling"]
PARTS: tuple[Part, ...] = get_args(Part)
SHAPES: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {
    "bert": bert,
    "llama": llama,
    "small": partial(bert, layers=1, width=64, rows=2, tokens=16),
}


@dataclass(frozen=True)
class Bench:
    """Measure training steps, forwards, initialisation and single layers of every method."""

    parts: tuple[Part, ...] = PARTS
    """steps: training steps; forwards: inference; starts: time of `apply`; products: a layer's matrix products, each
    alone; scaling: one layer of several sizes"""
    shapes: tuple[str, ...] = ("bert", "llama")
    """bert: 6 layers, width 384, 16 × 128 tokens; llama: 6 layers, width 512, 4 × 256 tokens; small: for a quick try"""
    methods: tuple[str, ...] = ("lora", "olora", "alora", "lora2", "adalora")
    """our methods to measure; LoRA² in its dense formulation, peft and full fine-tuning are measured as well"""
    rank: int = 8
    """rank of every adapter, on all linear layers of the blocks"""
    dropout: float = 0.1
    """dropout probability of the variants with dropout"""
    rounds: int = 15
    """timed rounds"""
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    """widths of the single layers (scaling)"""
    ranks: tuple[int, ...] = (1, 8, 32, 128)
    """ranks on the single layers"""
    tokens: tuple[int, ...] = (64, 256, 1024, 4096)
    """tokens that pass through the single layers"""
    start_width: int = 4096
    """width of the layer whose QR initialisation is timed (starts)"""
    out: Path = Path("runs/bench")
    """folder for bench.json and the pictures"""


def main(given: Bench) -> dict[str, Any]:
    setting = Setting("cpu", torch.float32, given.rank, given.dropout, given.rounds, given.methods)
    given.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"facts": facts("cpu")}
    print("; ".join(f"{name} {value}" for name, value in results["facts"].items()))
    for part, measure in (("steps", steps), ("forwards", forwards)):
        if part in given.parts:
            found = {shape: measure(*ready(*SHAPES[shape](), setting), setting) for shape in given.shapes}
            for shape, rows in found.items():
                print(f"\n{part}, {shape}, rank {given.rank}, float32, {given.rounds} interleaved rounds")
                print(as_text(table(rows)))
            save(_bars(found, part), given.out / f"{part}.png")
            results[part] = {shape: [asdict(row) for row in rows] for shape, rows in found.items()}
    if "starts" in given.parts:
        results["starts"] = starts(given.start_width)
        print("\nstarts")
        print(as_text([("what", "value"), *((name, f"{value:.3g}") for name, value in results["starts"].items())]))
    if "products" in given.parts:
        alone = {}
        for shape in given.shapes:
            model, batch = SHAPES[shape]()
            alone[shape] = products(model, batch["input_ids"].numel(), given.rank)
            print(f"\nproducts of {shape}'s layers, each alone and on cold tensors (ms)")
            print(as_text(_products_table(alone[shape])))
        results["products"] = {shape: [asdict(row) for row in rows] for shape, rows in alone.items()}
    if "scaling" in given.parts:
        cells = scaling(given)
        print("\none layer, forward and backward, of the frozen layer's")
        print(as_text(_scaling_table(cells, given)))
        save(_scaling_figure(cells, given), given.out / "scaling.png")
        results["scaling"] = [asdict(cell) for cell in cells]
    (given.out / "bench.json").write_text(json.dumps(results, indent=1))
    return results


def table(rows: Sequence[Measured]) -> list[tuple[str, ...]]:
    """Rows as text; memory is what exceeds the first variant's."""
    with_memory = rows[0].memory is not None
    lines: list[tuple[str, ...]] = [("variant", "seconds", "ratio", "quartiles")]
    if with_memory:
        lines[0] += ("memory beyond (MiB)",)
    for row in rows:
        line: tuple[str, ...] = (
            row.variant,
            f"{row.seconds:.3f}",
            f"{row.ratio:.2f}",
            f"{row.low:.2f} to {row.high:.2f}",
        )
        if with_memory:
            line += (f"{(row.memory or 0) - (rows[0].memory or 0):.0f}",)
        lines.append(line)
    return lines


def starts(width: int) -> dict[str, float]:
    """Seconds that `apply` takes: the QR initialisation of one layer, and 7B parameters on the meta device."""
    import peft
    import transformers

    torch.manual_seed(0)
    linear = nn.Linear(width, width, bias=False)
    layer, weight = nn.Sequential(linear), linear.weight.detach().clone()
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["0"], init_lora_weights="olora")
    ours = timed(lambda: lorafamily.apply(layer, "olora", rank=8, alpha=8, targets="0"), "cpu")
    initial = placement_of(layer).adapters["0"].initial
    assert initial is not None
    U, V = initial.factors()
    lorafamily.remove(layer)
    assert torch.equal(linear.weight, weight)
    made: list[Any] = []
    theirs = timed(lambda: made.append(peft.get_peft_model(layer, config)), "cpu")
    lora = made[0].base_model.model[0]
    product = (lora.lora_B["default"].weight @ lora.lora_A["default"].weight).detach()
    with torch.device("meta"):
        large = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    on_meta = timed(lambda: lorafamily.apply(large, "lora2", rank=8), "cpu")
    assert all(parameter.is_meta for parameter in large.parameters())
    return {
        f"QR initialisation, {width} × {width}, rank 8 (s)": ours,
        "peft's (s)": theirs,
        "peft's / ours": theirs / ours,
        "largest difference of B A": (U.detach() @ V.detach() - product).abs().max().item(),
        "largest entry of B A": product.abs().max().item(),
        "LLaMA-2-7B on the meta device (s)": on_meta,
    }


@dataclass(frozen=True)
class Products:
    """Milliseconds of a linear layer's products, with the frozen weight and with the factors.

    `layers`: how many layers have this size. `read`: reading x twice and the gradient of the output twice, which the
    thin products cannot avoid.
    """

    d_in: int
    d_out: int
    layers: int
    forward: float
    backward: float
    down: float
    up_gradient: float
    hidden_gradient: float
    down_gradient: float
    read: float

    @property
    def frozen(self) -> float:
        """The products of the frozen layer."""
        return self.forward + self.backward

    @property
    def thin(self) -> float:
        """The products that every low-rank update adds."""
        return self.down + self.up_gradient + self.hidden_gradient + self.down_gradient


def products(model: nn.Module, n: int, rank: int) -> list[Products]:
    """The products of every layer size in a model, on tensors that are in no cache."""
    sizes = Counter(tuple(target.weight.shape) for target in match(model).values())
    return [_products(d_in, d_out, layers, n, rank) for (d_out, d_in), layers in sizes.items()]


def _products(d_in: int, d_out: int, layers: int, n: int, rank: int) -> Products:
    copies = range(1 + 2**24 // (n * min(d_in, d_out)))  # 64 MiB and more
    xs, gs = [torch.randn(n, d_in) for _ in copies], [torch.randn(n, d_out) for _ in copies]
    W, U, V, h = (torch.randn(shape) for shape in ((d_out, d_in), (rank, d_out), (rank, d_in), (rank, n)))

    def milliseconds(tensors: Sequence[Tensor], product: Callable[[Tensor], Tensor]) -> float:
        return 1e3 * statistics.median(timed(partial(product, tensor), "cpu") for _ in range(3) for tensor in tensors)

    return Products(
        d_in,
        d_out,
        layers,
        forward=milliseconds(xs, lambda x: F.linear(x, W)),
        backward=milliseconds(gs, lambda g: g @ W),
        down=milliseconds(xs, lambda x: V @ x.T),
        hidden_gradient=milliseconds(gs, lambda g: U @ g.T),
        up_gradient=milliseconds(gs, lambda g: h @ g),
        down_gradient=milliseconds(xs, lambda x: h @ x),
        read=2 * (milliseconds(xs, torch.sum) + milliseconds(gs, torch.sum)),
    )


def _products_table(rows: Sequence[Products]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [
        ("in → out", "layers", "x Wᵀ", "g W", "V xᵀ", "Uᵀ gᵀ", "h g", "gₕ x", "thin / frozen", "reading / frozen")
    ]
    for row in rows:
        each = (row.forward, row.backward, row.down, row.hidden_gradient, row.up_gradient, row.down_gradient)
        texts = (f"{time:.2f}" for time in each)
        shares = f"{row.thin / row.frozen:.3f}", f"{row.read / row.frozen:.3f}"
        lines.append((f"{row.d_in} → {row.d_out}", str(row.layers), *texts, *shares))
    thin, read, frozen = (sum(row.layers * getattr(row, name) for row in rows) for name in ("thin", "read", "frozen"))
    lines.append(
        ("all", str(sum(row.layers for row in rows)), *[""] * 6, f"{thin / frozen:.3f}", f"{read / frozen:.3f}")
    )
    return lines


@dataclass(frozen=True)
class Cell:
    """One square layer: time of forward and backward, as a ratio to the frozen layer's."""

    width: int
    tokens: int
    rank: int
    ratio: float


def scaling(given: Bench) -> list[Cell]:
    """Every width × tokens × rank."""
    torch.manual_seed(0)
    return [_cell(width, n, rank) for width in given.widths for n in given.tokens for rank in given.ranks]


def _cell(width: int, n: int, rank: int) -> Cell:
    W, b = torch.randn(width, width) / width**0.5, torch.zeros(width)
    x, towards = torch.randn(n, width, requires_grad=True), torch.randn(n, width)
    U, V = (torch.randn(shape, requires_grad=True) for shape in ((width, rank), (rank, width)))

    def run(layer: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: layer().backward(towards)

    frozen, adapted = run(lambda: F.linear(x, W, b)), run(lambda: adapted_linear(x, W, b, U, V))
    once = min(timed(frozen, "cpu") for _ in range(3))
    times = [(timed(frozen, "cpu"), timed(adapted, "cpu")) for _ in range(min(41, max(5, int(0.3 / once))))]
    return Cell(width, n, rank, statistics.median(time / floor for floor, time in times))


def _scaling_table(cells: Sequence[Cell], given: Bench) -> list[tuple[str, ...]]:
    by = {(cell.width, cell.tokens, cell.rank): cell for cell in cells}
    lines: list[tuple[str, ...]] = [("width, tokens", *(f"rank {rank}" for rank in given.ranks))]
    for width in given.widths:
        for n in given.tokens:
            lines.append((f"{width}, {n}", *(f"{by[width, n, rank].ratio:.2f}" for rank in given.ranks)))
    return lines


def _bars(found: Mapping[str, Sequence[Measured]], part: str) -> Figure:
    """A bar with quartiles for every variant, one panel for each shape."""
    most = max(len(rows) for rows in found.values())
    figure = Figure(figsize=(5 * len(found) + 1, 0.32 * most + 1.2), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for axes, (shape, rows) in zip(panels, found.items(), strict=True):
        names, ratios = [row.variant for row in rows], [row.ratio for row in rows]
        spread = [[r.ratio - r.low for r in rows], [r.high - r.ratio for r in rows]]
        colours = [COLOURS[5] if "peft" in name else "#999999" if name in COMPARED else COLOURS[0] for name in names]
        axes.barh(names, ratios, xerr=spread, color=colours, ecolor="#888888", height=0.7)
        for i, row in enumerate(rows):
            axes.text(row.high + 0.02, i, f"{row.ratio:.2f}", va="center", fontsize=8)
        axes.axvline(1, color="#444444", linewidth=0.8)
        axes.set(title=shape, xlabel=f"time, of the {names[0]}", xlim=(0, 1.12 * max(row.high for row in rows)))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.suptitle({"steps": "A training step", "forwards": "A forward in inference"}[part])
    return figure


def _scaling_figure(cells: Sequence[Cell], given: Bench) -> Figure:
    """Ratio over tokens, one panel for each width."""
    figure = Figure(figsize=(3 * len(given.widths), 3.4), layout="constrained")
    for axes, width in zip(
        figure.subplots(1, len(given.widths), squeeze=False, sharey=True)[0], given.widths, strict=True
    ):
        for colour, rank in zip(COLOURS, given.ranks, strict=False):
            line = [cell for cell in cells if cell.width == width and cell.rank == rank]
            axes.plot([c.tokens for c in line], [c.ratio for c in line], color=colour, label=f"rank {rank}")
        axes.set(title=f"width {width}", xlabel="tokens", xscale="log", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("time, of the frozen layer")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle("One layer, forward and backward")
    return figure


if __name__ == "__main__":
    main(tyro.cli(Bench))
