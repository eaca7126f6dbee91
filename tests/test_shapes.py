"""The tools of the tests: shapes in signatures are checked, and cases that stand for a product cover what they say."""

from __future__ import annotations

from itertools import combinations, product

import jaxtyping
import pytest
import torch

import lorafamily
from conftest import in_turn, pairwise
from lorafamily.evidence import LayerEvidence
from lorafamily.principal import Principal


def test_shapes_in_signatures_are_checked_and_functions_without_are_left_alone():
    with pytest.raises(jaxtyping.TypeCheckError, match=r"Principal\.add"):
        Principal(2).add(torch.zeros(3))
    with pytest.raises(jaxtyping.TypeCheckError, match="gradient"):
        LayerEvidence(gradient=torch.zeros(3))
    assert not hasattr(lorafamily.apply, "__wrapped__")


@pytest.mark.parametrize("sizes", [(3, 2), (4, 3, 2), (2, 5, 3, 3), (2, 2, 2, 2, 2), (9, 1, 4)])
def test_pairs_of_values_all_meet(sizes):
    axes = [[f"{axis}{value}" for value in range(size)] for axis, size in enumerate(sizes)]
    cases = pairwise("a", *axes).args[1]
    for i, j in combinations(range(len(axes)), 2):
        assert {(case[i], case[j]) for case in cases} == set(product(axes[i], axes[j]))
    two, one = sorted(sizes)[-1], sorted(sizes)[-2]
    assert one * two <= len(cases) < 2 * one * two


def test_values_in_turn_all_come():
    cases = in_turn("a,b", "xyz", "12", and_also=[("x", "1"), ("x", "2")]).args[1]
    assert cases == [("x", "1"), ("y", "2"), ("z", "1"), ("x", "2")]
