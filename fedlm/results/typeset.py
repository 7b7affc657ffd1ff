"""How tables and numbers are written: Markdown for reading, LaTeX (booktabs) for papers."""

import math
from typing import NamedTuple

import numpy
import pandas
from tabulate import tabulate

WIDTH = 118  # width of a table in a terminal, in characters
LONGEST_FLOAT = 40  # rows; a longer LaTeX table breaks over pages


class Table(NamedTuple):
    """One table in two forms: `numbers` for programs, and `cells` of text for people.

    `best` holds a row of booleans for each row of `cells`; `groups` counts the leading columns whose
    repetitions are left blank.
    """

    name: str
    caption: str
    numbers: pandas.DataFrame
    cells: pandas.DataFrame
    best: numpy.ndarray
    groups: int
    notes: list[str]


def significant(value: float, digits: int = 3) -> str:
    """Write a number with three significant digits, or all digits before the point: 0.0123, 42.6, 12,345."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{_decimals(value, digits)}f}"


def _decimals(value: float, digits: int = 3) -> int:
    """Return the number of decimals that show `digits` significant digits."""
    if value == 0 or not math.isfinite(value):
        return 0
    # Rounding first: 9.999 is written 10.0, not 10.00.
    exponent = math.floor(math.log10(float(f"{abs(value):.{digits - 1}e}")))
    return max(0, digits - 1 - exponent)


def spread(values: pandas.Series | numpy.ndarray, decimals: int | None = None) -> str:
    """Write mean ± standard deviation (of the sample); a deviation that rounds to nothing is left out."""
    values = numpy.asarray(values, dtype=float)
    values = values[~numpy.isnan(values)]
    if not len(values):
        return "–"
    mean = float(values.mean())
    text = significant(mean) if decimals is None else f"{mean:,.{decimals}f}"
    if len(values) < 2 or "e" in text:
        return text
    deviation = f"{values.std(ddof=1):,.{_decimals(mean) if decimals is None else decimals}f}"
    return text if not deviation.strip("0.,") else f"{text} ± {deviation}"


def _without_repetitions(cells: pandas.DataFrame, groups: int) -> pandas.DataFrame:
    """Blank a leading cell that repeats the one above it."""
    shown = cells.copy()
    same = numpy.ones(len(cells), dtype=bool)
    for column in cells.columns[:groups]:
        same &= (cells[column] == cells[column].shift()).to_numpy()
        shown[column] = cells[column].where(~same, "")
    return shown


def markdown(table: Table) -> str:
    """Return the table as Markdown, with its caption as heading and its notes below."""
    cells = table.cells.map(lambda text: text.replace("|", "\\|"))
    cells = cells.mask(table.best, "**" + cells + "**") if len(cells) else cells
    cells = _without_repetitions(cells, table.groups)
    align = ["left" if column in _TEXT_COLUMNS else "right" for column in cells.columns]
    rows = cells.to_numpy().tolist()
    body = tabulate(rows, list(cells.columns), tablefmt="github", colalign=align, disable_numparse=True)
    if not rows:
        body = "Nothing to show."
    notes = "\n".join(f"- {note}" for note in table.notes)
    return f"# {table.caption}\n\n{body}\n\n{notes}\n"


_TEXT_COLUMNS = {
    "Task",
    "Model",
    "Block",
    "Partition",
    "Method",
    "Measure",
    "Scheme",
    "Quantity",
    "Origin",
    "Division of the data",
    "Rule",
    "Found",
    "Group",
    "Chosen",
    "System",
    "Claim",
    "Verdict",
}
# Special characters of LaTeX, and characters that its standard fonts lack.
_ESCAPES = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "×": r"$\times$",
        "–": "--",
        "†": r"$^\dagger$",
        "<": "$<$",
        ">": "$>$",
    }
)


# Sentences break into lines.
_SENTENCES = {"Claim": "p{5cm}", "Rule": "p{4cm}", "Found": "p{4cm}"}


def _column(heading: str) -> str:
    """Return how LaTeX aligns a column."""
    return _SENTENCES.get(heading) or ("l" if heading in _TEXT_COLUMNS else "r")


def _latex_heading(heading: str) -> str:
    """Put the unit below the name, which saves width."""
    name, bracket, unit = heading.translate(_ESCAPES).partition(" (")
    return f"\\shortstack[r]{{{name}\\\\({unit}}}" if bracket else name


def latex(table: Table) -> str:
    """Return the table for LaTeX; needs the package booktabs, and longtable where it is long."""
    notes = " ".join(table.notes).translate(_ESCAPES)
    caption, label = table.caption.translate(_ESCAPES), f"tab:{table.name}"
    if table.cells.empty:
        return f"% {table.caption}: nothing to show. {table.notes[0]}\n"
    cells = _without_repetitions(table.cells, table.groups).map(lambda text: text.translate(_ESCAPES))
    best, sections = table.best, None
    if table.groups > 1:
        # The first column becomes separate lines, which saves its width.
        best, sections, cells = best[:, 1:], cells.iloc[:, 0], cells.iloc[:, 1:]
    columns = [_column(column) for column in cells.columns]
    align = "".join(columns)
    cells.columns = [_latex_heading(column) for column in cells.columns]
    marks = pandas.DataFrame(
        numpy.where(best, "textbf:--rwrap;", ""), index=cells.index, columns=cells.columns
    )
    styler = cells.style.hide(axis="index").apply(lambda _: marks, axis=None)
    long = len(cells) > LONGEST_FLOAT
    if long:
        text = styler.to_latex(
            hrules=True, column_format=align, environment="longtable", caption=caption, label=label
        )
        start = "\\endlastfoot"
    else:
        text = styler.to_latex(hrules=True, column_format=align)
        start = "\\midrule"
    lines = text.rstrip("\n").split("\n")
    body = lines.index(start) + 1
    # From the last row to the first, so that indices stay valid.
    for row in range(len(cells) - 1, -1, -1):
        if sections is not None and sections.iloc[row]:
            lines.insert(
                body + row, f"\\multicolumn{{{len(columns)}}}{{l}}{{\\textit{{{sections.iloc[row]}}}}} \\\\"
            )
            if row:
                lines.insert(body + row, "\\midrule")
        elif row and cells.iloc[row, 0]:
            lines.insert(body + row, "\\addlinespace")
    text = "\n".join(lines)
    narrow = len(columns) > 8 or any(len(column) > 1 for column in columns)
    size = (
        f"\\{'scriptsize' if narrow else 'footnotesize'}\\setlength{{\\tabcolsep}}{{{3 if narrow else 4}pt}}"
    )
    if long:
        return f"{{{size}\n{text}\n\\par\\noindent {notes}\\par}}\n"
    return (
        f"\\begin{{table}}\n\\centering\n{size}\n"
        f"\\caption{{{caption}}}\n\\label{{{label}}}\n\\smallskip\n{text}\n"
        f"\\par\\smallskip\\raggedright\\scriptsize {notes}\n\\end{{table}}\n"
    )
