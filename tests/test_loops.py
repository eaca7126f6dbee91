"""Real clients run the scripts of docs/loops.md: the penalty acts, ranks move, and what was stopped goes on."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing import assert_close

from lorafamily.adapter import Adapter
from lorafamily.layers.placement import placement_of
from lorafamily.layers.state import Placement
from test_docs import ROOT, blocks

transformers = pytest.importorskip("transformers", reason="the page adapts models of transformers")

PAGE = "docs/loops.md"
STEPS = 24
LONGEST = 38  # lines of a script that are not blank; what is longer is no example
CLIENTS = {
    "trl: SFTTrainer": ("trl", "runs/sft/checkpoint-24"),
    "trl: DPOTrainer": ("trl", "runs/dpo/checkpoint-24"),
    "sentence-transformers": ("sentence_transformers", "runs/st/checkpoint-24"),
    "Lightning": ("lightning", "runs/lightning/step=24.ckpt"),
    "accelerate": ("accelerate", "runs/accelerate/epoch-3"),
    "Layers that are dropped (LayerDrop)": ("transformers", "runs/layerdrop/checkpoints/step-*24"),
    "Experts that no batch visits": ("torch", "nothing: the file of the middle is the only one"),
}
"""By section: what must be installed, and what a run that was stopped would not have written."""

pytestmark = pytest.mark.filterwarnings("ignore")  # the clients' own are of many kinds


def script(section: str) -> str:
    page = (ROOT / PAGE).read_text()
    (found,) = [part for part in page.split("\n## ") if part.startswith(section + "\n")]
    (code,) = re.findall(r"^```python\n(.*?)^```$", found, re.DOTALL | re.MULTILINE)
    return code


def frames_of(adapters: Mapping[str, Adapter]) -> dict[str, nn.Parameter]:
    """All but the gates. Gates are zero at the start, so that the task's gradient of the others is: what these have got
    then is the penalty's."""
    return {
        f"{at} {name}": parameter
        for at, adapter in adapters.items()
        for name, parameter in adapter.update.named_parameters()
        if adapter.update.role(name) != "gate"
    }


class Watch:
    """What optimisers of torch see while a script runs: gradients, and what the adapters have then."""

    def __init__(self, scope: dict):
        self.scope = scope
        self.steps = 0
        self.trainable: list[int] = []
        self.clipped: float | None = None
        self.without_gradient: set[tuple[int, str]] = set()

    @property
    def placement(self) -> Placement:
        found = self.scope["tuned"].model if "tuned" in self.scope else self.scope["model"]
        return placement_of(found)

    def before(self, optimizer: torch.optim.Optimizer, *given) -> None:
        if self.steps == 0 and type(optimizer).__module__.startswith("torch.optim"):  # not one that wraps it
            self.at_start = all(adapter.norm() == 0 for adapter in self.placement.adapters.values())
            # Of copies: the session listens at the tensors themselves for what arrives from the task.
            copies = copy.deepcopy(self.placement.adapters)
            frames = frames_of(copies)
            gradients = torch.autograd.grad(self.placement.method.penalty(copies.values()), list(frames.values()))
            self.expected = dict(zip(frames, gradients, strict=True))

    def after(self, optimizer: torch.optim.Optimizer, *given) -> None:
        if not type(optimizer).__module__.startswith("torch.optim"):
            return
        self.steps += 1
        self.trainable.append(self.placement.trainable())
        for at, adapter in self.placement.adapters.items():
            gates = [p for name, p in adapter.update.named_parameters() if adapter.update.role(name) == "gate"]
            if adapter.slices and not any(p.grad is not None and p.grad.any() for p in gates):
                self.without_gradient.add((self.steps, at))
        if self.steps == 1 and self.at_start:
            self.compare()

    def compare(self) -> None:
        frames = frames_of(self.placement.adapters)
        expected = torch.cat([self.expected[name].flatten() for name in frames])
        found = torch.cat([p.grad.flatten() for p in frames.values()])
        assert expected.norm() > 1e-3
        self.clipped = float(found @ expected / expected.square().sum())
        # Clipped, it is that gradient times one number; in float32, where a factor's gradient is a sum of products.
        assert_close(found, self.clipped * expected, rtol=1e-4, atol=1e-6)


@contextmanager
def watched(scope: dict) -> Iterator[Watch]:
    watch = Watch(scope)
    handles = [register_optimizer_step_pre_hook(watch.before), register_optimizer_step_post_hook(watch.after)]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def run(code: str, section: str) -> Watch:
    scope: dict = {"__name__": "__main__"}
    with watched(scope) as watch:
        if section.startswith("Experts"):
            with pytest.warns(UserWarning, match=r"no batch of the run reached 1 of 4 adapters: experts\.3\."):
                exec(compile(code, f"{PAGE}, {section}", "exec"), scope)
        else:
            exec(compile(code, f"{PAGE}, {section}", "exec"), scope)
    return watch


def saved() -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path("my-adapter").iterdir()}


@pytest.fixture
def models(monkeypatch, tmp_path) -> None:
    """The folders that the page's first block writes, where the scripts run."""
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(PAGE)[0], f"{PAGE}, block 1", "exec"), {})


@pytest.mark.parametrize("section", CLIENTS)
def test_a_client_allocates_with_the_penalty_and_goes_on_to_the_same_bytes(section, models):
    package, later = CLIENTS[section]
    pytest.importorskip(package, reason=f"the script is for {package}")
    code = script(section)
    assert len([line for line in code.splitlines() if line.strip()]) <= LONGEST
    whole = run(code, section)
    assert whole.steps == STEPS
    assert 0 < whole.clipped <= 1 + 1e-5
    adapters = whole.placement.adapters
    assert max(whole.trainable) <= whole.placement.sizing.budget
    assert whole.trainable[-1] < whole.trainable[0]
    assert sum(a.slices for a in adapters.values()) <= 0.9 * sum(a.initial_slices for a in adapters.values())
    assert len({adapter.slices for adapter in adapters.values()}) > 1
    assert all(adapter.settled for adapter in adapters.values())
    if "LayerDrop" in section:  # else nothing was dropped, and the guard had nothing to let pass
        assert len({step for step, _ in whole.without_gradient}) > 6

    bytes_of_whole = saved()
    for path in Path().glob(later):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree("my-adapter")
    again = run(code, section)
    # It went on, and did not begin anew. Those that save every epoch go on when slices are gone already, the others
    # while they are only off.
    assert again.steps == STEPS - (18 if section in ("Lightning", "accelerate") else 12)
    assert saved() == bytes_of_whole


def test_sentence_transformers_restores_the_best_adapters(models):
    """Its best checkpoint, too, is loaded into a model without adapters."""
    pytest.importorskip("sentence_transformers", reason="the script is for sentence-transformers")
    best = 'eval_strategy="steps", eval_steps=12, load_best_model_at_end=True, metric_for_best_model="eval_loss"'
    code = script("sentence-transformers").replace("save_steps=12", f"save_steps=12, {best}, greater_is_better=True")
    scope: dict = {}
    exec(code.replace("    loss=", "    eval_dataset=Dataset.from_list(rows), loss="), scope)
    assert scope["trainer"].state.best_model_checkpoint.endswith("checkpoint-12")  # the highest loss: the earlier one
    names = {step: Path(f"runs/st/checkpoint-{step}/lorafamily/adapter.safetensors").read_bytes() for step in (12, 24)}
    assert names[12] != names[24]
    assert saved()["adapter.safetensors"] == names[12]


def test_an_expert_without_tokens_gives_up_its_ranks_first_where_the_task_alone_counts(models):
    code = script("Experts that no batch visits").replace("interval=3)", 'interval=3, gradient_of="task")')
    scope: dict = {}
    exec(code, scope)
    ranks = {at: adapter.slices for at, adapter in placement_of(scope["model"]).adapters.items()}
    assert ranks == {"experts.0": 4, "experts.1": 4, "experts.2": 4, "experts.3": 2}


def test_every_section_of_the_page_is_run():
    sections = re.findall(r"^## (.*)$", (ROOT / PAGE).read_text(), re.MULTILINE)
    assert sections == list(CLIENTS)
