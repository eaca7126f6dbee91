"""Quantised bases: linear layers whose weight is stored in fewer bits, by bitsandbytes or torchao.

The layer's own forward computes its product and the update is added to it, so nothing is dequantised in a training
step but by the layer's own kernel. What the package wants of a weight elsewhere (its shape, its value for a start or a
merge, its bytes) a `Quantised` kind knows. Neither library is imported: a model with such layers has done so.
"""

from __future__ import annotations

import copy
import math
import sys
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorafamily.errors import StateError
from lorafamily.layers import LayerKind, kind_of, register_layer_kind
from lorafamily.names import join
from lorafamily.site import NAME, Front, base_parameters

_ADAPTED = "adapted are bitsandbytes' Linear4bit (nf4, fp4) and Linear8bitLt, and torchao's weight-only int8"
_OTHERS = {
    **{"hqq": "HQQ", "quanto": "quanto", "optimum": "quanto", "gptqmodel": "GPTQ", "auto_gptq": "GPTQ", "awq": "AWQ"},
    **{
        "eetq": "EETQ",
        "aqlm": "AQLM",
        "vptq": "VPTQ",
        "spqr_quant": "SpQR",
        "compressed_tensors": "compressed-tensors",
    },
}
"""What quantises otherwise, by the package its layers or weights come from."""


class Quantised(LayerKind):
    """A linear layer whose weight is stored in fewer bits. `weight` is that weight dequantised, in float32: a tensor of
    the full size, for whoever needs the values of one layer; `stored` is what the layer holds of it."""

    linear = True
    of: str = "linear"
    """The kind of layer that was quantised, as which files speak of it: they fit the unquantised base too."""

    def matrix(self, weight: Tensor) -> Float[Tensor, "d_out d_in"]:
        return weight

    def restore(self, matrix: Float[Tensor, "d_out d_in"], weight: Tensor) -> Tensor:
        return matrix

    def shape(self, module: Any) -> tuple[int, int]:
        return module.out_features, module.in_features

    def described(self) -> dict[str, Any]:
        return {"kind": self.of}

    @abstractmethod
    def weight(self, module: Any) -> Float[Tensor, "d_out d_in"]:
        """The dequantised weight, in float32; nothing else refers to it."""

    @abstractmethod
    def stored(self, module: Any) -> dict[str, Tensor]:
        """Every tensor that the weight follows from; the first one is the parameter."""

    @abstractmethod
    def rounding(self, module: Any) -> Float[Tensor, "d_out d_in"]:
        """The mean square of what rounding to the levels around each entry takes from it."""

    @abstractmethod
    def requantised(self, module: Any, weight: Float[Tensor, "d_out d_in"]) -> nn.Module:
        """A layer like this one, its weight quantised from another with the same settings."""

    def forget(self, module: Any) -> None:
        """Let go of the weight; the layer keeps its settings and shape."""
        old = module.weight
        module._parameters["weight"] = nn.Parameter(torch.empty(old.shape, dtype=old.dtype, device="meta"), False)


@dataclass(frozen=True)
class _FourBit(Quantised):
    """bitsandbytes' Linear4bit: packed pairs of indices into 16 levels, a factor `absmax` for each block of entries,
    and where these factors are quantised themselves (double quantisation), their own levels and factors."""

    of: str
    name = "4-bit linear (bitsandbytes)"

    def matches(self, module: nn.Module) -> bool:
        return _of_bitsandbytes(module, "Linear4bit", self.of)

    def weight(self, module: Any) -> Float[Tensor, "d_out d_in"]:
        state = _state(module)
        if state is None:  # bitsandbytes quantises when a layer moves to its device
            return module.weight.detach().float()
        functional, data = sys.modules["bitsandbytes.functional"], module.weight.data
        if getattr(state, "packing_format_for_cpu", False):  # how AVX512's inference kernel wants them
            data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
        state.dtype = torch.float32
        whole: Tensor = functional.dequantize_4bit(data, state)
        return whole

    def stored(self, module: Any) -> dict[str, Tensor]:
        found, state = {"weight": module.weight}, _state(module)
        if state is not None:
            found |= {"weight.absmax": state.absmax, "weight.quant_map": state.code}
            if state.nested:
                found |= {"weight.nested_absmax": state.state2.absmax, "weight.nested_quant_map": state.state2.code}
                found |= {"weight.nested_offset": state.offset}
        return found

    def rounding(self, module: Any) -> Float[Tensor, "d_out d_in"]:
        W, state = self.weight(module), _state(module)
        if state is None:
            return torch.zeros_like(W)
        largest = state.absmax
        if state.nested:
            functional = sys.modules["bitsandbytes.functional"]
            largest = functional.dequantize_blockwise(largest, state.state2) + state.offset
        factors = largest.float().repeat_interleave(state.blocksize)[: W.numel()].view_as(W)
        levels = state.code.float().unique()  # fp4 has two zeros
        between = (levels[1:] + levels[:-1]) / 2
        edges = torch.cat([levels[:1], between, levels[-1:]])
        below, above = levels - edges[:-1], edges[1:] - levels  # a level stands for what lies from edge to edge
        error = (below**3 + above**3) / (3 * (below + above))
        at = torch.bucketize(W / factors.clamp_min(torch.finfo(torch.float32).tiny), between)
        return error[at] * factors**2

    def forget(self, module: Any) -> None:
        super().forget(module)
        module.quant_state = None

    def requantised(self, module: Any, weight: Float[Tensor, "d_out d_in"]) -> nn.Module:
        new, old, state = _shell(module), module.weight, _state(module)
        settings = {"blocksize": old.blocksize, "compress_statistics": old.compress_statistics}
        settings |= {"quant_type": old.quant_type, "quant_storage": old.quant_storage, "module": new}
        weight = weight.to(weight.dtype if state is None else state.dtype)
        new.weight = type(old)(weight, requires_grad=False, **settings).to(weight.device)
        return new


@dataclass(frozen=True)
class _EightBit(Quantised):
    """bitsandbytes' Linear8bitLt: 8-bit integers and a factor a row, `SCB`, which moves into the layer's state with its
    first forward."""

    of: str
    name = "8-bit linear (bitsandbytes)"

    def matches(self, module: nn.Module) -> bool:
        return _of_bitsandbytes(module, "Linear8bitLt", self.of)

    def why_not(self, module: Any) -> str | None:
        if module.state.has_fp16_weights:
            return "it keeps its weight in 16 bits and quantises it in every forward; has_fp16_weights=False stores 8"
        return None

    def weight(self, module: Any) -> Float[Tensor, "d_out d_in"]:
        scale, data = self._scale(module), module.weight.detach().float()
        return data if scale is None else data * (scale.float() / 127).unsqueeze(1)

    def stored(self, module: Any) -> dict[str, Tensor]:
        scale = self._scale(module)
        return {"weight": module.weight} | ({} if scale is None else {"SCB": scale})

    def rounding(self, module: Any) -> Float[Tensor, "d_out d_in"]:
        scale, shape = self._scale(module), self.shape(module)
        step = torch.zeros(1, 1) if scale is None else (scale.float() / 127).unsqueeze(1)
        return (step**2 / 12).expand(shape)

    def requantised(self, module: Any, weight: Float[Tensor, "d_out d_in"]) -> nn.Module:
        new = _shell(module)
        new.state = copy.copy(module.state)
        new.state.CB = new.state.SCB = None
        cpu = weight.cpu()  # only from there does it quantise
        new.weight = type(module.weight)(cpu, requires_grad=False, has_fp16_weights=False).to(weight.device)
        return new

    def forget(self, module: Any) -> None:
        super().forget(module)
        module.state.CB = module.state.SCB = None

    def _scale(self, module: Any) -> Tensor | None:
        scale: Tensor | None = getattr(module.weight, "SCB", None)
        return module.state.SCB if scale is None else scale


class _TorchAO(Quantised):
    """nn.Linear with a weight of a tensor class of torchao, which dequantises itself."""

    name = "linear of torchao"

    def matches(self, module: nn.Module) -> bool:
        home, weight = sys.modules.get("torchao.utils"), module._parameters.get("weight")
        return home is not None and isinstance(module, nn.Linear) and isinstance(weight, home.TorchAOBaseTensor)

    def why_not(self, module: Any) -> str | None:
        for settings in ("act_quant_kwargs", "activation_quantization"):
            if getattr(module.weight, settings, None) is not None:
                return "torchao quantises its inputs too, through which no gradient flows; quantise weights only (int8)"
        return None if hasattr(module.weight, "dequantize") else f"{type(module.weight).__name__} does not dequantise"

    def weight(self, module: Any) -> Float[Tensor, "d_out d_in"]:
        whole: Tensor = module.weight.detach().dequantize()
        return whole.float()

    def stored(self, module: Any) -> dict[str, Tensor]:
        weight = module.weight
        inner = {name: getattr(weight, name) for name in weight.__tensor_flatten__()[0]}
        return {f"weight.{name}": tensor for name, tensor in inner.items() if isinstance(tensor, Tensor)}

    def rounding(self, module: Any) -> Float[Tensor, "d_out d_in"]:
        shape, scale = self.shape(module), getattr(module.weight, "scale", None)
        if scale is None or scale.ndim != 2 or shape[0] % len(scale) or shape[1] % scale.shape[1]:
            return torch.full((1, 1), math.nan).expand(shape)  # a format whose steps are not known here
        for axis, size in enumerate(shape):
            scale = scale.repeat_interleave(size // scale.shape[axis], axis)
        return scale.float() ** 2 / 12

    def forget(self, module: Any) -> None:
        module.to("meta")  # of the same class there, by which the layer is known

    def requantised(self, module: Any, weight: Float[Tensor, "d_out d_in"]) -> nn.Module:
        old, granularity = module.weight, sys.modules["torchao.quantization.granularity"]
        if type(old).__name__ not in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
            raise NotImplementedError(f"{type(old).__name__} is not quantised anew; dequantise=... merges")
        block = tuple(old.block_size)
        around_zero = sys.modules["torchao.quantization.quant_primitives"].MappingType
        mapping = around_zero.SYMMETRIC if not old.zero_point.any() else around_zero.ASYMMETRIC
        weight, given = weight.to(old.dtype), {"mapping_type": mapping}
        if hasattr(old, "target_dtype"):
            quantised = type(old).from_hp(weight, block, old.target_dtype, **given)
        else:
            rows = granularity.PerRow() if block[-1] == weight.shape[1] else granularity.PerGroup(block[-1])
            quantised = type(old).from_hp(weight, rows, reduce_range=old.reduce_range, **given)
        new = _shell(module)
        new.weight = nn.Parameter(quantised, requires_grad=False)
        return new


class _Other(LayerKind):
    """A linear layer that something else quantised: told by the package that its class, or that of its weight, is of,
    so that it can be refused by name."""

    name = "quantised otherwise"
    linear = True

    def matches(self, module: nn.Module) -> bool:
        return self._by(module) is not None

    def why_not(self, module: nn.Module) -> str | None:
        return f"it is quantised by {self._by(module)}; {_ADAPTED}: load the base so, or unquantised"

    def matrix(self, weight: Tensor) -> Float[Tensor, "d_out d_in"]:
        raise NotImplementedError(self.name)

    def restore(self, matrix: Float[Tensor, "d_out d_in"], weight: Tensor) -> Tensor:
        raise NotImplementedError(self.name)

    def _by(self, module: nn.Module) -> str | None:
        """The name of what quantised it, None where nothing known did."""
        home, _, within = type(module).__module__.partition(".")
        if "Linear" in type(module).__name__:
            if home in _OTHERS:
                return _OTHERS[home]
            if home == "transformers" and within.startswith("integrations."):  # FP8Linear, BitLinear, HiggsLinear
                return f"transformers' {within.rpartition('.')[2]}"
            if hasattr(module, "quantization_scheme"):
                return _OTHERS["compressed_tensors"]
        weight = module._parameters.get("weight")
        if weight is None or not isinstance(module, nn.Linear):
            return None
        if (of := type(weight).__module__.partition(".")[0]) in _OTHERS:
            return _OTHERS[of]
        # nn.Linear with 8-bit floats or with bytes of somebody's
        small = weight.dtype.itemsize == 1 or not weight.is_floating_point()
        return f"something that stores it as {weight.dtype}" if small else None


def _of_bitsandbytes(module: nn.Module, cls: str, of: str) -> bool:
    home = sys.modules.get("bitsandbytes.nn")
    if home is None or not isinstance(module, getattr(home, cls)):
        return False
    source = getattr(module, "source_cls", None)  # noted by transformers: GPT-2's Conv1D becomes a linear layer too
    return ("conv1d" if getattr(source, "__name__", None) == "Conv1D" else "linear") == of


def _state(module: Any) -> Any:
    """A copy of the state of a Linear4bit, None where it is not quantised yet. The layer has it too: wrappers that make
    a parameter anew lose it from there."""
    state = getattr(module.weight, "quant_state", None) or module.quant_state
    return None if state is None else copy.copy(state)


def _shell(module: nn.Module) -> Any:
    """A layer like another, that shares its tensors and may be given others."""
    new = object.__new__(type(module))
    vars(new).update({key: copy.copy(value) if key.startswith("_") else value for key, value in vars(module).items()})
    for name in (NAME, "forward", "_hf_hook", "_old_forward"):  # what stands before the forward of that very layer
        vars(new).pop(name, None)
    new._modules.pop(NAME, None)
    if module._parameters.get("bias") is not None:
        new._parameters["bias"] = nn.Parameter(module.bias.detach().clone(), module.bias.requires_grad)  # type: ignore
    return new


_BITSANDBYTES = [cls(of) for cls in (_FourBit, _EightBit) for of in ("linear", "conv1d")]
_KINDS: list[LayerKind] = [*_BITSANDBYTES, _TorchAO(), _Other()]
for _kind in reversed(_KINDS):  # the last one registered is asked first
    register_layer_kind(_kind)


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Quantised]]:
    """Every quantised layer of a kind that is adapted, by name."""
    for at, module in model.named_modules():
        if isinstance(kind := kind_of(module), Quantised):
            yield at, module, kind


def refused_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, LayerKind]]:
    """Every quantised layer that cannot carry an adapter, by name, with the kind that says why."""
    for at, module in model.named_modules():
        kind = next((kind for kind in _KINDS if kind.matches(module)), None)
        if kind is not None and kind.why_not(module) is not None:
            yield at, module, kind


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the base's parameters by name; of quantised weights those that they had before."""
    of_packed = {}
    for _, layer, kind in quantised_layers(model):
        shape = kind.shape(layer)
        of_packed[id(layer._parameters["weight"])] = shape[::-1] if kind.of == "conv1d" else shape
    return {name: of_packed.get(id(p), tuple(p.shape)) for name, p in base_parameters(model).items()}


def counts_of(model: nn.Module) -> dict[str, int]:
    """Parameters of the base by the name of the tensor; of quantised weights as many as they have entries."""
    return {name: math.prod(shape) for name, shape in shapes_of(model).items()}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The base's parameters by name; quantised weights as the tensors that they are stored in, scales and all."""
    parts = {
        id(layer._parameters["weight"]): {join(at, name): tensor for name, tensor in kind.stored(layer).items()}
        for at, layer, kind in quantised_layers(model)
    }
    found: dict[str, Tensor] = {}
    for name, parameter in base_parameters(model).items():
        found |= parts.get(id(parameter), {name: parameter})
    return found


def packed_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters that hold quantised weights, and cannot train."""
    return {id(layer._parameters["weight"]) for _, layer, _ in quantised_layers(model)}


class _ByKernel(torch.autograd.Function):
    """x Wᵀ as kernels on a CPU compute it: W is dequantised for the product, and for its gradient again or still."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], keeps: bool) -> Tensor:
        W = x.new_empty(shape)
        ctx.shape, ctx.W = shape, W if keeps else None
        return x @ W.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient @ (gradient.new_empty(ctx.shape) if ctx.W is None else ctx.W), None, None


def stand_in(kind: Quantised, layer: Any, dtype: torch.dtype | None) -> nn.Linear:
    """A layer on the meta device that takes the memory in a training step that a quantised one takes."""
    shape, bias = kind.shape(layer), layer.bias
    new = nn.Linear(
        shape[1], shape[0], bias is not None, device="meta", dtype=dtype or (bias.dtype if bias is not None else None)
    )
    keeps = isinstance(kind, _TorchAO)

    def forward(input: Tensor) -> Tensor:
        y: Tensor = _ByKernel.apply(input, shape, keeps)
        return y if new.bias is None else y + new.bias

    new.forward = forward  # type: ignore[method-assign]
    return new.requires_grad_(False)


def check_replacement(model: nn.Module, adapted: str | None, dtype: torch.dtype | None, again: bool) -> None:
    """Whether quantised layers can be merged as asked; `adapted`: one that carries an adapter, None where none does.

    Raises:
        StateError: neither way was chosen, both were, or there is nothing to choose for; a layer has a forward of
            somebody's on the instance, which its replacement would not have, or it is the model itself.
    """
    ways = "merge(model, dequantise=torch.bfloat16) puts ordinary layers in their place, requantise=True rounds anew"
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise StateError(f"dequantise={dtype!r}: must be a floating-point torch.dtype, such as torch.bfloat16")
    if dtype is not None and again:
        raise StateError("dequantise and requantise exclude each other: give one")
    if adapted is not None and dtype is None and not again:
        raise StateError(f"{adapted} is quantised, there is nothing to add ΔW to; {ways}")
    if adapted is None and (again or (dtype is not None and next(quantised_layers(model), None) is None)):
        raise StateError(f"{'requantise' if again else 'dequantise'} is given, and no adapted layer is quantised")
    for at, layer, _ in quantised_layers(model) if dtype is not None or again else ():
        forward = vars(layer).get("forward")
        forward = forward.inner if isinstance(forward, Front) else forward
        if not at or (forward is not None and "_hf_hook" not in vars(layer)):
            raise StateError(
                f"{at or 'the model'} ({type(layer).__name__}) "
                + (f"has a forward of its own on the instance ({forward!r})" if at else "is a quantised layer itself")
                + ", so no other layer can take its place"
            )


@dataclass
class Replaced:
    """Of a merged model: `layers`: the quantised ones, by name, that others stand in for; `noted`: what transformers
    said of them; `lost`: ‖error‖ by adapter where W + ΔW was quantised again."""

    layers: dict[str, nn.Module] = field(default_factory=dict)
    noted: dict[str, dict[str, Any]] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)


def plain_layer(kind: Quantised, layer: Any, weight: Float[Tensor, "d_out d_in"], dtype: torch.dtype) -> nn.Module:
    """An ordinary layer of another weight: nn.Linear, or Conv1D where the layer was one before it was quantised."""
    d_out, d_in = weight.shape
    with torch.device("meta"):
        biased = layer.bias is not None
        new = layer.source_cls(d_out, d_in) if kind.of == "conv1d" else nn.Linear(d_in, d_out, biased)
    as_stored = weight.T if kind.of == "conv1d" else weight
    new.weight = nn.Parameter(as_stored.to(dtype).contiguous(), requires_grad=False)
    if biased:
        new.bias = nn.Parameter(layer.bias.detach().to(dtype, copy=True), requires_grad=layer.bias.requires_grad)
    for name, hooks in vars(layer).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and "state_dict" not in name:
            vars(new)[name] = copy.copy(hooks)
    return new.train(layer.training)


def exchange(model: nn.Module, at: str, new: nn.Module, keep: str = "device") -> nn.Module:
    """Put a layer in the place of another, with what lorafamily knows of that one; returns the other, its tensors kept
    on their device, in CPU memory (`keep="cpu"`) or nowhere ("none")."""
    old = model.get_submodule(at)
    for name, module in [*model.named_modules(remove_duplicate=False)]:
        if module is old:
            model.set_submodule(name, new)
    if (hook := vars(old).get("_hf_hook")) is not None and "_hf_hook" not in vars(new):
        from accelerate.hooks import add_hook_to_module  # type: ignore[import-untyped, unused-ignore]

        add_hook_to_module(new, copy.copy(hook))
    if NAME in vars(old):
        vars(new)[NAME] = vars(old)[NAME]
    if keep == "device":  # of the model, which may have moved since
        new.to(old.get_parameter("weight").device)
    elif keep == "cpu":
        old.to("cpu")
    elif isinstance(kind := kind_of(old), Quantised):
        kind.forget(old)
    return old


_NOTED = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")


def forget_quantised(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Take from the models of transformers within what says that they are quantised: saved, they are ordinary ones."""
    taken: dict[str, dict[str, Any]] = {}
    for at, module in model.named_modules():
        noted = {name: vars(module).pop(name) for name in _NOTED if name in vars(module)}
        config = vars(vars(module).get("config", nn.Module()))
        if "quantization_config" in config:
            noted["quantization_config"] = config.pop("quantization_config")
        if noted:
            taken[at] = noted
        conversions = vars(module).get("_weight_conversions")  # between disk and memory, as the model was loaded
        if noted and conversions is not None:
            noted["_weight_conversions"] = conversions
            vars(module)["_weight_conversions"] = [one for one in conversions if _has_way_back(one)]
    return taken


def _has_way_back(conversion: Any) -> bool:
    """Whether transformers can save what it loaded so; packed weights that it read are gone."""
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def remember_quantised(model: nn.Module, taken: dict[str, dict[str, Any]]) -> None:
    """Give that back."""
    for at, noted in taken.items():
        module: Any = model.get_submodule(at)
        if "quantization_config" in noted:
            module.config.quantization_config = noted.pop("quantization_config")
        vars(module).update(noted)
