"""The conformance tests on one method's file, from anywhere, reported in plain words.

The tests are those of `tests/test_methods.py`, which run on every method of the repository.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fedlm.base.errors import UserError
from fedlm.federation.method import Method
from fedlm.study.plugins import ROOT, method_in

if TYPE_CHECKING:
    import pytest

TESTS = ROOT / "tests" / "test_methods.py"


class _Reporter:
    """Prints a line for each finished check, and the reason under one that failed."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self.log = log
        self.checks = self.failed = 0
        self.reason = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        if report.when == "teardown":
            return
        self.checks += 1
        self.failed += report.failed
        self.log(f"{'FAIL' if report.failed else 'pass'}  {_sentence(report.nodeid)}")
        if report.failed:
            reason = _why(report)
            self.log(f"      {'the same reason' if reason == self.reason else reason}")
            self.reason = reason

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.checks += 1
            self.failed += 1
            self.log(f"FAIL  the tests could not be loaded\n      {_why(report)}")


def test_method(path: Path, settings: str = "{}", log: Callable[[str], None] = print) -> bool:
    """Run the conformance tests on the method in a file; print a line for each; return whether all pass.

    `settings` are the method's, as a JSON table; the rest have their defaults.

    Raises UserError if the file holds no method or the settings are wrong.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the models are created on the fly
    path = Path(path).absolute()
    method = method_in(path)
    _check_settings(method, settings)
    import pytest

    # Only what the tests need: not the user's pytest settings, nor plug-ins of pytest that print.
    os.environ.pop("PYTEST_ADDOPTS", None)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    reporter = _Reporter(log)
    options = [
        *("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-o", "addopts="),
        *("-p", "no:terminal", "-p", "no:cacheprovider"),
        *("--method-file", str(path), "--method-settings", settings),
    ]
    status = pytest.main([*options, str(TESTS)], plugins=[reporter])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not reporter.checks:
        raise RuntimeError(f"the tests did not finish: {status!r}")
    if reporter.failed:
        log(f"{method.name}: {reporter.failed} of {reporter.checks} checks failed")
    else:
        log(f"{method.name}: all {reporter.checks} checks passed")
    return not reporter.failed


def _check_settings(method: type[Method], settings: str) -> None:
    from pydantic import ValidationError

    try:
        values = json.loads(settings)
    except ValueError as error:
        raise UserError(f"--settings: not valid JSON ({error}); allowed: a table of settings") from error
    if not isinstance(values, dict):
        raise UserError(f"--settings: {values!r}; allowed: a table of settings")
    try:
        method.Config(**values)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        hint = "; --settings sets it" if fault["type"] == "missing" else ""
        raise UserError(f"{method.name}: setting {where}: {fault['msg']}{hint}") from None


def _sentence(nodeid: str) -> str:
    """Return in words what a test checks: its name, and the model and kind of task it runs on."""
    test, _, case = nodeid.rpartition("::")[2].partition("[")
    words = test.removeprefix("test_").replace("_", " ")
    _, _, case = case.rstrip("]").partition("-")
    return f"{words} ({case.replace('-', ', ').replace('_', ' ')})" if case else words


def _why(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return the most informative line about a failure."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        lines = [line for line in str(report.longrepr).splitlines() if line.strip()]
        return lines[-1].strip() if lines else "no reason given"
    message = re.sub(r"^(AssertionError|fedlm\.base\.errors\.\w+): ", "", crash.message.splitlines()[0])
    return f"{message} ({_short(Path(crash.path))}, line {crash.lineno})"


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
