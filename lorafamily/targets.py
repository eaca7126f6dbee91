"""Which layers get an adapter, and which parameters train along with the adapters."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import nn

from lorafamily.errors import TargetError
from lorafamily.layers.experts import Expert, expert_weights, why_no_experts
from lorafamily.layers.extra_trained import tied_names
from lorafamily.layers.formats import refused_layers
from lorafamily.layers.kinds import kind_of, why_not
from lorafamily.layers.offloaded import offloaded_value, refuse_absent
from lorafamily.layers.quantised import packed_parameters
from lorafamily.layers.rows import Fused
from lorafamily.layers.site import base_parameters
from lorafamily.layers.target import Target, possible_targets
from lorafamily.names import join

Targets = str | Sequence[str] | Callable[[str, nn.Module], bool] | None

# Names of output heads and poolers, at the top of a model or of the trunk in it. Further inside the same words mean
# other things: `heads` of attention, GPT-J's `fc_out`, the `head` of a tower. Heads that `get_output_embeddings` of
# transformers returns, or that share their weight with an embedding, are found without a name.
HEADS = {
    *("lm_head", "embed_out", "output_projection", "fc_out", "cls", "predictions", "qa_outputs"),
    *("classifier", "pre_classifier", "classification_head", "score", "head", "heads", "pooler"),
    *("output", "to_logits", "mlp_head", "linear_head"),  # torchtune, x-transformers, vit-pytorch
}
_ATTENTION = re.compile(r"(^|[._])(\w*attn\w*|\w*attention\w*)($|[._])", re.IGNORECASE)
_GATE = re.compile(r"(^|_)(gate|router|wg)$")


def match(
    model: nn.Module, targets: Targets = None, fused: Fused | None = None, exclude: Targets = None
) -> dict[str, Target]:
    """The targets that `targets` names and `exclude` does not, by full name, in the model's order; `apply` explains the
    arguments.

    Raises:
        TargetError: a target matches no layer, or only layers that cannot carry an adapter; the message has the reason.
    """
    able = possible_targets(model, fused)
    refused = {name: Target(layer, kind) for name, layer, kind in refused_layers(model)}
    left_out = {} if exclude is None else _named(model, exclude, able | refused, of_all=True)
    asked = able if callable(targets) else able | refused  # a predicate sees only layers that can carry an adapter
    chosen = {name: target for name, target in _named(model, targets, asked).items() if name not in left_out}
    for name, target in chosen.items():
        if name in refused:
            raise TargetError(
                f"{name} ({type(target.layer).__name__}) cannot carry an adapter: {why_not(target.layer)}; or leave it "
                f'out with exclude="{name}"'
            )
    if not chosen:
        asked_for = f"targets={targets!r}" + (" (linear layers but heads)" if by_default(targets) else "")
        without = "" if exclude is None else f" without exclude={exclude!r}"
        raise TargetError(f"{asked_for}{without} match no layer of {type(model).__name__}; {_offer(able, model)}")
    return chosen


def by_default(targets: Targets) -> bool:
    """Whether the user named no layers, at most "all-linear" or "attention"."""
    return targets in (None, "all-linear", "attention")


def _named(model: nn.Module, targets: Targets, able: dict[str, Target], of_all: bool = False) -> dict[str, Target]:
    """The layers that are meant. Patterns mean linear layers first, unless they are `of_all` layers."""
    linear = {name: target for name, target in able.items() if target.kind.linear}
    if targets is None or by_default(targets):
        inside = _inside(model, linear)
        return inside if targets != "attention" else {name: t for name, t in inside.items() if _ATTENTION.search(name)}
    if callable(targets):
        return {name: target for name, target in able.items() if targets(name, target.layer)}
    patterns = [targets] if isinstance(targets, str) else list(targets)
    first, is_head = able if of_all else linear, heads_of(model)
    heads = {name for name, target in first.items() if is_head(name, target.layer)}
    per_pattern = [_searched(pattern, first, heads, able, model) for pattern in patterns]
    return {name: target for name, target in able.items() if any(name in found for found in per_pattern)}


def match_extra_trained(
    model: nn.Module, patterns: str | Sequence[str] | None, adapted: Mapping[str, Target]
) -> dict[str, nn.Parameter]:
    """The base parameters that train along with the adapters: those in whose full names regular expressions are found.

    Raises:
        TargetError: a pattern matches no parameter, only a further name of a tied one, a quantised parameter, or the
            weight of an adapted layer, which merging replaces.
        StateError: a parameter is offloaded, or spread over processes.
    """
    if patterns is None:
        return {}
    named = base_parameters(model)
    found: dict[str, nn.Parameter] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        compiled = _compiled(pattern)
        matched = {name: parameter for name, parameter in named.items() if compiled.search(name)}
        if not matched:
            for name, together in tied_names(model).items():
                if compiled.search(name):
                    raise TargetError(
                        f'also_train="{pattern}": {name} is one tied tensor with {together[0]}, and both train under '
                        f'that name: also_train="{re.escape(together[0])}"'
                    )
            near = difflib.get_close_matches(pattern, named, n=3, cutoff=0.3)
            raise TargetError(
                f'also_train="{pattern}" matches no parameter; nearest: {", ".join(near) or "none"}; '
                f"names end in {', '.join(sorted(named)[-3:])}"
            )
        found |= matched
    # A parameter on the meta device that is not offloaded belongs to a model that is only planned.
    planned = {at for at, p in found.items() if p.is_meta and offloaded_value(model, at) is None}
    refuse_absent(found, found.keys() - planned, "which also_train names")
    weights = {id(target.stored): path for path, target in adapted.items()}
    packed = packed_parameters(model)
    for name, parameter in found.items():
        if id(parameter) in packed:
            raise TargetError(f"also_train names {name}, which is quantised and cannot train; an adapter on it can")
        if (path := weights.get(id(parameter))) is not None:
            raise TargetError(
                f"also_train names {name}, the weight of a layer that gets an adapter ({path}); train one or the other"
            )
    return found


def _inside(model: nn.Module, linear: dict[str, Target]) -> dict[str, Target]:
    """The linear layers that "all-linear" means."""
    heads = heads_of(model)
    return {
        name: target
        for name, target in linear.items()
        if isinstance(target.kind, Expert)
        or not (heads(name, target.layer) or is_router(model, name) or is_of_a_kernel(model, name))
    }


def heads_of(model: nn.Module) -> Callable[[str, nn.Module], bool]:
    """A predicate of (name, module): whether a layer is the output head, the pooler or a part of them."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    try:
        output = getattr(model, "get_output_embeddings", lambda: None)()
    except (NotImplementedError, AttributeError):  # some models of transformers have the method, but no such layer
        output = None
    trunks = {getattr(model, "base_model_prefix", "")}
    # Composed of whole models, such as two BERTs: each has heads of its own, and the encoder's pooler is not used.
    trunks |= {part for part in ("encoder", "decoder") if hasattr(getattr(model, part, None), "base_model_prefix")}

    def is_head(name: str, layer: nn.Module) -> bool:
        path = name.split(".")
        path = path[1:] if len(path) > 1 and path[0] in trunks else path
        return path[0] in HEADS or layer is output or id(layer._parameters.get("weight")) in embeddings

    return is_head


def is_router(model: nn.Module, name: str) -> bool:
    """Whether a layer chooses among experts (a `router`, or a `gate` next to experts), or among the tokens that
    attention sees (an `indexer`, as in DeepSeek V3.2, whose top-k no gradient passes)."""
    *before, last = path = name.split(".")
    if not {"router", "indexer"}.isdisjoint(path):
        return True
    siblings = [child for child, _ in model.get_submodule(".".join(before)).named_children()] if before else []
    return bool(_GATE.search(last)) and any("expert" in child for child in siblings if child != last)


def is_of_a_kernel(model: nn.Module, name: str) -> bool:
    """Whether a state-space mixer (Mamba's, which has an A_log) may pass the layer's weight to fused kernels instead of
    calling the layer; only its input projection is always called."""
    before, _, last = name.rpartition(".")
    return "A_log" in model.get_submodule(before)._parameters and not last.startswith("in_proj")


def _searched(
    pattern: str, first: Iterable[str], heads: set[str], able: dict[str, Target], model: nn.Module
) -> set[str]:
    """The layers in whose names the pattern is found: of `first`, or of all that are `able` where there it finds output
    heads alone, as ".*" does in a convolutional net."""
    compiled = _compiled(pattern)
    found = {name for name in first if compiled.search(name)}
    if found <= heads:
        found = {name for name in able if compiled.search(name)}
    if not found:
        for name, module in model.named_modules():
            reason = why_no_experts(module)
            named = reason is not None and any(compiled.search(join(name, part)) for part in module._parameters)
            if named or (compiled.search(name) and (reason := reason or why_not(module)) is not None):
                raise TargetError(f'target "{pattern}": {name} cannot carry an adapter: {reason}')
        near = difflib.get_close_matches(pattern, able, n=3, cutoff=0.3)
        nearest = f"nearest: {', '.join(near)}; " if near else ""
        raise TargetError(f'target "{pattern}" matches no layer; {nearest}{_offer(able, model)}')
    return found


def _compiled(pattern: str) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise TargetError(f"{pattern!r}: must be a regular expression or a list of them; targets also take a predicate")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise TargetError(f'"{pattern}" is no regular expression: {error}') from None


def _offer(able: dict[str, Target], model: nn.Module) -> str:
    if able:
        last = sorted({name.rsplit(".", 1)[-1] for name in able})
        return f"layers that can carry an adapter end in: {', '.join(last)}"
    for name, module in model.named_modules():
        if (reason := why_not(module)) is not None:
            return f"no layer can carry an adapter; {name}: {reason}"
    classes = Counter(type(m) for m in model.modules() if not list(m.children()))
    what = ", ".join(f"{count} {_full_name(cls)}" for cls, count in classes.most_common())
    return f"no layer can carry an adapter; the model has {what}; register_layer_kind teaches lorafamily another class"


def _full_name(cls: type) -> str:
    """The name of a class, after its package's unless that is torch: others have a Linear, too."""
    package = cls.__module__.partition(".")[0]
    return cls.__name__ if package in ("torch", "__main__") else f"{package}'s {cls.__name__}"


def what_is(model: nn.Module) -> Callable[[str], str]:
    """A function from a parameter's name to the group that `summary` counts it in."""
    heads = heads_of(model)

    def group(name: str) -> str:
        at, _, attribute = name.rpartition(".")
        module = model.get_submodule(at)
        of = type(module).__name__
        if isinstance(module, nn.Embedding) or "Embedding" in of:
            return "embeddings"  # a tied output head's weight, too
        if heads(at, module):
            return "output heads"
        if is_router(model, at):
            return "routers"
        if "Norm" in of:
            return "norms"
        if weights := expert_weights(module):
            return "experts" if attribute in weights else "scales and biases elsewhere"
        if kind_of(module) is not None:
            return f"other layers that can be adapted ({of})"
        if (ndim := module.get_parameter(attribute).ndim) < 2:
            return "scales and biases elsewhere"
        if isinstance(model.get_submodule(at.rpartition(".")[0]), nn.MultiheadAttention):
            return "other layers that can be adapted (MultiheadAttention)"
        return f"what no layer kind covers ({of}, {ndim}-D)"

    return group
