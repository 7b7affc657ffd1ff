"""Shared by all tests: no network, few threads, one folder for tiny models."""

import os
import shutil
import sys
import tempfile
from contextlib import nullcontext

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
import pytest
from hypothesis import HealthCheck, settings

from fedlm.base.processor import make_full_use

# How long an example takes says more about the machine's other work than about the code.
settings.register_profile("fedlm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fedlm")

# The processes that pytest starts to share the tests inherit this folder.
OWN_CACHE = None if "FEDLM_CACHE" in os.environ else tempfile.mkdtemp(prefix="fedlm-tests-")
os.environ.setdefault("FEDLM_CACHE", OWN_CACHE or "")


def pytest_addoption(parser):
    parser.addoption("--method-file", help="test this method instead of those of the folder")
    parser.addoption("--method-settings", default="{}", help="its settings, as JSON")


class Failures:
    """Says at once what failed, for a test run that is cut off before its end."""

    def __init__(self, config):
        self.config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report):
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal:  # `fedlm test-method` reports in its own words, without one
            terminal.write_line(f"\nFAILED {report.nodeid}: {report.longreprtext[-1000:]}")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Failures(config))


def pytest_unconfigure():
    if OWN_CACHE:
        shutil.rmtree(OWN_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder for tiny models, one for the whole session."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module", autouse=True)
def older_objects():
    """Set what is imported aside for a whole module: each run would do so again, a tenth of a second each."""
    if "torch" in sys.modules:
        make_full_use()  # as the first run in this process would, and all of a module with the same products
    memory = sys.modules.get("fedlm.measure.memory")
    with memory.older_objects_set_aside() if memory else nullcontext():
        yield


@pytest.fixture(scope="module")
def one_thread():
    """Threads that wait for each other are slow where other processes use the cores too."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# They fork the test process, which is safe only while no library has started threads in it.
FORKING = ("test_kills.py", "test_faults.py", "test_stored.py")


def pytest_collection_modifyitems(items):
    """Run the files that fork first."""
    items.sort(key=lambda item: item.path.name not in FORKING)
