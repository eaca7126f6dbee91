"""Hugging Face models work unchanged around adapters."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.testing import assert_close

import lorafamily
from conftest import METHODS, assert_merged, few_rounds, in_turn, perturb_
from lorafamily.layers.placement import placement_of

transformers = pytest.importorskip("transformers", reason="transformers is an extra; nothing to test without it")

SMALL = {
    "bert": lambda: transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3
    ),
    "llama": lambda: transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2, n_positions=64),
}
LAYERS = {"bert": 12, "llama": 14, "gpt2": 8}


def model_of(family: str):
    torch.manual_seed(0)
    auto = transformers.AutoModelForSequenceClassification if family == "bert" else transformers.AutoModelForCausalLM
    return auto.from_config(SMALL[family]()).eval()


def ids(seed: int = 0):
    return torch.randint(1, 99, (3, 10), generator=torch.Generator().manual_seed(seed))


families = pytest.mark.parametrize("family", SMALL)
# Every method on one family, and the plain and the most involved one on all.
methods_on_families = in_turn("family,method", list(SMALL), METHODS, and_also=product(SMALL, ["lora", "lora2+olora"]))


@methods_on_families
def test_apply_train_merge_save_pretrained_reload(family, method, tmp_path):
    model = model_of(family)
    head = "classifier" if family == "bert" else None
    with torch.no_grad():
        base = model(ids()).logits
        lorafamily.apply(model, method, rank=2, also_train=head, **few_rounds(method))
        assert torch.equal(model(ids()).logits, base)
    assert len(placement_of(model).adapters) == LAYERS[family]
    labels = torch.tensor([0, 1, 2]) if family == "bert" else ids()
    batches = [{"input_ids": ids(), "labels": labels}]
    history = lorafamily.train(model, batches, steps=40, lr=1e-2, validation=batches, progress=False)
    assert history.steps[-1].loss < history.steps[0].loss
    perturb_(model, size=0.1)
    model.eval()
    with torch.no_grad():
        adapted = model(ids()).logits
        assert (adapted - base).abs().max() > 0.01
        merged = lorafamily.merge(model)(ids()).logits
        assert_merged(merged, adapted)
        model.save_pretrained(tmp_path)
        reloaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert torch.equal(reloaded.eval()(ids()).logits, merged)
        assert torch.equal(lorafamily.unmerge(model)(ids()).logits, adapted)
        assert torch.equal(lorafamily.remove(model)(ids()).logits, base)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "lora2+olora"])
def test_generate_works_adapted_and_merged(family, method):
    model = perturb_(lorafamily.apply(model_of(family), method, rank=2), size=0.5)

    def generated():
        return model.generate(ids()[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)

    with lorafamily.disabled(model):
        base = generated()
    adapted = generated()
    assert adapted.shape == base.shape
    lorafamily.merge(model)
    assert torch.equal(generated(), adapted)


def test_gpt2_stores_weights_transposed_and_delta_follows():
    model = perturb_(lorafamily.apply(model_of("gpt2"), "lora", rank=2))
    layer = model.transformer.h[0].attn.c_attn
    delta = placement_of(model).adapters["transformer.h.0.attn.c_attn"].delta()
    assert delta.shape == (96, 32)
    assert layer.weight.shape == (32, 96)
    before = layer.weight.detach().clone()
    lorafamily.merge(model)
    assert_close(layer.weight - before, delta.T, rtol=1e-4, atol=1e-6)  # a difference of float32 sums


def test_gradient_checkpointing_reaches_every_adapter():
    model = model_of("llama")
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    lorafamily.apply(model, "lora", rank=2)
    batches = [{"input_ids": ids(), "labels": ids()}]
    assert lorafamily.train(model, batches, steps=3, progress=False).steps


def test_the_output_head_is_left_alone_by_default_and_a_tied_one_is_not_merged():
    model = model_of("gpt2")
    lorafamily.apply(model, "lora", rank=2)
    assert "lm_head" not in placement_of(model).adapters
    lorafamily.remove(model)
    lorafamily.apply(model, "lora", rank=2, targets="lm_head")
    perturb_(model)
    with pytest.raises(
        lorafamily.StateError, match=r"transformer\.wte\.weight and lm_head\.weight are one tied tensor"
    ):
        lorafamily.merge(model)


@families
def test_activations_are_recomputed(family):
    batches = [{"input_ids": ids(), "labels": torch.tensor([0, 1, 2]) if family == "bert" else ids()}]
    losses = []
    for recompute in (False, True):
        model = lorafamily.apply(model_of(family), "lora", rank=2, seed=0)
        history = lorafamily.train(model, batches, steps=4, checkpoint_activations=recompute, progress=False)
        losses.append([step.loss for step in history.steps])
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    # float32: GPT-2 adds gradients up in another order.
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_an_adapter_on_an_embedding_that_was_resized_is_not_written(tmp_path):
    """Its file would fit neither the old embedding nor the new one."""
    model = lorafamily.apply(model_of("llama"), "lora", rank=2, targets=["embed_tokens", "q_proj"])
    perturb_(model)
    d_in, d_out = model.model.embed_tokens.weight.shape
    model.resize_token_embeddings(d_in + 7)
    message = rf"embed_tokens is \[{d_out}, {d_in + 7}\] as \(d_out, d_in\), .* made for \[{d_out}, {d_in}\]"
    for write in (lorafamily.save, lorafamily.export_peft):
        with pytest.raises(lorafamily.StateError, match=message):
            write(model, tmp_path / "it")
    assert not (tmp_path / "it").exists()
