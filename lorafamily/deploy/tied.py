"""Tied weights in `peft`'s files: a head that is the embedding, trained along.

Here they stay one tensor. peft copies what its `modules_to_save` names, and so unties it; with `ensure_weight_tying` it
ties again the heads that are linear layers. Its files then hold the one tensor under every name.
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
    """What trained, under every name that it has in the model: whoever unties it computes the same."""
    tied = tied_names(model)
    found = dict(trained)
    for at, value in trained.items():
        found |= {name: value.clone() for name in tied.get(at, ()) if name != at}  # files hold no views of one tensor
    return found


def tying(model: nn.Module, modules: Iterable[str]) -> dict[str, Any]:
    """The setting with which peft ties modules that it saves. It makes a linear layer of each but the embedding, so it
    is left out where there are others; all have the same values then, and are trained on apart."""
    tied = [at for at in modules if any(f"{at}.{name}" in tied_names(model) for name, _ in _own(model, at))]
    if not tied:  # models without text have no embedding to ask for
        return {}
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    others = [layer for layer in map(model.get_submodule, tied) if layer is not embedding]
    linear = bool(others) and all(isinstance(layer, nn.Linear) for layer in others)
    return {"ensure_weight_tying": True} if linear and len(others) < len(tied) else {}


def _own(model: nn.Module, at: str) -> Iterable[tuple[str, nn.Parameter]]:
    return model.get_submodule(at).named_parameters(recurse=False)


def one_of_tied(
    model: nn.Module, tensors: Mapping[str, Tensor], config: Mapping[str, Any], path: Path
) -> dict[str, Tensor]:
    """What a file holds besides the factors, with tied tensors under the name that the model has for them.

    Raises:
        FileError: different values for what is one tensor here, or a value for a part of it, where peft would leave the
            others as they are.
    """
    found = dict(tensors)
    for together in {id(names): names for names in tied_names(model).values()}.values():
        held = [name for name in together if name in found]
        if not held:
            continue
        value, first = found[held[0]], model.get_parameter(together[0])
        said = f"{' and '.join(together)} are one tied tensor in this {type(model).__name__}"
        untie = "untie them (a clone of the weight, tie_word_embeddings=False) before importing"
        if any(not torch.equal(found[name], value) for name in held[1:]):
            raise FileError(f"{path}: {said}, and the file has other values for {held[-1]} than for {held[0]}; {untie}")
        unchanged = value.shape == first.shape and torch.equal(value.to(first.device, first.dtype), first.data)
        if len(held) < len(together) and not config.get("ensure_weight_tying") and not unchanged:
            raise FileError(
                f"{path}: {said}, and the file has {held[0]} alone: peft would leave the rest as it is; {untie}"
            )
        for name in held:
            del found[name]
        found[together[0]] = value
    return found
