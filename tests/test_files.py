"""Loading is strict: one clear line, the model untouched, nothing unpickled."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorafamily
from conftest import data, logits, perturb_, tiny
from embedded import ByteDecoder
from lorafamily.deploy.folder import write_sealed
from lorafamily.layers.placement import placement_of


@pytest.fixture
def folder(tmp_path):
    model = perturb_(lorafamily.apply(tiny(), "lora", rank=2, also_train=r"^norm\."))
    return lorafamily.save(model, tmp_path / "adapter")


def edit_record(folder, change):
    path = folder / "adapter.json"
    record = json.loads(path.read_text())
    change(record)
    write_sealed(folder, "adapter.json", record, "adapter.safetensors", load_file(folder / "adapter.safetensors"))


def edit_tensors(folder, change):
    path = folder / "adapter.safetensors"
    tensors = load_file(path)
    change(tensors)
    write_sealed(folder, "adapter.json", json.loads((folder / "adapter.json").read_text()), path.name, tensors)


KEY = "blocks.0.mlp.up.update.A"
DAMAGE = {
    "no record": (lambda f: (f / "adapter.json").unlink(), "no adapter.json there"),
    "no tensors": (lambda f: (f / "adapter.safetensors").unlink(), "no adapter.safetensors there"),
    "truncated record": (lambda f: (f / "adapter.json").write_text("{"), "damaged, not JSON"),
    "truncated tensors": (
        lambda f: (f / "adapter.safetensors").write_bytes((f / "adapter.safetensors").read_bytes()[:-9]),
        "damaged, its SHA-256 is not the one that the record notes",
    ),
    "pickle": (
        lambda f: (f / "adapter.safetensors").write_bytes(pickle.dumps({"a": 1})),
        "damaged, its SHA-256 is not the one that the record notes",
    ),
    "newer format": (
        lambda f: edit_record(f, lambda r: r.update(format=99)),
        "format 99; this version .* reads format 3",
    ),
    "no object": (lambda f: (f / "adapter.json").write_text("[]"), "format None"),
    "record lacks a part": (lambda f: edit_record(f, lambda r: r.pop("modules")), "not a record of an adapter"),
    "sizes of no sense": (
        lambda f: edit_record(f, lambda r: r["modules"]["blocks.0.mlp.up"].update(sizes={"rank": "x"})),
        "not a record of an adapter",
    ),
    "negative sizes": (
        lambda f: edit_record(f, lambda r: r["modules"]["blocks.0.mlp.up"].update(sizes={"rank": -1})),
        "not a record of an adapter",
    ),
    "a name twice": (
        lambda f: (f / "adapter.json").write_text('{"format": 1, "format": 1}'),
        "a name occurs twice among format, format",
    ),
    "a scale of no sense": (
        lambda f: edit_record(f, lambda r: r["modules"]["blocks.0.mlp.up"].update(scale="big")),
        "not a record of an adapter",
    ),
    "unknown option": (lambda f: edit_record(f, lambda r: r["options"].update(x=1)), "unknown option x"),
    "shape of three": (
        lambda f: edit_record(f, lambda r: r["modules"]["blocks.0.mlp.up"].update(shape=[1, 2, 3])),
        "not a record of an adapter",
    ),
    "a pickle": (
        lambda f: torch.save({KEY: torch.ones(2, 16)}, f / "adapter.safetensors"),
        "damaged, its SHA-256 is not the one that the record notes",
    ),
    "unknown method": (lambda f: edit_record(f, lambda r: r.update(method="lora9")), 'no method named "lora9"'),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(KEY)), f"{KEY} is missing"),
    "extra tensor": (lambda f: edit_tensors(f, lambda t: t.update(x=torch.ones(1))), "x is not in the record"),
    "wrong shape": (lambda f: edit_tensors(f, lambda t: t.update({KEY: torch.ones(2, 3)})), r"\(2, 3\), not \(2, 16\)"),
    "nan": (lambda f: edit_tensors(f, lambda t: t[KEY].fill_(torch.nan)), f"{KEY} is not all finite"),
    "integers": (lambda f: edit_tensors(f, lambda t: t.update({KEY: t[KEY].int()})), f"{KEY} is not all finite"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused(folder, damage):
    harm, message = DAMAGE[damage]
    harm(folder)
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(lorafamily.LoraFamilyError, match=message):
        lorafamily.load(model, folder)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_file_for_another_base_says_which_modules_differ(folder):
    with pytest.raises(
        lorafamily.FileError, match=r"another model .*blocks.0.attention.query is \[32, 32\], not \[16, 16\]"
    ):
        lorafamily.load(ByteDecoder(width=32, layers=2, heads=2, context=24), folder)
    with pytest.raises(lorafamily.FileError, match=r"blocks.1.attention.query is missing"):
        lorafamily.load(ByteDecoder(width=16, layers=1, heads=2, context=24), folder)


def test_a_file_that_notes_weights_is_refused_on_others(tmp_path):
    model = perturb_(lorafamily.apply(tiny(), "lora", rank=2))
    for merged in (False, True):
        if merged:
            lorafamily.merge(model)
        folder = lorafamily.save(model, tmp_path / str(merged), hash_base=True)
        assert torch.equal(logits(lorafamily.load(tiny(), folder)), logits(lorafamily.unmerge(model)))
    other = tiny()
    with torch.no_grad():
        other.blocks[1].mlp.up.weight[0, 0] += 1
    with pytest.raises(lorafamily.FileError, match=r"in this ByteDecoder blocks\.1\.mlp\.up has other weights$"):
        lorafamily.load(other, folder)


def test_weights_that_are_gone_are_not_noted(tmp_path):
    """The merged weights are there, and load would take them for the base and add the update once more."""
    model = tiny()
    lorafamily.apply(model, "lora", rank=2, name="parts", fused={"up": ["first", "second"]})
    lorafamily.apply(model, "lora", rank=2, name="merged", targets="down|up.first")
    perturb_(model)
    lorafamily.merge(model, keep="none")
    for name in ("merged", "parts"):  # the second half of that weight is merged too
        with pytest.raises(
            lorafamily.StateError, match=r'that of blocks\.0\.mlp\.\S+ is gone: "merged" was merged with'
        ):
            lorafamily.save(model, tmp_path / name, name, hash_base=True)
        lorafamily.save(model, tmp_path / name, name)


def test_noted_weights_are_the_base_s_where_another_adapter_trained_them(tmp_path):
    model = lorafamily.apply(tiny(), "lora", rank=2, name="adapts", targets="up$")
    perturb_(model)
    lorafamily.switch(model, None)
    lorafamily.apply(model, "lora", rank=2, name="trains", targets="down$", also_train=r"up\.weight")
    with torch.no_grad():
        model.blocks[0].mlp.up.weight.add_(1)
    lorafamily.save(model, tmp_path / "it", "adapts", hash_base=True)
    again = logits(lorafamily.load(tiny(), tmp_path / "it"))
    assert torch.equal(again, logits(lorafamily.switch(model, "adapts")))


def test_a_base_that_differs_elsewhere_is_said(folder):
    other = tiny()
    other.extra = torch.nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="every adapted layer fits, but this ByteDecoder has other parameters"):
        lorafamily.load(other, folder)


def test_nothing_partial_is_left_behind(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.json", "adapter.safetensors"]


def test_saving_without_adapters_is_refused(tmp_path):
    with pytest.raises(lorafamily.StateError, match="has no adapters"):
        lorafamily.save(tiny(), tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", ["blocks.1.mlp.up", "norm.weight"])
def test_what_is_not_finite_is_not_written(at, value, tmp_path):
    model = perturb_(lorafamily.apply(tiny(), "lora", rank=2, also_train=r"^norm\."))
    tensor = model.get_parameter(at) if at == "norm.weight" else placement_of(model).adapters[at].update.A
    with torch.no_grad():
        tensor[1:].view(-1)[3] = value
    for write in (lorafamily.save, lorafamily.export_peft):
        with pytest.raises(lorafamily.StateError, match=rf"{at}.*not all finite numbers; .*training diverged: take an"):
            write(model, tmp_path / "it")
    assert not (tmp_path / "it").exists()


def test_file_size_follows_the_ranks(tmp_path):
    sizes = []
    for rank in (2, 4):
        folder = lorafamily.save(lorafamily.apply(tiny(), "lora", rank=rank), tmp_path / str(rank))
        sizes.append((folder / "adapter.safetensors").stat().st_size)
    # Per rank and float32: twelve modules of 16 + 16 (attention) and 16 + 64 (MLP) numbers, two blocks.
    assert sizes[1] - sizes[0] == pytest.approx(2 * 4 * 2 * (4 * 32 + 2 * 80), rel=0.02)  # the header grows a little


def trained(method: str, session: bool, steps: int = 24):
    model = lorafamily.apply(tiny().train(), method, rank=3, seed=0)
    optimizer = torch.optim.AdamW(lorafamily.parameter_groups(model, lr=1e-3))
    held = lorafamily.session(model, optimizer, steps=24, validation=data(1)) if session else None
    for step in range(steps):
        loss = model(**data()[step % 4]).loss
        loss.backward() if held is None else held.backward(loss)
        optimizer.step()
        if held is not None:
            held.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("method", ["lora2", "alora", "adalora", "svd"])
def test_training_without_what_the_method_does_is_said_when_it_is_saved(method, tmp_path):
    missing = {"alora": "rank allocation", "svd": "penalty"}.get(method, "rank allocation and penalty")
    model = trained(method, session=False, steps=2)
    for write in (lorafamily.save, lorafamily.export_peft):
        with pytest.warns(UserWarning, match=f'"default" was trained without the {missing} of its method, {method}'):
            write(model, tmp_path / "it")
    # Warnings are errors here. Nothing is lacking in these:
    lorafamily.save(trained(method, session=False, steps=0), tmp_path / "untrained")
    lorafamily.save(trained("lora", session=False, steps=2), tmp_path / "lora")
    lorafamily.save(trained("olora", session=False, steps=2), tmp_path / "olora")
    lorafamily.save(trained(method, session=True, steps=1), tmp_path / "begun")
    lorafamily.save(lorafamily.load(tiny(), tmp_path / "it"), tmp_path / "it-again")  # was said of it before
    lorafamily.save(lorafamily.load(tiny(), tmp_path / "it").double(), tmp_path / "cast")


class Reads(nn.Module):
    """Calls one layer, and reads the weight of the other, as BEiT's attention in timm does."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.called(nn.functional.linear(x, self.read.weight))


@pytest.mark.parametrize("method", ["lora", "olora"])
def test_adapters_that_a_loop_without_session_could_not_train_are_named_when_they_are_saved(method, tmp_path):
    def trained(**given):
        model = lorafamily.apply(Reads(), method, rank=2, seed=0, **given)
        optimizer = torch.optim.AdamW(lorafamily.parameter_groups(model, lr=1e-2))
        for _ in range(2):
            model(torch.ones(3, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    for write in (lorafamily.save, lorafamily.export_peft):
        with pytest.warns(UserWarning, match="of 2 adapters 1 are still zero, such as that of read: it took no part"):
            write(trained(), tmp_path / write.__name__)
    lorafamily.save(trained(targets="called"), tmp_path / "called")  # warnings are errors here
    lorafamily.save(lorafamily.import_peft(Reads(), tmp_path / "export_peft"), tmp_path / "imported")
    with pytest.warns(UserWarning, match="reads the weight of read and never calls the layer"):
        model = trained(example=torch.ones(3, 4))
    lorafamily.save(model, tmp_path / "example")


@pytest.mark.parametrize("method", ["lora", "olora", "adalora"])
def test_an_optimizer_from_before_the_adapters_is_said_when_they_are_saved(method, tmp_path):
    def trained(place):
        model = Reads()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        place(model)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(3, 4)).square().sum().backward()
            optimizer.step()
        return model

    said = 'gradients reached adapter "default", but no step moved it. An optimizer that is older than an adapter does'
    new = trained(lambda model: lorafamily.apply(model, method, rank=2, targets="called", seed=0))
    for write in (lorafamily.save, lorafamily.export_peft):
        with pytest.warns(UserWarning, match=said):
            write(new, tmp_path / write.__name__)
    with pytest.warns(UserWarning, match=said):
        lorafamily.merge(new)
    old = trained(lambda model: lorafamily.load(model, tmp_path / "save"))
    with pytest.warns(UserWarning, match=said):
        lorafamily.save(old, tmp_path / "again")


def test_training_on_from_a_file_without_a_session_is_said_too(tmp_path):
    lorafamily.save(trained("alora", session=True, steps=2), tmp_path / "unsettled")
    model = lorafamily.load(tiny().train(), tmp_path / "unsettled")
    optimizer = torch.optim.AdamW(lorafamily.parameter_groups(model, lr=1e-3))
    model(**data()[0]).loss.backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r'"default" was trained without the rank allocation of its method, alora'):
        lorafamily.save(model, tmp_path / "on")
