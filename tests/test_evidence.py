"""Ranking, profiles, cost to target, quality control, tuning, claims: all follow from the records."""

import itertools
import json
import math
import re
from pathlib import Path

import numpy
import pandas
import pytest
import scipy.stats
import yaml
from hypothesis import given
from hypothesis import strategies as st
from synthetic import TITLES, synthetic_record, synthetic_trials, write_study

from fedlm.base.errors import UserError
from fedlm.results import (
    claims,
    cost_to_target,
    drawing,
    findings,
    profiles,
    quality,
    records,
    statistics,
    tables,
    tuning,
)
from fedlm.results.claims import CLAIMS, judge, read_claims, to_predict
from fedlm.results.contents import TABLES, Contents, cohorts, names_of_tables
from fedlm.results.devices import read_devices
from fedlm.results.ranking import compare_all, families, on_all_partitions, ranking_table
from fedlm.results.scene import Scene
from fedlm.study import reading

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("bbc_news", "movie_reviews")
METHODS = ("fedavg", "fedcybgd", "fedlora", "centralized", "head_only")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Runs and rounds of a small study, and its scene."""
    folder = tmp_path_factory.mktemp("study")
    partitions = ("iid", "dirichlet_0.1")
    paths, _, expected = write_study(folder, TASKS, partitions, METHODS, (1, 2, 3, 4, 5), rounds=8)
    records.collect(paths, folder / "rounds.parquet", folder / "runs.parquet")
    runs, rounds = records.load_runs(folder / "runs.parquet"), records.load_rounds(folder / "rounds.parquet")
    return runs, rounds, Scene.make(runs, expected, TITLES)


def changed(scene, where, column, value):
    """Return the scene with another value in the rows of the runs that `where` selects."""
    runs = scene.runs.copy()
    runs.loc[where(runs), column] = value
    return scene._replace(runs=runs)


# ---------------------------------------------------------------------------------------------------------
# Statistics.


def one_cell(*tasks):
    """Return the differences of tasks with one partition each."""
    return [numpy.array(task, dtype=float).reshape(-1, 1) for task in tasks]


def test_one_cell_is_the_paired_t_test():
    ours, theirs = numpy.array([0.7, 0.8, 0.75, 0.9]), numpy.array([0.6, 0.75, 0.76, 0.7])
    assert statistics.compare_tasks(one_cell(ours - theirs)) == pytest.approx(
        statistics.compare(ours, theirs)
    )


def test_several_tasks_hold_whatever_the_tasks_differ_by():
    """The variance is that between the seeds of a task; how much the tasks differ does not count."""
    noise = [numpy.array([-1.0, 0.0, 1.0, 0.5, -0.5]) * scale for scale in (1.0, 0.5, 2.0)]
    near = statistics.compare_tasks(one_cell(*(10 + task for task in noise)))
    shifted = (shift + task for shift, task in zip((0, 10, 20), noise, strict=True))
    assert statistics.compare_tasks(one_cell(*shifted)) == pytest.approx(near)
    assert near.n == 15 and near.difference == pytest.approx(10)
    # Tasks of equal variance are the two-sample case with known degrees of freedom: n - tasks.
    equal = statistics.compare_tasks(one_cell(*(shift + noise[0] for shift in (0, 10, 20))))
    error = noise[0].std(ddof=1) / math.sqrt(5) / math.sqrt(3)
    assert equal.p == pytest.approx(2 * scipy.stats.t.sf(10 / error, 12))
    assert equal.high - 10 == pytest.approx(scipy.stats.t.ppf(0.975, 12) * error)


def test_a_seed_counts_once_for_all_partitions_of_a_task():
    """The same differences again, as those of another partition of the task, say nothing new."""
    once = numpy.array([1.0, 2.0, 4.0, 3.0, 5.0])
    twice = statistics.compare_tasks([numpy.column_stack([once, once])])
    assert twice.n == 10 and twice[1:] == pytest.approx(statistics.compare(once, 0 * once)[1:])
    # As partitions of two tasks they would, and every cell weighs the same.
    apart = statistics.compare_tasks(one_cell(once, once))
    assert apart.p < twice.p
    mixed = statistics.compare_tasks([numpy.column_stack([once, once + 6]), *one_cell(once)])
    assert mixed.difference == pytest.approx(3 + 6 / 3)


def test_a_seed_without_all_partitions_of_a_task_is_left_out():
    some = numpy.array([[1.0, 2.0], [2.0, 4.0], [3.0, 3.0], [9.0, math.nan]])
    assert statistics.compare_tasks([some]) == statistics.compare_tasks([some[:3]])


def test_its_interval_covers_the_truth_about_as_often_as_it_says():
    """Also where the partitions of a task go up and down together, as they share the seed's split."""
    generator, hits = numpy.random.default_rng(0), 0
    for _ in range(400):
        tasks = [
            generator.normal(mean, scale, (5, 1)) + generator.normal(0, scale, (5, partitions))
            for mean, scale, partitions in ((0, 1, 2), (3, 2, 2), (-6, 0.5, 1))
        ]
        found = statistics.compare_tasks(tasks)
        hits += found.low <= 0 <= found.high
    assert 365 <= hits <= 395


@pytest.mark.parametrize("tasks", [[], [[1.0]], [[1.0, 2.0], [3.0]], [[1.0, 1.0], [2.0, 2.0]],
                                   [[1.0, 2.0], [math.nan]]])  # fmt: skip
def test_without_pairs_or_spread_nothing_is_claimed(tasks):
    found = statistics.compare_tasks(one_cell(*tasks))
    assert math.isnan(found.p) and math.isnan(found.low)
    assert found.n == sum(not math.isnan(value) for task in tasks for value in task)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_as_the_stepwise_procedure_does(values):
    adjusted = statistics.holm(values)
    rejected = set()
    for step, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        if values[place] * (len(values) - step) >= 0.05:
            break
        rejected.add(place)
    assert {place for place, value in enumerate(adjusted) if value < 0.05} == rejected
    assert all(p <= q <= 1 for p, q in zip(values, adjusted, strict=True))


def test_holm_leaves_out_what_is_not_known():
    adjusted = statistics.holm([0.01, math.nan, 0.04])
    assert (
        adjusted[0] == pytest.approx(0.02) and math.isnan(adjusted[1]) and adjusted[2] == pytest.approx(0.04)
    )


NAMES = list("abcdefg")
PAIRS = list(itertools.combinations(NAMES, 2))


@given(st.sets(st.sampled_from(PAIRS)))
def test_letters_are_shared_by_exactly_those_that_do_not_differ(different):
    letters = statistics.groups(NAMES, different)
    for first, second in PAIRS:
        assert bool(set(letters[first]) & set(letters[second])) == ((first, second) not in different)
    assert letters["a"].startswith("a")


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=7))
def test_expected_best_is_the_mean_over_all_draws(scores):
    found = statistics.expected_best(scores)
    for number, value in enumerate(found, start=1):
        draws = [max(draw) for draw in itertools.combinations(scores, number)]
        assert value == pytest.approx(sum(draws) / len(draws), abs=1e-9)


# ---------------------------------------------------------------------------------------------------------
# Ranking and profiles.


def test_the_ranking_has_intervals_ranks_and_groups(study):
    runs, _, scene = study
    table = ranking_table(scene).numbers.set_index("method")
    own = runs[runs["method"] == "fedavg"]["test_score"] * 100
    assert table.loc["fedavg", "interquartile_mean"] == pytest.approx(scipy.stats.trim_mean(own, 0.25))
    assert (
        table.loc["fedavg", "low"] < table.loc["fedavg", "interquartile_mean"] < table.loc["fedavg", "high"]
    )
    assert table["mean_rank"].dropna().mean() == pytest.approx(2)  # of three competitors
    assert table.index[table["group"] == ""].tolist() == ["centralized", "head_only"]
    assert table.loc["fedavg", "group"] == "a"
    competitors = table[~table["control"]]["interquartile_mean"]
    assert competitors.is_monotonic_decreasing


def test_a_method_and_its_copy_share_a_letter_and_rank(study):
    _, _, scene = study
    own = scene.runs[scene.runs["method"] == "fedavg"]
    twin = own.assign(method="twin", method_name="fedavg")
    # The same scores but for a little noise without a direction.
    signs = numpy.where(twin["seed"] % 2 == 0, 1, -1) * numpy.where(twin["partition"] == "iid", 1, -1)
    twin["test_score"] += 1e-4 * signs
    both = scene._replace(
        runs=pandas.concat([scene.runs, twin], ignore_index=True),
        methods=[*scene.methods, "twin"],
        titles={**scene.titles, "twin": "Twin"},
    )
    table = ranking_table(both)
    numbers = table.numbers.set_index("method")
    assert numbers.loc["twin", "group"] == numbers.loc["fedavg", "group"] == "a"
    bold = table.cells["Method"][table.best.any(axis=1)]
    assert set(bold) == {"FedAvg", "Twin"}


def test_what_cannot_be_told_from_the_best_is_among_the_best_whatever_its_letters(study):
    """FedAvg is the best, but varies: only the two others, which do not, differ from each other."""
    _, _, scene = study
    competitors = scene.runs["method"].isin(["fedavg", "fedcybgd", "fedlora"])
    runs = scene.runs[competitors].copy()
    spread = {"fedavg": 0.1, "fedcybgd": 0.001, "fedlora": 0.0005}
    means = {"fedavg": 0.62, "fedcybgd": 0.60, "fedlora": 0.58}
    noise = (runs["seed"] - 3) * runs["method"].map(spread)  # the seeds are 1 to 5
    runs["test_score"] = runs["method"].map(means) + noise
    table = ranking_table(scene._replace(runs=runs, controls=set()))
    numbers = table.numbers.set_index("method")
    assert numbers.index[0] == "fedavg" and len(numbers.loc["fedavg", "group"]) == 2
    assert not set(numbers.loc["fedcybgd", "group"]) & set(numbers.loc["fedlora", "group"])
    assert numbers["best"].all() and table.best.any(axis=1).all()


def test_with_two_seeds_there_is_no_interval_and_no_best(study):
    _, _, scene = study
    few = scene._replace(runs=scene.runs[scene.runs["seed"] == 1], expected=[], absent=[])
    table = ranking_table(few)
    assert (table.cells["95% interval"] == "–").all() and not table.best.any()
    assert set(table.cells["Group"]) == {"–"}  # there is nothing to test
    two = scene._replace(runs=scene.runs[scene.runs["seed"] <= 3])
    assert (ranking_table(two).cells["95% interval"] == "–").all()
    assert "a" in set(ranking_table(two).cells["Group"])


def test_a_method_that_lacks_a_cell_is_neither_ranked_nor_grouped(study):
    _, _, scene = study
    lacks = (
        (scene.runs["method"] == "fedlora")
        & (scene.runs["task"] == "bbc_news")
        & (scene.runs["partition"] == "iid")
    )
    table = ranking_table(scene._replace(runs=scene.runs[~lacks])).numbers.set_index("method")
    assert table.loc["fedlora", "cells"] == 3 and table.loc["fedlora", "group"] == ""
    assert math.isnan(table.loc["fedlora", "mean_rank"]) and table.index[-1] == "fedlora"


def test_one_partition_of_the_centralised_run_counts_for_all_of_its_task(study):
    runs, _, scene = study
    only = runs[(runs["method"] != "centralized") | (runs["partition"] == "iid")]
    table = ranking_table(scene._replace(runs=only)).numbers.set_index("method")
    own = only[only["method"] == "centralized"]["test_score"] * 100
    assert len(own) == 10
    assert table.loc["centralized", "mean"] == pytest.approx(own.mean())
    assert table.loc["centralized", ["cells", "cells_of_all", "runs"]].tolist() == [4, 4, 10]
    others = ranking_table(scene).numbers.set_index("method").drop("centralized")
    pandas.testing.assert_frame_equal(table.drop("centralized"), others, check_like=True)
    copied = on_all_partitions(only)
    centralised = copied[copied["method"] == "centralized"]
    schemes = runs.groupby("partition")["scheme"].first()
    assert (centralised["scheme"] == centralised["partition"].map(schemes)).all() and len(centralised) == 20


def test_all_pairs_are_compared_once_and_adjusted(study):
    _, _, scene = study
    (family,) = families(scene.runs)
    found = compare_all(family, ["fedavg", "fedcybgd", "fedlora"])
    assert list(found) == [("fedavg", "fedcybgd"), ("fedavg", "fedlora"), ("fedcybgd", "fedlora")]
    assert all(one.n == 20 and p >= one.p for one, p in found.values())


def test_scores_and_perplexities_are_ranked_apart(study):
    runs, _, scene = study
    talk = runs[runs["task"] == "bbc_news"].assign(task="talk", metric="perplexity", greater_is_better=False)
    talk["test_score"] = 40 - 30 * talk["test_score"]
    both = scene._replace(runs=pandas.concat([runs, talk], ignore_index=True), tasks=[*TASKS, "talk"])
    table = ranking_table(both)
    assert table.cells["Measure"].unique().tolist() == ["score, points", "perplexity, lower is better"]
    own = table.numbers[table.numbers["family"] == "perplexity"]
    first = own[~own["control"]].iloc[0]
    assert first["interquartile_mean"] == own[~own["control"]]["interquartile_mean"].min()
    # Points below the best are not defined for them.
    assert len(profiles.gaps(both)) == 4


def test_profiles_count_cells(study):
    runs, _, scene = study
    below = profiles.gaps(scene)
    assert list(below) == ["fedavg", "fedcybgd", "fedlora"] and len(below) == 4
    means = runs.groupby(["task", "partition", "method"])["test_score"].mean() * 100
    cell = means["bbc_news", "dirichlet_0.1"][["fedavg", "fedcybgd", "fedlora"]]
    assert below.loc["bbc_news", "dirichlet_0.1"].tolist() == pytest.approx((cell.max() - cell).tolist())
    assert (profiles.shares(below, 0).sum()) >= 1
    assert (profiles.shares(below, 100) == 1).all()
    numbers = profiles.profiles_table(scene).numbers
    assert numbers.groupby("method")["share"].apply(lambda share: share.is_monotonic_increasing).all()


def test_a_cell_without_a_run_is_not_within_any_distance(study):
    _, _, scene = study
    gone = (scene.runs["method"] == "fedlora") & (scene.runs["partition"] == "iid")
    below = profiles.gaps(scene._replace(runs=scene.runs[~gone]))
    assert profiles.shares(below, 1000)["fedlora"] == 0.5


# ---------------------------------------------------------------------------------------------------------
# Cost to target.


def test_cost_to_target_is_that_of_the_first_round_within_reach(study):
    runs, rounds, scene = study
    shares = {(task, method): 1 / 8 for task in TASKS for method in METHODS}
    table = cost_to_target.cost_to_target_table(scene, rounds, read_devices(), shares)
    numbers = table.numbers.set_index(["task", "partition", "method", "target"])
    labels = ("bbc_news", "iid", "fedavg")
    own = rounds[(rounds[["task", "partition", "method"]] == labels).all(axis=1)]
    top = runs[
        (runs["task"] == "bbc_news") & (runs["partition"] == "iid") & (runs["method"] == "centralized")
    ]
    target = 0.97 * top["validation_score"].mean()
    firsts = [some[some["validation_score"] >= target].iloc[0] for _, some in own.groupby("seed")]
    row = numbers.loc[(*labels, 0.97)]
    assert row["reached"] == row["seeds"] == 5
    for column in ("round", "upload_bytes", "download_bytes", "flops"):
        assert row[column] == numpy.median([first[column] for first in firsts])
    # 90% is reached no later than 97%.
    nearer = numbers.xs(0.90, level="target")
    assert (nearer["reached"] >= numbers.xs(0.97, level="target")["reached"]).all()
    name = "seconds_on(phone_midrange, 5g)"
    assert row[name] == pytest.approx(row["round"] * (900e9 / 3.2e9 + 90.9e6 * 8 / 20e6 + 90.9e6 * 8 / 207e6))
    assert "centralized" not in set(table.numbers["method"])


def test_never_is_an_answer_and_is_counted(study):
    """A seed that never gets there counts as infinitely dear, so it cannot make a method look cheaper."""
    _, rounds, scene = study

    def row(failing):
        late = rounds.assign(validation_score=0.1 + 0.9 * (rounds["round"] >= rounds["seed"]))
        late.loc[late["seed"] > 5 - failing, "validation_score"] = 0.1
        table = cost_to_target.cost_to_target_table(scene, late)
        assert not any(name.startswith("seconds_on") for name in table.numbers)
        own = table.cells[(table.cells["Method"] == "FedLoRA") & (table.cells["Target"] == "90%")]
        return own.iloc[0]

    scene = changed(scene, lambda runs: runs["seed"] > 0, "validation_score", 1.0)
    # The seeds need 1, 2, ... 5 rounds.
    assert row(0)[["Reached", "Rounds"]].tolist() == ["5 of 5", "3"]
    assert row(2)[["Reached", "Rounds"]].tolist() == ["3 of 5", "3"]
    assert (
        row(3)[["Reached", "Rounds", "Sent up (MB)", "Peak memory (MiB)"]].tolist()
        == ["2 of 5"] + ["never"] * 3
    )


def test_one_partition_of_the_centralised_run_serves_for_all_of_its_task(study):
    _, _, scene = study
    only = scene.runs[(scene.runs["method"] != "centralized") | (scene.runs["partition"] == "iid")]
    scores = cost_to_target.centralised_scores(scene._replace(runs=only))
    assert len(scores) == 20
    for seed in range(1, 6):
        iid = scores["bbc_news", "iid", seed]
        assert scores["bbc_news", "dirichlet_0.1", seed] == iid != scores["movie_reviews", "iid", seed]


def test_a_run_is_compared_with_the_centralised_one_of_its_seed(study):
    """One seed with an easy split must not be the only one that gets there."""
    runs, rounds, scene = study
    own = runs.assign(validation_score=runs["seed"] / 10)
    curves = rounds.assign(validation_score=rounds["seed"] / 10)
    first = cost_to_target.first_rounds(scene._replace(runs=own), curves, 0.97)
    assert (first["round"] == 0).all() and set(first["seed"]) == {1, 2, 3, 4, 5}
    # A seed without its centralised run has no target.
    fewer = own[(own["method"] != "centralized") | (own["seed"] < 5)]
    assert set(cost_to_target.first_rounds(scene._replace(runs=fewer), curves, 0.97)["seed"]) == {1, 2, 3, 4}


def test_one_lucky_round_is_not_enough(study):
    runs, rounds, scene = study
    own = scene._replace(runs=runs.assign(validation_score=0.8))
    last = rounds["round"].max()

    def first(reached):
        curves = rounds.assign(validation_score=numpy.where(rounds["round"].isin(reached), 0.8, 0.1))
        return cost_to_target.first_rounds(own, curves, 0.97)["round"]

    assert first([1]).isna().all()
    assert (first([1, 3, 4]) == 3).all()
    assert (first([last]) == last).all()


def test_where_lower_is_better_the_target_lies_above(study):
    runs, rounds, scene = study
    worse = runs.assign(greater_is_better=False, metric="perplexity", validation_score=10.0)
    curves = rounds.assign(validation_score=numpy.where(rounds["round"] < 3, 20.0, 11.0))
    first = cost_to_target.first_rounds(scene._replace(runs=worse), curves, 0.90)
    assert (first["round"] == 3).all()
    assert cost_to_target.first_rounds(scene._replace(runs=worse), curves, 0.97)["round"].isna().all()


# ---------------------------------------------------------------------------------------------------------
# Quality control.


def raised(scene, rounds, rule, **more):
    """Return what a rule found, as (task, partition, method, text)."""
    table = quality.quality_table(scene, rounds, **more).numbers
    assert rule in set(table["rule"]) and (table["says"] != "").all()
    own = table[(table["rule"] == rule) & table["raised"]]
    return own[["task", "partition", "method", "text"]].to_numpy().tolist()


def flat(rounds):
    return rounds.assign(validation_score=0.5 + 0.4 * (rounds["round"] > 3))


def test_a_study_without_faults_passes_every_rule_and_says_so(study):
    _, rounds, scene = study
    scene = changed(scene, lambda runs: runs["seed"] > 0, "test_examples", 1112)
    table = quality.quality_table(scene, flat(rounds))
    assert not table.numbers["raised"].any()
    assert table.cells["Found"].str.startswith("holds for all").all()
    assert list(table.cells["Rule"]) == [
        *("complete", "curve is flat", "above its controls", "below its control"),
        *("validation near test", "test split is large", "committed code"),
    ]


@pytest.mark.slow
def test_each_rule_finds_its_fault(study):
    runs, rounds, scene = study
    rounds = flat(rounds)

    def lora(frame):
        return (frame["method"] == "fedlora") & (frame["partition"] == "iid") & (frame["task"] == "bbc_news")

    place = ["bbc_news", "iid", "fedlora"]
    gone = scene._replace(absent=[run for run in scene.expected if [*run[:3]] == place][:2])
    assert raised(gone, rounds, "complete") == [[*place, "seeds 1, 2 missing"]]
    rising = rounds.copy()
    rising.loc[lora(rising) & (rising["round"] == 8), "validation_score"] = 0.95
    assert raised(scene, rising, "curve is flat") == [[*place, "gains 5.00 points from round 6 to 8"]]
    rising.loc[lora(rising) & (rising["round"] == 8), "validation_score"] = 0.88
    assert raised(scene, rising, "curve is flat") == [[*place, "loses 2.00 points from round 6 to 8"]]
    assert raised(changed(scene, lora, "test_score", 0.2), rounds, "above its controls")[0][:3] == place
    assert raised(changed(scene, lora, "test_score", 1.0), rounds, "below its control")[0][:3] == place
    assert (
        raised(changed(scene, lora, "validation_score", 0.1), rounds, "validation near test")[0][:3] == place
    )
    assert raised(changed(scene, lora, "dirty", True), rounds, "committed code") == [[*place, "5 of 5 runs"]]
    large = changed(scene, lambda runs: runs["seed"] > 0, "test_examples", 1112)
    small = changed(large, lambda runs: runs["task"] == "bbc_news", "test_examples", 425)
    assert raised(small, rounds, "test split is large") == [
        ["bbc_news", partition, "", "425 test examples: a standard error of up to 2.43 points"]
        for partition in ("iid", "dirichlet_0.1")
    ]
    assert not raised(large, rounds, "test split is large")


def test_curves_of_too_few_rounds_cannot_be_judged(study):
    _, rounds, scene = study
    last = rounds.assign(validation_score=rounds["validation_score"].where(rounds["round"].isin([0, 8])))
    assert len(raised(scene, last, "curve is flat")) == 4 * len(METHODS)


def test_rules_of_the_tuning_name_winners_at_the_edge_and_failed_trials(study):
    _, rounds, scene = study
    trials, choices = synthetic_trials(TASKS, ("fedavg", "fedprompt"), failed={("fedprompt", 2)})
    choices[0] = {
        **choices[0],
        "at_edge": ["training.learning_rate"],
        "chosen": {"training.learning_rate": 1e-2},
    }
    more = {"trials": trials, "choices": choices}
    assert raised(scene, rounds, "winner inside its space", **more)[0] == [
        *("bbc_news", "dirichlet_0.1", "fedavg"),
        "training.learning_rate 0.01 is the outermost tried",
    ]
    assert raised(scene, rounds, "trials finished", **more) == [
        [task, "dirichlet_0.1", "fedprompt", "1 of 8: trials 2"] for task in TASKS
    ]


# ---------------------------------------------------------------------------------------------------------
# Tuning.


def test_the_curve_ends_at_the_chosen_score_and_a_failed_trial_counts_as_the_worst(study):
    _, _, scene = study
    trials, choices = synthetic_trials(TASKS, METHODS, failed={("fedlora", 1)})
    found = tuning.expectations(trials)
    last = found[found["trials"] == 8].set_index(["task", "method"])
    best = trials.groupby(["task", "method"])["validation_score"].max()
    assert (last["expected_best"] - best).abs().max() < 1e-12
    own = trials[(trials["task"] == "bbc_news") & (trials["method"] == "fedlora")]
    worst = trials[trials["task"] == "bbc_news"]["validation_score"].min()
    first = found[(found["task"] == "bbc_news") & (found["method"] == "fedlora") & (found["trials"] == 1)]
    expected = own["validation_score"].astype(float).fillna(worst).mean()
    assert first["expected_best"].item() == pytest.approx(expected)
    table = tuning.tuning_table(scene, trials, choices)
    assert list(table.cells)[3:7] == ["1 trial", "2 trials", "4 trials", "8 trials"]
    assert len(table.cells) == len(TASKS) * len(METHODS)


def test_where_lower_is_better_the_best_is_the_lowest():
    trials, _ = synthetic_trials(("talk",), ("fedavg",), failed=())
    trials["greater_is_better"] = False
    found = tuning.expectations(trials)
    assert found["expected_best"].iloc[-1] == pytest.approx(trials["validation_score"].min())
    assert found["expected_best"].is_monotonic_decreasing


def test_choices_and_trials_that_cannot_be_used_are_named(tmp_path):
    path = tmp_path / "bbc_news" / "fedavg.json"
    path.parent.mkdir()
    _, choices = synthetic_trials(("bbc_news",), ("fedavg",))
    path.write_text(json.dumps(choices[0]))
    rows = {("bbc_news", "fedavg"), ("bbc_news", "not_yet")}
    assert tuning.read_choices(tmp_path, rows) == choices
    assert tuning.read_choices(tmp_path, set()) == []
    path.write_text("{}")
    with pytest.raises(UserError, match="fedavg.json: not the choice of a tuning"):
        tuning.read_choices(tmp_path, rows)
    with pytest.raises(UserError, match="trials.parquet: not a parquet file"):
        tuning.read_trials(tmp_path / "trials.parquet")
    pandas.DataFrame({"task": ["t"]}).to_parquet(tmp_path / "trials.parquet")
    with pytest.raises(UserError, match="lacks the column partition"):
        tuning.read_trials(tmp_path / "trials.parquet")


# ---------------------------------------------------------------------------------------------------------
# Claims.

SYSTEMS = (
    *(
        "FedCyBGD",
        "FedAvg",
        "FedLoRA (FedIT)",
        "Federated prompt tuning",
        "SLoRA",
        "FedBPT",
        "FedPepTAO",
        "CELLM",
    ),
    *("EmbracingFL", "BlockLLM", "SHERL", "R-SFLLM", "DSnoT", "RTD", "MobiLlama"),
)
PREDICTED = pandas.DataFrame(
    {
        "model": ["m", "m"],
        "method": ["fedcybgd", "fedavg"],
        "settings": ["", ""],
        "turn_upload_bytes": [3.0, 100.0],
        "turn_download_bytes": [90.0, 100.0],
        "turn_flops": [50.0, 100.0],
        "peak_memory_bytes": [30, 100],
        "parameters": [7, 7],
    }
)


def rule(**keys):
    system = {"name": "x", "reference": "x", "claims": [{"claim": "x", "rule": keys}]}
    return claims.Claims.model_validate({"systems": [system]}).systems[0].claims[0].rule


def score_rule(at_least, **more):
    return rule(kind="score", of="fedcybgd", against="fedavg", at_least=at_least, **more)


def test_every_system_has_claims_and_each_its_rule_or_a_reason():
    systems = read_claims()
    assert set(SYSTEMS) <= {system.name for system in systems}
    own = next(system for system in systems if system.name == "FedCyBGD").claims
    compared = {(one.rule.against, one.rule.partitions) for one in own if one.rule.kind == "score"}
    assert compared == {
        *itertools.product(("fedavg", "fedlora", "fedprompt"), ("even", "skewed")),
        ("fed_full", "all"),
    }
    exact = {one.rule.quantity for one in own if one.rule.kind == "predicted"}
    assert exact == {"turn_upload_bytes", "turn_download_bytes", "peak_memory_bytes", "turn_flops"}
    needed = to_predict(systems)
    assert len(needed) == len(set(needed))
    assert {("llama2_7b", "fedavg", ""), ("llama2_7b", "fedcybgd", "")} <= set(needed)
    for claim in (claim for system in systems for claim in system.claims):
        assert claim.rule.kind == "none" or claim.shown_by, claim.claim


def test_a_score_is_judged_by_its_interval(study):
    _, _, scene = study
    found = judge(score_rule(0), scene)
    assert found.low < found.value < found.high < 0
    assert found.verdict == claims.CONTRADICTED
    assert judge(score_rule(found.low - 0.1), scene).verdict == claims.SUPPORTED
    assert judge(score_rule(found.value), scene).verdict == claims.UNDECIDED
    pairs = families(scene.runs)[0].differences("fedcybgd", "fedavg")
    assert [pair.shape for pair in pairs] == [(5, 2), (5, 2)]
    assert found.value == pytest.approx(numpy.mean([pair.mean() for pair in pairs]))
    # Its p is that of the margin, so it is small where the margin is far from the interval.
    assert judge(score_rule(found.low), scene).p == pytest.approx(0.05)
    assert judge(score_rule(found.low - 9), scene).p < 0.01


def test_even_and_skewed_partitions_are_judged_apart(study):
    _, _, scene = study
    even, skewed = (judge(score_rule(0, partitions=where), scene) for where in ("even", "skewed"))
    every = judge(score_rule(0), scene)
    assert every.value == pytest.approx((even.value + skewed.value) / 2)
    assert "2 cells, 10 pairs" in even.text and skewed.value < even.value
    only = scene._replace(runs=scene.runs[scene.runs["partition"] == "iid"])
    assert judge(score_rule(0, partitions="skewed"), only).verdict == claims.UNTESTABLE


def test_with_too_few_seeds_a_score_stays_undecided(study):
    _, _, scene = study
    one = scene._replace(runs=scene.runs[scene.runs["seed"] == 1])
    found = judge(score_rule(0), one)
    assert found.verdict == claims.UNDECIDED and "too few pairs" in found.text


def test_what_the_study_lacks_cannot_be_tested(study):
    _, _, scene = study
    for one in (
        rule(kind="score", of="slora", against="fedavg", at_least=0),
        rule(kind="cost", of="fedavg", against="slora", quantity="flops", at_most=1),
    ):
        found = judge(one, scene)
        assert (found.verdict, found.text) == (claims.UNTESTABLE, "the study has no runs of slora")
    assert judge(rule(kind="none", reason="no radio"), scene)[::4] == (claims.UNTESTABLE, "no radio")


def test_costs_are_judged_in_every_cell(study):
    _, _, scene = study

    def cost(at_most, scene=scene):
        keys = {"of": "fedcybgd", "against": "fedavg", "quantity": "upload_bytes"}
        return judge(rule(kind="cost", at_most=at_most, **keys), scene)

    assert cost(0.1).value == pytest.approx(7.1 / 90.9) and cost(0.1).verdict == claims.SUPPORTED
    assert cost(0.05).verdict == claims.CONTRADICTED
    dear = changed(
        scene,
        lambda runs: (runs["method"] == "fedcybgd") & (runs["task"] == "bbc_news"),
        "upload_bytes",
        10**12,
    )
    assert cost(0.1, dear).verdict == claims.UNDECIDED
    free = changed(scene, lambda runs: runs["method"] == "fedavg", "upload_bytes", 0)
    assert cost(0.1, free).verdict == claims.UNTESTABLE


def test_predicted_costs_are_exact(study):
    _, _, scene = study
    keys = {"kind": "predicted", "model": "m", "of": "fedcybgd", "against": "fedavg"}
    upload = rule(**keys, quantity="turn_upload_bytes", at_most=0.04)
    assert judge(upload, scene, PREDICTED)[:2] == (claims.SUPPORTED, 0.03)
    memory = rule(**keys, quantity="peak_memory_bytes", at_most=0.25)
    assert judge(memory, scene, PREDICTED)[:2] == (claims.CONTRADICTED, 0.3)
    count = rule(kind="predicted", model="m", of="fedavg", quantity="parameters", at_most=7)
    assert judge(count, scene, PREDICTED)[:2] == (claims.SUPPORTED, 7)
    assert judge(upload, scene).verdict == claims.UNDECIDED
    # Costs with other settings are costs of their own.
    pruned = rule(**keys, settings={"cache": "pretrained"}, quantity="turn_download_bytes", at_most=0.5)
    assert judge(pruned, scene, PREDICTED).verdict == claims.UNTESTABLE
    more = PREDICTED[:1].assign(settings='{"cache": "pretrained"}', turn_download_bytes=20.0)
    assert judge(pruned, scene, pandas.concat([PREDICTED, more]))[:2] == (claims.SUPPORTED, 0.2)
    assert judge(upload, scene, PREDICTED[:1]).text == "no costs of fedavg on m"
    dense = rule(
        **{**keys, "against": "fedcybgd"},
        against_settings={"cache": "pretrained"},
        quantity="turn_download_bytes",
        at_most=4,
    )
    assert judge(dense, scene, PREDICTED).verdict == claims.UNTESTABLE
    assert judge(dense, scene, pandas.concat([PREDICTED, more]))[:2] == (claims.CONTRADICTED, 4.5)
    text = 'over FedCyBGD with {"cache": "pretrained"} on m: at most 4'
    assert claims.limit_text(dense, scene).endswith(text)


def test_the_table_of_claims_holds_every_claim_and_counts_the_verdicts(study):
    _, _, scene = study
    table = claims.claims_table(scene, PREDICTED)
    every = [claim.claim for system in read_claims() for claim in system.claims]
    assert table.numbers["claim"].tolist() == every
    counts = table.numbers["verdict"].value_counts()
    assert f"{counts[claims.SUPPORTED]} supported" in table.notes[0]
    assert (table.numbers["text"] != "").all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "score", "of": "a", "against": "b"}, "rule.score.at_least"),
        ({"kind": "guess"}, "rule"),
        (
            {"kind": "cost", "of": "a", "against": "b", "quantity": "joy", "at_most": 1},
            "rule.cost.quantity: 'joy'",
        ),
        (
            {
                "kind": "predicted",
                "model": "m",
                "of": "a",
                "against_settings": {"rank": 2},
                "quantity": "turn_flops",
                "at_most": 1,
            },
            "rule.predicted.against_settings",
        ),
    ],
)
def test_faults_of_the_claims_are_named(change, message, tmp_path):
    path = tmp_path / "claims.yaml"
    claim = {"claim": "c", "rule": change}
    path.write_text(yaml.safe_dump({"systems": [{"name": "n", "reference": "r", "claims": [claim]}]}))
    with pytest.raises(UserError) as error:
        read_claims(path)
    assert str(error.value).startswith(f"{path}: systems.0.claims.0.{message}"), error.value
    assert CLAIMS.exists()


def test_predicted_costs_are_read_as_they_are_written(tmp_path):
    assert claims.read_predicted(tmp_path / "absent.csv") is None
    PREDICTED.to_csv(tmp_path / "claims.csv", index=False)
    assert claims.read_predicted(tmp_path / "claims.csv").equals(PREDICTED)
    PREDICTED.drop(columns="turn_flops").to_csv(tmp_path / "claims.csv", index=False)
    with pytest.raises(UserError, match="lacks the column turn_flops"):
        claims.read_predicted(tmp_path / "claims.csv")


# ---------------------------------------------------------------------------------------------------------
# Which study has what.


@pytest.fixture(scope="module")
def small_study():
    task = {"task": "bbc_news", "max_length": 24}
    return {
        "study": "s",
        "seeds": [1],
        "model": "minilm",
        "federation": {"clients": 4, "rounds": 2},
        "tasks": {"bbc_news": task},
        "partitions": {"iid": None, "skewed": {"scheme": "dirichlet", "alpha": 0.3}},
        "methods": {"fedavg": None, "fedcybgd": None, "centralized": {"partitions": ["iid"]}},
    }


def test_a_study_has_only_the_tables_that_it_has_something_for(small_study):
    has = Contents.of(reading.parse(small_study))
    assert has == Contents(competitors=2, cells=2, centralized=True, tuned=False)
    assert has.tables() == ["profiles", "cost_to_target"] and has.figures() == ["overview", "profiles"]
    alone = {**small_study, "methods": {"fedavg": None, "head_only": None}}
    assert Contents.of(reading.parse(alone)).tables() == []
    one_cell = {**small_study, "partitions": {"iid": None}}
    assert Contents.of(reading.parse(one_cell)).tables() == ["cost_to_target"]
    assert has._replace(tuned=True, competitors=1).tables() == ["cost_to_target", "tuning"]
    assert has._replace(tuned=True).tables() == ["profiles", "cost_to_target", "tuning", "claims"]


def written_tables(study, folder, has):
    runs, rounds, scene = study
    runs.to_parquet(folder / "runs.parquet")
    rounds.to_parquet(folder / "rounds.parquet")
    trials, choices = synthetic_trials(TASKS, METHODS)
    shares = {(task, method): 1 / 8 for task in TASKS for method in METHODS}
    evidence = tables.Evidence(has, read_devices(), shares, trials, choices, PREDICTED) if has else None
    files = [folder / "runs.parquet", folder / "rounds.parquet"]
    return tables.make(*files, scene.expected, TITLES, folder / "tables", evidence=evidence)


EVERYTHING = Contents(competitors=3, cells=4, centralized=True, tuned=True)


@pytest.fixture(scope="module")
def tabled(study, tmp_path_factory):
    """The folder of the tables of a tuned study."""
    folder = tmp_path_factory.mktemp("tabled")
    written_tables(study, folder, EVERYTHING)
    return folder / "tables"


@pytest.mark.slow
@pytest.mark.parametrize("has", [EVERYTHING, None])
def test_tables_are_written_for_what_a_study_has(has, study, tabled, tmp_path):
    written = written_tables(study, tmp_path, has)
    names = names_of_tables(has) if has else TABLES
    endings = ("csv", "md", "tex")
    assert {path.name for path in written} == {
        "missing.csv",
        *(f"{table}.{ending}" for table in names for ending in endings),
    }
    assert all(path.stat().st_size > 100 for path in written if path.stem not in ("missing", "reference"))
    traffic = pandas.read_csv(tmp_path / "tables" / "traffic.csv")
    assert ("seconds_on(phone_midrange, 5g)_mean" in traffic) == bool(has)
    if has:
        for path in written:
            assert (tabled / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_every_number_of_the_findings_comes_from_the_tables(tabled, tmp_path):
    """The template holds no number but that of the interval; the text follows the tables."""
    text = findings.write_up(tabled, "made_up")
    assert text == findings.write_up(tabled, "made_up")
    ranking = pandas.read_csv(tabled / "ranking.csv").set_index("method")
    assert f"| FedAvg | {ranking.loc['fedavg', 'interquartile_mean']:.1f} |" in text
    assert f"| {ranking.loc['fedavg', 'mean']:.1f} | {ranking.loc['fedavg', 'group']} |" in text
    judged = pandas.read_csv(tabled / "claims.csv")
    verdicts = judged[judged["kind"] == "score"]["verdict"].value_counts()
    assert f"{verdicts['supported']} is supported here, {verdicts['contradicted']} contradicted" in text
    assert text.count("| supported |") + text.count("| supported* |") == verdicts["supported"]
    assert text.count("* |") == judged["alone"].sum()
    assert "Contradicted: " not in text
    assert "100 runs of 100" in text and "80 trials" in text
    words = re.sub(r"{[{%].*?[}%]}", "", findings.TEMPLATE.read_text())
    assert re.findall(r"\d[\d.]*%?", words) == ["95%"]
    for path in tabled.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    ranking.loc["fedavg", "interquartile_mean"] = 12.3
    ranking.reset_index().to_csv(tmp_path / "ranking.csv", index=False)
    dear = judged[judged["kind"] == "predicted"].index[0]
    judged.loc[dear, "verdict"] = "contradicted"
    judged.to_csv(tmp_path / "claims.csv", index=False)
    text = findings.write_up(tmp_path, "made_up")
    assert "| FedAvg | 12.3 |" in text
    assert f'Contradicted: "{judged.loc[dear, "claim"].rstrip(".")}"' in text


@pytest.mark.slow
def test_a_method_that_loses_everywhere_is_the_first_line(tabled, tmp_path):
    for path in tabled.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    main = pandas.read_csv(tabled / "main.csv")
    main["test_score_mean"] = main["test_score_mean"].where(main["method"] != "fedcybgd", 0.3)
    main.to_csv(tmp_path / "main.csv", index=False)
    first, *_ = findings.write_up(tmp_path, "made_up").splitlines()
    assert first.startswith("**FedCyBGD loses in every cell, by ") and " points to the best of " in first
    losses = main.assign(greater_is_better=False, metric="loss")
    losses["test_score_mean"] = losses["method"].map({"fedcybgd": 2.0, "fedavg": 2.01}).fillna(2.03)
    losses.to_csv(tmp_path / "main.csv", index=False)
    first, *_ = findings.write_up(tmp_path, "made_up").splitlines()
    assert first == (
        "**FedLoRA loses in every cell, by 1.5 to 1.5% of the loss to the best of FedAvg, FedCyBGD and "
        "FedLoRA (means over seeds).**"
    )
    # In a study of one cell that is no more than not to be the best.
    losses[losses["partition"] == "iid"].query("task == 'bbc_news'").to_csv(
        tmp_path / "main.csv", index=False
    )
    assert findings.write_up(tmp_path, "made_up").startswith("# What the study made_up found")
    for method, score in {"fedcybgd": 0.96, "fedavg": 0.955, "fedlora": 0.953}.items():
        main.loc[main["method"] == method, "test_score_mean"] = score
    main.to_csv(tmp_path / "main.csv", index=False)
    assert findings.write_up(tmp_path, "made_up").startswith("# What the study made_up found")


@pytest.mark.slow
def test_findings_need_all_tables(tabled, tmp_path):
    with pytest.raises(UserError, match="main.csv: cannot be read; make it with `tables`"):
        findings.write_up(tmp_path, "made_up")


@pytest.mark.slow
def test_findings_can_be_written_before_centralised_training_is_done(study, tabled, tmp_path):
    _, rounds, scene = study
    early = scene._replace(runs=scene.runs[scene.runs["method_name"] != "centralized"])
    table = cost_to_target.cost_to_target_table(early, rounds)
    for path in tabled.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    table.numbers.to_csv(tmp_path / "cost_to_target.csv", index=False)
    text = findings.write_up(tmp_path, "made_up")
    assert len(table.numbers) == 0 and "## At what price" not in text and "never" not in text


@pytest.mark.slow
def test_findings_of_a_study_without_centralised_training_have_no_costs_to_its_score(tabled, tmp_path):
    for path in tabled.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "cost_to_target.csv").unlink()
    with pytest.raises(UserError, match="cost_to_target.csv: cannot be read"):
        findings.write_up(tmp_path, "made_up")
    text = findings.write_up(tmp_path, "made_up", names_of_tables(Contents(competitors=3, tuned=True)))
    assert "## At what price" not in text and "## What the papers claim" in text


def test_the_schedule_of_a_study_says_who_takes_turns(small_study):
    methods = {"fedavg": None, "fedcybgd": None, "fedbavg": {"method": "fedcybgd", "clients_per_block": 2}}
    found = cohorts(reading.parse({**small_study, "methods": methods}))
    assert found == {
        ("bbc_news", "fedavg"): 0.25,
        ("bbc_news", "fedcybgd"): 1.0,
        ("bbc_news", "fedbavg"): 0.5,
    }


# ---------------------------------------------------------------------------------------------------------
# Figures.


def check_layout(figure):
    """Everything is within the axes, and texts do not overlap."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        for line in axes.lines:
            x, y = line.get_transform().transform(numpy.column_stack(line.get_data()).astype(float)).T
            assert numpy.all((axes.bbox.x0 - 1 <= x) & (x <= axes.bbox.x1 + 1))
            assert numpy.all((axes.bbox.y0 - 1 <= y) & (y <= axes.bbox.y1 + 1))
    boxes = [axes.xaxis.label.get_window_extent() for axes in figure.axes]
    boxes += [axes.yaxis.label.get_window_extent() for axes in figure.axes]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    for number, box in enumerate(boxes):
        assert figure.bbox.x0 - 1 <= box.x0 and box.x1 <= figure.bbox.x1 + 1
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])


def test_profiles_and_tuning_curves_are_in_view_in_the_colours_of_their_methods(study):
    _, _, scene = study
    look = drawing.styles(scene.methods)
    trials, _ = synthetic_trials(TASKS, METHODS)
    with drawing.settings():
        profile = profiles.profiles(scene, look)
        curves = tuning.tuning_curves(scene, look, trials, list(TASKS))
        check_layout(profile)
        check_layout(curves)
    competitors = ["fedavg", "fedcybgd", "fedlora"]
    assert [line.get_color() for line in profile.axes[0].lines] == [
        look[method].colour for method in competitors
    ]
    assert len(curves.axes) == 2 and all(len(axes.lines) == len(METHODS) for axes in curves.axes)
    assert {line.get_color() for line in curves.axes[0].lines} == {look[method].colour for method in METHODS}


def test_a_record_says_how_much_the_largest_client_holds(tmp_path):
    record = synthetic_record() | {"partition_skew": {"largest_client": 400}}
    path = tmp_path / "seed1.json"
    path.write_text(json.dumps(record))
    records.collect([path], tmp_path / "rounds.parquet", tmp_path / "runs.parquet")
    assert records.load_runs(tmp_path / "runs.parquet")["largest_client_share"].tolist() == [0.5]
    rounds = records.load_rounds(tmp_path / "rounds.parquet")
    assert rounds["largest_upload_bytes"].tolist() == [0, *[90_900_000] * 4]


def test_the_readme_shows_the_table_of_the_findings():
    found = (ROOT / "docs/findings.md").read_text()
    table = found[found.index("| method | interquartile mean |") :].split("\n\n")[0]
    rows = pandas.read_csv(ROOT / "results/benchmark/tables/ranking.csv")
    assert len(table.splitlines()) == 2 + len(rows) and table in (ROOT / "README.md").read_text()
