"""Keeping the libraries quiet, and torch's global generator unchanged, while models are loaded."""

import contextlib
from collections.abc import Iterator

import huggingface_hub
import torch
import transformers


@contextlib.contextmanager
def own_generator(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator with `seed`, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed every GPU as well.
        torch.default_generator.manual_seed(seed)
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and reports of loading."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    hub_verbosity = huggingface_hub.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        huggingface_hub.logging.set_verbosity(hub_verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
