"""A process that makes full use of its processor computes what another one computes, up to rounding."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fedlm.base import processor

ROOT = Path(__file__).resolve().parent.parent
installed = pytest.mark.skipif(
    not processor._has_unused_vectors(), reason="for AMD's processors with AVX-512 and PyTorch with MKL"
)
SIZES = st.sampled_from([1, 2, 7, 32, 96, 257])


def matrix(rows, columns, layout):
    """Numbers in one of the layouts that training meets: by rows or columns, a part, a repeated row."""
    numbers = torch.Generator().manual_seed(rows * 1000 + columns)
    if layout == "rows":
        return torch.randn(rows, columns, generator=numbers)
    if layout == "columns":
        return torch.randn(columns, rows, generator=numbers).t()
    if layout == "part":
        return torch.randn(rows, 3 * columns, generator=numbers)[:, columns : 2 * columns]
    return torch.randn(1, columns, generator=numbers).expand(rows, columns)


LAYOUTS = st.sampled_from(["rows", "columns", "part", "repeated"])


@installed
@given(SIZES, SIZES, SIZES, LAYOUTS, LAYOUTS)
def test_products_are_those_of_double_precision_up_to_rounding(rows, inner, columns, first, second):
    processor.make_full_use()
    assert processor.multiplies_by() == "oneDNN"
    one, other = matrix(rows, inner, first), matrix(inner, columns, second)
    bias = matrix(1, columns, "rows")[0]
    truth = one.double() @ other.double()
    allowed = 1e-6 * (one.double().abs() @ other.double().abs()) + 1e-6
    for found, added in (
        (one @ other, 0),
        (torch.addmm(bias, one, other), bias),
        (torch.nn.functional.linear(one, other.t(), bias), bias),
        (torch.addmm(bias, one, other, beta=0.5, alpha=1), 0.5 * bias),
    ):
        assert found.shape == truth.shape and found.is_contiguous()
        assert ((found.double() - truth - added).abs() <= allowed + 1e-6 * bias.abs()).all()


@installed
def test_gradients_and_flops_are_those_of_a_linear_layer():
    processor.make_full_use()
    layer, batch = torch.nn.Linear(96, 192), torch.randn(4, 32, 96)
    with FlopCounterMode(display=False) as counter:
        layer(batch).square().sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 128 * 96 * 192  # forward, and backward to the weight
    exact = torch.nn.Linear(96, 192).double()
    exact.load_state_dict(layer.state_dict())
    exact(batch.double()).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad.double(), exact.weight.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.bias.grad.double(), exact.bias.grad, rtol=1e-4, atol=1e-3)


@installed
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_other_numbers_are_left_to_pytorch(dtype):
    processor.make_full_use()
    one, other = ((10 * matrix(96, 96, layout)).to(dtype) for layout in ("rows", "columns"))
    found = one @ other
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), one.double() @ other.double(), rtol=0.02, atol=1)


@installed
def test_it_is_said_once_only_and_without_a_warning():
    code = (
        "import torch; from fedlm.base import processor as p; print(p.multiplies_by()); p.make_full_use();"
        "p.make_full_use(); print(p.multiplies_by(), len(p._installed))"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("MKL\noneDNN 1\n", "")


def test_an_old_set_of_instructions_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not processor._has_unused_vectors()
