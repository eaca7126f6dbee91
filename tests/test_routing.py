"""Samples of one batch through adapters of their own give what each gives alone."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lorafamily
from conftest import METHODS, logits, perturb_, tiny, tokens
from heads import llama
from lorafamily.layers.placement import placement_of
from lorafamily.layers.site import site_on, sites_in


def with_all() -> nn.Module:
    """One adapter of every method, of different ranks, one of them on some layers only."""
    model = tiny(dtype=torch.float64)
    for seed, method in enumerate(METHODS):
        targets = "mlp" if seed == 2 else None
        name = method.replace("+", "_")
        lorafamily.apply(model, method, rank=1 + seed % 4, name=name, seed=seed, targets=targets)
        perturb_(model, seed=seed)
    return model


def test_every_sample_gets_its_own_adapter():
    model = with_all()
    names = [None, *[method.replace("+", "_") for method in METHODS], None, "lora", "lora"]
    batch = tokens(rows=len(names))
    active = placement_of(model).name
    before = logits(model)
    with torch.no_grad():
        with lorafamily.routing(model, names):
            routed = model(batch).logits
        for i, name in enumerate(names):
            alone = model(batch[i : i + 1]).logits if name == active else None
            if name != active:
                lorafamily.switch(model, name)
                alone = model(batch[i : i + 1]).logits
                lorafamily.switch(model, active)
            # float64: the same products, padded with zeros and summed in another order.
            assert_close(routed[i : i + 1], alone, rtol=1e-10, atol=1e-12)
    assert len({float(sample.sum()) for sample in routed}) == len(names)
    assert placement_of(model).name == active
    assert torch.equal(logits(model), before)


def test_flattened_tokens_follow_their_sample():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 4, dtype=torch.float64)

        def forward(self, x):
            return self.layer(x.flatten(0, 1)).view(*x.shape[:2], 4)

    model = Flat()
    for name in ("a", "b"):
        perturb_(lorafamily.apply(model, "lora", rank=2, name=name, seed=ord(name)), seed=ord(name))
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    with lorafamily.routing(model, ["b", None, "a"]):
        routed = model(x)
        with pytest.raises(lorafamily.StateError, match="layer got 14 rows for a batch routed as 3 samples"):
            model(x[:2])
    for i, name in enumerate(["b", None, "a"]):
        lorafamily.switch(model, name)
        assert_close(routed[i], model(x)[i])
    assert all(site.route is None for _, site in sites_in(model))


def test_routes_that_cannot_be_are_refused():
    model = lorafamily.apply(tiny(), "lora", rank=1, name="a")
    lorafamily.apply(model, "lora", rank=1, name="head", also_train="norm")
    for names, message in (
        (["a", "c"], 'no adapter named "c"; this model has "a", "head"'),
        ("a", "must be a list with the name of an adapter"),
        ([], "must be a list"),
        (["a", "head"], 'adapter "head" has its own .*norm.*, trained along with it'),
    ):
        with pytest.raises(lorafamily.StateError, match=message), lorafamily.routing(model, names):
            pass
    lorafamily.merge(lorafamily.switch(model, "a"))
    with pytest.raises(lorafamily.StateError, match="is merged into the weights"), lorafamily.routing(model, ["a"]):
        pass
    embedding = lorafamily.apply(nn.Sequential(nn.Embedding(4, 3)), "lora", rank=1, targets="0", name="a")
    refused = pytest.raises(lorafamily.StateError, match=r"is on 0 \(embedding\); only layers called")
    with refused, lorafamily.routing(embedding, ["a"]):
        pass


def with_two(model: nn.Module, **options) -> nn.Module:
    """Adapters "a" and "b" on a model, in float64."""
    model = model.double().eval()
    for name in ("a", "b"):
        perturb_(lorafamily.apply(model, "lora", rank=2, name=name, seed=ord(name), **options), seed=ord(name))
    return model


@torch.no_grad()
def one_by_one(model, run, names):
    """What each sample's adapter gives where it is the only one."""
    alone = {name: run(lorafamily.switch(model, name)) for name in dict.fromkeys(names)}
    return torch.stack([alone[name][i] for i, name in enumerate(names)])


@torch.no_grad()
def assert_right_or_refused(model, run, names, message=None):
    """Routing gives every sample what its adapter gives, or a StateError where `message` is given."""
    expected = one_by_one(model, run, names)
    if message is None:
        with lorafamily.routing(model, names):
            # float64: the same products, padded with zeros and summed in another order.
            return assert_close(run(model), expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(lorafamily.StateError, match=message), lorafamily.routing(model, names):
        run(model)
    same = ["b"] * len(names)
    expected = one_by_one(model, run, same)
    with lorafamily.routing(model, same):  # where the samples are does not matter then
        assert_close(run(model), expected, rtol=1e-9, atol=1e-9)


class Turned(nn.Module):
    """Its layer gets (length, samples, width) of an input (samples, length, width), as in Longformer and XLNet."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 4)

    def forward(self, x):
        return self.layer(x.transpose(0, 1).contiguous()).transpose(0, 1)


class Windows(Turned):
    """Its layer gets two windows of a sample as rows of their own."""

    def forward(self, x):
        return self.layer(x.unflatten(1, (2, -1)).flatten(0, 1)).unflatten(0, (len(x), 2)).flatten(1, 2)


class Experts(nn.Module):
    """One expert gets the tokens whose first number is large, last token first, the other one the rest."""

    def __init__(self, container):
        super().__init__()
        self.experts = container

    def forward(self, x):
        tokens = x.flatten(0, 1)
        chosen = (tokens[:, 0] > tokens[:, 0].median()).long()
        y = x.new_zeros(len(tokens), 5)
        layers = self.experts.values() if isinstance(self.experts, nn.ModuleDict) else self.experts
        for i, layer in enumerate(layers):
            where = (chosen == i).nonzero()[:, 0].flip(0)
            y[where] = layer(tokens[where])
        return y.view(*x.shape[:2], 5)


def encoder_of_torch(batch_first):
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first), 1, enable_nested_tensor=False
    )


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (Turned, (3, 6, 5), r"layer got 6 rows .* \(positions before samples\?"),
        (Turned, (3, 3, 5), "layer got 3 rows .* as many along the second axis: either may be the samples"),
        (Windows, (3, 8, 5), "layer got 6 rows .* windows"),
        (lambda: Experts(nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])), (3, 4, 5), r"experts\.0 is in an expert"),
        (
            lambda: Experts(nn.ModuleDict({"expert_0": nn.Linear(5, 5), "expert_1": nn.Linear(5, 5)})),
            (3, 4, 5),
            "experts.expert_0 is in an expert, which gets some tokens",
        ),
    ],
    ids=["turned", "turned, square", "windows", "list of experts", "experts by name"],
)
def test_layers_that_do_not_get_whole_samples_in_order_are_refused(model, shape, message):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = with_two(model(), targets="layer|expert")
    assert_right_or_refused(model, lambda m: m(x), ["a", "b", None], message)


@pytest.mark.parametrize("length", [3, 6])
def test_a_transformer_of_torch_needs_the_batch_first(length):
    x = torch.randn(3, length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = with_two(encoder_of_torch(False), targets="linear")
    message = r"layers\.0\.linear1 is in layers\.0, which has positions before samples; make it with batch_first=True"
    with pytest.raises(lorafamily.StateError, match=message), lorafamily.routing(model, ["a", "b", None]):
        model(x.transpose(0, 1))
    model = with_two(encoder_of_torch(True), targets="linear")
    message = None if length == 6 else "either may be the samples"
    assert_right_or_refused(model, lambda m: m(x), ["a", "b", None], message)


def test_a_model_of_transformers_takes_as_many_tokens_as_samples_at_once():
    """They have samples first, but for a few."""
    model = with_two(llama())
    x = torch.arange(9).view(3, 3) % 7
    expected = one_by_one(model, lambda m: m(x).logits, ["a", None, "b"])
    with torch.no_grad(), lorafamily.routing(model, ["a", None, "b"]):
        assert_close(model(x).logits, expected, rtol=1e-9, atol=1e-9)


def test_a_layer_that_is_known_takes_as_many_tokens_as_samples():
    """Without a cache, generating passes through every length."""
    model = with_two(tiny())
    x = tokens(rows=3)
    expected = one_by_one(model, lambda m: m(x[:, :3]).logits, ["a", None, "b"])
    with torch.no_grad(), lorafamily.routing(model, ["a", None, "b"]):
        with pytest.raises(lorafamily.StateError, match="pad the batch by one token"):
            model(x[:, :3])
        model(x[:, :2])
        assert_close(model(x[:, :3]).logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("names", [["a", "b"], ["a"], ["b", "b"]], ids=str)
def test_a_name_for_every_sample(names):
    model = with_two(tiny())
    message = re.escape(f"got 4 rows for a batch routed as {len(names)} samples, and the model 4 (bytes): give a name")
    with pytest.raises(lorafamily.StateError, match=message), lorafamily.routing(model, names):
        model(tokens(rows=4))


def test_beams_have_names_of_their_own_and_images_are_not_samples():
    transformers = pytest.importorskip("transformers", reason="transformers is an extra; nothing to test without it")
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_attention_heads=2, **sizes))
    model, ids = with_two(llama), torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    options = {"num_beams": 2, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    found = {name: lorafamily.switch(model, name).generate(ids, **options) for name in "ab"}
    with lorafamily.routing(model, ["a", "a", "b", "b"]):
        routed = model.generate(ids, **options)
    assert torch.equal(routed, torch.stack([found["a"][0], found["b"][1]]))
    assert not torch.equal(found["a"][0], found["b"][0])

    class Seeing(nn.Module):
        """Two images, both of the first sample, make its text longer."""

        def __init__(self):
            super().__init__()
            self.vision, self.text, self.words = nn.Linear(6, 4), nn.Linear(4, 4), nn.Embedding(99, 4)

        def forward(self, input_ids, pixel_values):
            x = self.words(input_ids)
            x[0, :2] += self.vision(pixel_values).sum(1)
            return self.text(x)

    images = torch.randn(2, 5, 6, dtype=torch.float64)
    model = with_two(Seeing(), targets="vision")
    for run in (lambda m: m(ids, images), lambda m: m(pixel_values=images, input_ids=ids)):
        assert_right_or_refused(model, run, ["a", "b"], r"vision got 2 rows .*next to input_ids of shape \(2, 7\)")
    assert_right_or_refused(with_two(Seeing(), targets="text"), lambda m: m(ids, images), ["a", "b"])


def test_buffers_that_moved_in_training_cannot_be_routed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    lorafamily.apply(model, "lora", rank=2, name="a")
    model.train()(torch.randn(8, 4))
    lorafamily.apply(model.eval(), "lora", rank=2, name="b")
    for active in ("a", "b", None):
        lorafamily.switch(model, active)
        refused = pytest.raises(lorafamily.StateError, match=r'"a" has its own 1\.running_mean, .* moved in training')
        with refused, lorafamily.routing(model, ["a", "b"]):
            pass
        assert site_on(model[0]).state.active == active
        with lorafamily.routing(model, ["b", None]):  # the buffers of "b" are the base's
            model(torch.randn(2, 4))


def test_blocks_inside_routing():
    model, names = with_two(tiny()), ["a", None, "b", "a"]
    expected, of_b = one_by_one(model, logits, names), logits(lorafamily.switch(model, "b"))
    base = logits(lorafamily.switch(model, None))
    lorafamily.switch(model, "b")
    with torch.no_grad():
        with lorafamily.routing(model, names):
            routed = logits(model)
            assert_close(routed, expected, rtol=1e-9, atol=1e-9)
            with lorafamily.routing(model, ["b", "b"]):
                assert_close(logits(model, 2), of_b[:2], rtol=1e-9, atol=1e-9)
                with lorafamily.disabled(model):
                    assert torch.equal(logits(model), base)  # of any number of rows
                    with lorafamily.routing(model, names):
                        assert torch.equal(logits(model), routed)
                    assert torch.equal(logits(model), base)
            assert torch.equal(logits(model), routed)
            with lorafamily.disabled(model):
                assert torch.equal(logits(model), base)
            with pytest.raises(lorafamily.StateError, match="no adapter named"), lorafamily.routing(model, ["c"]):
                pass
            for change in (
                lambda: lorafamily.switch(model, "a"),
                lambda: lorafamily.switch(model, None),
                lambda: lorafamily.remove(model),
                lambda: lorafamily.apply(model, "lora", rank=1, name="c"),
                lambda: lorafamily.combine(model, {"a": 1.0}, "c"),
            ):
                with pytest.raises(lorafamily.StateError, match=r"inside a block of lorafamily\.routing"):
                    change()
            assert torch.equal(logits(model), routed)
        assert torch.equal(logits(model), of_b)
