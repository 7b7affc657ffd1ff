"""Floating-point operations, counted by PyTorch's own counter.

A multiply-add counts as two operations. Only matrix products and attention count: the rest of a
transformer is below one percent. The backward pass of fused attention computes the scores again, and
this is counted, as in PyTorch's formulas for GPUs.
"""

from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def _attention(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *others: object, **options: object
) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    output_gradient: Sequence[int],
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    *others: object,
    **options: object,
) -> int:
    return sdpa_backward_flop_count(output_gradient, query, key, value)


# PyTorch's counter covers the fused attention of GPUs, but not that of the CPU, which does the same products.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def flop_counter() -> FlopCounterMode:
    """Return PyTorch's counter, a context manager, with the CPU's fused attention included."""
    return FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)


def count_flops(function: Callable[[], object]) -> int:
    """Run a function, such as a training step, and return how many floating-point operations it did.

    The number depends on shapes only: real and fake tensors give the same.
    """
    with flop_counter() as counter:
        function()
    return counter.get_total_flops()
