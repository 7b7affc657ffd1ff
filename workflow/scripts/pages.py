"""Turn Markdown tables into web pages for Snakemake's report: TABLE.md... PAGE.html..., one each."""

import sys
from pathlib import Path

from markdown_it import MarkdownIt

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 1.5em; color: #1b1b1b; background: #fff; }
h1 { font-size: 1.3em; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3em 0.8em; text-align: left; white-space: nowrap; }
thead tr { border-bottom: 2px solid #444; }
tbody tr { border-bottom: 1px solid #ddd; }
tbody tr:hover { background: #f2f5f8; }
ul { max-width: 60em; padding-left: 1.2em; color: #444; }
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head>
<body>
{body}</body>
</html>
"""


def page(markdown: str, title: str) -> str:
    """Return a self-contained web page: it loads nothing from elsewhere."""
    # HTML in a label or title is shown as text, not interpreted.
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    return PAGE.format(title=title, style=STYLE, body=body)


if __name__ == "__main__":
    paths = [Path(name) for name in sys.argv[1:]]
    half = len(paths) // 2
    for table, destination in zip(paths[:half], paths[half:], strict=True):
        destination.write_text(page(table.read_text("utf-8"), table.stem), "utf-8")
