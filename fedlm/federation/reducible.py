"""Whether a method's reductions find anything to reduce."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlm.base.errors import UserError
from fedlm.exchange.compression import LayerDrop, LowRankUpload, free_blocks
from fedlm.federation.method import Method
from fedlm.models.config import Kind, ModelConfig

if TYPE_CHECKING:
    from torch.nn import Module

    from fedlm.models.blocks import Anatomy


def check(method: Method, model: ModelConfig, kind: Kind) -> None:
    """Raise UserError if one of the method's reductions finds nothing to reduce; no weights are read.

    `method` will be prepared with a model without values, so pass a fresh one.
    """
    if method.config.compression is None and not isinstance(method.config.upload_compression, LowRankUpload):
        return
    # Most methods have none, and checking a study should not require importing PyTorch.
    import torch

    from fedlm.models.blocks import find_blocks
    from fedlm.models.loading import build_on_meta

    shapes = build_on_meta(model, kind, 2)
    with torch.device("meta"):
        adapted = method.prepare(shapes, kind)
    if method.config.compression is not None:
        require_reducible(method, find_blocks(adapted))
    if isinstance(method.config.upload_compression, LowRankUpload):
        require_large_matrix(method, adapted)


def require_large_matrix(method: Method, model: Module) -> None:
    """Raise UserError if no exchanged parameter is large enough for the factors of a low-rank upload."""
    operator = method.config.upload_compression
    assert isinstance(operator, LowRankUpload)
    shapes = [tuple(value.shape) for name, value in model.named_parameters() if name in set(method.exchanged)]
    if all(operator.rank_of(shape) is None for shape in shapes):
        raise UserError(
            f"upload_compression: low_rank of rank {operator.rank} finds no matrix that its factors make "
            f"smaller by more than {operator.least_rate:g}; allowed: a smaller rank or least_rate, or a "
            "method that trains large matrices"
        )


def require_reducible(method: Method, anatomy: Anatomy) -> None:
    """Raise UserError if the method's compression would never find anything to reduce.

    `method` must be prepared and have a compression; `anatomy` is that of the adapted model.
    """
    operator = method.config.compression
    exchanged = set(method.exchanged)
    # Clients and rounds may differ in what is trained; the first few show whether any leaves a block.
    for round in (1, 2):
        for client in range(min(method.clients, 100)):
            for block in free_blocks(anatomy, method.trainable(client, round)):
                movable = not isinstance(operator, LayerDrop) or block.module in anatomy.layers
                if movable and not exchanged.isdisjoint(block.parameters):
                    return
    assert operator is not None
    raise UserError(
        f"compression: {operator.operator} finds nothing to reduce, since every client of {method.name} "
        "trains all that it downloads; allowed: no compression, or a method whose clients train some of the "
        "blocks, such as fedcybgd"
    )
