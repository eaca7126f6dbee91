"""Reports on a run: evaluations, lines of progress, samples of answers, and the result in words."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from lorafamily.batch import LossFn, weigher
from lorafamily.chat.batches import ChatBatches
from lorafamily.chat.forms import Conversation
from lorafamily.chat.generating import answers_to, questions_of
from lorafamily.chat.loss import ChunkedLoss
from lorafamily.chat.settings import Train
from lorafamily.chat.templates import Template
from lorafamily.history import History, Step
from lorafamily.terminal import in_units
from lorafamily.training.batches import mean_loss
from lorafamily.training.processes import Processes
from lorafamily.training.schedule import total_steps

LINES = 20  # lines of progress in a run, where there is no terminal for a bar
SAMPLE = 64  # the most tokens of a sample
EPOCHS = 3.0  # unless --steps or --epochs is given


@dataclass
class Reporter:
    """For one run: evaluates, prints progress, writes samples to TensorBoard, and describes the result.

    `evaluated`: the conversations of `validation`; `say`: prints a line.
    """

    options: Train
    model: Any
    template: Template
    batches: ChatBatches
    validation: ChatBatches | None
    evaluated: Sequence[Conversation]
    loss_fn: LossFn
    processes: Processes
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        given = self.options.optimisation
        epochs = EPOCHS if given.steps is None and given.epochs is None else given.epochs
        self.total = total_steps(self.batches, given.steps, epochs, self.options.batches.accumulate)
        self.tenth = max(1, math.ceil(self.total / 10))  # of the steps
        self.bar = sys.stderr.isatty() and not self.options.json
        self.questions, self.answers = questions_of(self.evaluated, self.template, self.options.evaluation.samples)
        self.board: SummaryWriter | None = None
        self.at = 0  # steps made
        self.first: tuple[float, int] | None = None  # after the first step: time without evaluations, tokens
        self.last = (0.0, 0)  # the same after the last step
        self.evaluating = 0.0  # seconds in evaluations
        if self.options.batches.chunk and not isinstance(self.loss_fn, ChunkedLoss):
            name = type(self.model).__name__
            self.say(f"{name} does more in its loss than a linear head and cross-entropy, so logits are not chunked")

    def close(self) -> None:
        """Close the file of the samples."""
        if self.board is not None:
            self.board.close()

    def step(self, step: Step) -> None:
        """Called after every step, in the first process."""
        self.at = step.step
        self.last = (time.perf_counter() - self.evaluating, self.batches.count.tokens)
        self.first = self.first or self.last
        every = max(1, self.total // LINES)
        if not self.bar and (step.step % every == 0 or step.step in (1, self.total)):
            rate = f"  {self.rate:,.0f} tokens/s" if self.rate else ""
            done = f"step {step.step}/{self.total}"
            self.say(f"{done}  loss {step.loss:.4f}  lr {step.lr:.2e}  slices {step.slices}{rate}")

    @property
    def rate(self) -> float:
        """Tokens per second of all processes together; 0 after a single step."""
        if self.first is None or self.last[0] <= self.first[0]:
            return 0.0
        return self.processes.world * (self.last[1] - self.first[1]) / (self.last[0] - self.first[0])

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """The `quality` on the rows kept for evaluation; writes samples to TensorBoard."""
        assert self.validation is not None
        begun = time.perf_counter()
        found = quality(model, self.validation, self.loss_fn, self.processes)
        if self.processes.first:
            self._write_samples(model)
            line = f"evaluation at step {self.at}: loss {found['loss']:.4f}, perplexity {found['perplexity']:.2f}"
            if self.bar:
                tqdm.write(line, file=sys.stderr)
            else:
                self.say(line)
        self.evaluating += time.perf_counter() - begun
        return found

    def _write_samples(self, model: Any) -> None:
        if not self.questions:
            return
        self.board = self.board or SummaryWriter(str(self.options.out / "log"), filename_suffix=".samples")
        written = answers_to(getattr(model, "_orig_mod", model), self.template, self.questions, SAMPLE)
        for number, samples in enumerate(zip(self.questions, written, self.answers, strict=True), 1):
            texts = zip(("asked", "written", "given"), samples, strict=True)
            # Indented, so that Markdown formats nothing.
            text = "\n\n".join(f"**{name}**\n\n{indent(value, '    ')}" for name, value in texts)
            self.board.add_text(f"samples/{number}", text, self.at)

    def result(self, history: History, exports: Mapping[str, Path]) -> tuple[dict[str, Any], str]:
        """The result as data, for --json, and in words."""
        start, end = sum(history.slices_start.values()), sum(history.slices_end.values())
        first, last = history.steps[0].loss, history.smoothed_loss()[-1]
        out, padding, memory = self.options.out, self.batches.count.padding, _peak()
        found = {
            "steps": len(history.steps),
            "loss": {"first": first, "last": last},
            "evaluation": history.metrics,
            "best": None if history.best is None else {"step": history.best.step, **history.best.metrics},
            "stopped": history.stopped,
            "seconds": history.seconds,
            "tokens per second": self.rate,
            "padding": padding,
            "slices": {"start": start, "end": end},
            "peak memory": memory,
            "out": str(out),
            "exports": {name: str(path) for name, path in exports.items()},
        }
        held_out = ""
        if history.evaluations:
            before, after = history.evaluations[0].metrics, history.evaluations[-1].metrics
            held_out = f"; on held-out rows {before['loss']:.4f} → {after['loss']:.4f}"
            held_out += f", perplexity {after['perplexity']:.2f}"
        speed = f"{self.rate:,.0f} tokens/s, " if self.rate else ""
        peak = f", peak memory {in_units(memory)}" if memory else ""
        slices = f"{end}" if start == end else f"{start} → {end}"
        more = "".join(f", {path.name}" for path in exports.values())
        return found, (
            f"{history.stopped}: loss {first:.4f} → {last:.4f} (smoothed){held_out}\n"
            f"{speed}{padding:.1%} padding, {history.seconds:.1f} s in steps{peak}\n"
            f"{out}: adapter ({slices} slices), run.yaml, log/{more}\n"
            f'try it:   lorafamily generate --model {self.options.model.model} --adapter {out} "Hello"\n'
            f"watch it: tensorboard --logdir {out}"
        )


@torch.no_grad()
def quality(model: nn.Module, batches: ChatBatches, loss_fn: LossFn, processes: Processes) -> dict[str, float]:
    """Loss in nats per token, and perplexity, which is infinite if it is too large for a float."""
    weigh = weigher("tokens", getattr(model, "_orig_mod", model), loss_fn)
    loss = mean_loss(model, batches, loss_fn, weigh, processes)
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}


def _peak() -> int | None:
    """The most memory used, in bytes: on the GPU if there is one, otherwise by the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(used) if sys.platform == "darwin" else int(used) * 1024
