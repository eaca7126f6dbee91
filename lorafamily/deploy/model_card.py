"""The model card of an exported adapter: what the adapter is for readers, and what the Hub indexes it by."""

from __future__ import annotations

import json
import re
from pathlib import Path

from torch import nn

from lorafamily.deploy.folder import write_bytes
from lorafamily.deploy.peft_config import found_at, task_of
from lorafamily.layers.state import Placement

CARD, PICTURE = "README.md", "ranks.png"
NATIVE = "lorafamily"
"""The layout that `lorafamily.save` writes."""
OURS = "<!-- Written by lorafamily. Without this line the next export leaves the file as it is. -->"
PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
"""The Hub's names for peft's tasks."""


def write_card(folder: Path, model: nn.Module, placement: Placement, layout: str, base: str | None) -> None:
    """Write `README.md` and the picture it shows, unless somebody else's `README.md` is there."""
    card = folder / CARD
    if card.is_file() and OURS not in card.read_text(encoding="utf-8", errors="replace"):
        return
    from lorafamily.insight.drawing import save as draw  # matplotlib takes long to import
    from lorafamily.insight.heatmaps import rank_heatmap

    start = {at: adapter.initial_slices for at, adapter in placement.adapters.items()}
    slices = {at: adapter.slices for at, adapter in placement.adapters.items()}
    draw(rank_heatmap(start, slices, f"{placement.spec}: rank by layer and matrix"), folder / PICTURE)
    write_bytes(card, _text(model, placement, layout, base or found_at(model)).encode())


def _text(model: nn.Module, placement: Placement, layout: str, base: str | None) -> str:
    architecture = type(model).__name__
    trained = [*placement.inactive_values, *placement.inactive_buffers]
    slices = [adapter.slices for adapter in placement.adapters.values()]
    options = ", ".join(f"{key}={value!r}" for key, value in placement.method.options().items())
    rows = {
        "method": placement.spec,
        "options": options or "none",
        "base": f"{base or 'not noted'} ({architecture})",
        "asked for": _asked(placement),
        "trainable adapter parameters": f"{placement.trainable():,}",
        "slices": f"{min(slices)} to {max(slices)} in {len(slices)} modules, {sum(slices)} in all",
    }
    rows |= {"also trained": ", ".join(trained)} if trained else {}
    how = "" if layout == NATIVE else " and written as plain LoRA"
    table = "\n".join(f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items())
    return f"""{_front(model, layout, base)}
{OURS}

# {placement.spec} on {architecture}

A low-rank update ΔW = s · U V of the base's weights, trained with lorafamily{how}.

| | |
| --- | --- |
{table}

![Rank of every layer and matrix, at the start and now]({PICTURE})

```python
{_usage(model, layout, base)}
```
"""


def _front(model: nn.Module, layout: str, base: str | None) -> str:
    """The YAML block at the top. It names the base only if that is a name on the Hub, which refuses cards that name a
    folder."""
    on_hub = base is not None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) and not Path(base).exists()
    task = PIPELINES.get(task_of(model, dict(model.named_modules())) or "")
    lines = [f"base_model: {json.dumps(base)}"] if on_hub else []
    lines += [f"library_name: {layout if layout in ('diffusers', NATIVE) else 'peft'}"]
    lines += [f"pipeline_tag: {task}"] if task else []
    return "\n".join(["---", *lines, "tags:", "- lora", "- lorafamily", "---"])


def _asked(placement: Placement) -> str:
    """The budget or the rank that was asked for."""
    sizing = placement.sizing
    if sizing.budget is not None:
        when = "at any step" if sizing.budget_at == "peak" else "at the end"
        return f"{sizing.budget:,} trainable adapter parameters {when}"
    if sizing.rank_budget is not None:
        return f"{sizing.rank_budget:,} rank slices in all"
    return "ranks by layer" if sizing.ranks is not None else f"rank {sizing.rank} of every module"


def _usage(model: nn.Module, layout: str, base: str | None) -> str:
    """Code that loads the base and the adapter."""
    found = json.dumps(base or "BASE")
    if layout == "diffusers":
        made = f"pipeline = diffusers.DiffusionPipeline.from_pretrained({found})"
        return f'{made}\npipeline.load_lora_weights("THIS_FOLDER")'
    made = f"base = {type(model).__module__.partition('.')[0]}.{type(model).__name__}.from_pretrained({found})"
    load = "lorafamily.load" if layout == NATIVE else "peft.PeftModel.from_pretrained"
    return f'{made}\nmodel = {load}(base, "THIS_FOLDER")'
