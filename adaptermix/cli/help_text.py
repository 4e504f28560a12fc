"""Help texts of commands: of long ones the common options, and all of them in panels on request."""

from __future__ import annotations

from typing import Any

import click

from ..options.roles import Panel

OPTIONS = "Options"
_OUTPUT = "Output"
_ONE_LINE = 80
"""Longest description, in characters, that the short help text shows whole."""
_LONGEST_NAMES = 60
"""Longest names of an option with its choices, in characters, that the short help text shows whole."""
_ORDER = [panel.value for panel in Panel]
_SHOWS_ALL = "adaptermix.help_all"


class SettingsOption(click.Option):
    """An option of a command, with its place in the help text.

    Args:
        panel: Title above it in the whole help text of commands with many options.
        is_common: Whether the short help text shows it too.
    """

    def __init__(self, *arguments: Any, panel: str, is_common: bool, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.panel, self.is_common = panel, is_common


class HelpfulCommand(click.Command):
    """Shows the common options by `--help`, in short, and all of them in panels by `--help-all`.

    A command without rare options has one help text.
    """

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the description; of a long command in short the first paragraph and the first example."""
        if self._is_short(ctx) and self.help:
            first, *others = self.help.split("\n\n")
            example = next((text for text in others if text.startswith("Example")), "")
            formatter.write_paragraph()
            with formatter.indentation():
                formatter.write_text(f"{first}\n\n{example}".strip())
            return
        super().format_help_text(ctx, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, the common ones or panel by panel."""
        options = [option for option in self.get_params(ctx) if isinstance(option, click.Option)]
        if self._is_short(ctx):
            self._format_common(ctx, formatter, options)
            return
        panels: dict[str, list[tuple[str, str]]] = {panel.value: [] for panel in Panel}
        last = _OUTPUT if self._has_rare() else OPTIONS
        for option in options:
            if record := option.get_help_record(ctx):
                panels.setdefault(getattr(option, "panel", last), []).append(record)
        for panel, records in panels.items():
            if records:
                with formatter.section(panel):
                    formatter.write_dl(records)

    def _format_common(self, ctx: click.Context, formatter: click.HelpFormatter, options: list[click.Option]) -> None:
        settings = [option for option in options if isinstance(option, SettingsOption)]
        common = sorted(
            (option for option in settings if option.is_common),
            key=lambda option: (not option.required, _ORDER.index(option.panel)),
        )
        with formatter.section(OPTIONS):
            formatter.write_dl([record for option in common if (record := _short_record(ctx, option))])
        formatter.write_paragraph()
        left_out = len(settings) - len(common)
        formatter.write_text(f"Also --json, --quiet and {left_out} more options: {ctx.command_path} --help-all")

    def _has_rare(self) -> bool:
        return any(isinstance(option, SettingsOption) and not option.is_common for option in self.params)

    def _is_short(self, ctx: click.Context) -> bool:
        return self._has_rare() and not ctx.meta.get(_SHOWS_ALL, False)


def _short_record(ctx: click.Context, option: click.Option) -> tuple[str, str] | None:
    """Return the names of an option with its description, of a long one the first clause, and its default."""
    record = option.get_help_record(ctx)
    if record is None:
        return None
    names, text = record
    if len(names) > _LONGEST_NAMES:
        names = f"{names.partition('[')[0]}NAME"
    text, opened, default = text.partition("  [")
    if len(text) > _ONE_LINE:
        text = text.partition(";")[0]
    return names, text + opened + default


def help_all_option() -> click.Option:
    """Return the option that shows the whole help text.

    It is hidden, since the last line of a short help text names it; without rare options it is the same as --help.
    """
    return click.Option(
        ["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_show_all, hidden=True
    )


def _show_all(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_SHOWS_ALL] = True
        click.echo(ctx.get_help())
        ctx.exit()
