"""A report as Markdown that fits a comment on a pull request: verdict, gates and main figures; the rest unfolds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any

from pifa_deploy.report_quality import parity_tables, perplexity_table, tasks_tables
from pifa_deploy.report_tables import (
    Table,
    changes_table,
    commands_of,
    engines_table,
    environment_table,
    figures_tables,
    gates_tables,
    latency_tables,
    rivals_table,
    summary,
)

SYMBOLS = {"passed": "✅", "failed": "❌", "not decided": "⚪"}
_LIMIT = 65_000  # GitHub refuses a comment of more than 65,536 characters
_ACTIVE = re.compile(r"([\\`*_\[\]|~#@!])")
Json = Mapping[str, Any]


def markdown(report: Json) -> str:
    """Returns the report as GitHub-flavoured Markdown; details that would make a comment too long are left out."""
    verdict, gates = report["verdict"], gates_tables(report)
    several = gates if len(gates) > 1 else []
    open_ones = [table for table in several if any(row[4] != "passed" for row in table.rows)]
    head = [
        f"## {SYMBOLS[verdict]} {_text(report['title'])}: {verdict}",
        f"{summary(report)}.".capitalize(),
        *map(_section, open_ones),
        *map(_table, gates[: 0 if several else 1]),
        *map(_section, figures_tables(report)),
        _section(rivals_table(report)),
        _section(changes_table(report)),
    ]
    folded = [
        _folded("Gates that passed", [table for table in several if table not in open_ones]),
        _folded("Perplexity with intervals", [perplexity_table(report)]),
        _folded("Tasks", tasks_tables(report)),
        _folded("Latency", latency_tables(report)),
        _folded("Parity", parity_tables(report)),
        _folded("Engines", [engines_table(report)]),
        _folded("Environment", [environment_table(entry) for entry in report["stages"]["bench"]]),
        _commands(report),
    ]
    text = "\n\n".join(filter(None, head))
    for part in filter(None, folded):
        if len(text) + len(part) > _LIMIT:
            text += "\n\nMore is in report.html: this comment has reached its length."
            break
        text += f"\n\n{part}"
    return text + "\n"


def _section(table: Table) -> str:
    return f"### {_text(table.title)}\n\n{_table(table)}" if table.rows else ""


def _folded(summary: str, tables: list[Table]) -> str:
    parts = [
        (f"**{_text(table.title)}**\n\n" if len(tables) > 1 else "") + _table(table) for table in tables if table.rows
    ]
    return f"<details><summary>{escape(summary)}</summary>\n\n" + "\n\n".join(parts) + "\n\n</details>" if parts else ""


def _commands(report: Json) -> str:
    commands = commands_of(report)
    # A fence longer than any run of backticks inside it.
    ticks = max([2, *(len(run) for command in commands for run in re.findall("`+", command))]) + 1
    fence = "`" * ticks
    body = "\n".join(" ".join(command.splitlines()) for command in commands)
    return f"<details><summary>Commands</summary>\n\n{fence}sh\n{body}\n{fence}\n\n</details>" if commands else ""


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    marks = ["--:" if numeric else "---" for numeric in table.numeric]
    lines = [table.columns, marks, *table.rows]
    cells = [line if line is marks else [_text(cell) for cell in line] for line in lines]
    text = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    return f"{text}\n\n{_text(table.note)}" if table.note else text


def _text(text: str) -> str:
    """Returns a text that Markdown and HTML show as it is, on one line, and that calls nobody's @name."""
    one_line = " ".join(text.split())
    return _ACTIVE.sub(r"\\\1", escape(one_line, quote=False)).replace("\\@", "@\u200b")
