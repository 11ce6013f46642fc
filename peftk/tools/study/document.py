"""Sections of the report: the same for the console, for docs/study.md and for report.html."""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Mapping, Sequence
from typing import Any

from peftk.tools.demo import stage


@dataclasses.dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the study. caption: how its data was cut. claims: sentences, each with its interval.

    figures: matplotlib figures, by file name without ending.
    """

    name: str
    title: str
    command: str
    text: Sequence[str] = ()
    caption: str = ""
    claims: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def show(self, on: stage.Stage) -> None:
        for table in self.tables:
            shown = stage.table(*table.columns, title=table.title)
            for row in table.rows:
                shown.add_row(*row)
            on.console.print(shown)
        for claim in self.claims:
            on.say(f"• {claim}")
        on.say(f"[dim]{self.caption}[/]")


def markdown(head: Section, sections: Sequence[Section], pictures: str) -> str:
    """pictures: the folder of the figures, relative to the page."""
    lines = [f"# {head.title}", "", *_paragraphs(head.text)]
    for table in head.tables:
        lines += _markdown_table(table)
    for section in sections:
        lines += [f"## {section.title}", "", *_paragraphs(section.text)]
        for name, figure in section.figures.items():
            lines += [f"![{_alternative(figure)}]({pictures}/{name}.svg)", ""]
        for table in section.tables:
            lines += _markdown_table(table)
        lines += [f"- {claim}" for claim in section.claims] + [""] * bool(section.claims)
        lines += [f"*{section.caption}*", ""] if section.caption else []
        lines += [f"    {section.command}", ""]
    return "\n".join(lines).rstrip() + "\n"


def _alternative(figure: Any) -> str:
    """What a picture says, in words: its title."""
    return " ".join(figure.get_suptitle().split())


def _paragraphs(text: Sequence[str]) -> list[str]:
    return [line for paragraph in text for line in (paragraph, "")]


def _markdown_table(table: Table) -> list[str]:
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (table.columns, *table.rows)]
    ruler = "|" + "|".join(["---", *["---:"] * (len(table.columns) - 1)]) + "|"
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [f"**{table.title}**", "", lines[0], ruler, *lines[1:], ""]


STYLE = """
:root { color-scheme: light dark; --ink: #1f2329; --ground: #ffffff; --faint: #d3d7dc; --quiet: #5d6673 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --ground: #14171c; --faint: #3a414b; --quiet: #9aa4b2 } }
@media print { :root { --ink: #000; --ground: #fff; --faint: #bbb; --quiet: #444 }
  table, img { break-inside: avoid } }
body { color: var(--ink); background: var(--ground); font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 62rem; padding: 0 1rem }
img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: 0.85rem; margin: 1rem 0 }
.wide { overflow-x: auto }
caption { text-align: left; font-weight: 600; padding-bottom: 0.3rem }
th, td { text-align: right; padding: 0.2rem 0.6rem; border-bottom: 1px solid var(--faint) }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
.caption { color: var(--quiet); font-style: italic }
code { background: color-mix(in srgb, var(--faint) 35%, transparent); padding: 0.1rem 0.3rem }
"""


def page(head: Section, sections: Sequence[Section], svg: Mapping[str, str]) -> str:
    """One HTML file with everything in it. svg: the figures, by name."""
    body = [f"<h1>{_text(head.title)}</h1>", *(f"<p>{_text(text)}</p>" for text in head.text)]
    body += [_html_table(table) for table in head.tables]
    for section in sections:
        body += ["<section>", f"<h2>{_text(section.title)}</h2>", *(f"<p>{_text(text)}</p>" for text in section.text)]
        for name, figure in section.figures.items():
            data = base64.b64encode(svg[name].encode()).decode()
            body.append(f'<img alt="{_text(_alternative(figure))}" src="data:image/svg+xml;base64,{data}">')
        body += [_html_table(table) for table in section.tables]
        if section.claims:
            body.append("<ul>" + "".join(f"<li>{_text(claim)}</li>" for claim in section.claims) + "</ul>")
        body.append(f'<p class="caption">{_text(section.caption)}</p><p><code>{_text(section.command)}</code></p>')
        body.append("</section>")
    title = _text(head.title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows)
    caption = f"<caption>{_text(table.title)}</caption>"
    return f'<div class="wide"><table>{caption}<tr>{head}</tr>\n{rows}</table></div>'


def _text(text: str) -> str:
    return html.escape(text)
