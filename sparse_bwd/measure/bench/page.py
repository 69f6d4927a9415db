"""One HTML file with the table and the figures, which needs nothing else: no script, no network."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from sparse_bwd.measure.bench.figures import budget_figure, draw, layers_figure, pareto_figure
from sparse_bwd.measure.bench.report import CAPTION, COLUMNS, cells, title
from sparse_bwd.measure.bench.strategies import STRATEGIES

FIGURES = (
    (budget_figure, "Time and peak memory against the budget, over dense PyTorch in its faster layout."),
    (pareto_figure, "Time against peak memory of every row."),
    (layers_figure, "What each part of the network keeps for backward, and computes in it."),
)
CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1100px; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: 0; } h1 + p { color: #555; margin-top: .3em; }
figure { margin: 1.5em 0; } figure svg { max-width: 100%; height: auto; } figcaption { color: #555; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; white-space: nowrap; }
th, td { padding: .25em .6em; text-align: right; border-bottom: 1px solid #e3e3e3; }
th { border-bottom: 2px solid #888; position: sticky; top: 0; background: #fff; }
th:first-child, td:first-child, td.error { text-align: left; } td.error { color: #8a2f00; white-space: normal; }
tr.dense td { background: #f5f2e4; } code { background: #f4f4f4; padding: .1em .3em; }
"""


def page(found: Mapping[str, Any]) -> str:
    """The page of a record."""
    names = dict.fromkeys(row["strategy"] for row in found["rows"])
    about = [f"<dt><code>{name}</code></dt><dd>{escape(STRATEGIES[name].about)}</dd>" for name in names]
    versions = ", ".join(f"{name} {value}" for name, value in found["machine"]["versions"].items())
    source = f"commit {found['commit']}, {found['date']}, {versions}"
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(found["asked"]["model"])}</title>',
            f'<meta name="viewport" content="width=device-width"><style>{CSS}</style></head><body>',
            f"<h1>What a budget buys: {escape(found['asked']['model'])}</h1><p>{escape(title(found))}</p>",
            *([] if found["finished"] else ["<p><strong>Not finished: some cases are missing.</strong></p>"]),
            *_figures(found),
            f'<div class="wide">{_table(found)}</div>',
            f"<p>{escape(CAPTION)}</p>",
            f"<h2>Rows</h2><dl>{''.join(about)}</dl>",
            f"<p><code>{escape(found['command'])}</code><br>{escape(source)}</p>",
            "</body></html>",
            "",
        ]
    )


def _figures(found: Mapping[str, Any]) -> list[str]:
    """Every figure that there is something to draw in; where matplotlib is missing, a sentence."""
    try:
        drawn = [(draw(make, found), caption) for make, caption in FIGURES]
    except ImportError:
        return ["<p>The figures need matplotlib (pip install matplotlib), which is not installed.</p>"]
    return [
        f"<figure>{_inline(svg)}<figcaption>{caption}</figcaption></figure>" for svg, caption in drawn if svg
    ]


def _inline(svg: bytes) -> str:
    """The element without the declarations before it, which a page must not hold."""
    text = svg.decode()
    return text[text.index("<svg") :]


def _table(found: Mapping[str, Any]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    body = []
    for row in found["rows"]:
        every = cells(row, found["rows"])
        if row["error"]:
            error = f'<td class="error" colspan="{len(COLUMNS) - 1}">{escape(every[1])}</td>'
            inside = f"<td>{escape(every[0])}</td>{error}"
        else:
            inside = "".join(f"<td>{escape(cell)}</td>" for cell in every)
        body.append(f'<tr class="{escape(row["strategy"])}">{inside}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
