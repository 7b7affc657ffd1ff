"""The panes of the explorer: Vega-Lite charts without data, which the page adds as its filters leave them."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair
from matplotlib.markers import MarkerStyle
from matplotlib.path import Path
from matplotlib.transforms import Affine2D

from fedlm.results.drawing import KINDS, Style, settings

# What can be on an axis: its column, what it is called, and whether it spans powers of ten.
AXES = [
    ("score", "score", False),
    ("upload_bytes", "sent up by all clients (bytes)", True),
    ("download_bytes", "sent down to all clients (bytes)", True),
    ("peak_memory_bytes", "peak memory of a turn (bytes)", True),
    ("flops", "compute of all clients (FLOPs)", True),
]
ALONG = [
    ("round", "round", False),
    ("upload_bytes", "sent up so far (bytes)", True),
    ("download_bytes", "sent down so far (bytes)", True),
    ("flops", "compute so far (FLOPs)", True),
]
_SI = "~s"  # 1.2M, 350k


def looks(look: Mapping[str, Style], titles: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return how the page draws each method: its label and title, colour, symbol and dashes."""
    return [
        {
            "method": method,
            "title": titles[method],
            "colour": style.colour,
            "shape": symbol(style.marker),
            "dash": list(style.line[1]) if isinstance(style.line, tuple) else [1, 0],
        }
        for method, style in look.items()
    ]


def symbol(marker: Any) -> str:
    """Return a marker of matplotlib's as Vega draws it: an SVG path, within -1 and 1 for most."""
    if marker == "_":
        return "M-1,-0.2L1,-0.2L1,0.2L-1,0.2Z"  # matplotlib's is a line, which has nothing to fill
    with settings():  # matplotlib remembers how it set a text, whatever the fonts are next time
        style = MarkerStyle(marker)
    path = style.get_path().transformed(style.get_transform() + Affine2D().scale(2, -2))
    letters = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}
    drawn = []
    for numbers, code in path.iter_segments(simplify=False):
        ends = [] if code == Path.CLOSEPOLY else [f"{round(number, 3) + 0.0:g}" for number in numbers]
        drawn.append(letters[code] + ",".join(ends))
    return "".join(drawn)


class Panes:
    """Charts in which a method looks as it does in the figures."""

    def __init__(self, methods: Sequence[Mapping[str, Any]]) -> None:
        titles = [method["title"] for method in methods]

        def scale(what: str) -> altair.Scale:
            return altair.Scale(domain=titles, range=[method[what] for method in methods])

        legend = altair.Legend(orient="bottom", title=None, symbolSize=80, labelLimit=220)
        self.colour = altair.Color("title:N", scale=scale("colour"), legend=legend)
        self.shape = altair.Shape("title:N", scale=scale("shape"), legend=legend)
        self.dash = altair.StrokeDash("title:N", scale=scale("dash"), legend=legend)
        self.plain_colour = altair.Color("title:N", scale=scale("colour"), legend=None)
        self.plain_shape = altair.Shape("title:N", scale=scale("shape"), legend=None)

    def charts(self) -> dict[str, dict[str, Any]]:
        """Return the specification of each pane by its name."""
        made = {
            "ranking": self._ranking(beside=True),
            "ranking_narrow": self._ranking(beside=False),
            "trade_off": self._trade_off(),
            "curves": self._curves(),
            "memory": self._memory(),
            "partitions": self._partitions(),
            "target": self._target(),
        }
        return {name: chart.to_dict() for name, chart in made.items()}

    def _ranking(self, beside: bool) -> altair.TopLevelMixin:
        rows = altair.Y("title:N", sort=altair.SortField("place"), title=None)
        names = altair.Axis(labelLimit=220, ticks=False, domain=False)
        base = altair.Chart(altair.NamedData(name="ranking"))
        named = rows.axis(names)
        points = altair.X("value:Q", title="score", scale=altair.Scale(zero=False))
        whole = [
            altair.Tooltip("title:N", title="method"),
            altair.Tooltip("value:Q", title="interquartile mean", format=".3g"),
            altair.Tooltip("low:Q", title="95% from", format=".3g"),
            altair.Tooltip("high:Q", title="to", format=".3g"),
            altair.Tooltip("group:N", title="cannot be told apart"),
        ]
        interval = base.mark_rule(strokeWidth=1.5).encode(
            x=altair.X("low:Q", title="score"), x2="high:Q", y=named, color=self.plain_colour
        )
        mean = base.mark_point(filled=True, size=90, opacity=1).encode(
            x=points, y=named, color=self.plain_colour, shape=self.plain_shape, tooltip=whole
        )
        group = base.mark_text(align="left", dx=9, fontSize=11).encode(x=points, y=named, text="group:N")
        charts = [(interval + mean + group).properties(width=230, height=altair.Step(22))]
        for column, title, _ in AXES[1:]:
            unnamed = rows.axis(None) if beside else named
            charts.append(
                base.mark_point(filled=True, size=70, opacity=1)
                .encode(
                    x=altair.X(
                        f"{column}:Q",
                        title=title.replace(" (", "|(").split("|"),
                        scale=altair.Scale(type="log", nice=False, padding=8),
                        axis=altair.Axis(format=_SI, tickCount=3),
                    ),
                    y=unnamed,
                    color=self.plain_colour,
                    shape=self.plain_shape,
                    tooltip=[
                        altair.Tooltip("title:N", title="method"),
                        altair.Tooltip(f"{column}:Q", format=".3s"),
                    ],
                )
                .transform_filter(f"datum.{column} > 0")
                .properties(width=125 if beside else 230, height=altair.Step(22))
            )
        joined = altair.hconcat(*charts, spacing=12) if beside else altair.vconcat(*charts)
        return joined.resolve_scale(y="shared" if beside else "independent")

    def _trade_off(self) -> altair.TopLevelMixin:
        base = altair.Chart(altair.NamedData(name="cells"))
        y = altair.Y("score:Q", title="score", scale=altair.Scale(zero=False))
        x = altair.X("upload_bytes:Q", title="", axis=altair.Axis(format=_SI, tickCount=4))
        spread = base.mark_rule(strokeWidth=1.2, opacity=0.7).encode(
            x=x, y=altair.Y("low:Q", title="score"), y2="high:Q", color=self.colour
        )
        point = base.mark_point(filled=True, size=110, opacity=1, cursor="pointer").encode(
            x=x,
            y=y,
            color=self.colour,
            shape=self.shape,
            tooltip=[
                altair.Tooltip("title:N", title="method"),
                altair.Tooltip("cell:N", title="cell"),
                altair.Tooltip("score:Q", format=".2f"),
                altair.Tooltip("sd:Q", title="standard deviation", format=".2f"),
                altair.Tooltip("seeds:Q"),
                *(altair.Tooltip(f"{name}:Q", title=title, format=".3s") for name, title, _ in AXES[1:]),
            ],
        )
        return self._by_cell(spread + point)

    def _curves(self) -> altair.TopLevelMixin:
        base = altair.Chart(altair.NamedData(name="curves")).encode(
            x=altair.X("round:Q", title="round", axis=altair.Axis(format=_SI, tickCount=5)),
            y=altair.Y("score:Q", title="validation score", scale=altair.Scale(zero=False)),
            color=self.colour,
            order="round:Q",
        )
        line = base.mark_line(strokeWidth=1.6).encode(strokeDash=self.dash)
        point = base.mark_point(filled=True, size=36, opacity=1).encode(
            shape=self.shape,
            tooltip=[
                altair.Tooltip("title:N", title="method"),
                altair.Tooltip("round:Q"),
                altair.Tooltip("score:Q", format=".2f"),
            ],
        )
        return self._by_cell(line + point)

    def _memory(self) -> altair.TopLevelMixin:
        names = [name for _, name, *_ in KINDS]
        kinds = altair.Scale(domain=names, range=[colour for _, _, colour, _ in KINDS])
        chart = (
            altair.Chart(altair.NamedData(name="memory"))
            .mark_bar(stroke="white", strokeWidth=0.7)
            .encode(
                x=altair.X(
                    "bytes:Q",
                    title="peak memory of a turn (bytes)",
                    axis=altair.Axis(format=_SI, tickCount=5),
                ),
                y=altair.Y(
                    "title:N", sort=altair.SortField("place"), title=None, axis=altair.Axis(labelLimit=220)
                ),
                color=altair.Color(
                    "kind:N",
                    scale=kinds,
                    sort=names,
                    legend=altair.Legend(orient="bottom", title=None),
                ),
                order="order:Q",
                tooltip=["title:N", "kind:N", altair.Tooltip("bytes:Q", format=".3s")],
            )
            .properties(height=altair.Step(20))
        )
        return chart.facet(facet=altair.Facet("task:N", title=None, sort=None), columns=2)

    def _partitions(self) -> altair.TopLevelMixin:
        chart = (
            altair.Chart(altair.NamedData(name="partitions"))
            .mark_bar()
            .encode(
                x=altair.X("client:O", title="client", axis=altair.Axis(labelOverlap=True, labelAngle=0)),
                y=altair.Y("examples:Q", title="examples"),
                color=altair.Color(
                    "label:N",
                    sort=altair.EncodingSortField("order", op="min"),
                    scale=altair.Scale(scheme="viridis"),
                    legend=altair.Legend(
                        orient="bottom", title=None, symbolLimit=8, columns=2, labelLimit=110
                    ),
                ),
                order="order:Q",
                tooltip=["client:O", "label:N", "examples:Q"],
            )
        )
        return self._by_cell(chart, ("color", "x"))

    def _target(self) -> altair.TopLevelMixin:
        base = altair.Chart(altair.NamedData(name="target"))
        y = altair.Y("title:N", sort=altair.SortField("place"), title=None, axis=altair.Axis(labelLimit=220))
        x = altair.X("amount:Q", title="", axis=altair.Axis(format=_SI, tickCount=4))
        reached = (
            base.mark_point(filled=True, size=90, opacity=1)
            .encode(
                x=x,
                y=y,
                color=self.plain_colour,
                shape=self.plain_shape,
                tooltip=[
                    "title:N",
                    altair.Tooltip("amount:Q", format=".3s"),
                    altair.Tooltip("text:N", title="seeds"),
                ],
            )
            .transform_filter("isValid(datum.amount)")
        )
        never = (
            base.mark_text(align="left", fontStyle="italic", color="#555")
            .encode(x=altair.value(4), y=y, text=altair.value("never"))
            .transform_filter("!isValid(datum.amount)")
        )
        return self._by_cell((reached + never).properties(height=altair.Step(20)))

    def _by_cell(self, chart: Any, alone: Sequence[str] = ()) -> altair.TopLevelMixin:
        facet = altair.Facet(
            "cell:N", title=None, sort=None, header=altair.Header(labelLimit=320, labelFontWeight="bold")
        )
        scales = {"x": "shared", "y": "independent"} | dict.fromkeys(alone, "independent")
        faceted = chart.facet(facet=facet, columns=2).resolve_scale(**scales)
        # A shared axis would also be drawn below the place that an odd number of cells leaves empty.
        return faceted.resolve_axis(x="independent")
