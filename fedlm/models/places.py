"""Where a model is: a label of the catalogue, a folder written by Transformers, or the hub.

PyTorch and Transformers are imported only where a model is read.
"""

import contextlib
import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError

from fedlm.base.errors import UserError
from fedlm.base.files import local_path
from fedlm.models.catalogue import CATALOGUE
from fedlm.models.config import ModelConfig


@dataclass(frozen=True)
class Place:
    """Where Transformers reads a model: a folder, a config.json, or the hub."""

    name: str
    local: bool


def check(config: ModelConfig) -> None:
    """Raise UserError if the source cannot exist; reads no weights and uses no network."""
    entry = CATALOGUE.get(config.source)
    if entry is not None or _looks_like_hub_id(config.source):
        return
    _folder(config.source)


def _looks_like_hub_id(source: str) -> bool:
    return not local_path(source).exists() and bool(
        re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source)
    )


def _folder(source: str) -> Path:
    path = local_path(source)
    if path.is_file() and path.suffix == ".json":
        return path
    if (path / "config.json").is_file():
        return path
    if path.exists():
        raise UserError(
            f"model: folder {source!r} has no config.json; name a folder written by Transformers' "
            "save_pretrained (config.json, model.safetensors, tokenizer files)"
        )
    if os.sep in source or source.startswith("~"):
        raise UserError(f"model: there is no folder {source!r}; allowed: {_allowed()}")
    near = difflib.get_close_matches(source.lower().replace("-", "_"), CATALOGUE, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ";"
    raise UserError(f"model: unknown label {source!r}{hint} Allowed: {_allowed()}")


def _allowed() -> str:
    return (
        f"a label ({', '.join(CATALOGUE)}), a folder with config.json and safetensors, or a hub id owner/name"
    )


def find_place(config: ModelConfig) -> Place:
    """Return where the model's files are, downloading and converting an embedded model if needed."""
    entry = CATALOGUE.get(config.source)
    if entry is not None and entry.embedded:
        from fedlm.models import embedded

        return Place(str(getattr(embedded, config.source)()), local=True)
    if config.source in CATALOGUE:
        return Place(CATALOGUE[config.source].hub, local=False)
    if _looks_like_hub_id(config.source):
        return Place(config.source, local=False)
    return Place(str(_folder(config.source)), local=True)


@contextlib.contextmanager
def reading(config: ModelConfig, place: Place) -> Iterator[None]:
    """Silence the libraries, and turn their errors about files and hub into a UserError with a remedy."""
    from fedlm.models.quiet import quiet

    try:
        with quiet():
            yield
    except hub_errors.GatedRepoError as error:
        raise UserError(
            f"model: access to {place.name!r} must be granted by its owner; ask for it on the hub and set "
            "HF_TOKEN"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise UserError(f"model: {place.name!r} has no revision {config.revision!r} on the hub") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise UserError(
            f"model: the hub has no model {place.name!r}, or it is private; allowed: {_allowed()}"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in reason:
            raise UserError(
                f"model: {config.source!r} comes with its own Python code; read it, and set "
                "trust_remote_code: true (and a revision) if it may run"
            ) from error
        unreachable = isinstance(error, hub_errors.LocalEntryNotFoundError) or "couldn't connect" in reason
        if not place.local and (unreachable or hub_errors.OfflineModeIsEnabled in type(error).__mro__):
            raise UserError(
                f"model: the hub cannot be reached for {place.name!r} and it is not in the hub's cache; "
                "connect, or download the model elsewhere and name its folder as `source`"
            ) from error
        raise UserError(f"model: {config.source!r} cannot be loaded: {reason[:300]}") from error
