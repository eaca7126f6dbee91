"""What is loaded has memory of its own, aligned as a new tensor's.

On some processors the product of a matrix that is not aligned differs in its last bit from that of an aligned one, so a
model that computes with what lies somewhere in a file is not, bit for bit, the one that was saved. The addresses are
looked at, not the products: these differ on some machines only.
"""

import pytest
import torch
from safetensors.torch import load_file

import lorafamily
from conftest import data, perturb_, tiny
from lorafamily.deploy import checkpoint, checkpoint_changes, folder
from lorafamily.training.checkpoints import Checkpoints

ALIGNED = 64  # bytes; what torch's allocator gives on a CPU


SHORT = {"warmup": 0, "final": 1, "interval": 1}  # a schedule for three steps


def off(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if tensor.numel() and tensor.data_ptr() % ALIGNED]


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def saved(tmp_path):
    model = perturb_(lorafamily.apply(tiny(), "olora", rank=3, also_train=r"^norm\.", seed=0))
    at = lorafamily.save(model, tmp_path / "adapter")
    assert off(load_file(at / "adapter.safetensors"))  # else nothing here could fail
    return at


def test_tensors_of_a_file_do_not_lie_in_it(saved):
    assert not off(folder.read_tensors(saved / "adapter.safetensors", "what"))


def test_a_loaded_adapter_and_what_trained_beside_it(saved):
    model = lorafamily.load(tiny(), saved)
    assert len(trained(model)) > 9
    assert not off(trained(model))
    lorafamily.switch(model, None)
    lorafamily.switch(model, "default")
    assert not off(trained(model))


def test_an_adapter_of_peft_s(saved, tmp_path):
    at = lorafamily.export_peft(lorafamily.load(tiny(), saved), tmp_path / "peft")
    assert off(load_file(at / "adapter_model.safetensors"))
    assert not off(trained(lorafamily.import_peft(tiny(), at)))


def test_a_run_that_goes_on(tmp_path):
    settings = {"lr": 1e-2, "log_dir": tmp_path, "pictures": False, "save_every": 3, "progress": False}
    lorafamily.train(lorafamily.apply(tiny(), "adalora", rank=3, seed=0, **SHORT), data(), steps=3, **settings)
    at = Checkpoints(tmp_path, 3, 2).to_go_on_from("auto")
    assert at is not None
    assert off(load_file(at.folder / "state.safetensors"))
    held = [leaf for leaf in torch.utils._pytree.tree_leaves(at.state) if isinstance(leaf, torch.Tensor)]
    assert held
    assert not off(dict(enumerate(held)))
    model = lorafamily.apply(tiny(), "adalora", rank=3, seed=0, **SHORT)
    lorafamily.train(model, data(), steps=3, resume="auto", **settings)
    assert not off(trained(model))


def test_weights_that_are_merged_on_disk(saved, tmp_path, monkeypatch):
    seen = {}
    change = checkpoint_changes.changed_weight
    monkeypatch.setattr(
        checkpoint_changes, "changed_weight", lambda weight, acting: change(seen.setdefault(id(weight), weight), acting)
    )
    base = tmp_path / "base"
    base.mkdir()
    folder.write_tensors(base / "model.safetensors", tiny().state_dict())
    checkpoint.merge_checkpoint(base, lorafamily.deploy.saved.read(saved), tmp_path / "merged")
    assert len(seen) > 9
    assert not off(seen)
