"""Tables: numbers are those of the records, marks and notes are right, bytes are the same each time."""

import json
import math

import numpy
import pandas
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import TITLES, synthetic_record, write_study

from fedlm.base.errors import UserError
from fedlm.results import cells, cost_tables, records, reference, statistics, tables, typeset
from fedlm.results.contents import TABLES
from fedlm.results.scene import Scene


def study(folder, skip=(), **changes):
    """Write, collect and return the runs and the list of expected runs; runs in `skip` are not there."""
    written, _, expected = write_study(folder, **changes)
    kept = [
        path for path, run in zip(written, expected, strict=True) if run not in skip and run[:3] not in skip
    ]
    records.collect(kept, folder / "rounds.parquet", folder / "runs.parquet")
    return records.load_runs(folder / "runs.parquet"), expected


def make(folder, expected, titles=TITLES, name="tables", **settings):
    return tables.make(
        folder / "runs.parquet", folder / "rounds.parquet", expected, titles, folder / name, **settings
    )


@pytest.mark.slow
def test_main_table_holds_what_the_records_hold(tmp_path):
    runs, expected = study(tmp_path)
    make(tmp_path, expected)
    table = pandas.read_csv(tmp_path / "tables" / "main.csv")
    assert len(table) == 2 * 3 * 7
    for _, row in table.iterrows():
        own = runs[
            (runs["task"] == row["task"])
            & (runs["partition"] == row["partition"])
            & (runs["method"] == row["method"])
        ]
        assert row["seeds"] == row["seeds_expected"] == 3
        assert row["test_score_mean"] == pytest.approx(own["test_score"].mean())
        assert row["test_score_sd"] == pytest.approx(own["test_score"].std())
        for column in ("peak_memory_bytes", "upload_bytes", "download_bytes", "flops"):
            assert row[f"{column}_mean"] == pytest.approx(own[column].mean())


@pytest.mark.slow
def test_rows_come_in_the_order_of_the_study_and_of_the_titles(tmp_path):
    _, expected = study(tmp_path, partitions=("iid", "dirichlet_0.1"), seeds=(1,))
    titles = {name: name.upper() for name in ("head_only", "fedlora", "fedavg")}
    make(tmp_path, expected, titles)
    table = pandas.read_csv(tmp_path / "tables" / "main.csv")
    assert table["task"].unique().tolist() == ["bbc_news", "movie_reviews"]
    assert table["partition"].tolist()[:8] == ["iid"] * 7 + ["dirichlet_0.1"]
    assert table["method"].tolist()[:4] == ["head_only", "fedlora", "fedavg", "fedcybgd"]
    assert table["title"].tolist()[:4] == ["HEAD_ONLY", "FEDLORA", "FEDAVG", "fedcybgd"]


@pytest.mark.slow
def test_the_same_records_give_the_same_bytes(tmp_path):
    _, expected = study(tmp_path)
    first = make(tmp_path, expected, name="one")
    second = make(tmp_path, expected, name="two")
    assert [path.name for path in first] == [path.name for path in second]
    assert len(first) == 3 * len(TABLES) + 1
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def marked(folder, heading="Score", name="main"):
    """Return the methods that are bold in a column of a Markdown table."""
    lines = [line for line in (folder / "tables" / f"{name}.md").read_text().splitlines() if line[:1] == "|"]
    head, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row[head.index("Method")] for row in rows[1:] if row[head.index(heading)].startswith("**")]


def test_the_best_competitor_is_marked_and_never_a_control(tmp_path):
    _, expected = study(tmp_path, partitions=("iid",), tasks=("bbc_news",))
    make(tmp_path, expected)
    # Centralized scores higher and sends nothing, head-only needs less memory: they are controls.
    assert marked(tmp_path) == ["FedAvg"]
    assert marked(tmp_path, "Sent up (MB)") == ["Federated prompt tuning"]
    assert marked(tmp_path, "Peak memory (MiB)") == ["FedCyBGD"]
    text = (tmp_path / "tables" / "main.md").read_text()
    assert "Centralized†" in text and "FedAvg†" not in text


@pytest.mark.parametrize(("examples", "best"), [(None, ["FedAvg", "FedLoRA"]), (200, [])])
def test_what_looks_equal_is_marked_equally_or_not_at_all_where_the_test_split_cannot_tell(
    tmp_path, examples, best
):
    written = []
    for method, score in {"fedavg": 0.9001, "fedlora": 0.8999, "fedcybgd": 0.85}.items():
        record = synthetic_record(method=method) | {"test_score": score}
        record["examples"] = {"test": examples} if examples else {}
        path = tmp_path / f"{method}.json"
        path.write_text(json.dumps(record))
        written.append(path)
    records.collect(written, tmp_path / "rounds.parquet", tmp_path / "runs.parquet")
    make(tmp_path, [])
    assert marked(tmp_path) == best


def test_smaller_is_better_where_the_metric_says_so(tmp_path):
    _, expected = study(
        tmp_path, metric="perplexity", tasks=("small_talk",), partitions=("iid",), seeds=(1, 2, 3, 4, 5)
    )
    make(tmp_path, expected)
    table = pandas.read_csv(tmp_path / "tables" / "main.csv")
    competitors = table[~table["control"]]
    best = competitors.loc[competitors["test_score_mean"].idxmin(), "title"]
    assert marked(tmp_path) == [best]
    text = (tmp_path / "tables" / "main.md").read_text()
    assert "perplexity, lower is better" in text
    assert marked(tmp_path, "Interquartile mean", "ranking")[0] == best


@pytest.mark.parametrize(
    ("second", "dirty", "made"),
    [
        ("0" * 40, False, "Made by commit 000000000000."),
        ("0" * 40, True, "Made by commit 000000000000, with changes."),
        ("1" * 40, False, "Made by commits 000000000000, 111111111111."),
        ("1" * 40, True, "Made by commits 000000000000, 111111111111, with changes."),
    ],
)
def test_every_table_names_the_commits_that_made_it(second, dirty, made, tmp_path):
    """Records of other commits are put back where what a run executes has not changed between them."""
    small = {"tasks": ("bbc_news",), "partitions": ("iid",), "methods": ("fedavg", "fedlora")}
    written, _, expected = write_study(tmp_path, **small)
    for number, path in enumerate(written):
        record = json.loads(path.read_text())
        record["provenance"]["commit"] = second if number == 1 else "0" * 40
        record["provenance"]["dirty"] = dirty and number == 1
        path.write_text(json.dumps(record))
    records.collect(written, tmp_path / "rounds.parquet", tmp_path / "runs.parquet")
    make(tmp_path, expected)
    for name in ("main", "ranking", "paired", "traffic", "memory", "skew"):
        assert made in (tmp_path / "tables" / f"{name}.md").read_text()


@pytest.mark.slow
def test_missing_runs_are_named_in_every_table(tmp_path):
    gone = {("bbc_news", "iid", "fedlora"), ("movie_reviews", "iid", "fedavg", 2)}
    _, expected = study(tmp_path, skip=gone)
    make(tmp_path, expected)
    for name in TABLES:
        for ending in ("md", "tex"):
            text = (tmp_path / "tables" / f"{name}.{ending}").read_text().replace("\\_", "_")
            if "nothing to show" in text:
                continue
            assert "Missing: 4 of 126 runs" in text
            assert "bbc_news / iid / fedlora: seeds 1, 2, 3" in text
            assert "movie_reviews / iid / fedavg: seed 2" in text
    absent = pandas.read_csv(tmp_path / "tables" / "missing.csv")
    assert len(absent) == 4
    main = pandas.read_csv(tmp_path / "tables" / "main.csv").set_index(["task", "partition", "method"])
    assert main.loc[("bbc_news", "iid", "fedlora"), "seeds"] == 0
    assert math.isnan(main.loc[("bbc_news", "iid", "fedlora"), "test_score_mean"])
    assert main.loc[("movie_reviews", "iid", "fedavg"), "seeds"] == 2
    text = (tmp_path / "tables" / "main.md").read_text()
    assert "missing" in text and "0 of 3" in text and "2 of 3" in text


def test_a_score_of_fewer_seeds_is_not_marked(tmp_path):
    gone = {("bbc_news", "iid", "fedavg", 2)}
    _, expected = study(tmp_path, skip=gone, tasks=("bbc_news",), partitions=("iid",), seeds=(1, 2, 3, 4, 5))
    make(tmp_path, expected)
    assert marked(tmp_path) == ["FedCyBGD"]


def test_records_that_the_study_does_not_list_are_left_out_and_counted(tmp_path):
    _, expected = study(tmp_path)
    make(tmp_path, [run for run in expected if run[2] != "fedlora"])
    text = (tmp_path / "tables" / "main.md").read_text()
    assert "FedLoRA" not in text
    assert "18 records that are not in the study are left out" in text


def test_two_labels_with_one_title_stay_apart(tmp_path):
    _, expected = study(tmp_path, methods=("fedcybgd", "fedcybgd_pruned"), tasks=("bbc_news",), seeds=(1,))
    make(tmp_path, expected, {"fedcybgd": "FedCyBGD", "fedcybgd_pruned": "FedCyBGD"})
    table = pandas.read_csv(tmp_path / "tables" / "main.csv")
    assert set(table["title"]) == {"FedCyBGD (fedcybgd)", "FedCyBGD (fedcybgd_pruned)"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": (1,)},
        {"seeds": (1,), "methods": ("fedavg",), "partitions": ("iid",), "tasks": ("bbc_news",), "rounds": 1},
        {"methods": ("centralized", "local_only")},
        {"methods": ("my_own",), "seeds": (1, 2)},
    ],
)
def test_small_studies_have_all_tables(tmp_path, changes):
    _, expected = study(tmp_path, **changes)
    for path in make(tmp_path, expected):
        assert path.stat().st_size > 0
    assert cost_tables.terminal(records.load_runs(tmp_path / "runs.parquet"), expected)


def test_titles_with_signs_of_latex_and_markdown_are_harmless(tmp_path):
    _, expected = study(tmp_path, methods=("fedavg", "fedlora"), partitions=("iid",), tasks=("bbc_news",))
    make(tmp_path, expected, {"fedavg": "100% & $5_a #1 {x} ~^ \\alpha", "fedlora": "a | b"})
    latex = (tmp_path / "tables" / "main.tex").read_text()
    assert r"100\% \& \$5\_a \#1 \{x\} \textasciitilde{}\textasciicircum{} \textbackslash{}alpha" in latex
    rows = [line for line in (tmp_path / "tables" / "main.md").read_text().splitlines() if line[:1] == "|"]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1


def test_latex_has_no_bare_percent_sign_and_balanced_environments(tmp_path):
    _, expected = study(tmp_path, skip={("bbc_news", "iid", "fedlora")})
    make(tmp_path, expected)
    for name in TABLES:
        text = (tmp_path / "tables" / f"{name}.tex").read_text()
        if text.startswith("%"):
            continue
        assert "%" not in text.replace("\\%", "")
        assert text.count("{") == text.count("}")
        for environment in ("table", "tabular", "longtable"):
            assert text.count(f"\\begin{{{environment}}}") == text.count(f"\\end{{{environment}}}")
        assert "\\toprule" in text and "\\bottomrule" in text
        # Every row of the body has as many columns as the head.
        rows = [line for line in text.splitlines() if line.endswith("\\\\") and " & " in line]
        assert len({line.count(" & ") for line in rows}) == 1
        assert text.isascii(), [character for character in text if not character.isascii()]


@pytest.mark.slow
def test_ranking_has_the_interquartile_mean_of_all_cells(tmp_path):
    runs, expected = study(tmp_path, skip={("bbc_news", "iid", "fedlora")}, seeds=(1, 2, 3, 4))
    make(tmp_path, expected)
    table = pandas.read_csv(tmp_path / "tables" / "ranking.csv").set_index("method")
    scores = runs[runs["method"] == "fedavg"]["test_score"] * 100
    assert table.loc["fedavg", "interquartile_mean"] == pytest.approx(scipy.stats.trim_mean(scores, 0.25))
    assert (
        table.loc["fedavg", "low"] <= table.loc["fedavg", "interquartile_mean"] <= table.loc["fedavg", "high"]
    )
    assert table.loc["fedlora", "cells"] == 5 and table.loc["fedavg", "cells"] == 6


@pytest.mark.slow
def test_paired_table_compares_the_same_seeds(tmp_path):
    runs, expected = study(tmp_path, skip={("bbc_news", "iid", "fedlora", 1)}, seeds=(1, 2, 3, 4))
    make(tmp_path, expected)
    table = pandas.read_csv(tmp_path / "tables" / "paired.csv").set_index(["task", "partition", "method"])
    assert (table["against"] == "fedavg").all()
    row = table.loc[("bbc_news", "iid", "fedlora")]
    own = runs[(runs["task"] == "bbc_news") & (runs["partition"] == "iid") & (runs["seed"] > 1)]
    ours = own[own["method"] == "fedlora"].sort_values("seed")["test_score"].to_numpy() * 100
    theirs = own[own["method"] == "fedavg"].sort_values("seed")["test_score"].to_numpy() * 100
    assert row["n"] == 3
    assert row["difference"] == pytest.approx((ours - theirs).mean())
    assert row["p"] == pytest.approx(scipy.stats.ttest_rel(ours, theirs).pvalue)
    # Controls, which differ for sure, do not count among the tests.
    own = table[~table.index.get_level_values("method").isin(["local_only", "head_only", "centralized"])]
    assert (own["p_adjusted"] >= own["p"]).all() and table["p_adjusted"].notna().sum() == len(own)


@pytest.mark.slow
def test_traffic_of_a_turn_is_that_of_a_client_in_a_round(tmp_path):
    _, expected = study(tmp_path, clients=8, rounds=4)
    make(tmp_path, expected)
    table = pandas.read_csv(tmp_path / "tables" / "traffic.csv").set_index(["task", "partition", "method"])
    assert table.loc[("bbc_news", "iid", "fedcybgd"), "turn_upload_bytes_mean"] == pytest.approx(7.1e6)


def test_queries_have_a_column_where_a_method_makes_some(tmp_path):
    runs, expected = study(tmp_path, tasks=("bbc_news",), partitions=("iid",), clients=8, rounds=4)
    rounds = records.load_rounds(tmp_path / "rounds.parquet")
    scene = Scene.make(runs, expected)
    assert "turn_queries_mean" not in cost_tables.traffic_table(scene, rounds).numbers
    some = runs.assign(queries=numpy.where(runs["method"] == "fedavg", 320, 0))
    table = cost_tables.traffic_table(Scene.make(some, expected), rounds).numbers.set_index("method")
    assert table["turn_queries_mean"]["fedavg"] == 10 and table["turn_queries_mean"]["fedlora"] == 0


def test_published_numbers_stand_beside_ours_where_task_and_model_agree(tmp_path):
    _, expected = study(
        tmp_path,
        tasks=("sst2", "bbc_news"),
        partitions=("iid",),
        model="FacebookAI/roberta-base",
        seeds=(1, 2),
    )
    make(tmp_path, expected)
    table = pandas.read_csv(tmp_path / "tables" / "reference.csv")
    assert set(table["task"]) == {"sst2"}
    published = table[table["origin"] != "this study"]
    assert set(published["origin"]) == {"FedPETuning", "FedEx-LoRA"}
    assert len(table[table["origin"] == "this study"]) == 7
    row = published[(published["method"] == "LoRA") & (published["division"] == "Dirichlet 0.1")]
    assert row["value"].tolist() == [92.0]
    text = (tmp_path / "tables" / "reference.md").read_text()
    assert "arXiv:2212.10025" in text and "never mixed" in text
    # Published numbers appear in no other table.
    for name in set(TABLES) - {"reference"}:
        assert "FedPETuning" not in (tmp_path / "tables" / f"{name}.md").read_text()


def test_published_numbers_of_another_model_are_not_shown(tmp_path):
    _, expected = study(tmp_path, tasks=("sst2",), partitions=("iid",), model="minilm", seeds=(1,))
    make(tmp_path, expected)
    assert "no published numbers" in (tmp_path / "tables" / "reference.md").read_text()


def test_published_memory_stands_beside_ours(tmp_path):
    model = "meta-llama/Llama-2-7b-hf"
    _, expected = study(
        tmp_path, tasks=("alpaca_gpt4",), partitions=("iid",), model=model, metric="perplexity", seeds=(1,)
    )
    make(tmp_path, expected)
    table = pandas.read_csv(tmp_path / "tables" / "reference.csv")
    assert table[table["origin"] == "BAdam"]["value"].tolist() == [122.8, 21.8]
    assert set(table["quantity"]) == {"memory, GB"}


def test_reference_file_names_its_sources_and_faults_are_named(tmp_path):
    sources = reference.read_reference()
    assert all(source.reference and source.note and source.rows for source in sources)
    path = tmp_path / "reference.yaml"
    path.write_text("sources: [{name: x}]")
    with pytest.raises(UserError, match="reference.yaml: sources.0"):
        reference.read_reference(path)
    path.write_text("sources: [")
    with pytest.raises(UserError, match="not valid YAML"):
        reference.read_reference(path)


@pytest.mark.slow
def test_terminal_table_fits_into_120_columns(tmp_path):
    runs, expected = study(tmp_path, skip={("bbc_news", "iid", "fedlora")})
    long = {label: f"A rather long title of the method {label}" for label in TITLES}
    for titles in (TITLES, long, None):
        text = cost_tables.terminal(runs, expected, titles)
        assert text == cost_tables.terminal(tmp_path / "runs.parquet", expected, titles)
        assert max(map(len, text.splitlines())) <= 120
        assert text.count("bbc_news (accuracy, %)") == 3
        assert "93.9 ± 1.2 *" in text
    assert "fedlora: seeds 1, 2, 3" in text.replace("\n  ", " ")


def test_numbers_are_written_with_three_significant_digits():
    write = typeset.significant
    assert [write(value) for value in (0, 0.0123456, 9.999, 42.649, 545.2, 12345.6, 0.00012345)] == [
        "0",
        "0.0123",
        "10.0",
        "42.6",
        "545",
        "12,346",
        "1.23e-04",
    ]
    assert write(math.nan) == "–"
    assert typeset.spread(pandas.Series([1.0, 2.0, 3.0])) == "2.00 ± 1.00"
    assert typeset.spread(pandas.Series([512.0, 512.0])) == "512"
    assert typeset.spread(pandas.Series([0.5])) == "0.500"
    assert typeset.spread(pandas.Series([], dtype=float)) == "–"


@settings(max_examples=200)
@given(value=st.floats(1e-3, 1e9))
def test_a_written_number_is_within_half_a_percent(value):
    assert float(typeset.significant(value).replace(",", "")) == pytest.approx(value, rel=0.0051)


@settings(max_examples=40)
@given(
    cells=st.lists(
        st.lists(st.floats(0, 100), min_size=1, max_size=5).map(lambda task: numpy.array(task)[:, None]),
        min_size=1,
        max_size=5,
    )
)
def test_interquartile_mean_and_its_interval(cells):
    found = statistics.interquartile_mean(cells, resamples=200)
    assert found == statistics.interquartile_mean(cells, resamples=200) or math.isnan(found.low)
    everything = numpy.concatenate(cells)
    assert everything.min() - 1e-9 <= found.value <= everything.max() + 1e-9
    if min(map(len, cells)) < statistics.LEAST_SEEDS:
        assert math.isnan(found.low)
    else:
        assert found.low <= found.high


def test_comparison_without_spread_has_no_p():
    same = statistics.compare(numpy.array([0.1, 0.2, 0.3]) + 0.1, numpy.array([0.1, 0.2, 0.3]))
    assert same.n == 3 and same.difference == pytest.approx(0.1) and math.isnan(same.p)
    adjusted = statistics.adjust([0.01, math.nan, 0.04])
    assert adjusted[0] == pytest.approx(0.02) and math.isnan(adjusted[1])


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    generator = numpy.random.default_rng(0)
    hits = 0
    for _ in range(100):
        found = statistics.interquartile_mean(
            [generator.normal(mean, 1, (10, 1)) for mean in (10, 10.5, 11)], resamples=300
        )
        hits += found.low <= 10.5 <= found.high
    assert hits >= 85


def test_a_scene_of_nothing_expected_takes_what_there_is(tmp_path):
    runs, _ = study(tmp_path, seeds=(1,))
    scene = Scene.make(runs)
    assert scene.absent == [] and scene.left_out == 0
    assert scene.tasks == ["bbc_news", "movie_reviews"]
    assert scene.controls == {"centralized", "head_only", "local_only"}


# ---------------------------------------------------------------------------------------------------------
# What the test split can tell


def compared(folder, scores, examples, **changes):
    """Write the records of methods with these test scores on so many examples; return the marked ones."""
    written = []
    for method, score in scores.items():
        record = synthetic_record(method=method, **changes)
        record |= {"test_score": score, "examples": {"train": 80, "validation": 10, "test": examples}}
        path = folder / f"{method}.json"
        path.write_text(json.dumps(record))
        written.append(path)
    records.collect(written, folder / "rounds.parquet", folder / "runs.parquet")
    make(folder, [])
    return marked(folder)


@pytest.mark.parametrize(
    ("examples", "best"), [(40, []), (310, []), (330, ["FedAvg"]), (100_000, ["FedAvg"])]
)
def test_the_best_score_is_marked_only_where_the_test_split_can_tell(tmp_path, examples, best):
    """90 against 87.5: the standard error of the difference is 2.5 points with 319 examples."""
    scores = {"fedavg": 0.9, "fedlora": 0.875, "fedcybgd": 0.5}
    assert compared(tmp_path, scores, examples) == best
    # Costs do not depend on the test split.
    assert marked(tmp_path, "Sent up (MB)") == ["FedLoRA"]


def test_two_equal_scores_are_not_told_apart_by_any_number_of_examples(tmp_path):
    assert compared(tmp_path, {"fedavg": 0.9, "fedlora": 0.9, "fedcybgd": 0.1}, 10**6) == []


def test_a_control_beside_the_best_does_not_count_as_the_next_one(tmp_path):
    assert compared(tmp_path, {"fedavg": 0.9, "centralized": 0.9, "fedlora": 0.5}, 200) == ["FedAvg"]


def test_of_losses_it_is_not_known_and_the_smallest_is_marked(tmp_path):
    assert compared(tmp_path, {"fedavg": 2.0, "fedlora": 2.1}, 40, metric="perplexity") == ["FedAvg"]


@pytest.mark.slow
@given(
    st.integers(1, 10_000),
    st.lists(st.integers(0, 100), min_size=2, max_size=6),
)
@settings(max_examples=200)
def test_the_bound_is_that_of_two_independent_binomials(n, percent):
    scores = numpy.array(percent) / 100
    frames = [
        pandas.DataFrame(
            {
                "test_score": [score],
                "greater_is_better": [True],
                "metric": ["accuracy"],
                "test_examples": [n],
            }
        )
        for score in scores
    ]
    variances = numpy.array([cells.test_variance(frame) for frame in frames])
    expected = [scipy.stats.binom(n, score).var() * 1e4 / n**2 for score in scores]
    assert variances == pytest.approx(expected)
    best, second = sorted(zip(-100 * scores, variances, strict=True), key=lambda pair: pair[0])[:2]
    clear = second[0] - best[0] > math.sqrt(best[1] + second[1])
    assert cells.stands_out(-100 * scores, variances) == clear


def test_notes_explain_what_a_table_shows(tmp_path):
    _, expected = study(tmp_path, tasks=("bbc_news",), partitions=("iid",), seeds=(1, 2))
    make(tmp_path, expected)
    main = (tmp_path / "tables" / "main.md").read_text()
    assert "the mean over its clients' models" in main and "look equal are equally bold" in main
    assert "left out for one seed" in main and "test examples" in main
    shown = cost_tables.terminal(records.load_runs(tmp_path / "runs.parquet"), expected, TITLES)
    assert "left out for one seed" in shown and max(map(len, shown.splitlines())) <= 120
    assert "–: not defined" not in (tmp_path / "tables" / "paired.md").read_text()


def test_a_dash_in_the_paired_table_is_explained_where_it_stands(tmp_path):
    written = []
    for method, score in {"fedavg": 0.75, "fedlora": 0.5}.items():
        for seed in (1, 2):
            path = tmp_path / f"{method}{seed}.json"
            path.write_text(json.dumps(synthetic_record(method=method, seed=seed) | {"test_score": score}))
            written.append(path)
    records.collect(written, tmp_path / "rounds.parquet", tmp_path / "runs.parquet")
    make(tmp_path, [])
    text = (tmp_path / "tables" / "paired.md").read_text()
    assert " – |" in text and "–: not defined, since the difference is the same in all pairs." in text
