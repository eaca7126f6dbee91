"""The model to plan for, from a config or a published shape, on the meta device; and a batch for it.

`lorafamily/zoo/shapes.json` maps names to published shapes: those entries of config.json that decide about shapes.
`matrices.json` maps model types to short names of a layer's matrices, with regular expressions for `targets`.
`transformers` is imported only when a model is asked for.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.errors import DataError, FileError, StateError
from lorafamily.layers.rows import Fused


def _zoo(name: str) -> dict[str, dict[str, Any]]:
    return json.loads((files("lorafamily") / "zoo" / name).read_text(encoding="utf-8"))


SHAPES = _zoo("shapes.json")


def model_of(given: str, architecture: str | None = None) -> nn.Module:
    """The model of a name in `SHAPES`, of a config.json or of a folder with one, on the meta device.

    `architecture`: a class of transformers, instead of the one that the config names.

    Raises:
        StateError: transformers is not installed, or has no such architecture.
        FileError: `given` is neither a known name nor a config that can be read.
    """
    try:
        import transformers
    except ImportError:
        raise StateError(
            'a plan from a name or a config builds the model with transformers: pip install "lorafamily[tasks]"'
        ) from None
    if given in SHAPES:
        settings = dict(SHAPES[given])
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    else:
        config = _config(Path(given), transformers)
    wanted = architecture or next(iter(getattr(config, "architectures", None) or []), None)
    cls = getattr(transformers, wanted, None) if wanted else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        lacks = f"transformers {transformers.__version__} has no model {wanted}"
        reason = lacks if wanted else "its config names no architecture"
        raise StateError(f"{given}: {reason}; name one by --architecture, such as BertForSequenceClassification")
    if "SequenceClassification" in cls.__name__ and config.problem_type is None:
        config.problem_type = "single_label_classification"  # some models derive it from the labels' values
    with torch.device("meta"):
        return cls(config)


def example_batch(model: nn.Module, rows: int, tokens: int) -> dict[str, Tensor]:
    """Token ids of shape (rows, tokens) and labels for the model's task, on the meta device; no padding, so no mask.

    Raises:
        DataError: rows or tokens are not positive, or the model has fewer positions than tokens.
    """
    for name, value in (("batch", rows), ("length", tokens)):
        if value < 1:
            raise DataError(f"{name}={value}: must be at least 1")
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise DataError(f"length={tokens}: this {type(model).__name__} has {positions} positions")
    ids = partial(torch.empty, dtype=torch.long, device="meta")
    batch, task = {"input_ids": ids(rows, tokens)}, type(model).__name__
    if task.endswith("ForSequenceClassification"):
        return batch | {"labels": ids(rows)}
    if task.endswith("ForQuestionAnswering"):
        return batch | {"start_positions": ids(rows), "end_positions": ids(rows)}
    return batch | {"labels": ids(rows, tokens)}


def targets_of(model: nn.Module, given: Sequence[str] | None) -> tuple[str | list[str] | None, Fused | None]:
    """`targets` and `fused` for `apply`, from targets that may be short names of matrices: q k v o up down gate."""
    if given is None:
        return None, None
    if len(given) == 1 and given[0] in ("attention", "all-linear"):
        return given[0], None
    known = _zoo("matrices.json").get(getattr(getattr(model, "config", None), "model_type", ""), {})
    short = known.get("matrices", {})
    parts = {"q", "k", "v"} & {*given}
    return [short.get(name, name) for name in given], known.get("fused") if parts else None


def _config(path: Path, transformers: Any) -> Any:
    if not path.exists():
        near = difflib.get_close_matches(str(path), SHAPES, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise FileError(f"{path}: no such file or folder, and no shape of that name; {hint}known: {', '.join(SHAPES)}")
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileError(f"{path}: no config.json there")
    try:
        return transformers.AutoConfig.from_pretrained(str(file), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{file}: no config that transformers reads ({' '.join(str(error).split())[:200]})") from None
