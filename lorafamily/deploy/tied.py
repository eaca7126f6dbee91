"""Tied weights in `peft`'s files, such as a head that is the embedding and trains along with the adapters.

Here they stay one tensor. peft copies the modules that `modules_to_save` names, which unties them; with
`ensure_weight_tying` it ties again those that are linear layers. Its files then hold the one tensor under every name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafamily.errors import FileError
from lorafamily.layers.extra_trained import tied_names


def under_all_names(model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Trained values, each under every name that it has in the model, so that a client that unties it computes the
    same."""
    tied = tied_names(model)
    found = dict(trained)
    for at, value in trained.items():
        found |= {name: value.clone() for name in tied.get(at, ()) if name != at}  # files hold no views of one tensor
    return found


def tying(model: nn.Module, modules: Iterable[str]) -> dict[str, Any]:
    """The setting with which peft ties modules that it saves.

    With it peft makes a linear layer of each but the embedding, so it is left out where any of them is something else.
    All have the same values then, and train separately.
    """
    names = tied_names(model)
    tied = [at for at in modules if any(f"{at}.{name}" in names for name in model.get_submodule(at)._parameters)]
    if not tied:  # models without text have no embedding to ask for
        return {}
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    others = [layer for layer in map(model.get_submodule, tied) if layer is not embedding]
    linear = bool(others) and all(isinstance(layer, nn.Linear) for layer in others)
    return {"ensure_weight_tying": True} if linear and len(others) < len(tied) else {}


def one_of_tied(
    model: nn.Module, tensors: Mapping[str, Tensor], config: Mapping[str, Any], path: Path
) -> dict[str, Tensor]:
    """What a file holds besides the factors, with each tied tensor under its first name in the model only.

    Raises:
        FileError: the file has different values for what is one tensor here, or a value for only some of its names,
            where peft would leave the others unchanged.
    """
    found = dict(tensors)
    for names in {id(names): names for names in tied_names(model).values()}.values():
        present = [name for name in names if name in found]
        if not present:
            continue
        value, parameter = found[present[0]], model.get_parameter(names[0])
        tied = f"{path}: {' and '.join(names)} are one tied tensor in this {type(model).__name__}"
        untie = "untie them (a clone of the weight, tie_word_embeddings=False) before importing"
        if any(not torch.equal(found[name], value) for name in present[1:]):
            raise FileError(f"{tied}, and the file has other values for {present[-1]} than for {present[0]}; {untie}")
        unchanged = value.shape == parameter.shape and torch.equal(
            value.to(parameter.device, parameter.dtype), parameter.data
        )
        if len(present) < len(names) and not config.get("ensure_weight_tying") and not unchanged:
            raise FileError(f"{tied}, and the file has {present[0]} alone: peft would leave the rest as it is; {untie}")
        found = {name: tensor for name, tensor in found.items() if name not in present} | {names[0]: value}
    return found
