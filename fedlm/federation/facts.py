"""What a method can know about a model before any job starts."""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from fedlm.base.files import write_atomically
from fedlm.models import places
from fedlm.models.catalogue import CATALOGUE
from fedlm.models.config import Kind, ModelConfig


@dataclass(frozen=True)
class Facts:
    """What a method can know about a model: `positions` is None if there is no limit."""

    family: str
    kind: Kind
    blocks: int
    hidden: int
    positions: int | None
    decoder: bool
    layers: int


@cache
def facts(model: ModelConfig, kind: Kind) -> Facts:
    """Return the facts of a model, from its shape alone; no weights are read.

    A model of the catalogue is known by its dimensions; others need PyTorch and Transformers, which take
    seconds to import, so their facts are kept in a folder of the user's (`FEDLM_CACHE`, by default
    `~/.cache/fedlm`).

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
            decoder=entry.decoder,
            layers=entry.layers,
        )
    kept = _kept_facts(model, kind)
    if kept is not None:
        with suppress(OSError, ValueError, TypeError):
            return Facts(**json.loads(kept.read_text(encoding="utf-8")))
    found = read_facts(model, kind)
    if kept is not None:
        with suppress(OSError):  # a home that cannot be written to
            write_atomically(kept, json.dumps(asdict(found)).encode())
    return found


def _kept_facts(model: ModelConfig, kind: Kind) -> Path | None:
    """Return the file for a model's facts, named by all that they follow from; None if that is not known."""
    if model.trust_remote_code:
        return None
    place = places.find_place(model)
    if place.local:
        config = Path(place.name)
        config = config if config.suffix == ".json" else config / "config.json"
    else:
        cached = try_to_load_from_cache(place.name, "config.json", revision=model.revision)
        if not isinstance(cached, str):
            return None
        config = Path(cached)
    # Where the model is does not matter, nor does what only its weights depend on.
    settings = model.model_dump_json(exclude={"source", "revision"})
    digest = hashlib.sha256(f"{kind} {settings} {version('transformers')}".encode())
    try:
        for path in [config, Path(__file__), *sorted(Path(places.__file__).parent.glob("*.py"))]:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    except OSError:
        return None
    folder = Path(os.environ.get("FEDLM_CACHE") or "~/.cache/fedlm").expanduser()
    return folder / "facts" / f"{digest.hexdigest()}.json"


def read_facts(model: ModelConfig, kind: Kind) -> Facts:
    """Return the facts of any model, from its configuration and its structure; errors as in `facts`."""
    from fedlm.models.blocks import find_blocks
    from fedlm.models.loading import build_config, build_on_meta, is_encoder, max_positions

    shape = build_config(model, kind, 2)
    return Facts(
        family=shape.model_type,
        kind=kind,
        blocks=len(find_blocks(build_on_meta(model, kind, 2)).blocks),
        hidden=shape.hidden_size,
        positions=max_positions(model),
        decoder=not is_encoder(shape),
        layers=shape.num_hidden_layers,
    )
