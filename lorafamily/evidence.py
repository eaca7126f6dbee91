"""What a method may look at before training: inputs of layers, and the loss's gradient with respect to weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
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
    """The evidence of one layer; what the method did not want is None.

    `directions`: the leading principal directions of its inputs, as orthonormal rows, in falling order; `explained`:
    the share of the inputs' variance along each; `gradient`: of the mean loss with respect to its weight.
    """

    directions: Float[Tensor, "k d_in"] | None = None
    explained: Float[Tensor, " k"] | None = None
    gradient: Float[Tensor, "d_out d_in"] | None = None


@dataclass(frozen=True)
class Evidence:
    """The evidence of all targets by full name, from `batches` batches; `gather` returns it, `apply` takes it."""

    layers: Mapping[str, LayerEvidence]
    batches: int

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Write it into one file (safetensors).

        Raises:
            FileError: it cannot be written.
        """
        tensors = {
            f"{at}.{name}": value.contiguous().clone()  # layers may share directions, which safetensors refuses
            for at, layer in self.layers.items()
            for name, value in vars(layer).items()
            if value is not None
        }
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
            FileError: the file is missing, damaged, or was not written by `save`.
        """
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                about = opened.metadata() or {}
                if (found := about.get("format")) != FORMAT:
                    raise ValueError(f"its format is {found}, not {FORMAT}")
                # Cloned into memory that torch aligns: otherwise products differ in the last bit.
                tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118 - no mapping
            values: dict[str, dict[str, Any]] = {at: {} for at in json.loads(about["layers"])}
            for key, value in tensors.items():
                at, _, name = key.rpartition(".")
                values[at][name] = value
            layers = {at: LayerEvidence(**of_layer) for at, of_layer in values.items()}
            return Evidence(layers, int(about["batches"]))
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise FileError(f"{file}: no file that Evidence.save wrote ({type(error).__name__}: {error})") from None
