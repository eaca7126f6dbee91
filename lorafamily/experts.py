"""Adapters on single experts, where a model holds all of a layer's experts in one 3-D parameter (transformers 5).

Every expert is a target of its own, `experts.3.down_proj`, with its own rank. A layer of experts calls nothing for a
single one: it reads weights. While adapters are active it finds an `UpdatedWeight` in their place, which gives W x for
all experts in the products that the layer makes itself, and adds U (V x) in products of the same kind, batched over the
experts. What the layer does otherwise, routing, gates and biases, is not repeated here.

Axes: E experts; d_in, d_out of one expert's weight; m = largest inner size of the factors; n = rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from lorafamily.adapter import Adapter
from lorafamily.functional import can_be_fast, in_dtype
from lorafamily.layers import Acting, Part, holding

if TYPE_CHECKING:
    from lorafamily.site import Site

READ = ("gate_up_proj", "up_proj", "down_proj")
"""Parameters that every implementation in transformers' registry reads."""
PRODUCTS = ("eager", "grouped_mm", "batched_mm")
"""Implementations made of PyTorch's own products; others hand the weights to kernels, which want tensors."""


@dataclass(frozen=True)
class Expert(Part):
    """The kind of one expert's weight: entry `index` of the 3-D parameter `held_in`, (d_in, d_out) if `transposed`.

    Dropout acts on the columns of V, an expert's features of the input, the same ones for a whole batch.
    """

    held_in: str
    index: int
    transposed: bool
    part: str = field(init=False)

    name = "expert"
    linear = True
    additive = False
    by_sample = False
    in_place = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "part", f"{self.index}_{self.held_in}")

    @property
    def path(self) -> str:
        return f"{self.index}.{self.held_in}"

    def matrix(self, weight: Float[Tensor, "E _ _"]) -> Float[Tensor, "d_out d_in"]:
        return weight[self.index].T if self.transposed else weight[self.index]

    def restore(self, matrix: Float[Tensor, "d_out d_in"], weight: Tensor) -> Tensor:
        whole = weight.clone()
        self.matrix(whole).copy_(matrix)
        return whole

    def changed(self, weight: Tensor, U: Tensor, V: Tensor, scale: float) -> Tensor:
        self.matrix(weight).addmm_(U, V, alpha=scale)
        return weight

    def stored_as(self, at: str) -> str:
        return at.removesuffix(self.path) + self.held_in

    def described(self) -> dict[str, Any]:
        return {"kind": self.name, "held_in": self.held_in, "index": self.index, "transposed": self.transposed}

    def output(self, site: Site, acting: Acting, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        by_parameter: dict[str, list[tuple[Expert, Adapter]]] = defaultdict(list)
        for kind, adapter in acting:
            by_parameter[cast(Expert, kind).held_in].append((cast(Expert, kind), adapter))
        x, layer = site.input_of(args, kwargs), site.layer
        found: dict[str, Any] = {}
        for name, of_experts in by_parameter.items():
            W = cast(Tensor, getattr(layer, name))
            fast = not site.patched and can_be_fast(x, W, None)
            weight = UpdatedWeight(W, *_factors(W, of_experts, fast))
            as_products = fast and implementation(layer) in PRODUCTS
            found[name] = weight if as_products else weight.formed()
        with holding(layer, found):
            return site.base(*args, **kwargs)


def expert_weights(layer: nn.Module) -> dict[str, Tensor]:
    """The 3-D parameters of a layer of experts, none where it is not of transformers' registry of implementations."""
    if implementation(layer) is None:
        return {}
    weights: dict[str, Tensor] = {name: weight for name in READ if (weight := layer._parameters.get(name)) is not None}
    return weights if all(w.ndim == 3 and w.is_floating_point() for w in weights.values()) else {}


def expert_kinds(layer: nn.Module) -> Iterator[Expert]:
    """The kinds of all experts of a layer, expert by expert."""
    weights = expert_weights(layer)
    for index in range(max(map(len, weights.values()), default=0)):
        for name in weights:
            yield Expert(name, index, bool(layer.is_transposed))


def is_expert_of(kind: Expert, layer: nn.Module) -> bool:
    """Whether the layer has that expert."""
    weight = expert_weights(layer).get(kind.held_in)
    return weight is not None and kind.index < len(weight) and kind.transposed == layer.is_transposed


def implementation(layer: nn.Module) -> str | None:
    """Which of the registry's implementations computes the layer; None where it is no layer of the registry."""
    if not {"is_transposed", "has_gate", "has_bias", "config"} <= vars(layer).keys():
        return None
    return str(getattr(layer.config, "_experts_implementation", None) or "eager")


def why_no_experts(layer: nn.Module) -> str | None:
    """Why the experts of a layer cannot carry adapters, None where they can or it has none in 3-D parameters."""
    stacked = {name: p for name, p in layer._parameters.items() if p is not None and p.ndim == 3}
    if not stacked or "expert" not in type(layer).__name__.lower() or expert_weights(layer):
        return None
    if implementation(layer) is None:
        return (
            f"{type(layer).__name__} holds experts in {', '.join(stacked)} and is not of transformers' registry of "
            "expert implementations (use_experts_implementation), so that nobody says which axis is its input"
        )
    said = ", ".join(f"{name} {p.dtype} {tuple(p.shape)}" for name, p in stacked.items())
    return f"{type(layer).__name__} has {said}; experts need 3-D floating-point parameters"


def _factors(
    W: Float[Tensor, "E _ _"], of_experts: Sequence[tuple[Expert, Adapter]], fast: bool
) -> tuple[Float[Tensor, "E _ m"], Float[Tensor, "E m _"]]:
    """Left and right factor of ΔW, as W lies; zeros for experts without an adapter."""
    places = [kind.index for kind, _ in of_experts]
    Us, Vs = zip(*(adapter.factors(dropping=True) for _, adapter in of_experts), strict=True)
    most = max(len(V) for V in Vs)
    most += -most % 8 if W.is_cuda else 0  # grouped products on a GPU want rows of a multiple of 16 bytes
    ups = [U.T for U in Us]
    stack = _Stacked.apply if fast else _stacked
    U, V = stack(places, len(W), most, *ups, *Vs)
    scales = {adapter.scale for _, adapter in of_experts}
    if len(scales) == 1:
        U = U * scales.pop()
    else:
        s = U.new_ones(len(W))
        s[places] = U.new_tensor([adapter.scale for _, adapter in of_experts])
        U = U * s[:, None, None]
    if p := of_experts[0][1].drops("entries"):
        V = V * F.dropout(V.new_ones(len(V), 1, V.shape[2]), p)
    U, V = in_dtype(U.mT, V, W.dtype)
    return (V.mT, U.mT) if of_experts[0][0].transposed else (U, V)


def _stacked(places: list[int], experts: int, most: int, *factors: Tensor) -> tuple[Tensor, Tensor]:
    """The factors (m, d) of some experts as (E, most, d), with zeros elsewhere; ups first, then downs."""
    both = []
    for some in (factors[: len(places)], factors[len(places) :]):
        at = {place: F.pad(factor, (0, 0, 0, most - len(factor))) for place, factor in zip(places, some, strict=True)}
        nothing = some[0].new_zeros(most, some[0].shape[1])
        both.append(torch.stack([at.get(place, nothing) for place in range(experts)]))
    return both[0], both[1]


class _Stacked(torch.autograd.Function):
    """`_stacked` without a copy for the padding. An expert whose factors both got nothing but zeros was visited by no
    token, and gets no gradient: an optimiser leaves it alone, moments and decay included, as it does a layer unused."""

    @staticmethod
    def forward(ctx: Any, places: list[int], experts: int, most: int, *factors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.places, ctx.ranks = places, [len(factor) for factor in factors]
        ups, downs = factors[: len(places)], factors[len(places) :]
        both = [some[0].new_zeros(experts, most, some[0].shape[1]) for some in (ups, downs)]
        views = [
            whole[at, : len(factor)]
            for whole, some in zip(both, (ups, downs), strict=True)
            for at, factor in zip(places, some, strict=True)
        ]
        torch._foreach_copy_(views, list(factors))
        return both[0], both[1]

    @staticmethod
    def backward(ctx: Any, of_up: Tensor, of_down: Tensor) -> tuple[Tensor | None, ...]:
        visited = _nonzero(of_up, of_down)
        n = len(ctx.places)
        found = [
            whole[at, :rank] if visited is None or visited[at] else None
            for whole, ranks in ((of_up, ctx.ranks[:n]), (of_down, ctx.ranks[n:]))
            for at, rank in zip(ctx.places, ranks, strict=True)
        ]
        return None, None, None, *found


def _nonzero(*gradients: Float[Tensor, "E _ _"]) -> list[bool] | None:
    """For which experts there is anything; None where there are no numbers to look at."""
    if any(isinstance(g, FakeTensor) or g.is_meta for g in gradients):
        return None
    anything = torch.stack([g.detach().flatten(1).any(1) for g in gradients]).any(0)
    found: list[bool] = anything.tolist()
    return found


class UpdatedWeight:
    """W + ΔW of all experts, or of those picked by an index, which is never formed where a product is asked for.

    Stands where a layer looks for W: PyTorch asks an object with `__torch_function__` what a product with it is. W lies
    as (…, a, b), ΔW = left · right with left (…, a, m) and right (…, m, b). Of an operation that is no product with it
    the sum is formed, so that whatever a layer does is right.
    """

    def __init__(self, W: Tensor, left: Tensor, right: Tensor):
        self.W, self.left, self.right = W, left, right

    def formed(self) -> Tensor:
        """W + ΔW."""
        return self.W + self.left @ self.right

    def transpose(self, first: int, second: int) -> Any:
        if {first % self.W.ndim, second % self.W.ndim} == {self.W.ndim - 2, self.W.ndim - 1}:
            return self.mT
        return self.formed().transpose(first, second)

    @property
    def mT(self) -> UpdatedWeight:  # noqa: N802 (a tensor's name)
        return UpdatedWeight(self.W.mT, self.right.mT, self.left.mT)

    @property
    def T(self) -> Any:  # noqa: N802
        return self.mT if self.W.ndim == 2 else self.formed().T

    def __getitem__(self, experts: Any) -> Any:
        """Of one expert, or of one for each row; `experts` indexes the first axis alone."""
        if isinstance(experts, tuple):
            return self.formed()[experts]
        return UpdatedWeight(self.W[experts], self.left[experts], self.right[experts])

    def __len__(self) -> int:
        return len(self.W)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.W if name in _DESCRIBES else self.formed(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if len(args) >= 2 and func in _TIMES and kwargs.get("bias") is None:
            first, second, *rest = args
            if isinstance(second, cls) and isinstance(first, Tensor):
                y = func(first, second.W, *rest, **kwargs)
                return y.add_(func(func(first, second.left, *rest, **kwargs), second.right, *rest, **kwargs))
            if isinstance(first, cls) and isinstance(second, Tensor) and not rest and not kwargs:
                return func(first.W, second).add_(func(first.left, func(first.right, second)))
        if func is F.linear and isinstance(args[0], Tensor) and isinstance(args[1], cls):
            x, weight = args[:2]
            y = F.linear(x, weight.W, *args[2:], **kwargs)
            return y.add_(F.linear(F.linear(x, weight.right), weight.left))
        args, kwargs = tree_map(lambda leaf: leaf.formed() if isinstance(leaf, cls) else leaf, (args, kwargs))
        return func(*args, **kwargs)


_DESCRIBES = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "data_ptr", "stride", "requires_grad"}
_DESCRIBES |= {"is_cuda", "is_meta", "is_contiguous", "is_floating_point", "layout", "element_size"}
_TIMES = {torch.bmm, torch.matmul, torch.mm, Tensor.bmm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
_TIMES |= {product for product in (getattr(torch, "_grouped_mm", None),) if product is not None}
"""Products in which a matrix may be given as two, one after the other."""
