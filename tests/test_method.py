"""Methods as points on axes: options, combinations, the registry's rules."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lorafamily
from conftest import every_method, tiny
from lorafamily.adapter import Adapter
from lorafamily.layers.placement import placement_of
from lorafamily.registry import find
from lorafamily.variants.lora import lora
from lorafamily.variants.olora import leading_qr


@every_method
def test_options_survive_a_file(method):
    made = find(method).with_options(alpha=3.0)
    assert find(method).with_options(**json.loads(json.dumps(made.options()))) == made


@pytest.mark.parametrize("parts", [("olora", "alora"), ("lora2", "olora"), ("rslora", "adalora")])
def test_a_combination_takes_each_axis_from_the_part_that_claims_it(parts):
    first, second = map(find, parts)
    for spec in ("+".join(parts), "+".join(reversed(parts))):
        combined = find(spec)
        assert combined.claimed == first.claimed | second.claimed
        for part in (first, second):
            assert all(getattr(combined, axis) == getattr(part, axis) for axis in part.claimed)


def test_rslora_scales_by_the_root_of_the_rank():
    scales = {
        method: placement_of(lorafamily.apply(tiny(), method, rank=4, alpha=8)).adapters["blocks.0.mlp.up"].scale
        for method in ("lora", "rslora", "rslora+olora")
    }
    assert scales == {"lora": 2.0, "rslora": 4.0, "rslora+olora": 4.0}


def test_lora_starts_as_the_code_or_as_the_paper():
    def first(**options):
        model = lorafamily.apply(tiny(), "lora", rank=4, seed=0, **options)
        return torch.cat(
            [a.update.A.data.flatten() for a in placement_of(model).adapters.values() if a.update.d_in == 16]
        )

    kaiming, gaussian = first(), first(init="gaussian")
    assert kaiming.abs().max() <= 1 / 4  # U(−1/√d_in, 1/√d_in)
    # 640 draws: the standard error of a standard deviation is 3 %, and seed 0 is fixed.
    assert float(kaiming.std()) == pytest.approx(1 / (4 * 3**0.5), rel=0.1)
    assert float(gaussian.std()) == pytest.approx(1 / 4, rel=0.1)


def test_the_panel_qr_is_the_full_qr_with_signs_fixed():
    W = torch.randn(12, 9, generator=torch.Generator().manual_seed(0)).double()
    Q, R = torch.linalg.qr(W)
    signs = R.diagonal().sign()
    got_Q, got_R = leading_qr(W, 4)
    assert_close(got_Q, (Q * signs)[:, :4])
    assert_close(got_R, (R * signs[:, None])[:4])
    assert (got_R.diagonal() > 0).all()


def test_dependent_leading_columns_fall_back_to_the_full_qr():
    W = torch.randn(12, 9, generator=torch.Generator().manual_seed(0)).double()
    W[:, 1] = 2 * W[:, 0]
    Q, R = leading_qr(W, 4)
    assert_close(Q.T @ Q, torch.eye(4).double())
    assert_close(R, Q.T @ W)
    assert torch.isfinite(Q).all()


class Frozen(lorafamily.Parametrisation):
    """LoRA with a frozen A, as a parameter, which would train all the same."""

    slice_axes = {"B": 1, "A": 0}
    zeroed = "B"

    def __init__(self, d_in, d_out, rank):
        super().__init__(d_in, d_out)
        self.B = nn.Parameter(torch.empty(d_out, rank))
        self.A = nn.Parameter(torch.empty(rank, d_in), requires_grad=False)

    @staticmethod
    def count(d_in, d_out, rank):
        return rank * (d_in + d_out)

    def sizes(self):
        return {"rank": self.slices}

    def factors(self, gate=None):
        return self.B, self.A

    def reset(self, generator): ...

    def represent(self, U, V): ...

    def fresh(self, n, generator): ...


class SlicedBuffer(Frozen):
    def __init__(self, d_in, d_out, rank):
        super().__init__(d_in, d_out, rank)
        del self.A
        self.register_buffer("A", torch.empty(rank, d_in))


@pytest.mark.parametrize(
    ("cls", "message"),
    [(Frozen, "Frozen: A has requires_grad=False"), (SlicedBuffer, "SlicedBuffer: A must be parameters")],
)
def test_frozen_tensors_that_would_train_or_be_pruned_are_refused(cls, message):
    with pytest.raises(lorafamily.MethodError, match=message):
        Adapter(cls(4, 5, rank=2), scale=1.0)


def test_an_option_that_would_mean_two_things_is_refused():
    @dataclass(frozen=True)
    class Clash(lorafamily.Initialisation):
        rounds: int = 1

        def __call__(self, update, weight, generator): ...

    with pytest.raises(lorafamily.MethodError, match="option rounds means two things"):
        find("alora").but(initialisation=Clash())


def install(folder: Path, package: str, entry: str) -> None:
    """As pip does, for a package of nothing but one entry point."""
    information = folder / f"{package}-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Name: {package}\nVersion: 1\n")
    (information / "entry_points.txt").write_text(f"[lorafamily.variants]\n{entry}\n")


def test_methods_of_packages_are_found_once_they_are_installed_and_must_be_methods(monkeypatch, tmp_path):
    built_in = lorafamily.methods()
    monkeypatch.syspath_prepend(tmp_path)
    assert lorafamily.methods() == built_in
    install(tmp_path, "own", "mine = lorafamily.variants.lora:lora")
    assert lorafamily.methods() == built_in | {"mine": lora}
    install(tmp_path, "broken", "broken = math:pi")
    with pytest.raises(lorafamily.MethodError, match='"broken" = math:pi is a float, not a'):
        lorafamily.methods()
    install(tmp_path, "other", "mine = other:lora")
    with pytest.raises(lorafamily.MethodError, match=r'two packages register the method "mine": .*uninstall one'):
        lorafamily.methods()


def test_a_package_that_cannot_be_imported_does_not_stop_the_use_of_others(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "broken", "gone = no_such_module:gone")
    left_out = r'the method "gone" of broken is left out: no_such_module:gone cannot be imported \(ModuleNotFoundError'
    with pytest.warns(UserWarning, match=left_out):
        lorafamily.apply(tiny(), "lora", rank=2)
    with (
        pytest.warns(UserWarning, match=left_out),
        pytest.raises(lorafamily.MethodError, match='no method named "gone"'),
    ):
        lorafamily.apply(tiny(), "gone", rank=2)


def test_a_method_that_has_no_name_and_a_scorer_that_is_unknown_are_refused_before_anything_is_changed():
    model = tiny()
    with pytest.raises(lorafamily.MethodError, match=r'takes names, not objects: register .* "lorafamily\.variants"'):
        lorafamily.apply(model, lora, rank=2)
    with pytest.raises(lorafamily.AllocationError, match="scorer='worth': must be one of exact, first-order"):
        lorafamily.apply(model, "alora", rank=2, scorer="worth")
    assert not any(isinstance(module, Adapter) for module in model.modules())
