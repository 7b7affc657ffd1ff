"""What a method may ask about a model before any job starts."""

from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Facts:
    """What a method may ask about a model: `positions` is None where there is no limit."""

    family: str
    kind: str
    blocks: int
    hidden: int
    positions: int | None
    decoder: bool


@cache
def facts(model, kind: str) -> Facts:
    """Return the facts of a model, from its shape alone; no weights are read.

    Raises UserError when the model cannot be found or its blocks cannot.
    """
    from fedlm.models.blocks import find_blocks
    from fedlm.models.loading import build_config, build_on_meta, max_positions

    shape = build_config(model, kind, 2)
    return Facts(
        family=shape.model_type,
        kind=kind,
        blocks=len(find_blocks(build_on_meta(model, kind, 2)).blocks),
        hidden=shape.hidden_size,
        positions=max_positions(model),
        decoder=shape.model_type not in ("bert", "roberta", "distilbert", "deberta-v2", "electra"),
    )
