"""Arguments are refused by PyTorch's rules, with an error that names them, before anything runs."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fusedpool import geometry, pool2d, runtime
from fusedpool.geometry import Window

X = torch.zeros(1, 2, 5, 4)
C = torch.ones(2)

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "kernel_zero": ({"kernel_size": 0}, r"kernel_size is 0; it must be at least 1"),
    "kernel_three": ({"kernel_size": (1, 2, 3)}, r"kernel_size is \(1, 2, 3\); it must be an int or two of them"),
    "kernel_float": ({"kernel_size": 2.0}, r"kernel_size is 2\.0; it must be an int"),
    "kernel_bool": ({"kernel_size": True}, r"kernel_size is True; it must be an int"),
    "kernel_text": ({"kernel_size": "33"}, r"kernel_size is '33'; it must be an int"),
    "kernel_empty": ({"kernel_size": ()}, r"kernel_size is \(\); it must be an int"),
    "kernel_large": ({"kernel_size": (6, 1)}, r"kernel_size is \(6, 1\).*does not fit into x, whose maps are 5 x 4"),
    "dilated_large": ({"kernel_size": 2, "dilation": 4}, r"kernel_size is \(2, 2\).*dilation \(4, 4\) it does not fit"),
    "stride": ({"kernel_size": 2, "stride": (1, 0)}, r"stride is \(1, 0\); it must be at least 1"),
    "padding_negative": ({"kernel_size": 2, "padding": -1}, r"padding is -1; it must be at least 0"),
    "padding_half": ({"kernel_size": 3, "padding": (0, 2)}, r"padding is 2; it must be at most half the effective"),
    "dilation": ({"kernel_size": 2, "dilation": 0}, r"dilation is 0; it must be at least 1"),
    "divisor": ({"kernel_size": 2, "kind": "avg", "divisor_override": 0}, r"divisor_override is 0"),
    "divisor_float": ({"kernel_size": 2, "kind": "avg", "divisor_override": 2.5}, r"divisor_override is 2\.5"),
    "kind_list": ({"kernel_size": 2, "kind": ["max"]}, r"kind is \['max'\]; it must be one of max, min"),
    "kind": ({"kernel_size": 2, "kind": "median"}, r"kind is 'median'; it must be one of max, min"),
    "activation": ({"kernel_size": 2, "activation": "swish"}, r"activation is 'swish'; it must be one of none, relu"),
    "scale_shape": ({"kernel_size": 2, "scale": torch.ones(3)}, r"scale has shape \[3\]; it must be \[C\] = \[2\]"),
    "shift_shape": ({"kernel_size": 2, "shift": torch.ones(2, 1)}, r"shift has shape \[2, 1\]; it must be \[C\]"),
    "scale_type": ({"kernel_size": 2, "scale": C.long()}, r"scale is torch\.int64 on cpu; it must be floating-point"),
    "scale_device": ({"kernel_size": 2, "scale": C.to("meta")}, r"scale is torch\.float32 on meta"),
    "p_of_none": ({"kernel_size": 2, "p": 2.0}, r"p is 2\.0; the kind 'max' has no parameter"),
    "p_text": ({"kernel_size": 2, "kind": "gem", "p": "3"}, r"p is '3'; it must be a number, or a tensor of one"),
    "ceil_mode": ({"kernel_size": 2, "ceil_mode": "yes"}, r"ceil_mode is 'yes'; it must be True or False"),
    "generator": ({"kernel_size": 2, "kind": "stochastic", "generator": 3}, r"generator is of type int"),
    "p_zero": ({"kernel_size": 2, "kind": "lp", "p": 0}, r"p is 0; for lp it must be positive and finite"),
    "p_infinite": ({"kernel_size": 2, "kind": "gem", "p": float("inf")}, r"p is inf; for gem it must be positive"),
    "p_nan": ({"kernel_size": 2, "kind": "lse", "p": float("nan")}, r"p is nan; for lse it must be positive"),
    "p_mixed": ({"kernel_size": 2, "kind": "mixed", "p": 1.5}, r"p is 1\.5; for mixed it must be in \[0, 1\]"),
    "p_shape": ({"kernel_size": 2, "kind": "gem", "p": C}, r"p is torch\.float32 \[2\] on cpu; it must be one number"),
    "p_learned": (
        {"kernel_size": 2, "kind": "lp", "p": torch.ones(1, requires_grad=True)},
        r"p requires a gradient, which the kind 'lp' does not give",
    ),
    "indices": ({"kernel_size": 2, "kind": "avg", "return_indices": True}, r"return_indices is True; only max and min"),
    "scale_number": ({"kernel_size": 2, "scale": 2.0}, r"scale is of type float; it must be a tensor"),
    "x_list": ({"x": [1.0], "kernel_size": 2}, r"x is of type list; it must be a tensor"),
    "x_dims": ({"x": X[0], "kernel_size": 2}, r"x has shape \[2, 5, 4\]; it must be \[N, C, H, W\]"),
    "x_type": ({"x": X.int(), "kernel_size": 2}, r"x is torch\.int32; it must be float32"),
    "x_empty": ({"x": X[:, :, :0], "kernel_size": 2}, r"x has shape \[1, 2, 0, 4\]; only N may be 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_named(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given_arguments, message = WRONG[case]
    monkeypatch.setattr(runtime, "use_triton", lambda x: pytest.fail("something ran"))
    with pytest.raises(ValueError, match=message):
        pool2d(**{"x": X, **given_arguments})


def test_the_control_of_the_cases_runs() -> None:
    pool2d(X, 2, scale=C, shift=C, activation="relu", return_indices=True)
    pool2d(X, 2, kind="lp", p=torch.tensor(3.0))


def test_two_numbers_may_come_in_any_sequence() -> None:
    expected = pool2d(X, (2, 2), (2, 2), (1, 1))
    for one in (2, [2], (2,), torch.Size([2, 2]), [2, 2]):
        assert torch.equal(pool2d(X, one, one, 1), expected)


sizes = st.integers(1, 12)
small = st.integers(1, 5)


@settings(max_examples=300, deadline=None)
@given(
    shape=st.tuples(sizes, sizes),
    kernel=st.tuples(small, small),
    stride=st.tuples(small, small),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    ceil_mode=st.booleans(),
)
def test_sizes_and_refusals_are_pytorchs(
    shape: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> None:
    x = torch.zeros(1, 1, *shape)
    try:
        expected: Any = F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode).shape[2:]
    except RuntimeError:
        expected = None
    try:
        window = geometry.window(x, kernel, stride, padding, dilation, ceil_mode, True, None)
    except ValueError:
        assert expected is None
    else:
        if (
            expected is None
        ):  # in 2-D PyTorch wants half of the kernel, in 1-D of the effective one, as is the rule here
            assert any(pad > size // 2 and step > 1 for pad, size, step in zip(padding, kernel, dilation, strict=True))
        else:
            assert tuple(expected) == window.output_size(*shape)
        assert Window.from_ints(window.to_ints()) == window


def test_the_last_window_starts_inside_the_map_or_its_left_padding() -> None:
    for size, kernel, stride in itertools.product(range(1, 9), range(1, 5), range(1, 5)):
        for padding in range(kernel // 2 + 1):
            outputs, _ = Window(kernel, 1, stride, 1, padding, 0, 1, 1, ceil_mode=1).output_size(size, 1)
            if outputs > 0:
                assert (outputs - 1) * stride - padding < size
