"""What the papers claim, and what the study says about it: config/claims.yaml with computed verdicts.

Each claim has a rule, written before the scores that it judges were known (where not, the system's note says
so); a verdict is computed, never written.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy
import pandas
from pydantic import Field, ValidationInfo, field_validator

from fedlm.base.errors import UserError
from fedlm.base.settings import Settings
from fedlm.results.cells import CELL
from fedlm.results.ranking import LEVEL, families, on_all_partitions
from fedlm.results.scene import Scene
from fedlm.results.statistics import compare_tasks, holm
from fedlm.results.typeset import Table, significant
from fedlm.study.yaml_files import read_settings

CLAIMS = Path(__file__).parents[2] / "config" / "claims.yaml"
SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"
UNTESTABLE = "cannot be tested here"
EVEN = ("iid", "pooled")  # schemes that make clients alike
LABEL_SKEW = 0.05  # bit of label divergence, from which clients' labels count as skewed


class ScoreRule(Settings):
    """A difference of test scores, paired by seed within each cell.

    Supported if its 95% interval lies at or above the margin, contradicted if it lies below, else undecided.
    Where a lower score is better, as of a loss, a percent of it counts as a point.
    """

    kind: Literal["score"]
    of: str = Field(description="label of a row of the study")
    against: str = Field(description="label of a row of the study")
    partitions: Literal["all", "even", "skewed"] = Field(
        "all", description="even: IID; skewed: clients' labels differ; natural partitions may be neither"
    )
    at_least: float = Field(description="margin in points; -1: at most one point worse")


class CostRule(Settings):
    """A ratio of measured costs, in each cell of the study.

    Supported if it is at most the limit in every cell, contradicted if in none, else undecided.
    """

    kind: Literal["cost"]
    of: str = Field(description="label of a row of the study")
    against: str = Field(description="label of a row of the study")
    quantity: Literal["upload_bytes", "download_bytes", "peak_memory_bytes", "flops", "queries"]
    at_most: float = Field(gt=0, description="limit of the ratio")
    model: str | None = Field(None, description="label of the model that the limit is for; else for all")


class PredictedRule(Settings):
    """A ratio of predicted costs on a model; without `against` the costs themselves. Always decided."""

    kind: Literal["predicted"]
    model: str = Field(description="label of a model")
    of: str = Field(description="name of a method")
    settings: dict[str, Any] = Field({}, description="its settings, where not the defaults")
    against: str | None = Field(None, description="name of a method")
    against_settings: dict[str, Any] = Field({}, description="its settings, where not the defaults")
    quantity: Literal[
        "turn_upload_bytes", "turn_download_bytes", "turn_flops", "peak_memory_bytes", "parameters"
    ]
    at_most: float = Field(gt=0, description="limit of the ratio, or of the costs")

    @field_validator("against_settings")
    @classmethod
    def _of_somebody(cls, settings: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if settings and info.data.get("against") is None:
            raise ValueError("allowed with `against` only, whose settings they are")
        return settings


class NoRule(Settings):
    """A claim that this suite cannot test, and why."""

    kind: Literal["none"]
    reason: str


Rule = Annotated[ScoreRule | CostRule | PredictedRule | NoRule, Field(discriminator="kind")]


class Claim(Settings):
    """One claim in one line, the quantity that would show it here, and the rule of its verdict."""

    claim: str
    shown_by: str = ""
    rule: Rule


class System(Settings):
    """One publication with its claims."""

    name: str
    reference: str
    note: str = ""
    claims: list[Claim] = Field(min_length=1)


class Claims(Settings):
    """The content of config/claims.yaml."""

    systems: list[System]


class Verdict(NamedTuple):
    """What became of a claim: the verdict, the quantity found with its range, and both in words.

    `p` is that of the test against the margin, of scores.
    """

    verdict: str
    value: float
    low: float
    high: float
    text: str
    p: float = math.nan


def read_claims(path: Path = CLAIMS) -> list[System]:
    """Read the claims; raise UserError naming the place of an error."""
    return read_settings(path, Claims).systems


def read_predicted(path: Path) -> pandas.DataFrame | None:
    """Return the predicted costs that claims name, as `costs --claims` writes them; None without a file."""
    if not path.exists():
        return None
    try:
        predicted = pandas.read_csv(path, keep_default_na=False)
    except (OSError, ValueError):
        raise UserError(f"{path}: not a csv file of costs; make it again with `costs --claims`") from None
    for name in ("model", "method", "settings", *get_args(PredictedRule.model_fields["quantity"].annotation)):
        if name not in predicted:
            raise UserError(f"{path}: lacks the column {name}; make it again with `costs --claims`")
    return predicted


class Needed(NamedTuple):
    """A prediction that claims need: a method on a model; settings as JSON, empty for the defaults."""

    model: str
    method: str
    settings: str


def to_predict(systems: list[System]) -> list[Needed]:
    """Return the predictions that the claims need, each once."""
    rules = [claim.rule for system in systems for claim in system.claims]
    return list(
        dict.fromkeys(one for rule in rules if isinstance(rule, PredictedRule) for one in _needed(rule))
    )


def _needed(rule: PredictedRule) -> list[Needed]:
    """Return what the rule compares: `of`, and `against` where there is one."""
    found = [Needed(rule.model, rule.of, _as_text(rule.settings))]
    if rule.against:
        found.append(Needed(rule.model, rule.against, _as_text(rule.against_settings)))
    return found


def _as_text(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True) if settings else ""


def judge(rule: Rule, scene: Scene, predicted: pandas.DataFrame | None = None) -> Verdict:
    """Return the verdict of a rule.

    `predicted` has one row per model, method and settings (see `Needed`); its other columns are those of
    the table of costs.
    """
    if isinstance(rule, NoRule):
        return _open(UNTESTABLE, rule.reason)
    if isinstance(rule, PredictedRule):
        return _judge_predicted(rule, predicted)
    have = set(scene.runs["method"])
    absent = [name for name in (rule.of, rule.against) if name not in have]
    if absent:
        return _open(UNTESTABLE, f"the study has no runs of {' and '.join(absent)}")
    return _judge_score(rule, scene) if isinstance(rule, ScoreRule) else _judge_cost(rule, scene)


def _open(verdict: str, reason: str) -> Verdict:
    return Verdict(verdict, math.nan, math.nan, math.nan, reason)


def _counted(cells: int) -> str:
    return f"{cells} cell{'s' if cells != 1 else ''}"


def _where(scene: Scene, partitions: str) -> pandas.DataFrame:
    """Return the runs of the cells that a rule names."""
    runs = on_all_partitions(scene.runs)
    even = runs["scheme"].isin(EVEN)
    if partitions == "even":
        return runs[even]
    if partitions == "skewed":
        divided = scene.runs[scene.runs["method_name"] != "centralized"]
        divergence = divided["label_divergence"].astype(float).groupby([divided[key] for key in CELL]).mean()
        skewed = divergence.index[divergence >= LABEL_SKEW]
        return runs[~even & pandas.MultiIndex.from_frame(runs[CELL]).isin(skewed)]
    return runs


def _judge_score(rule: ScoreRule, scene: Scene) -> Verdict:
    runs = _where(scene, rule.partitions)
    runs = runs[runs["method"].isin([rule.of, rule.against])]
    scores = families(runs) if len(runs) else []
    if not scores or not {rule.of, rule.against} <= set(scores[0].scores):
        return _open(UNTESTABLE, f"the study has no cell of both with {rule.partitions} partitions")
    family = scores[0]
    differences = family.differences(rule.of, rule.against)
    if not family.greater:
        # A percent of a loss counts as a point, and less is better.
        differences = [-100 * one / family.scores[rule.against].mean() for one in differences]
    found = compare_tasks(differences)
    unit = " points" if family.greater else f"% of the {family.name}, less is better"
    sign = 1 if family.greater else -1
    where = f"{_counted(sum(one.shape[1] for one in differences))}, {found.n} pairs"
    if not found.n:
        return _open(UNTESTABLE, "the study has no seed of both")
    if not math.isfinite(found.low):
        equal = min(map(len, differences)) > 1
        reason = "no spread between seeds" if equal else "too few pairs for an interval"
        text = f"{sign * found.difference:+.1f}{unit}; {where}; {reason}"
        return Verdict(UNDECIDED, found.difference, math.nan, math.nan, text)
    verdict = UNDECIDED
    if found.low >= rule.at_least:
        verdict = SUPPORTED
    elif found.high < rule.at_least:
        verdict = CONTRADICTED
    ends = sorted((sign * found.low, sign * found.high))
    text = f"{sign * found.difference:+.1f}{unit} ({ends[0]:+.1f} to {ends[1]:+.1f}); {where}"
    p = compare_tasks([one - rule.at_least for one in differences]).p
    return Verdict(verdict, found.difference, found.low, found.high, text, p)


def _judge_cost(rule: CostRule, scene: Scene) -> Verdict:
    runs = scene.runs[scene.runs["method"].isin([rule.of, rule.against])]
    if rule.model and set(runs["model"]) != {rule.model}:
        return _open(UNTESTABLE, f"the limit is for {rule.model}")
    values = runs.assign(value=runs[rule.quantity].astype(float))
    means = values.pivot_table(index=CELL, columns="method", values="value", aggfunc="mean").dropna()
    if not {rule.of, rule.against} <= set(means):
        return _open(UNTESTABLE, "the study has no cell of both")
    ratios = (means[rule.of] / means[rule.against].where(means[rule.against] > 0)).dropna()
    if ratios.empty:
        return _open(UNTESTABLE, f"{rule.against} has no {rule.quantity} to compare with")
    low, middle, high = float(ratios.min()), float(ratios.median()), float(ratios.max())
    verdict = UNDECIDED
    if high <= rule.at_most:
        verdict = SUPPORTED
    elif low > rule.at_most:
        verdict = CONTRADICTED
    text = f"ratio {significant(middle)}"
    text += f" ({significant(low)} to {significant(high)})" if significant(low) != significant(high) else ""
    return Verdict(verdict, middle, low, high, f"{text}; {_counted(len(ratios))}")


def _judge_predicted(rule: PredictedRule, predicted: pandas.DataFrame | None) -> Verdict:
    if predicted is None:
        return _open(UNDECIDED, "the costs are not predicted yet: `costs --claims`")
    keys = predicted[["model", "method", "settings"]].itertuples(index=False, name=None)
    known = dict(zip(keys, predicted[rule.quantity].astype(float), strict=True))
    values = [known.get(one) for one in _needed(rule)]
    absent = [one.method for one, value in zip(_needed(rule), values, strict=True) if value is None]
    if absent:
        return _open(UNTESTABLE, f"no costs of {' and '.join(absent)} on {rule.model}")
    value, *others = (value for value in values if value is not None)
    text = f"{value:,.0f}"
    if others:
        value = value / others[0]
        text = f"ratio {significant(value)}"
    verdict = SUPPORTED if value <= rule.at_most else CONTRADICTED
    exact = "within 1%" if rule.quantity == "peak_memory_bytes" else "exact"
    return Verdict(verdict, value, value, value, f"{text}; {exact}, on {rule.model}")


def limit_text(rule: Rule, scene: Scene) -> str:
    """Return what a rule compares with what, in words."""
    if isinstance(rule, NoRule):
        return "–"
    # A predicted rule names methods with their own settings, the others rows of the study.
    titles = _titles_of_methods() if isinstance(rule, PredictedRule) else scene.titles
    of = titles.get(rule.of, rule.of)
    against = titles.get(rule.against, rule.against) if rule.against else ""
    if isinstance(rule, ScoreRule):
        where = "" if rule.partitions == "all" else f", {rule.partitions} partitions"
        return f"score of {of} minus {against}{where}: at least {rule.at_least:g} points"
    quantity = rule.quantity.replace("turn_", "").replace("_bytes", " bytes").replace("_", " ")
    quantity = quantity.replace("peak memory bytes", "peak memory").replace("flops", "FLOPs")
    turn = " a turn" if "turn_" in rule.quantity else ""
    if isinstance(rule, PredictedRule):
        of, against = of + _with(rule.settings), against + _with(rule.against_settings)
    on = f" on {rule.model}" if rule.model else ""
    if rule.quantity == "parameters":
        return f"parameters of {rule.model}: at most {rule.at_most:,.0f}"
    if not against:
        return f"{quantity}{turn} of {of}{on}: at most {rule.at_most:,.0f}"
    return f"{quantity}{turn} of {of} over {against}{on}: at most {rule.at_most:g}"


def _with(settings: dict[str, Any]) -> str:
    return f" with {_as_text(settings)}" if settings else ""


def _titles_of_methods() -> dict[str, str]:
    from fedlm.study.plugins import discover_methods

    return {name: kind.title for name, kind in discover_methods().items()}


def claims_table(scene: Scene, predicted: pandas.DataFrame | None = None, path: Path = CLAIMS) -> Table:
    """Every claim with its rule, what was found, and the verdict."""
    systems = read_claims(path)
    every = [
        (system, claim, judge(claim.rule, scene, predicted)) for system in systems for claim in system.claims
    ]
    adjusted = holm([verdict.p for _, _, verdict in every])
    numbers: list[dict[str, Any]] = []
    cells = []
    for (system, claim, verdict), p in zip(every, adjusted, strict=True):
        alone = verdict.verdict in (SUPPORTED, CONTRADICTED) and p >= LEVEL
        numbers.append(
            {
                "system": system.name,
                "reference": system.reference,
                "claim": claim.claim,
                "shown_by": claim.shown_by,
                "kind": claim.rule.kind,
                "rule": claim.rule.model_dump_json(),
                **verdict._asdict(),
                "p_adjusted": p,
                "alone": alone,
            }
        )
        cells.append(
            {
                "System": system.name,
                "Claim": claim.claim,
                "Rule": limit_text(claim.rule, scene),
                "Found": verdict.text,
                "Verdict": verdict.verdict + "*" * alone,
            }
        )
    shown_cells = pandas.DataFrame(cells, columns=["System", "Claim", "Rule", "Found", "Verdict"])
    counts = shown_cells["Verdict"].value_counts()
    totals = ", ".join(
        f"{counts.get(verdict, 0)} {verdict}" for verdict in (SUPPORTED, CONTRADICTED, UNDECIDED, UNTESTABLE)
    )
    notes = [
        f"{len(cells)} claims: {totals}. Claims are in the suite's own words; the rules of "
        "config/claims.yaml were written beforehand, except where a system's note says otherwise.",
        "Differences of scores are paired by seed, with the 95% interval of a t-test over tasks and seeds: "
        "supported if it lies at or above the margin, contradicted if below, else undecided. Each verdict is "
        "one comparison on the cells that the claim names. *: it would be undecided with p adjusted for all "
        "claims about scores (Holm). Where a loss is the score, a percent of it counts as a point. Ratios of "
        "costs: supported if within the limit in every cell, contradicted if in none. Exact: predicted costs "
        "of a turn, equal to the byte to those of a run; memory is predicted within 1%. Even partitions are "
        f"IID; skewed ones have a label divergence of at least {LABEL_SKEW:g} bit; a natural one may be "
        "neither. A verdict holds for the models and data of this study and not for those of the paper.",
        *(f"{system.name}: {system.note}" for system in systems if system.note),
        *scene.notes(),
    ]
    return Table(
        "claims",
        "What the papers claim, and what is found here",
        pandas.DataFrame(numbers),
        shown_cells,
        numpy.zeros(shown_cells.shape, dtype=bool),
        1,
        notes,
    )
