"""How far the outputs of programs that read our files are from the adapted model's.

A tiny model of random weights gets adapters with moved factors and different ranks (one module has rank 0), on some of
the layers that servers fuse. Its file goes through each client's own loading code. A difference is the largest
difference of an output over the largest output; a refusal says who refused.

    pip download --no-deps -d servers vllm sglang
    pip download --no-deps --no-binary :all: -d servers llama-cpp-python
    python experiments/checks/clients.py --packages servers
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that rooms find each other

import waiting  # noqa: F401 - before torch

# isort: split
import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch import Tensor, nn

import lorafamily
from checks import servers
from lorafamily.deploy.peft import Layout
from lorafamily.layers.placement import placement_of

BOUND = 1e-5
"""Largest relative difference: float32 outputs are sums of some hundred terms, each rounded to 6e-8."""
PARTLY = r"layers\.0\.self_attn\.(q|o)_proj|layers\.0\.mlp\.(gate|down)_proj|layers\.1\..*(k|v|up)_proj"
"""Targets: some layers of every group that a server fuses."""


@dataclass(frozen=True)
class Clients:
    """Load our files in every installed client, and print the differences."""

    packages: Path | None = None
    """folder with the wheels of vLLM and SGLang and the source of llama-cpp-python; without it they are left out"""
    methods: tuple[str, ...] = ("lora", "olora", "alora", "lora2")
    only: str = ""
    """only clients whose name contains this"""
    mismatched: bool = False
    """also try layouts that a client cannot read correctly, to see what the comparison shows"""


@dataclass(frozen=True)
class Client:
    """`loaded`: from (base, folder of the adapter, folder of the base's checkpoint) the model whose outputs are
    compared."""

    name: str
    base: Callable[[Path], nn.Module]
    layout: Layout
    loaded: Callable[[nn.Module, Path, Path], nn.Module]
    targets: str | None = None
    head: str | None = None
    """extra trained parameters"""


def main(given: Clients) -> list[dict[str, Any]]:
    rows = []
    print(f"| client | layout | {' | '.join(given.methods)} |")
    print(f"| --- | --- | {' | '.join(['---:'] * len(given.methods))} |")
    for client in clients(given.packages, given.mismatched):
        if given.only in client.name:
            found = {method: difference(client, method) for method in given.methods}
            cells = " | ".join(
                value.partition(": ")[0] if isinstance(value, str) else f"{value:.1e}" for value in found.values()
            )
            print(f"| {client.name} | `{client.layout}` | {cells} |", flush=True)
            rows.append({"client": client.name, "layout": client.layout, **found})
    print()
    for row in rows:
        for message in dict.fromkeys(value for value in row.values() if isinstance(value, str) and ": " in value):
            print(f"{row['client']}: {message}")
    worst = [value for row in rows for value in row.values() if isinstance(value, float)]
    if worst:
        print(f"largest: {max(worst):.1e}, which is {'within' if max(worst) <= BOUND else 'above'} {BOUND:.0e}")
    return rows


def difference(client: Client, method: str) -> float | str:
    """The difference relative to the largest output, or who refused and why."""
    with tempfile.TemporaryDirectory() as at, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as peft's on ranks of parameters
        place = Path(at)
        model = client.base(place / "base")
        base = copy.deepcopy(model)
        moved(model, method, client)
        expected, before = outputs(model), outputs(base)
        assert (expected - before).abs().max() > 100 * BOUND * before.abs().max(), f"{method} moved nothing"
        try:
            lorafamily.export_peft(model, place / "adapter", layout=client.layout, card=False)
        except lorafamily.LoraFamilyError as error:
            return f"refused here: {error}"
        try:
            theirs = outputs(client.loaded(base, place / "adapter", place / "base"))
        except Exception as error:  # any exception of a client is what its user would see
            return f"{type(error).__name__} there: {error}"
        return float((theirs - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def moved(model: nn.Module, method: str, client: Client) -> None:
    """Put adapters on the model and move them: one without rank, one that lost ranks, one that grew."""
    lorafamily.apply(model, method, rank=3, seed=0, targets=client.targets, also_train=client.head)
    placement = placement_of(model)
    placement.had_session = True  # as after training, so that the export does not warn
    generator = torch.Generator().manual_seed(1)
    for adapter in placement.adapters.values():
        for parameter in adapter.update.parameters():
            size = 0.3 if method == "lora2" else 0.1  # LoRA²'s update is a product of four
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    none, fewer, more, *_ = placement.adapters.values()
    none.resize(torch.arange(0))
    fewer.resize(torch.tensor([1]))
    more.resize(torch.arange(more.slices), add=2, generator=generator)
    more.update.get_parameter(more.update.zeroed).normal_(std=0.1, generator=generator)
    for name in placement.inactive_values:
        model.get_parameter(name).normal_(generator=generator)


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    architecture = type(model).__name__

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if architecture == "UNet2DConditionModel":
        return model.eval()(noise(2, 4, 8, 8), torch.tensor([3, 5]), encoder_hidden_states=noise(2, 5, 8)).sample
    if architecture == "FluxTransformer2DModel":
        places = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3), "timestep": torch.tensor([0.5])}
        hidden = {"hidden_states": noise(1, 16, 4), "encoder_hidden_states": noise(1, 6, 16)}
        return model.eval()(**hidden, pooled_projections=noise(1, 16), **places).sample
    ids = torch.randint(50, (2, 9), generator=generator)
    out = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    return out.logits if "logits" in out else out.last_hidden_state


def clients(packages: Path | None, mismatched: bool) -> list[Client]:
    """All clients, in the order of the table."""
    found = [
        Client("peft", llama, "peft", by_peft, PARTLY),
        Client("peft", llama, "serving", by_peft, PARTLY),
        Client("peft, trained head", classifier, "peft", by_peft, head="classifier"),
        Client("peft, experts as target_parameters", experts, "peft", by_peft),
        Client("peft, shared experts of DeepSeek-V3", deepseek, "peft", by_peft),
        Client("peft.AutoPeftModelForCausalLM", llama, "peft", by_auto, PARTLY),
        Client("transformers, load_adapter", llama, "peft", by_transformers, PARTLY),
        Client("transformers, load_adapter, head", classifier, "peft", by_transformers, head="classifier"),
        Client("sentence-transformers, load_adapter", encoder, "peft", by_sentence_transformers),
        Client("diffusers, load_lora_adapter, UNet", unet, "diffusers", by_diffusers),
        Client("diffusers, load_lora_weights, UNet", unet, "diffusers", by_pipeline),
        Client("diffusers, load_lora_adapter, Flux", flux, "diffusers", by_diffusers),
        Client("diffusers, load_lora_weights, Flux", flux, "diffusers", by_pipeline),
    ]
    read_by: dict[str, tuple[tuple[Layout, ...], Callable[..., servers.Updates]]] = {
        "vllm": (("peft", "serving"), servers.vllm),
        "sglang": (("serving",), servers.sglang),
        "llama_cpp": (("serving",), servers.llama_cpp),
    }
    for name, (to_serve, read) in read_by.items():
        file = next(iter(sorted((packages or Path("nowhere")).glob(f"{name}*"))), None)
        if file is not None:
            called = " ".join(file.name.replace("-cp", " ").replace(".tar.gz", "").split()[0].split("-")[:2])
            loaded = merged_by(read, file)
            found += [Client(f"{called}, loading code", llama, to, loaded, PARTLY) for to in to_serve]
            found += [Client(f"{called}, experts in one parameter", experts, "serving", loaded)]
            found += [Client(f"{called}, trained head", classifier, "serving", loaded, head="classifier")]
            if mismatched and to_serve == ("serving",):
                found.append(Client(f"{called}, mismatched", llama, "peft", loaded, PARTLY))
    return found


def merged_by(read: Callable[..., servers.Updates], package: Path) -> Callable[..., nn.Module]:
    """A client whose code gives ΔW of every layer; here it is added to the base."""

    @torch.no_grad()
    def loaded(base: Any, folder: Path, checkpoint: Path) -> nn.Module:
        about = checkpoint if read is servers.llama_cpp else base.config
        for at, update in read(package, folder, about).items():
            base.get_submodule(at).weight += update
        return base

    return loaded


def by_peft(base: Any, folder: Path, checkpoint: Path) -> nn.Module:
    import peft

    return peft.PeftModel.from_pretrained(base, folder)


def by_auto(base: Any, folder: Path, checkpoint: Path) -> nn.Module:
    import peft

    return peft.AutoPeftModelForCausalLM.from_pretrained(folder)


def by_transformers(base: Any, folder: Path, checkpoint: Path) -> nn.Module:
    base.load_adapter(str(folder))
    return base


def by_sentence_transformers(base: Any, folder: Path, checkpoint: Path) -> nn.Module:
    import sentence_transformers
    from sentence_transformers.sentence_transformer import modules

    _tokenizer(checkpoint)
    transformer = modules.Transformer(str(checkpoint))
    model = sentence_transformers.SentenceTransformer(modules=[transformer, modules.Pooling(32)], device="cpu")
    model.load_adapter(str(folder))
    adapted: Any = model.transformers_model
    return adapted


def by_diffusers(base: Any, folder: Path, checkpoint: Path) -> nn.Module:
    prefix = "unet" if type(base).__name__.startswith("UNet") else "transformer"
    base.load_lora_adapter(folder, prefix=prefix, use_safetensors=True)
    return base


def by_pipeline(base: Any, folder: Path, checkpoint: Path) -> nn.Module:
    """What `pipeline.load_lora_weights(folder)` does for this model of the pipeline."""
    from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin

    if type(base).__name__.startswith("UNet"):
        found = StableDiffusionLoraLoaderMixin.lora_state_dict(folder, return_lora_metadata=True)
        StableDiffusionLoraLoaderMixin.load_lora_into_unet(*found[:2], base, metadata=found[2])
    else:
        found = FluxLoraLoaderMixin.lora_state_dict(folder, return_alphas=True, return_lora_metadata=True)
        FluxLoraLoaderMixin.load_lora_into_transformer(*found[:2], base, metadata=found[2])
    return base


COMMON = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SPARSE = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}


def _saved(architecture: str, folder: Path, **settings: Any) -> nn.Module:
    import transformers

    cls = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = cls(cls.config_class(**COMMON, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 3:  # experts, which transformers leaves at zero or uninitialised
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return cls.from_pretrained(folder).eval()


def _exact(model: Any) -> nn.Module:
    """The model in float64, since norms of latents and routers amplify rounding, in a merged model as in a client."""
    model.set_experts_implementation("eager")  # the fused products have no float64
    return model.double()


def llama(folder: Path) -> nn.Module:
    return _saved("LlamaForCausalLM", folder, num_attention_heads=4, num_key_value_heads=2)


def encoder(folder: Path) -> nn.Module:
    return _saved("BertModel", folder, num_attention_heads=4)


def classifier(folder: Path) -> nn.Module:
    return _saved("BertForSequenceClassification", folder, num_attention_heads=4)


def experts(folder: Path) -> nn.Module:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return _exact(_saved("Qwen3MoeForCausalLM", folder, num_experts=8, **heads, **SPARSE))


def deepseek(folder: Path) -> nn.Module:
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    groups = {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return _exact(_saved("DeepseekV3ForCausalLM", folder, **heads, **latent, **groups, **SPARSE))


def unet(folder: Path) -> nn.Module:
    import diffusers

    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def flux(folder: Path) -> nn.Module:
    import diffusers

    torch.manual_seed(0)
    sizes = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 8)}
    layers = {"num_layers": 1, "num_single_layers": 1, "pooled_projection_dim": 16}
    return diffusers.FluxTransformer2DModel(patch_size=1, in_channels=4, **sizes, **layers).eval()


def _tokenizer(folder: Path) -> None:
    """Write a tokenizer, without which sentence-transformers loads no model; the comparison passes token ids."""
    import transformers

    words = {word: number for number, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))}
    transformers.BertTokenizer(vocab=words).save_pretrained(folder)


if __name__ == "__main__":
    main(tyro.cli(Clients))
