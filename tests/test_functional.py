"""The low-rank product, and that shapes in signatures are really checked in these tests."""

import pytest
import torch
from jaxtyping import TypeCheckError
from torch.testing import assert_close

from lorafamily.functional import low_rank_linear


def test_it_is_the_product_with_delta():
    generator = torch.Generator().manual_seed(0)
    x, U, V = (torch.randn(*shape, generator=generator).double() for shape in ((2, 3, 5), (4, 2), (2, 5)))
    assert_close(low_rank_linear(x, U, V, 0.5), x @ (0.5 * U @ V).T)


def test_factors_follow_the_dtype_of_the_activations():
    out = low_rank_linear(torch.ones(3, 5, dtype=torch.bfloat16), torch.ones(4, 2), torch.ones(2, 5), 1.0)
    assert out.dtype == torch.bfloat16


def test_shapes_in_signatures_are_checked():
    with pytest.raises(TypeCheckError):
        low_rank_linear(torch.ones(2, 5), torch.ones(4, 3), torch.ones(2, 5), 1.0)
