"""The explorer: one page without network, in a real browser where there is one."""

import json
import re
import shutil
from pathlib import Path
from urllib.parse import quote

import numpy
import pandas
import pytest
from synthetic import TITLES, write_study

from fedlm.data.partition import PartitionFile
from fedlm.results import explorer, records
from fedlm.results.devices import read_devices
from fedlm.results.scene import Scene

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def write(folder: Path, **changes) -> Path:
    """Write the page of a synthetic study."""
    written, partitions, expected = write_study(folder, **changes)
    records.collect(written, folder / "rounds.parquet", folder / "runs.parquet")
    runs = records.load_runs(folder / "runs.parquet")
    methods = list(dict.fromkeys(run[2] for run in expected))
    scene = Scene.make(runs, expected, {name: TITLES.get(name, name) for name in methods})
    return explorer.make(
        scene,
        records.load_rounds(folder / "rounds.parquet"),
        [PartitionFile.read(path) for path in partitions],
        folder / "explorer.html",
        study="synthetic",
        devices=read_devices(),
        cohorts={key: 1.0 if "cybgd" in key[1] else 0.1 for key in {(run[0], run[2]) for run in expected}},
        has_target="centralized" in methods,
    )


def content(page: Path) -> dict:
    found = re.search(
        r'<script id="content" type="application/json">(.*?)</script>', page.read_text("utf-8"), re.DOTALL
    )
    assert found
    return json.loads(found[1])


STUDY = {
    "partitions": ("iid", "dirichlet_0.1"),
    "methods": ("fedavg", "fedcybgd", "fedlora", "centralized"),
    "seeds": (1, 2),
    "rounds": 3,
}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write(tmp_path_factory.mktemp("explorer"), **STUDY)


@pytest.mark.slow
def test_numbers_are_those_of_the_records(page):
    found = content(page)
    runs = records.load_runs(page.with_name("runs.parquet"))
    cells = pandas.DataFrame(found["cells"])
    assert len(cells) == 2 * 2 * 4
    for row in cells.itertuples():
        own = runs[(runs["task"] == row.task) & (runs["partition"] == row.partition)]
        own = own[own["method"] == row.method]
        assert row.score == pytest.approx(100 * own["test_score"].mean(), rel=1e-4)
        assert row.sd == pytest.approx(100 * own["test_score"].std(ddof=1), rel=1e-4)
        assert row.upload_bytes == pytest.approx(own["upload_bytes"].mean(), rel=1e-4)
        assert row.seconds_0 > 0
    curves = pandas.DataFrame(found["curves"])
    assert len(curves) == 16 * 4  # with round 0
    end = curves[curves["round"] == 3].set_index(["task", "partition", "method"])["upload_bytes"]
    total = cells.set_index(["task", "partition", "method"])["upload_bytes"]
    numpy.testing.assert_allclose(end, total.loc[end.index], rtol=1e-4)
    ranking = pandas.DataFrame(found["ranking"])
    assert set(zip(ranking["task"], ranking["partition"], strict=True)) == {
        (task, partition) for task in ("", *found["tasks"]) for partition in ("", *found["partitions"])
    }
    clients = pandas.DataFrame(found["clients"])
    assert clients.groupby(["task", "partition"])["examples"].sum().eq(800).all()
    assert set(pandas.DataFrame(found["target"])["method"]) == {"fedavg", "fedcybgd", "fedlora"}
    assert len(found["runs"]["seed"]) == len(runs)
    assert found["runs"]["record"][0].startswith("results/synthetic/runs/")


@pytest.mark.slow
def test_the_page_loads_nothing_and_ends_no_script(tmp_path):
    hostile = "</script><img src=x onerror=alert(1)>"
    page = write(
        tmp_path, partitions=("iid",), methods=("fedavg", hostile.replace("/", "")), seeds=(1,), rounds=1
    )
    text = page.read_text("utf-8")
    assert not re.findall(r"<(?:script|link|img|iframe|source)[^>]+(?:src|href)=", text.split("<script>")[0])
    assert len(re.findall(r"<script", text.split('<script id="content"')[0])) == 0
    assert text.count("</script>") == 3


@pytest.mark.slow
def test_a_thousand_runs_are_two_megabytes(tmp_path):
    methods = ["fedavg", "fedcybgd", "fedlora", "fedprompt", "head_only"]
    methods += [f"variant_{number}" for number in range(5)]
    page = write(
        tmp_path,
        tasks=tuple(f"task_{number}" for number in range(5)),
        partitions=("iid", "dirichlet_1", "dirichlet_0.1", "sizes_0.3"),
        methods=tuple(methods),
        seeds=(1, 2, 3, 4, 5),
        rounds=10,
    )
    assert len(content(page)["runs"]["seed"]) == 1000
    assert page.stat().st_size <= 2_000_000


@pytest.mark.slow
def test_one_run_of_one_method_is_enough(tmp_path):
    page = write(
        tmp_path, tasks=("bbc_news",), partitions=("iid",), methods=("fedlora",), seeds=(1,), rounds=1
    )
    assert content(page)["target"] == {}


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with sync_api.sync_playwright() as player:
        started = player.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


class Reader:
    """A reader with the page open, who has no network and notices every error."""

    def __init__(self, browser, page: Path, address: str = "", width: int = 1200):
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, offline=True, accept_downloads=True
        )
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on(
            "console",
            lambda line: self.errors.append(line.text) if line.type == "error" else None,
        )
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(f"file://{page}{address}")
        self.wait()

    def wait(self) -> None:
        self.page.wait_for_selector("body[data-ready=yes]")

    def choose(self, control: str, value: str) -> None:
        self.page.select_option(f"#{control}", value)
        self.wait()

    def rows(self, pane: str) -> int:
        return int(self.page.get_attribute(f"#{pane}", "data-rows"))

    def titles(self) -> list[str]:
        return [
            made.get_attribute("aria-label") for made in self.page.query_selector_all(".chart svg[role=img]")
        ]

    def close(self) -> None:
        assert not self.errors, self.errors
        assert all(url.startswith(("file://", "data:", "blob:")) for url in self.requests)
        self.context.close()


@pytest.mark.slow
def test_it_opens_from_a_file_without_network_and_draws_every_pane(browser, page):
    reader = Reader(browser, page)
    panes = ("ranking", "trade_off", "curves", "target", "memory", "partitions")
    for pane in panes:
        assert reader.rows(pane) > 0, pane
        box = reader.page.query_selector(f"#{pane} .chart svg").bounding_box()
        assert box["width"] > 200 and box["height"] > 80, pane
    assert reader.rows("ranking") == 4 and reader.rows("trade_off") == 12  # centralised sends nothing
    # The first picture is in view, and says which method and at what price, without a click.
    assert reader.page.query_selector("#ranking .chart svg").bounding_box()["y"] < 600
    assert "FedCyBGD" in reader.page.text_content("#ranking .chart svg")
    reader.close()


@pytest.mark.slow
def test_filters_act_on_all_panes_and_stand_in_the_address(browser, page):
    reader = Reader(browser, page)
    reader.choose("task", "bbc_news")
    reader.choose("partition", "iid")
    reader.page.uncheck("#methods input[value=fedlora]")
    reader.wait()
    assert reader.rows("ranking") == 3 and reader.rows("trade_off") == 2
    assert reader.rows("curves") == 3 * 4 and reader.rows("memory") == 3 * 5
    assert all(title.endswith(": bbc_news, iid") for title in reader.titles())
    reader.choose("x", "flops")
    reader.choose("along", "upload_bytes")
    address = reader.page.evaluate("location.hash")
    drawn = {pane: reader.page.inner_html(f"#{pane} .chart") for pane in ("ranking", "trade_off", "curves")}
    assert reader.rows("trade_off") == 3  # centralised computes
    reader.close()

    again = Reader(browser, page, address)
    assert again.page.input_value("#task") == "bbc_news" and again.page.input_value("#x") == "flops"
    assert not again.page.is_checked("#methods input[value=fedlora]")
    for pane, before in drawn.items():
        assert again.page.inner_text(f"#{pane} .chart") == re.sub(r"<[^>]+>", "", before) or before
    assert again.rows("trade_off") == 3
    again.page.click("#reset")
    again.wait()
    assert again.rows("ranking") == 4 and again.page.evaluate("location.hash") == ""
    again.close()


@pytest.mark.slow
def test_a_class_has_one_colour_in_all_partitions_of_a_task(browser, page):
    reader = Reader(browser, page, "#task=bbc_news")
    legends = reader.page.evaluate(
        """[...document.querySelectorAll("#partitions .chart .mark-group.role-legend")].map((legend) => {
            const colours = [...legend.querySelectorAll(".role-legend-symbol path")].map((path) =>
                path.getAttribute("fill"));
            return [...legend.querySelectorAll(".role-legend-label text")].map((text, place) =>
                [text.textContent, colours[place]]);
        })"""
    )
    assert len(legends) == len(STUDY["partitions"])
    assert legends[0] and all(legend == legends[0] for legend in legends)
    assert len({colour for _, colour in legends[0]}) == len(legends[0])
    reader.close()


@pytest.mark.slow
def test_an_address_of_another_study_does_no_harm(browser, page):
    for address in ("#task=absent&x=nothing&cell=[]", "#hide=%5B1", f"#cell={quote('{1')}&share=3"):
        reader = Reader(browser, page, address)
        assert reader.rows("ranking") == 4 and reader.page.input_value("#x") == "upload_bytes"
        reader.close()


@pytest.mark.slow
def test_a_click_on_a_point_shows_where_it_comes_from(browser, page):
    reader = Reader(browser, page)
    point = reader.page.query_selector("#trade_off .chart .mark-symbol path")
    point.click()
    reader.page.wait_for_selector("#runs tbody tr")
    assert len(reader.page.query_selector_all("#runs tbody tr")) == 2
    text = reader.page.inner_text("#runs")
    assert "python -m fedlm rerun results/synthetic/runs/" in text
    # The same by keyboard, without a point.
    reader.choose("cell", json.dumps(["movie_reviews", "iid", "fedlora"], separators=(",", ":")))
    assert "movie_reviews/iid/fedlora/seed1.json" in reader.page.inner_text("#runs")
    reader.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_pane_is_saved_under_its_name(browser, page, kind, tmp_path):
    reader = Reader(browser, page, "#task=bbc_news&partition=iid")
    with reader.page.expect_download() as waiting:
        reader.page.click(f"#curves .save button:has-text('{kind}')")
    download = waiting.value
    assert download.suggested_filename == f"synthetic_curves_bbc_news_iid.{kind}"
    download.save_as(tmp_path / "saved")
    saved = (tmp_path / "saved").read_bytes()
    if kind == "svg":
        assert b"Learning curves" in saved and b"bbc_news, iid" in saved
    else:
        assert saved.startswith(b"\x89PNG")
    reader.close()


@pytest.mark.slow
def test_it_is_readable_on_a_phone(browser, page):
    reader = Reader(browser, page, width=390)
    assert reader.page.evaluate("document.documentElement.scrollWidth") <= 390
    for pane in ("ranking", "trade_off", "curves"):
        assert reader.page.query_selector(f"#{pane} .chart svg").bounding_box()["width"] <= 390
    reader.close()
