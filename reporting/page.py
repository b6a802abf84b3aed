"""One HTML file with the table, the notes and the pictures inside; it fetches nothing and needs no network.

The table sorts by a click on a heading, or on opening by `#sort=K` (column from 1; `-K` for descending). Rows can be picked by
dataset, network and method, there by `&method=TEXT` too, and columns one by one; of which a screen begins with those that fit.
"""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from reporting.comparison_table import ComparisonTable
from reporting.gather import Group, Results
from reporting.tables import SUBJECT_TITLES, Cell, headings, notes, rows
from utils.errors import printable


class Picture(NamedTuple):
    """A PNG file, with what to read under it and what to read instead of it."""

    name: str
    title: str
    caption: str
    png: bytes

    @property
    def file_name(self) -> str:
        return f"{self.name}.png"


STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #444; --ground: #fff; --line: #ccc; --hover: #f1f6fa; --mark: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --soft: #b5b5b5; --ground: #16181c; --line: #3c4046; --hover: #23272e; --mark: #56b4e9; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
  max-width: 100rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }
h1 { margin-bottom: 0; line-height: 1.2; } h2 { margin-top: 2.5rem; }
.scroll { overflow-x: auto; }
.choices { display: flex; flex-wrap: wrap; gap: .5rem 1.2rem; align-items: center; margin: 1rem 0; }
.choices input[type=search], .choices select { font: inherit; max-width: 14rem; }
.choices details label { display: block; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th.text, td.text { text-align: left; } td.name { white-space: normal; min-width: 9rem; }
tbody tr:hover { background: var(--hover); }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--mark); }
th[aria-sort=ascending] button::after { content: " \\25B2"; } th[aria-sort=descending] button::after { content: " \\25BC"; }
figure { margin: 1.5rem 0; } figcaption { max-width: 60rem; color: var(--soft); }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
code { font-size: 13px; overflow-wrap: anywhere; } summary { cursor: pointer; }
@media (max-width: 600px) { body { margin: 1rem auto; padding: 0 .7rem; } th, td { padding: .3rem .4rem; }
  .scroll img { max-width: none; width: 46rem; } }
@media print { th button::after { content: "" !important; } details, .choices { display: none; }
  figure { break-inside: avoid; } }
"""

SCRIPT = """
"use strict";
const table = document.querySelector("table.sortable");
const heads = [...table.tHead.rows[0].cells];
function key(row, column) {
  const text = row.cells[column].dataset.value;
  return heads[column].classList.contains("text") || text === "" ? text : Number(text);
}
function sortBy(column, descending) {
  const sign = descending ? -1 : 1;
  const rows = [...table.tBodies[0].rows].map(row => [key(row, column), row]);
  rows.sort(([a], [b]) => {
    if (a === "" || b === "") return (a === "") - (b === "");  // rows without a figure stay last
    return sign * (typeof a === "number" ? a - b : a.localeCompare(b));
  });
  table.tBodies[0].append(...rows.map(([, row]) => row));
  const order = descending ? "descending" : "ascending";
  heads.forEach((head, index) => head.setAttribute("aria-sort", index === column ? order : "none"));
}
heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () =>
  sortBy(column, head.getAttribute("aria-sort") === "ascending")));

const filters = [...document.querySelectorAll("[data-filter]")];
function filter() {
  let shown = 0;
  for (const row of table.tBodies[0].rows) {
    row.hidden = !filters.every(field => {
      const text = row.cells[field.dataset.filter].dataset.value;
      return field.tagName === "SELECT" ? ["", text].includes(field.value)
        : text.toLowerCase().includes(field.value.toLowerCase());
    });
    shown += !row.hidden;
  }
  document.querySelector("#shown").textContent = shown;
}
filters.forEach(field => field.addEventListener("input", filter));

const boxes = [...document.querySelectorAll("[data-column]")];
function show(box) {
  for (const row of table.rows) row.cells[box.dataset.column].hidden = !box.checked;
}
const narrow = matchMedia("(max-width: 600px)").matches;
boxes.forEach(box => {
  box.checked = narrow ? "key" in box.dataset : !("spare" in box.dataset);
  box.addEventListener("change", () => show(box));
  show(box);
});

const asked = new URLSearchParams(location.hash.slice(1).replaceAll("+", "%2B"));
const sort = /^(-?)(\\d+)$/.exec(asked.get("sort") ?? "");
if (sort && heads[sort[2] - 1]) sortBy(sort[2] - 1, sort[1] === "-");
if (asked.has("method")) document.querySelector("input[data-filter]").value = asked.get("method");
filter();
"""
GENERATOR = '<meta name="generator" content="report.py of filter-pruning-distillation">'
FOLDER_LENGTH = 1000  # characters that are shown of a path
TEXT_COLUMNS = 3  # dataset, network, method
KEY_COLUMNS = ("method", "last top-1 %", "drop", "MACs")  # those that a narrow screen begins with
SPARE_COLUMNS = ("best top-1 %", "dense file", "minutes")  # those that every screen begins without


def page(
    results: Results, *, title: str, caption: str, pictures: Iterable[Picture], comparisons: Iterable[ComparisonTable] = ()
) -> str:
    """The whole document; every text from a run is escaped."""
    groups, body_rows = results.groups, rows(results.groups)
    runs = sum(len(group.records) for group in groups)
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{runs} finished runs of {len(groups)} methods. A click on a heading sorts.</p>",
        _choices(groups, body_rows),
        f'<div class="scroll">{_table(groups, body_rows)}</div>',
        f"<p>{escape(caption)}</p>",
        *map(_comparison, comparisons),
        _listing("What to know of single rows", notes(groups)),
        _listing("Left out", list(map(str, results.skipped))),
        *map(_figure, pictures),
        _commands(groups),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{GENERATOR}\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, body))
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _choices(groups: Sequence[Group], body_rows: Sequence[Sequence[Cell]]) -> str:
    """Fields that pick rows, and boxes that pick columns."""
    fields = []
    for column, title in enumerate(SUBJECT_TITLES):
        values = sorted({(row[column].value, row[column].text) for row in body_rows})
        options = "".join(f'<option value="{escape(str(value))}">{escape(text)}</option>' for value, text in values)
        if len(values) > 1:
            every = f'<option value="">all {title}s</option>'
            fields.append(f'<select aria-label="{title}" data-filter="{column}">{every}{options}</select>')
    search = f'<input type="search" placeholder="method" aria-label="method" data-filter="{TEXT_COLUMNS - 1}">'
    boxes = "".join(
        f'<label><input type="checkbox" data-column="{column}"{_column_class(title)}> {escape(title)}</label>'
        for column, title in enumerate(headings(groups))
    )
    shown = f'<span><span id="shown">{len(groups)}</span> shown</span>'
    columns = f"<details><summary>columns</summary>{boxes}</details>"
    return f'<div class="choices">{"".join(fields)}{search}{columns}{shown}</div>'


def _column_class(title: str) -> str:
    return " data-key" if title in KEY_COLUMNS else " data-spare" if title in SPARE_COLUMNS else ""


def _table(groups: Sequence[Group], body_rows: Sequence[Sequence[Cell]]) -> str:
    heads = "".join(
        f'<th scope="col" aria-sort="none"{_text_class(column)}><button>{escape(title)}</button></th>'
        for column, title in enumerate(headings(groups))
    )
    body = "\n".join(f"<tr>{''.join(map(_data_cell, range(len(row)), row))}</tr>" for row in body_rows)
    return f'<table class="sortable">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>'


def _comparison(table: ComparisonTable) -> str:
    heads = "".join(f'<th scope="col"{_first_is_text(column)}>{escape(text)}</th>' for column, text in enumerate(table.headings))
    body = "\n".join(
        f"<tr>{''.join(f'<td{_first_is_text(column)}>{escape(text)}</td>' for column, text in enumerate(row))}</tr>"
        for row in table.rows
    )
    return (
        f'<h2>{escape(table.title)}</h2>\n<div class="scroll"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n'
        f"</tbody>\n</table></div>\n<p>{escape(table.caption)}</p>"
    )


def _first_is_text(column: int) -> str:
    return ' class="text"' if column == 0 else ""


def _data_cell(column: int, cell: Cell) -> str:
    value = "" if cell.value is None else str(cell.value)
    return f'<td{_text_class(column)} data-value="{escape(value)}">{escape(cell.text)}</td>'


def _text_class(column: int) -> str:
    if column >= TEXT_COLUMNS:
        return ""
    return ' class="text name"' if column == TEXT_COLUMNS - 1 else ' class="text"'


def _listing(heading: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    return f"<h2>{escape(heading)}</h2>\n<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    alt = escape(f"{picture.title}: {picture.caption}")
    image = f'<div class="scroll"><img src="data:image/png;base64,{data}" alt="{alt}"></div>'
    return f"<figure>\n<h2>{escape(picture.title)}</h2>\n{image}\n<figcaption>{escape(picture.caption)}</figcaption>\n</figure>"


def _commands(groups: Sequence[Group]) -> str:
    items = [
        f"<li>{escape(printable(str(record.folder), FOLDER_LENGTH))}, {escape(record.circumstances['device'])}: "
        f"top-1 {record.measures['last_top1']:.2f} last, {record.measures['best_top1']:.2f} best<br>"
        f"<code>{escape(record.command)}</code></li>"
        for group in groups
        for record in group.records
    ]
    return f"<details>\n<summary>Every run and its command</summary>\n<ul>{''.join(items)}</ul>\n</details>"
