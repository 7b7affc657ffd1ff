"""What a method can know about a model before any job starts."""

from dataclasses import dataclass
from functools import cache

from fedlm.models.catalogue import CATALOGUE
from fedlm.models.config import Kind, ModelConfig

ENCODERS = ("bert", "roberta", "distilbert", "deberta-v2", "electra")


@dataclass(frozen=True)
class Facts:
    """What a method can know about a model: `positions` is None if there is no limit."""

    family: str
    kind: Kind
    blocks: int
    hidden: int
    positions: int | None
    decoder: bool


@cache
def facts(model: ModelConfig, kind: Kind) -> Facts:
    """Return the facts of a model, from its shape alone; no weights are read.

    A model of the catalogue is known by its dimensions; others need PyTorch and Transformers.

    Raises UserError if the model or its blocks cannot be found.
    """
    entry = CATALOGUE.get(model.source)
    if entry is not None and kind in entry.kinds:
        return Facts(
            family=entry.model_type,
            kind=kind,
            blocks=entry.blocks,
            hidden=entry.hidden,
            positions=entry.positions,
            decoder=entry.model_type not in ENCODERS,
        )
    return read_facts(model, kind)


def read_facts(model: ModelConfig, kind: Kind) -> Facts:
    """Return the facts of any model, from its configuration and its structure; errors as in `facts`."""
    from fedlm.models.blocks import find_blocks
    from fedlm.models.loading import build_config, build_on_meta, max_positions

    shape = build_config(model, kind, 2)
    return Facts(
        family=shape.model_type,
        kind=kind,
        blocks=len(find_blocks(build_on_meta(model, kind, 2)).blocks),
        hidden=shape.hidden_size,
        positions=max_positions(model),
        decoder=shape.model_type not in ENCODERS,
    )
