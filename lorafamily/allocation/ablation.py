"""AB-LoRA (ALoRA, sec. 3.3, eq. 6): a slice is worth what the network loses without it plus what it gives alone.

    IS(i) = S(M) − S(M∖i) + S(M_i),   S = −loss on one batch of validation data

M∖i has slice i off; M_i has slice i on and all others in the whole network off. That is two forwards a slice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lorafamily.adapter import Adapter
from lorafamily.allocation.replay import PeakActivations, Tape
from lorafamily.allocation.run import Run
from lorafamily.allocation.scorer import Scorer, Scores
from lorafamily.errors import AllocationError
from lorafamily.layers.placement import targets_of
from lorafamily.names import place_of

SCORING_ROWS = 32  # ALoRA, sec. 4: ranks are scored on one fixed batch of 32 validation samples
ON_A_GPU = 1024.0  # MiB for ablations in one batch, unless `scoring_memory` says otherwise


class Ablation(Scorer):
    """AB-LoRA, exact, in about half the time of two forwards a slice: what comes before a layer is the same for all its
    ablations and is replayed from a `Tape`; what comes after it is computed for several ablations in one batch.

    Args:
        scoring_rows: rows of validation data for the loss.
        scoring_memory: MiB of activations that one batch of ablations may take. None: 1024 on a GPU; on a CPU, where
            batching gains nothing, one ablation at a time.

    Raises:
        AllocationError: an option makes no sense, or the run has no validation data.
    """

    def __init__(self, run: Run, scoring_rows: int = SCORING_ROWS, scoring_memory: float | None = None):
        super().__init__(run)
        if not isinstance(scoring_rows, int) or isinstance(scoring_rows, bool) or scoring_rows < 1:
            raise AllocationError(f"scoring_rows={scoring_rows!r}: must be a whole number of rows, at least 1")
        if run.validation_loss is None:
            raise AllocationError(
                "ranks are scored on validation data, and the run has none: pass train(..., validation=batches)"
            )
        self.loss: Callable[[], Tensor] = partial(run.validation_loss, scoring_rows)
        if scoring_memory is not None and not (isinstance(scoring_memory, Real) and scoring_memory > 0):
            raise AllocationError(f"scoring_memory={scoring_memory!r}: must be a positive number of MiB, or None")
        self.memory = scoring_memory
        self._batches = True  # until the model turns out not to work under vmap
        self._replays: bool | None = None  # not known before the first scoring

    @torch.no_grad()
    def why_not_finite(self) -> str:
        loss = float(self.loss())
        if loss - loss == 0:
            return "the loss of the scored rows overflows with some slices switched off; lower lr"
        return (
            f"the loss of the scored rows is {loss}. If all their labels are masked (-100), shuffle the validation "
            "data or score more rows (scoring_rows)"
        )

    @torch.no_grad()
    def scores(self) -> Scores:
        ablations = 2 * sum(adapter.slices for adapter in self.run.adapters.values())
        quiet = not self.run.progress
        with tqdm(total=ablations, desc="scoring ranks", unit="ablation", leave=False, disable=quiet) as bar:
            whole, without = self._losses(bar)
            with all_off(self.run.adapters):
                _, alone = self._losses(bar)
        return {name: without[name] - whole - alone[name] for name in without}

    def _losses(self, bar: tqdm) -> tuple[Float[Tensor, ""], Scores]:
        """The loss with the adapters as they are, and for every slice the loss with that slice switched over: off where
        adapters are on, on where they are off."""
        tape = Tape(self.run.model)
        with PeakActivations() as one_pass:
            unchanged = tape.run(self._loss).cpu()
        losses = {name: unchanged.repeat(adapter.slices) for name, adapter in self.run.adapters.items()}
        names = {id(module): name for name, module in self.run.model.named_modules()}
        at = {path: names[id(target.layer)] for path, target in targets_of(self.run.model).items()}
        reached = {layer: i for i, layer in enumerate(tape.order)}
        called = [name for name in losses if at[name] in reached and len(losses[name])]
        called.sort(key=lambda name: reached[at[name]])
        if self._replays is None and called:
            self._replays = self._can_replay([at[name] for name in called], unchanged)
        for name in called:
            adapter = self.run.adapters[name]
            if self._replays:
                tape.wind_to(at[name], self._loss)
            only = torch.eye(adapter.slices, device=adapter.device)
            gates = only if adapter.off else 1 - only
            parts = []
            for batch in gates.split(self._batch_size(adapter.device, tape.bytes, one_pass.peak)):
                parts.append(self._with_gates(tape, adapter, batch).cpu())
                bar.update(len(batch))
            losses[name] = torch.cat(parts)
        return unchanged, losses

    def _can_replay(self, layers: list[str], unchanged: Float[Tensor, ""]) -> bool:
        """Whether the loss stays the same if what comes before a layer is replayed: tried for every matrix of a block,
        where it is called last, so that most of the model comes before it. `layers`: in the order of their calls."""
        tape, can = Tape(self.run.model), True
        last = {place_of(layer)._replace(layer=None): layer for layer in layers}
        try:
            for layer in sorted(last.values(), key=layers.index):
                tape.wind_to(layer, self._loss)
                can = can and tape.replays(self._loss, unchanged)
            can = can and tape.replays(self._loss, unchanged)  # the first time may have found what winding left behind
        except Exception:  # whatever a module raises that misses what another has left behind
            can = False
        if not can:
            warnings.warn(
                f"modules of {type(self.run.model).__name__} hand on more than their outputs (as routers do, if loads "
                "are in the loss, or layers that share keys and values), so ranks are scored by whole forwards, which "
                "takes about twice the time",
                stacklevel=2,
            )
        return can

    def _batch_size(self, device: torch.device, recorded: int, of_one: int) -> int:
        """How many ablations fit into one batch if each needs `of_one` bytes and the tape has `recorded`."""
        if not self._batches or (self.memory is None and device.type == "cpu"):
            return 1
        return max(1, int(((self.memory or ON_A_GPU) * 2**20 - recorded) / max(of_one, 1)))

    def _with_gates(self, tape: Tape, adapter: Adapter, gates: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
        def loss(gate: Float[Tensor, " r"]) -> Tensor:
            with adapter.gated(gate):
                return self._loss()

        if len(gates) > 1 and self._batches:
            try:
                with warnings.catch_warnings():
                    # Attention on a CPU has no batching rule and runs once a slice, with a warning.
                    warnings.filterwarnings("ignore", "There is a performance drop")
                    return tape.run(lambda: torch.func.vmap(loss)(gates))
            except RuntimeError as error:
                self._batches = False
                warnings.warn(
                    f"{type(self.run.model).__name__} cannot run several ablations in one batch, so they run one by "
                    f"one: {str(error).splitlines()[0]}",
                    stacklevel=2,
                )
        return torch.stack([tape.run(partial(loss, gate)) for gate in gates])

    def _loss(self) -> Float[Tensor, ""]:
        return self.loss().double()


class AblationEstimate(Ablation):
    """AB-LoRA to first order in the gates: one backward with all slices on, one with all off.

    S(M) − S(M∖i) ≈ ∂S/∂g_i at g = 1, and S(M_i) ≈ S(M_0) + ∂S/∂g_i at g = 0, where M_0 has all slices off.
    """

    def __init__(self, run: Run, scoring_rows: int = SCORING_ROWS):
        super().__init__(run, scoring_rows)

    @torch.no_grad()
    def scores(self) -> Scores:
        present = {name: adapter for name, adapter in self.run.adapters.items() if adapter.slices}
        result = {at: torch.zeros(a.slices, dtype=torch.float64, device="cpu") for at, a in self.run.adapters.items()}
        for value in (1.0, 0.0):
            gates = {n: torch.full((a.slices,), value, device=a.device, requires_grad=True) for n, a in present.items()}
            with ExitStack() as stack, torch.enable_grad():
                for name, adapter in present.items():
                    stack.enter_context(adapter.gated(gates[name]))
                loss = self.loss()
                gradients = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
            for name, gradient in zip(gates, gradients, strict=True):
                if gradient is not None:  # None: the layer has no part in the loss
                    result[name] -= gradient.cpu().double()
                if value == 0.0:
                    result[name] -= loss.detach().cpu().double()
        return result


@contextmanager
def all_off(adapters: Mapping[str, Adapter]) -> Iterator[None]:
    """In the block the model computes as if it had no adapters, except those with a gate."""
    for adapter in adapters.values():
        adapter.off = True
    try:
        yield
    finally:
        for adapter in adapters.values():
            adapter.off = False
