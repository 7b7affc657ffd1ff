"""Figures: all of them, the same bytes each time, one style a method, and no crash where data are missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from PIL import Image
from synthetic import TITLES, synthetic_partition, write_study

from fedlm.base.errors import UserError
from fedlm.results import contents, drawing, figures, partition_figures, records
from fedlm.results.contents import FIGURES, names_of_figures
from fedlm.results.curves import over_bytes, over_rounds
from fedlm.results.final_scores import over_heterogeneity, trade_off
from fedlm.results.memory_figures import memory, memory_by_block
from fedlm.results.scene import Scene

# Another process, whose reader has other settings and hashes, and whose memory has gaps of all sizes.
AGAIN = """
import ctypes, json, random, sys
import matplotlib
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
taken = [malloc(random.randrange(24, 200)) for _ in range(200000)]
random.shuffle(taken)
for place in taken[::2]:
    free(place)
from fedlm.results import figures
matplotlib.rcParams.update({"font.size": 20, "axes.grid": False, "figure.dpi": 50, "pdf.compression": 0})
before = dict(matplotlib.rcParams)
runs, rounds, partitions, titles, destination, expected = json.loads(sys.argv[1])
figures.make(runs, rounds, partitions, titles, destination, [tuple(run) for run in expected])
assert dict(matplotlib.rcParams) == before
"""


def study(folder, skip=lambda path: False, **changes):
    """Write and collect a study; return the arguments of `figures.make`, without the destination."""
    written, partitions, expected = write_study(folder, **changes)
    kept = [path for path in written if not skip(str(path.relative_to(folder)))]
    records.collect(kept, folder / "rounds.parquet", folder / "runs.parquet")
    return [folder / "runs.parquet", folder / "rounds.parquet", partitions], expected


def is_drawn(path):
    """Return whether a picture holds more than its background."""
    pixels = numpy.asarray(Image.open(path).convert("L"))
    return (pixels < 200).mean() > 0.002


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The figures of a small study that has a bit of everything."""
    folder = tmp_path_factory.mktemp("study")
    arguments, expected = study(
        folder,
        skip=lambda path: "movie_reviews/sizes_0.3/fedlora" in path,
        partitions=("dirichlet_0.1", "sizes_0.3"),
        methods=("fedavg", "fedcybgd", "fedlora", "centralized"),
        seeds=(1, 2),
        rounds=2,
    )
    paths = figures.make(*arguments, TITLES, folder / "figures", expected)
    return folder, arguments, expected, paths


def grid(tasks, partitions):
    return [(f"task{task}", f"partition{number}") for task in range(tasks) for number in range(partitions)]


def test_panels_follow_each_other_where_tasks_have_partitions_of_their_own():
    news, films = [("news", "iid"), ("news", "skewed")], [("films", "iid"), ("films", "halves")]
    cells = [*news, *films, ("sources", "natural")]
    assert contents.pages_of_cells(cells) == [
        [("news", ["iid", "skewed"]), ("films", ["iid", "halves"]), ("sources", ["natural"])]
    ]
    assert contents.compared_tasks(cells) == ["news", "films"]
    assert contents.compared_tasks(cells[-1:]) == ["sources"]
    many = [("news", str(number)) for number in range(6)] + films
    assert contents.pages_of_cells(many) == [
        [("news", ["0", "1", "2", "3"]), ("films", ["iid", "halves"])],
        [("news", ["4", "5"])],
    ]


@pytest.mark.slow
def test_every_figure_is_drawn_as_pdf_and_png(drawn):
    _, _, _, paths = drawn
    names = names_of_figures(grid(2, 2))
    assert sorted(path.name for path in paths) == sorted(
        f"{name}.{end}" for name in names for end in ("pdf", "png")
    )
    assert set(names) == set(FIGURES)
    for path in paths:
        if path.suffix == ".png":
            assert is_drawn(path), path
            width = Image.open(path).width / drawing.SETTINGS["savefig.dpi"]
            assert width == pytest.approx(drawing.WIDTH, abs=0.01)
        else:
            content = path.read_bytes()
            assert content.startswith(b"%PDF") and b"Date" not in content and b"Matplotlib" not in content


@pytest.mark.slow
def test_another_process_with_other_settings_draws_the_same_bytes(drawn):
    folder, arguments, expected, paths = drawn
    runs, rounds, partitions = arguments
    given = [
        str(runs),
        str(rounds),
        [str(path) for path in reversed(partitions)],
        TITLES,
        str(folder / "again"),
        expected,
    ]
    environment = os.environ | {"PYTHONHASHSEED": "7", "MPLBACKEND": "svg", "LC_ALL": "C"}
    subprocess.run(
        [sys.executable, "-c", AGAIN, json.dumps(given)],
        check=True,
        env=environment,
        cwd=Path(__file__).parents[1],
    )
    for path in paths:
        assert (folder / "again" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": (1,), "rounds": 1, "methods": ("fedavg",), "partitions": ("iid",), "tasks": ("bbc_news",)},
        {
            "seeds": (1,),
            "rounds": 1,
            "methods": ("local_only",),
            "partitions": ("dirichlet_1",),
            "tasks": ("t",),
        },
        {
            "seeds": (1,),
            "metric": "perplexity",
            "tasks": ("talk",),
            "methods": ("fedcybgd", "new_one"),
            "partitions": ("sizes_0.3",),
        },
    ],
    ids=["one run", "one control that sends nothing", "perplexity, sizes only"],
)
def test_small_studies_do_not_crash(tmp_path, changes, monkeypatch):
    monkeypatch.setitem(drawing.SETTINGS, "savefig.dpi", 60)
    arguments, expected = study(tmp_path, **changes)
    for path in figures.make(*arguments, {}, tmp_path / "figures", expected):
        assert path.stat().st_size > 1000


@pytest.mark.slow
def test_rounds_without_scores_and_missing_parts_do_not_crash(tmp_path, monkeypatch):
    monkeypatch.setitem(drawing.SETTINGS, "savefig.dpi", 60)

    def nothing_of_one_cell(path):
        return "bbc_news/iid" in path or "dirichlet_1/fedavg/seed2" in path

    arguments, expected = study(
        tmp_path,
        tasks=("bbc_news",),
        methods=("fedavg", "fedlora"),
        partitions=("iid", "dirichlet_1"),
        seeds=(1, 2),
        rounds=2,
    )
    kept = [path for path in (tmp_path / "runs").rglob("*.json") if not nothing_of_one_cell(str(path))]
    for path in kept:
        record = json.loads(path.read_text())
        record["rounds"][0] |= {"validation": None, "validation_score": None}
        record["baseline_validation"] = {}
        record["partition_skew"] = {}
        record["memory"] = dict.fromkeys(record["memory"])
        path.write_text(json.dumps(record))
    records.collect(kept, arguments[1], arguments[0])
    arguments[2] = arguments[2][:1]
    paths = figures.make(*arguments, TITLES, tmp_path / "figures", expected)
    assert len(paths) == 2 * len(names_of_figures(grid(1, 2)))


@pytest.mark.slow
def test_large_studies_go_on_in_further_files(tmp_path, monkeypatch):
    tall, wide = names_of_figures(grid(5, 1)), names_of_figures(grid(4, 9))
    assert "memory_2" in tall and "memory_2" not in wide
    assert "partitions_3" in wide and "trade_off_9" in wide
    monkeypatch.setattr(contents, "PER_PAGE", 1)
    monkeypatch.setitem(drawing.SETTINGS, "savefig.dpi", 60)
    arguments, expected = study(tmp_path, partitions=("iid",), methods=("fedavg",), seeds=(1,), rounds=1)
    paths = figures.make(*arguments, {}, tmp_path / "figures", expected)
    assert sorted(path.stem for path in paths if path.suffix == ".pdf") == sorted(
        names_of_figures(grid(2, 1))
    )
    assert len(paths) == 2 * 2 * len(FIGURES)


def test_known_methods_keep_their_style_and_new_ones_get_their_own():
    alone = drawing.styles(["fedavg"])["fedavg"]
    among = drawing.styles(["my_method", "zz", "fedcybgd", "fedavg"])
    assert among["fedavg"] == alone
    assert list(among) == ["my_method", "zz", "fedcybgd", "fedavg"]
    many = drawing.styles([*drawing.KNOWN, *(f"own_{number}" for number in range(7))])
    assert len({style.marker for style in many.values()}) == len(many)
    more = drawing.styles([*drawing.KNOWN, *(f"own_{number}" for number in range(60))])
    assert len({str(style) for style in more.values()}) == len(more)
    assert drawing.styles(["b", "a"]) == figures.styles(["a", "b"])


@pytest.mark.parametrize(("clients", "labels"), [(3, 2), (41, 2), (500, 77)])
def test_partitions_of_any_size_are_drawn(clients, labels):
    file = synthetic_partition("bbc_news", "dirichlet_0.1", 1, clients=clients)
    wide = numpy.random.default_rng(0).integers(0, 5, (clients, labels)).tolist()
    file = file.model_copy(
        update={"label_counts": wide, "label_names": [f"label {number}" for number in range(labels)]}
    )
    figure = partition_figures.draw_partitions([file], [("bbc_news", ["dirichlet_0.1", "absent"])])
    figure.draw_without_rendering()
    axes = figure.axes[0]
    tallest = max(map(sum, wide))
    assert tallest <= axes.get_ylim()[1] <= tallest * 1.2
    assert axes.get_xlabel() == ("client" if clients <= partition_figures.MANY_CLIENTS else "client, by size")


@pytest.mark.slow
def test_everything_is_in_view_and_texts_do_not_overlap(drawn):
    """All points are within the axes; titles, axis labels and legends have places of their own."""
    folder, arguments, expected, _ = drawn
    import matplotlib

    scene = Scene.make(records.load_runs(arguments[0]), expected, TITLES)
    rounds = records.load_rounds(arguments[1])
    for key in ("task", "partition", "method"):
        rounds[key] = rounds[key].astype(str)
    look = drawing.styles(scene.methods)
    rows = [(task, scene.partitions) for task in scene.tasks]
    with matplotlib.rc_context(drawing.SETTINGS):
        drawings = {
            "rounds": over_rounds(scene, rounds, look, rows),
            "bytes": over_bytes(scene, rounds, look, rows),
            "trade-off": trade_off(scene, look, [(task, "dirichlet_0.1") for task in scene.tasks]),
            "heterogeneity": over_heterogeneity(scene, look, scene.tasks),
            "memory": memory(scene, scene.tasks),
            "blocks": memory_by_block(scene, look, scene.tasks),
        }
        for name, figure in drawings.items():
            figure.draw_without_rendering()
            assert any(axes.lines or axes.patches for axes in figure.axes), name
            for axes in figure.axes:
                for line in axes.lines:
                    x, y = line.get_transform().transform(numpy.column_stack(line.get_data()).astype(float)).T
                    assert numpy.all((axes.bbox.x0 - 1 <= x) & (x <= axes.bbox.x1 + 1)), name
                    assert numpy.all((axes.bbox.y0 - 1 <= y) & (y <= axes.bbox.y1 + 1)), name
            boxes = [axes.title.get_window_extent() for axes in figure.axes if axes.get_title()]
            boxes += [axes.xaxis.label.get_window_extent() for axes in figure.axes if axes.get_xlabel()]
            boxes += [axes.yaxis.label.get_window_extent() for axes in figure.axes if axes.get_ylabel()]
            boxes += [legend.get_window_extent() for legend in figure.legends]
            for number, box in enumerate(boxes):
                assert figure.bbox.x0 - 1 <= box.x0 and box.x1 <= figure.bbox.x1 + 1, name
                assert not any(box.overlaps(other) for other in boxes[number + 1 :]), name


def test_a_damaged_partition_is_named(drawn, tmp_path):
    _, arguments, expected, _ = drawn
    (tmp_path / "seed1.json").write_text("{}")
    with pytest.raises(UserError, match=r"seed1\.json"):
        figures.make(*arguments[:2], [tmp_path / "seed1.json"], TITLES, tmp_path, expected)
