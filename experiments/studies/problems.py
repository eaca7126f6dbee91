"""What the arms are tried on: the planted problem, where it is known which layers can help, the embedded model, and
sentences for a pretrained encoder.

Every problem has three texts or samples: one to train on, one to tune on (rates are chosen by it, curves are drawn on
it, and methods that score ranks score them on it), and one to judge on, which nothing else sees.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

import embedded
from lorafamily.batch import to_device
from tasks import Glue, TaskError
from tasks.task import read_rows

Batch = dict[str, Tensor]


class Problem(ABC):
    """`metric`: lower is better. `budget`: trainable parameters of an arm of size 1. `steps`, `evaluations`: of a run.
    `margin`: the difference in the metric that nobody would mind, fixed before any run. `tuning_seeds`, `seeds`: those
    that choose rates, and those that are judged. `goal`: the metric on the tuning split that steps are counted to."""

    name: str
    what: str
    metric: str
    budget: int
    steps: int
    evaluations: int
    margin: float
    goal: float
    tuning_seeds: Sequence[int] = (100,)
    seeds: Sequence[int] = range(8)
    head_lr: float | None = None
    logs: bool = True
    """Whether a run writes logs and checkpoints; one of some seconds is sooner done again than its pictures drawn."""

    def read(self, model: str | None, data: Path | None) -> None:
        """Take the model and the data from there.

        Raises:
            TaskError: they cannot be read, or the problem has its own.
        """
        if model is not None or data is not None:
            raise TaskError(f"the problem {self.name} comes with its model and data; leave out --model and --data")

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """A fresh model, as it was before anything is adapted."""

    def head(self, seed: int) -> str | None:
        """A regular expression for the new task head, which trains with every arm at `head_lr`."""
        return None

    @abstractmethod
    def training(self, seed: int) -> Any:
        """Shuffled batches, the same for every arm of the seed."""

    @abstractmethod
    def tuning(self, seed: int) -> Sequence[Batch]: ...

    @abstractmethod
    def judging(self, seed: int) -> Sequence[Batch]: ...

    def source(self) -> Sequence[Batch]:
        """What the model could do before, to measure forgetting on; empty where there is no such thing."""
        return ()

    def quality(self, loss: float, seed: int) -> float:
        """The metric, from a mean loss."""
        return loss

    def measure(self, model: nn.Module, batches: Sequence[Batch], seed: int) -> float:
        """The metric of a model."""
        return self.quality(self.loss(model, batches), seed)

    def loss(self, model: nn.Module, batches: Sequence[Batch]) -> float:
        """Mean over batches of one size, in eval mode."""
        was = model.training
        model.eval()
        device = next(model.parameters()).device
        with torch.no_grad():
            losses = [model(**to_device(batch, device)).loss.item() for batch in batches]
        model.train(was)
        return sum(losses) / len(losses)

    def planted(self, seed: int) -> frozenset[str]:
        """Names of the layers that can help; empty where nobody knows."""
        return frozenset()


@dataclass(frozen=True)
class Fit:
    """`loss`: mean squared error."""

    loss: Float[Tensor, ""]


class Branches(nn.Module):
    """Layers side by side: each has inputs of its own, and their outputs are added.

    As inputs of different layers are independent, what one layer gets wrong no other can put right.
    """

    def __init__(self, layers: int, width: int):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x: Float[Tensor, "batch layers width"], y: Float[Tensor, "batch width"]) -> Fit:
        return Fit(F.mse_loss(self.predicted(x), y))

    def predicted(self, x: Float[Tensor, "batch layers width"]) -> Float[Tensor, "batch width"]:
        return torch.stack([F.gelu(layer(x[:, i])) for i, layer in enumerate(self.branches)]).sum(0)


def _weight(model: Branches, layer: int) -> Tensor:
    return model.get_parameter(f"branches.{layer}.weight").data


class Planted(Problem):
    """Eight layers, of which four need an update of rank 4 and the others none; the budget is rank 2 for each.

    The seed draws everything: weights, which layers, updates, data. The target is the same network with its updates,
    plus noise, so that layers that cannot help still have gradients. All layers' inputs have the same variance in all;
    in `narrow` layers nearly all of it lies in four directions, in others it is spread evenly. EVA looks at nothing
    else. In "planted" the narrow layers are those that need the update, which reads these directions; in
    "misleading" they are the others.
    """

    name = "planted"
    what = (
        "Eight linear layers of 32 × 32 side by side, with independent inputs. Four of them, drawn by the seed, need "
        "an update of rank 4; nothing is to be gained in the others. The budget is rank 2 for each of the eight, so "
        "that it suffices if all of it goes to the four."
    )
    metric = "share of the planted change that is missing"
    layers, width, rank = 8, 32, 4
    budget = 16 * (2 * 32 + 1)  # sixteen slices, of AdaLoRA too, whose slices have a singular value each
    steps, batch = 120, 64
    evaluations = 15
    margin = 0.05
    goal = 0.7
    rows, held_out = 64 * 120, 512
    noise, strength = 0.3, 2.0
    logs = False
    narrow: ClassVar[Literal["needed", "others"]] = "needed"

    @functools.cache  # noqa: B019 - as many as there are seeds
    def drawn(self, seed: int) -> dict[str, Any]:
        """Weights, updates and samples of a seed."""
        draw = torch.Generator().manual_seed(1000 + seed)
        chosen = set(torch.randperm(self.layers, generator=draw)[: self.layers // 2].tolist())
        base, target = Branches(self.layers, self.width), Branches(self.layers, self.width)
        scales = []
        for i in range(self.layers):
            weight = torch.randn(self.width, self.width, generator=draw) / self.width**0.5
            frame = torch.linalg.qr(torch.randn(self.width, self.width, generator=draw))[0]
            spread = torch.ones(self.width)
            if (i in chosen) == (self.narrow == "needed"):
                spread[: self.rank] = 0.95 * self.width / self.rank
                spread[self.rank :] = 0.05 * self.width / (self.width - self.rank)
            scales.append(frame * spread.sqrt())
            left = torch.linalg.qr(torch.randn(self.width, self.rank, generator=draw))[0]
            change = left @ frame[:, : self.rank].T / spread[: self.rank].mean().sqrt()
            _weight(base, i).copy_(weight)
            _weight(target, i).copy_(weight + (self.strength * change if i in chosen else 0.0))
        samples = {}
        for split, rows in (("training", self.rows), ("tuning", self.held_out), ("judging", self.held_out)):
            x = torch.stack([torch.randn(rows, self.width, generator=draw) @ scale.T for scale in scales], 1)
            with torch.no_grad():
                y = target.predicted(x)
            # What is judged has no noise: the metric is then 0 where everything planted was learnt.
            noise = 0.0 if split == "judging" else self.noise
            samples[split] = (x, y + noise * torch.randn(y.shape, generator=draw))
        return {"chosen": chosen, "base": base.state_dict(), "samples": samples}

    def model(self, seed: int) -> nn.Module:
        model = Branches(self.layers, self.width)
        model.load_state_dict(self.drawn(seed)["base"])
        return model

    def planted(self, seed: int) -> frozenset[str]:
        return frozenset(f"branches.{i}" for i in self.drawn(seed)["chosen"])

    def training(self, seed: int) -> Any:
        x, y = self.drawn(seed)["samples"]["training"]
        return [{"x": a, "y": b} for a, b in zip(x.split(self.batch), y.split(self.batch), strict=True)]

    def tuning(self, seed: int) -> Sequence[Batch]:
        x, y = self.drawn(seed)["samples"]["tuning"]
        return [{"x": x, "y": y}]

    def judging(self, seed: int) -> Sequence[Batch]:
        x, y = self.drawn(seed)["samples"]["judging"]
        return [{"x": x, "y": y}]

    def quality(self, loss: float, seed: int) -> float:
        return loss / self._missing(seed)

    @functools.cache  # noqa: B019 - as many as there are seeds
    def _missing(self, seed: int) -> float:
        """The mean squared error of the model that nothing was learnt by, without noise."""
        return self.loss(self.model(seed), self.judging(seed))


class Misleading(Planted):
    """The planted problem with the layers' inputs exchanged: variance points to the layers that need nothing."""

    name = "misleading"
    what = (
        "The planted problem, but nearly all variance of a layer's inputs lies in four directions where the layer "
        "needs no update, and is spread evenly where it does."
    )
    narrow = "others"


class Embedded(Problem):
    """The byte decoder, from English prose to the standard library's source code; modules held out are halved by name
    into those to tune on and those to judge on."""

    name = "embedded"
    what = (
        "A byte-level decoder of 0.8M parameters, pretrained on English prose, adapted to Python source code; the "
        "budget is LoRA's at rank 8. Forgetting: bits per byte on docstrings of modules that were held out of both "
    )
    metric = "bits per byte"
    budget = 80_000
    steps, batch = 600, 16
    evaluations = 15
    margin = 0.02
    goal = 2.05
    pieces = 128
    """Of 128 bytes, in each held-out text."""

    def model(self, seed: int) -> nn.Module:
        return embedded.pretrained()

    def training(self, seed: int) -> Any:
        return embedded.batches(_code(), self.batch, seed=seed)

    def tuning(self, seed: int) -> Sequence[Batch]:
        return _pieces("tuning", self.pieces)

    def judging(self, seed: int) -> Sequence[Batch]:
        return _pieces("judging", self.pieces)

    def source(self) -> Sequence[Batch]:
        return _pieces("source", self.pieces)

    def quality(self, loss: float, seed: int) -> float:
        return loss / math.log(2)


@functools.cache
def _code() -> bytes:
    return embedded.code(validation=False)


@functools.cache
def _pieces(which: str, wanted: int) -> Sequence[Batch]:
    """So many pieces of a held-out text, from all over it, in batches of 64."""
    held_out = [path for path in embedded.library() if embedded.held_out(path)]
    if which == "source":
        text = embedded.docstrings(held_out)
    else:
        text = "\n".join(embedded.library()[path] for path in held_out[which == "judging" :: 2]).encode()
    chunks = embedded.Chunks(text)
    every = max(1, len(chunks) // wanted)
    rows = torch.stack([chunks[i]["bytes"] for i in range(0, len(chunks), every)][:wanted])
    return [{"bytes": part} for part in rows.split(64)]


class Sentences(Problem):
    """A GLUE task for MiniLM, tuned on the validation split and judged on the test split.

    The budget is LoRA's at rank 4 on every linear layer of the encoder, a singular value per slice included.
    """

    metric = "share of sentences classified wrongly"
    budget = 4 * 6 * (4 * (384 + 384 + 1) + 2 * (384 + 1536 + 1))
    steps, batch, length = 600, 16, 64
    evaluations = 15
    margin = 0.01
    seeds = range(5)
    head_lr = 1e-2
    curve = 436
    """Rows of the validation split that curves are drawn on, and ranks scored on."""

    def __init__(self, name: str, what: str, goal: float):
        self.name, self.what, self.goal = name, what, goal

    def read(self, model: str | None, data: Path | None) -> None:
        if model is None or data is None:
            raise TaskError(f"the problem {self.name} needs --model, a folder of all-MiniLM-L6-v2, and --data")
        self.task = Glue(self.name, model, data, self.batch, self.length)
        self.test = read_rows(data / self.name / "test.jsonl.gz")

    def model(self, seed: int) -> nn.Module:
        return self.task.model(seed)[0]

    def head(self, seed: int) -> str | None:
        return self.task.model(seed)[1]

    def training(self, seed: int) -> Any:
        return self.task.training(seed)

    def tuning(self, seed: int) -> Sequence[Batch]:
        every = max(1, len(self.task.held_out) // self.curve)
        return self._batches(self.task.held_out[::every][: self.curve])

    def judging(self, seed: int) -> Sequence[Batch]:
        return self._batches(self.test)

    def measure(self, model: nn.Module, batches: Sequence[Batch], seed: int) -> float:
        was, device = model.training, next(model.parameters()).device
        model.eval()
        wrong = rows = 0
        with torch.no_grad():
            for batch in batches:
                found = model(**to_device(batch, device)).logits.argmax(-1).cpu()
                wrong, rows = wrong + int((found != batch["labels"]).sum()), rows + len(found)
        model.train(was)
        return wrong / rows

    def _batches(self, rows: Sequence[dict[str, Any]]) -> Sequence[Batch]:
        """All rows in batches of 64, those of like length together."""
        columns = self.task.task.columns
        ordered = sorted(rows, key=lambda row: sum(len(row[column]) for column in columns))
        return [self.task.collate(ordered[i : i + 64]) for i in range(0, len(ordered), 64)]


MINILM = (
    "all-MiniLM-L6-v2 (22M parameters, six layers of width 384) with a new head whose rate is 0.01 under every arm, on "
)
PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for problem in (
        Planted(),
        Misleading(),
        Embedded(),
        Sentences("sst2", MINILM + "on SST-2: is the sentence of a film review positive or negative?", 0.15),
        Sentences("mrpc", MINILM + "on MRPC: do two sentences say the same?", 0.25),
    )
}
