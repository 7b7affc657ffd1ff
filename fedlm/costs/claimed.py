"""The predicted costs that config/claims.yaml names."""

from collections.abc import Callable
from pathlib import Path

from fedlm.base.files import write_atomically
from fedlm.costs import cases, tables
from fedlm.costs.prediction import Costs
from fedlm.results.claims import CLAIMS, read_claims, to_predict
from fedlm.study.plugins import discover_methods


def write_claimed(
    destination: Path, path: Path = CLAIMS, log: Callable[[str], None] = lambda line: None
) -> list[str]:
    """Predict the costs that claims name and write them as csv; return a line for each that has none.

    Methods that do not exist are left out: the verdict says so.
    """
    known = discover_methods()
    needed = [one for one in to_predict(read_claims(path)) if one.method in known]
    asked = []
    for one in needed:
        case = cases.case_of(one.model, one.method)
        if one.settings:
            settings = case.method_class.Config.model_validate_json(one.settings)
            case = case._replace(settings=settings)
        asked.append(case)
    found = cases.cost_all(asked, positions=3, log=log)
    rows, _ = tables.frames(asked, found)
    whole = [one.settings for one, costs in zip(needed, found, strict=True) if isinstance(costs, Costs)]
    rows.insert(2, "settings", whole)
    write_atomically(destination, rows.to_csv(index=False, lineterminator="\n").encode())
    return cases.failures(asked, found)
