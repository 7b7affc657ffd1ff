"""The predicted costs that config/claims.yaml names."""

from collections.abc import Callable
from pathlib import Path

from fedlm.base.files import write_atomically
from fedlm.costs import cases, tables
from fedlm.results.claims import CLAIMS, read_claims, to_predict
from fedlm.study.plugins import discover_methods


def write_claimed(
    destination: Path, path: Path = CLAIMS, log: Callable[[str], None] = lambda line: None
) -> list[str]:
    """Predict the costs that claims name and write them as csv; return a line for each that has none.

    Methods that do not exist are left out: the verdict says so.
    """
    known = discover_methods()
    asked = [
        cases.case_of(model, method)
        for model, methods in to_predict(read_claims(path)).items()
        for method in methods
        if method in known
    ]
    found = cases.cost_all(asked, positions=3, log=log)
    rows, _ = tables.frames(asked, found)
    write_atomically(destination, rows.to_csv(index=False, lineterminator="\n").encode())
    return cases.failures(asked, found)
