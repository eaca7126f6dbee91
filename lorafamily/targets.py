"""Which layers get an adapter, and which parameters train beside the adapters."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Sequence

from torch import nn

from lorafamily.errors import TargetError
from lorafamily.layers import base_parameters, kind_for, kind_of, weight_of
from lorafamily.parts import Fused, Part, possible_parts

Targets = str | Sequence[str] | Callable[[str, nn.Module], bool] | None

# Components of module names that mark what sits on top of the network: the output head and the pooler. Part of every
# Hugging Face architecture seen so far; what is matched by weight (a head tied to the embedding) needs no name.
HEADS = {
    *("lm_head", "embed_out", "output_projection", "fc_out", "cls", "predictions", "qa_outputs"),
    *("classifier", "pre_classifier", "classification_head", "score", "head", "heads", "pooler"),
}
_ATTENTION = re.compile(r"(^|[._])(\w*attn\w*|\w*attention\w*)($|[._])", re.IGNORECASE)


def match(model: nn.Module, targets: Targets = None, fused: Fused | None = None) -> dict[str, nn.Module]:
    """The layers that targets name, by full module name, in the model's order.

    `targets`: None or "all-linear": every linear layer, without the output head and the pooler; "attention": those of
    them inside attention; one or several regular expressions, searched for in full names, of linear layers or, where
    one matches none of these, of embeddings, convolutions and other kinds; or a predicate of (name, module).
    `fused`: layers in whose place their parts are matched, see `parts.py`.

    Raises:
        TargetError: a target that matches no layer, or a layer whose weight is no plain floating-point matrix.
    """
    kinds = {name: (module, kind_of(module)) for name, module in _with_parts(model, fused).items()}
    able = {name: module for name, (module, kind) in kinds.items() if kind is not None}
    linear = {name: module for name, (module, kind) in kinds.items() if kind is not None and kind.linear}
    if targets is None or targets == "all-linear":
        chosen = _without_heads(model, linear)
    elif targets == "attention":
        chosen = {name: m for name, m in _without_heads(model, linear).items() if _ATTENTION.search(name)}
    elif callable(targets):
        chosen = {name: module for name, module in able.items() if targets(name, module)}
    else:
        patterns = [targets] if isinstance(targets, str) else list(targets)
        per_pattern = [_searched(pattern, linear, able, model) for pattern in patterns]
        chosen = {name: module for name, module in able.items() if any(name in found for found in per_pattern)}
    if not chosen:
        raise TargetError(f"targets={targets!r} match no layer of {type(model).__name__}; {_offer(able, model)}")
    for name, module in chosen.items():
        if not _has_matrix(module):
            raise TargetError(
                f"{name} ({type(module).__name__}) cannot carry an adapter: its weight is not a plain floating-point "
                f"matrix (quantised or re-parametrised?); leave it out of targets"
            )
    return chosen


def match_parameters(model: nn.Module, patterns: str | Sequence[str] | None) -> dict[str, nn.Parameter]:
    """The parameters of the base model in whose full names regular expressions are found.

    Raises:
        TargetError: a pattern that matches no parameter.
    """
    if patterns is None:
        return {}
    named = base_parameters(model)
    found: dict[str, nn.Parameter] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        compiled = _compiled(pattern)
        own = {name: parameter for name, parameter in named.items() if compiled.search(name)}
        if not own:
            near = difflib.get_close_matches(pattern, named, n=3, cutoff=0.3)
            raise TargetError(
                f'also_train="{pattern}" matches no parameter; nearest: {", ".join(near) or "none"}; '
                f"names end in {', '.join(sorted(named)[-3:])}"
            )
        found |= own
    return found


def _with_parts(model: nn.Module, fused: Fused | None) -> dict[str, nn.Module]:
    """Every module by name, in the model's order, with the parts of layers in the place of these."""
    parts = possible_parts(model, fused)
    of_layer: dict[int, dict[str, nn.Module]] = {}
    for name, part in parts.items():
        of_layer.setdefault(id(part.layer), {})[name] = part
    divided = of_layer.keys() | {id(module.layer) for module in model.modules() if isinstance(module, Part)}
    named: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if id(module) not in divided:
            named[name] = module
        named |= of_layer.get(id(module), {})
    return named


def _has_matrix(module: nn.Module) -> bool:
    try:
        kind_for(module).parameter(module)
    except AttributeError:
        return False
    weight = weight_of(module)
    return weight.is_floating_point() and weight.ndim == 2


def _without_heads(model: nn.Module, able: dict[str, nn.Module]) -> dict[str, nn.Module]:
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    try:
        output = getattr(model, "get_output_embeddings", lambda: None)()
    except NotImplementedError:  # some Hugging Face models have the method but no such layer
        output = None
    return {
        name: module
        for name, module in able.items()
        if module is not output
        and id(getattr(module, "weight", None)) not in embeddings
        and not HEADS.intersection(name.split("."))
    }


def _searched(pattern: str, linear: dict[str, nn.Module], able: dict[str, nn.Module], model: nn.Module) -> set[str]:
    compiled = _compiled(pattern)
    found = {name for name in linear if compiled.search(name)} or {name for name in able if compiled.search(name)}
    if not found:
        near = difflib.get_close_matches(pattern, able, n=3, cutoff=0.3)
        nearest = f"nearest: {', '.join(near)}; " if near else ""
        raise TargetError(f'target "{pattern}" matches no layer; {nearest}{_offer(able, model)}')
    return found


def _compiled(pattern: str) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise TargetError(f"{pattern!r}: a target must be a regular expression, a list of them, or a predicate")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise TargetError(f'"{pattern}" is no regular expression: {error}') from None


def _offer(able: dict[str, nn.Module], model: nn.Module) -> str:
    if able:
        last = sorted({name.rsplit(".", 1)[-1] for name in able})
        return f"layers that can carry an adapter end in: {', '.join(last)}"
    kinds = Counter(type(m).__name__ for m in model.modules() if not list(m.children()))
    return f"no layer can carry an adapter; the model has {', '.join(f'{n} {k}' for k, n in kinds.most_common())}"
