"""Shared by all tests: no network, few threads, one folder for tiny models."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder for tiny models, one for the whole session."""
    return tmp_path_factory.mktemp("models")
