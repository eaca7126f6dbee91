"""The tools of the tests: shapes in signatures are checked, and cases that stand for a product cover what they say."""

from __future__ import annotations

from itertools import combinations, product

import jaxtyping
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import lorafamily
from conftest import in_turn, pairwise
from lorafamily.evidence import LayerEvidence
from lorafamily.principal import Principal
from shapes import shapes


def test_shapes_in_signatures_are_checked_and_functions_without_are_left_alone():
    with pytest.raises(jaxtyping.TypeCheckError, match=r"Principal\.add"):
        Principal(2).add(torch.zeros(3))
    with pytest.raises(jaxtyping.TypeCheckError, match="gradient"):
        LayerEvidence(gradient=torch.zeros(3))
    assert not hasattr(lorafamily.apply, "__wrapped__")


def test_shapes_that_passed_are_checked_again_only_if_what_is_returned_has_others():
    calls = []

    def half(x: Float[Tensor, "n m"], rows: int) -> Float[Tensor, "_ m"]:
        calls.append(rows)
        return x[:rows] if rows else x[0]

    checked = jaxtyping.jaxtyped(typechecker=shapes)(half)
    for rows in (1, 2, 2):
        assert checked(torch.zeros(4, 3), rows).shape == (rows, 3)
    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        checked(torch.zeros(4, 3), 0)
    for wrong in (torch.zeros(4), torch.zeros(4, 3, dtype=torch.int)):
        with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'x'"):
            checked(wrong, 1)
    assert checked(torch.zeros(4, 3), 3).shape == (3, 3)
    assert calls == [1, 2, 2, 0, 3]  # each ran once, those with wrong arguments never


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
