"""Write the pages of docs/reference from the code: commands, merge methods, data sets, errors.

`scripts/docs --reference` writes them; a test compares them with the code.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from adaptermix.cli import COMMANDS
from adaptermix.cli.parse import SettingsOption, click_command
from adaptermix.commands.record import Command
from adaptermix.methods.listing import list_methods
from adaptermix.tasks.data.presets import PAIRS, PRESETS

DOCS = Path(__file__).parent
_NOTE = "<!-- Written by scripts/docs --reference from the code. Change the code, not this page. -->"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _options(command: click.Command) -> dict[str, list[tuple[str, str]]]:
    """Return name and description of each option of a command, by the title of its panel."""
    panels: dict[str, list[tuple[str, str]]] = {}
    with click.Context(command, info_name=f"adaptermix {command.name}") as context:
        for option in command.get_params(context):
            if isinstance(option, click.Option) and (record := option.get_help_record(context)):
                panel = option.panel if isinstance(option, SettingsOption) else "Output"
                panels.setdefault(panel, []).append(record)
    return panels


def _examples(notes: str) -> str:
    """Return the paragraphs of a help text, those that start with `Example` as command lines."""
    parts = []
    for paragraph in filter(None, (part.strip() for part in notes.split("\n\n"))):
        first, _, line = paragraph.partition(": ")
        if first.startswith("Example") and line.startswith("adaptermix"):
            title = first.removeprefix("Example").strip(", ")
            call, remark = (" ".join(part.split()) for part in f"{line}   (".split("   (")[:2])
            parts += [f"{title[:1].upper()}{title[1:]}:"] if title else []
            parts += [f"```console\n$ {call}\n```", *([f"{remark.rstrip(')').capitalize()}."] if remark else [])]
        else:
            parts.append(" ".join(paragraph.split()))
    return "\n\n".join(parts)


def command_section(record: Command) -> str:
    """Return the section of a command: summary, examples and all its options."""
    command = click_command(record)
    lines = [f"## {record.name}", "", (command.help or "").split("\n\n")[0].replace("\n", " "), ""]
    if record.notes:
        lines += [_examples(record.notes), ""]
    panels = _options(command)
    for panel, options in panels.items():
        if len(panels) > 2:
            lines += [f"**{panel}**", ""]
        elif panel == "Output":
            continue  # --json, --quiet and --help, which the top of the page has
        lines += ["| option | |", "|---|---|"]
        lines += [f"| `{_cell(name)}` | {_cell(text)} |" for name, text in options]
        lines.append("")
    return "\n".join(lines)


def commands_page() -> str:
    """Return the page of all commands."""
    contents = "\n".join(f"| [`{name}`](#{name}) | {_cell(record.summary)} |" for name, record in COMMANDS.items())
    sections = "\n".join(map(command_section, COMMANDS.values()))
    return (
        f"# Commands\n\n{_NOTE}\n\nEvery command has `--help`, `--json` (one [JSON document](json.md) on stdout, "
        "all text on stderr) and `--quiet`. Exit codes: 0 done, 1 could not be done, 2 wrong usage, 130 interrupted. "
        "In a recipe an option has the name without the dashes in front, and `_` for `-`.\n\n"
        f"| command | |\n|---|---|\n{contents}\n\n{sections}"
    )


def methods_page() -> str:
    """Return the page of all merge methods: description and options."""
    parts = [
        f"# Merge methods\n\n{_NOTE}\n\n`adaptermix merge A B --method NAME --set KEY=VALUE`. `adaptermix methods "
        "NAME` prints formula, options, shapes, source and differences from the paper.\n",
        "| method | | options and defaults |\n|---|---|---|",
    ]
    for entry in list_methods():
        if entry.name.startswith("mergekit:"):
            continue
        document = entry.document()
        options = ", ".join(f"`{name}={value}`" for name, value in dict(document["options"]).items())
        parts.append(f"| `{entry.name}` | {_cell(entry.summary)} | {options} |")
    parts.append(
        "\nWith the extra `[mergekit]`, `mergekit:NAME` runs mergekit's methods on the deltas; "
        "`adaptermix methods` lists them.\n"
    )
    return "\n".join(parts)


def errors_page() -> str:
    """Return the page of all error codes with their messages."""
    messages = json.loads((DOCS.parent / "tests" / "messages.json").read_text(encoding="utf-8"))
    lines = [
        f"# Errors\n\n{_NOTE}\n\nWith `--json` a failure is one document, "
        '`{"error": {"kind", "code", "message"}}`. Codes '
        "are stable; in messages, {} stands for a value.\n",
        "| code | kind | message |",
        "|---|---|---|",
    ]
    for code, kinds in sorted(messages.items()):
        for kind, texts in sorted(kinds.items()):
            lines += [f"| `{code}` | {kind} | {_cell(text)} |" for text in texts]
    return "\n".join(lines) + "\n"


def data_sets_page() -> str:
    """Return the page of the data sets with names."""
    lines = [
        f"# Data sets by name\n\n{_NOTE}\n\n`preset:NAME[:LANGUAGE,LANGUAGE...][:SPLIT]` is a data file of every "
        "command, such as `preset:belebele:de,tr`; see [formats](../formats.md).\n",
        "| name | data set of the Hub | tasks | default split | columns |",
        "|---|---|---|---|---|",
    ]
    for name, preset in sorted(PRESETS.items()):
        columns = ", ".join(f"`{field}={column}`" for field, column in preset.columns.items())
        tasks = ", ".join("pairs, translate" if task == PAIRS else task for task in preset.tasks)
        lines.append(f"| `{name}` | `{preset.hub}` | {tasks} | {preset.split} | {columns} |")
    return "\n".join(lines) + "\n"


PAGES = {
    "data_sets.md": data_sets_page,
    "commands.md": commands_page,
    "methods.md": methods_page,
    "errors.md": errors_page,
}


def main() -> None:
    """Write all pages."""
    for name, page in PAGES.items():
        (DOCS / "reference" / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
