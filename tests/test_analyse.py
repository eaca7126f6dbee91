"""The analysis of saved adapters, from the command line's point of view."""

from __future__ import annotations

import json

import pytest
import torch

import analyse
import embedded
import lorafamily
from conftest import perturb_
from lorafamily.layers.placement import placement_of


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two adapters of the embedded model with other methods and ranks, one of which has a layer without ranks."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, method, rank in (("one", "lora", 2), ("two@0.1", "alora", 3)):
        model = perturb_(lorafamily.apply(embedded.pretrained(), method, rank=rank, seed=0), size=0.1)
        if name == "two@0.1":
            next(iter(placement_of(model).adapters.values())).resize(torch.tensor([], dtype=torch.long))
        lorafamily.save(model, folder / name / "adapter")
    return folder


def test_numbers_pictures_and_board(saved, tmp_path, capsys):
    adapters = tuple(saved / name / "adapter" for name in ("one", "two@0.1"))
    told = analyse.main(analyse.Analyse(adapters, out=tmp_path))
    assert json.loads((tmp_path / "analysis.json").read_text()).keys() == told.keys()
    assert list(told["adapters"]) == ["one", "two@0.1"]
    model = lorafamily.load(embedded.pretrained(), adapters[0])
    for row in told["norms"]["one"]:
        expected = placement_of(model).adapters[row["module"]].norm()
        assert row["delta"] == pytest.approx(expected, rel=1e-8)  # float64, from a decomposition and from Gram matrices
    (phi,) = told["similarity"].values()
    assert len(phi) == len(told["norms"]["one"])
    assert min(len(grid) for grid in phi.values()) == 2
    assert [] in [grid[0] for grid in phi.values()]  # the layer without ranks
    for name in ("spectra", "norms", "similarity"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    assert list(tmp_path.glob("events.out.tfevents.*"))
    table = capsys.readouterr().out
    assert "one, attention.query" in table
    assert "‖ΔW‖ / ‖W‖" in table


def test_one_adapter_has_nothing_to_be_like(saved, tmp_path):
    analyse.main(analyse.Analyse((saved / "one" / "adapter",), out=tmp_path))
    assert not (tmp_path / "similarity.png").exists()


def test_no_adapter_or_one_twice_is_said(saved, tmp_path):
    with pytest.raises(SystemExit, match="runs/embedded/cells"):
        analyse.main(analyse.Analyse((), out=tmp_path))
    folder = saved / "one" / "adapter"
    with pytest.raises(SystemExit, match="twice"):
        analyse.main(analyse.Analyse((folder, folder), out=tmp_path))


def test_pairs_are_held_against_random_directions_of_their_side(saved, tmp_path, capsys):
    """Rank 2 and 3 in R^128 and R^512: two random subspaces share max(i, j)/d on average."""
    adapters = tuple(saved / name / "adapter" for name in ("one", "two@0.1"))
    for side in ("down", "up"):
        told = analyse.main(analyse.Analyse(adapters, out=tmp_path, side=side))
        (line,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("one | two@0.1")]
        (by_layer,) = told["similarity"].values()
        whole = [grid[-1][-1] for grid in by_layer.values() if grid[0]]
        assert float(line[5]) == pytest.approx(sum(whole) / len(whole), abs=0.006)  # printed with two digits
        width = {name: 128 if side == "up" or "down" not in name else 512 for name in by_layer}
        if side == "up":
            width |= {name: 512 for name in by_layer if name.endswith("mlp.up")}
        expected = [3 / width[name] for name, grid in by_layer.items() if grid[0]]
        assert float(line[6]) == pytest.approx(sum(expected) / len(expected), abs=0.02)  # 23 draws, spread 0.01 each
