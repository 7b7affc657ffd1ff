"""The findings of a study in two pages: a text whose every number is put in from the tables."""

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas

from fedlm.base.errors import UserError
from fedlm.results.claims import CONTRADICTED, SUPPORTED, UNDECIDED, UNTESTABLE
from fedlm.results.devices import columns_of_seconds, in_words
from fedlm.results.typeset import significant

TEMPLATE = Path(__file__).with_suffix(".md.j2")
NEEDED = ("main", "ranking", "cost_to_target", "quality", "tuning", "claims")
NEAR = 1.0  # points below the best competitor, or percent above its loss, that still count as close
AGAINST = "fedavg"  # costs are given as multiples of this method's
CORE = ("fedcybgd", "fedavg", "fedlora", "fedprompt")  # the first line says if one of them loses everywhere
COSTS = ("peak_memory_bytes", "upload_bytes", "download_bytes", "flops")


def write_up(tables: Path, study: str, has: Collection[str] = NEEDED) -> str:
    """Return the findings of a study as Markdown, from the csv files of its tables.

    `has` names the tables of the study. One without centralised training has no costs to its score, and the
    findings nothing of them. Raises UserError if a table is missing.
    """
    frames = {}
    for name in NEEDED:
        if name == "cost_to_target" and name not in has:
            continue
        path = Path(tables) / f"{name}.csv"
        try:
            frames[name] = pandas.read_csv(path, keep_default_na=False, na_values=[""])
        except (OSError, ValueError):
            raise UserError(
                f"{path}: cannot be read; make it with `tables`, which needs a tuned study"
            ) from None
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    environment.filters["share"] = "{:.0%}".format
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(study=study, **_facts(frames)).rstrip("\n") + "\n"


def _facts(frames: dict[str, pandas.DataFrame]) -> dict[str, Any]:
    main, claims, quality = frames["main"], frames["claims"], frames["quality"]
    costs = frames.get("cost_to_target")
    main["greater_is_better"] = main["greater_is_better"].astype(str) == "True"
    competitors = main[~main["control"]]
    greater = competitors["greater_is_better"]
    scored = competitors[greater]
    cells = list(dict.fromkeys(zip(main["task"], main["partition"], strict=True)))
    titles = dict(zip(main["method"], main["title"], strict=True))
    gaps = _gaps(competitors[competitors["method"].isin(CORE)])
    units = {" points": greater.any(), "% of the loss": not greater.all()}
    of_scores, of_costs = (
        claims[claims["kind"] == "score"],
        claims[claims["kind"].isin(["cost", "predicted"])],
    )
    decided = of_scores[of_scores["verdict"].isin([SUPPORTED, CONTRADICTED])]
    judged = {system: own.to_dict("records") for system, own in of_scores.groupby("system", sort=False)}
    return {
        "tasks": list(dict.fromkeys(main["task"])),
        "cells": cells,
        "methods": list(dict.fromkeys(competitors["title"])),
        "controls": list(dict.fromkeys(main[main["control"]]["title"])),
        "runs": int(main["seeds"].sum()),
        "asked": int(main["seeds_expected"].sum()),
        "trials": int(frames["tuning"].groupby(["task", "method"])["trials_of_all"].first().sum()),
        "failed": int(frames["tuning"].groupby(["task", "method"])["failed"].first().sum()),
        "losers": [
            (titles[method], gaps[method].min(), gaps[method].max())
            for method in gaps
            if len(gaps) > 1 and (gaps[method] > NEAR).all()
        ],
        "near": NEAR,
        "core": [titles[method] for method in gaps],
        "unit": " or ".join(unit for unit, has in units.items() if has),
        "ranking": frames["ranking"].to_dict("records"),
        "groups": _groups(frames["ranking"]),
        "winners": _winners(scored, titles),
        "prices": _prices(main),
        "against": titles.get(AGAINST),
        "targets": None if costs is None else _targets(costs),
        "seconds": [] if costs is None else columns_of_seconds(costs),
        "judged": judged,
        "of_scores": of_scores["verdict"].value_counts().to_dict(),
        "of_costs": of_costs["verdict"].value_counts().to_dict(),
        "decided": len(decided),
        "stay": int((decided["alone"].astype(str) != "True").sum()),
        "too_dear": of_costs[of_costs["verdict"] == CONTRADICTED].to_dict("records"),
        "open": int((claims["kind"] == "none").sum()),
        "supported": SUPPORTED,
        "contradicted": CONTRADICTED,
        "undecided": UNDECIDED,
        "untestable": UNTESTABLE,
        "raised": quality[quality["raised"]].groupby(["rule", "checked"], sort=False).size().to_dict(),
        "passed": list(dict.fromkeys(quality[~quality["raised"]]["rule"])),
        "says": dict(zip(quality["rule"], quality["says"], strict=True)),
        "in_words": in_words,
        "number": significant,
        "scored": _points if frames["ranking"]["family"].iloc[0] == "score" else significant,
        "listed": _listed,
        "amount": _amount,
        "counted": _counted,
    }


def _gaps(competitors: pandas.DataFrame) -> pandas.DataFrame:
    """Return how much worse than the best each method is in each cell: in points, or in percent of a loss."""
    cells = {}
    for (greater, *cell), own in competitors.groupby(["greater_is_better", "task", "partition"], sort=False):
        scores = own.set_index("method")["test_score_mean"]
        cells[tuple(cell)] = (scores.max() - scores if greater else scores / scores.min() - 1) * 100
    # Only methods that have every cell can lose everywhere.
    return pandas.DataFrame(cells).T.dropna(axis=1).round(9)


def _groups(ranking: pandas.DataFrame) -> list[str]:
    """Return the titles of the best competitor and of what cannot be told from it, in the first family."""
    return list(ranking[ranking["best"] & (ranking["family"] == ranking["family"].iloc[0])]["title"])


def _winners(scored: pandas.DataFrame, titles: dict[str, str]) -> list[dict[str, Any]]:
    rows = []
    for (task, partition), own in scored.groupby(["task", "partition"], sort=False):
        ordered = own.dropna(subset="test_score_mean").sort_values("test_score_mean", ascending=False)
        if ordered.empty:
            continue
        best = ordered.iloc[0]
        close = ordered[(best["test_score_mean"] - ordered["test_score_mean"]) * 100 <= NEAR]
        rows.append(
            {
                "task": task,
                "partition": partition,
                "best": titles[best["method"]],
                "score": best["test_score_mean"] * 100,
                "close": [titles[method] for method in close["method"].iloc[1:]],
                "last": titles[ordered.iloc[-1]["method"]],
                "lowest": ordered.iloc[-1]["test_score_mean"] * 100,
            }
        )
    return rows


def _prices(main: pandas.DataFrame) -> dict[str, list[float]]:
    """Return each method's costs as multiples of FedAvg's: the median over cells."""
    base = main[main["method"] == AGAINST].set_index(["task", "partition"])
    prices = {}
    for method, own in main.groupby("method", sort=False):
        own = own.set_index(["task", "partition"])
        prices[str(method)] = [
            float((own[f"{name}_mean"] / base[f"{name}_mean"]).median()) if len(base) else math.nan
            for name in COSTS
        ]
    return prices


def _targets(table: pandas.DataFrame) -> list[dict[str, Any]]:
    """Return for each competitor, and each target, in how many cells it gets there and its median costs.

    A cell in which it does not get there counts as infinite, as a seed does within a cell.
    """
    rows = []
    costs = ["peak_memory_bytes", "upload_bytes", "download_bytes", "flops", *columns_of_seconds(table)]
    for _, own in table[~table["control"].astype(bool)].groupby("method", sort=False):
        row: dict[str, Any] = {"title": own["title"].iloc[0], "targets": []}
        for target, some in own.groupby("target", sort=False):
            there = some["round"].notna()
            row["targets"].append(
                {
                    "target": target,
                    "cells": f"{there.sum()} of {len(some)}",
                    "seeds": f"{some['reached'].sum()} of {some['seeds'].sum()}",
                    "costs": [float(some[cost].where(there, math.inf).median()) for cost in costs],
                }
            )
        rows.append(row)
    return rows


def _amount(values: Sequence[float], unit: float = 1) -> str:
    """Write a cost for each target."""
    written = ["never" if value == math.inf else significant(value / unit) for value in values]
    return "never" if set(written) == {"never"} else " / ".join(written)


def _points(value: float) -> str:
    """Write a score in points."""
    return f"{value:.1f}"


def _listed(names: list[str]) -> str:
    """Write names as a list in a sentence: A, B and C."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _counted(count: int, noun: str) -> str:
    """Write a count with its noun: 1 run, 2 runs."""
    return f"{count:,} {noun}{'s' if count != 1 else ''}"
