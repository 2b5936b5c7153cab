"""The tensor that a layer reads, given by position or by name."""

import pytest
import torch

from isoprune_hf.pruning.calibration.inputs import first_tensor, read_tensor, replace_first_tensor

X, Y = torch.zeros(2), torch.ones(2)


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((X,), {}, ((Y,), {})),
        ((), {"input": X}, ((), {"input": Y})),
        ((None, X, 3), {"other": X}, ((None, Y, 3), {"other": X})),
        ((None,), {"scale": 2.0, "input": X}, ((None,), {"scale": 2.0, "input": Y})),
    ],
)
def test_first_tensor_is_replaced_where_it_was(args: tuple, kwargs: dict, expected: tuple) -> None:
    assert first_tensor(args, kwargs) is X
    new_args, new_kwargs = replace_first_tensor(args, kwargs, Y)
    assert all(new is old for new, old in zip(new_args, expected[0], strict=True))
    assert new_kwargs.keys() == expected[1].keys()
    assert all(value is expected[1][name] for name, value in new_kwargs.items())


def test_call_without_a_tensor_is_an_error() -> None:
    assert first_tensor((1,), {}) is None
    with pytest.raises(RuntimeError, match="without a tensor"):
        read_tensor((1,), {"a": None})
