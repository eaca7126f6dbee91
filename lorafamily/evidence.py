"""What a method may look at before training: the inputs of layers, and the gradient of the loss in their weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
from jaxtyping import Float
from torch import Tensor

from lorafamily.errors import FileError

Wanted = Literal["inputs", "gradients"]
FORMAT = "lorafamily evidence 1"


@dataclass(frozen=True)
class LayerEvidence:
    """Of one layer. What no method wanted is None.

    `directions`: the leading principal directions of its inputs, orthonormal rows, in falling order; `explained`: the
    share of the inputs' variance along each; `gradient`: mean over the data of the loss's gradient in its weight.
    """

    directions: Float[Tensor, "k d_in"] | None = None
    explained: Float[Tensor, " k"] | None = None
    gradient: Float[Tensor, "d_out d_in"] | None = None


@dataclass(frozen=True)
class Evidence:
    """Of all adapted layers, by full name, from so many `batches`; `gather` makes it, `apply(evidence=...)` uses it."""

    layers: Mapping[str, LayerEvidence]
    batches: int

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Write it into one file (safetensors).

        Raises:
            FileError: it cannot be written.
        """
        tensors = {}
        for at, layer in self.layers.items():
            for field in fields(layer):
                if (value := getattr(layer, field.name)) is not None:
                    tensors[f"{at}.{field.name}"] = value.contiguous().clone()  # layers share directions
        about = {"format": FORMAT, "batches": str(self.batches), "layers": json.dumps(list(self.layers))}
        try:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(tensors, file, metadata=about)
        except OSError as error:
            raise FileError(f"{file}: cannot write evidence there ({error})") from error
        return Path(file)

    @staticmethod
    def load(file: str | os.PathLike[str]) -> Evidence:
        """Read what `save` wrote.

        Raises:
            FileError: it is missing, damaged, or something else.
        """
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                about = opened.metadata() or {}
                if about.get("format") != FORMAT:
                    raise FileError(f"{file}: a safetensors file, but none that Evidence.save wrote")
                # Cloned: products of tensors that lie elsewhere than torch puts them differ in the last bit.
                tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118 - no mapping
            found: dict[str, dict[str, Any]] = {at: {} for at in json.loads(about["layers"])}
            for key, value in tensors.items():
                at, _, name = key.rpartition(".")
                found[at][name] = value
            layers = {at: LayerEvidence(**values) for at, values in found.items()}
            return Evidence(layers, int(about["batches"]))
        except FileError:
            raise
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise FileError(f"{file}: no evidence that Evidence.save wrote ({type(error).__name__}: {error})") from None
