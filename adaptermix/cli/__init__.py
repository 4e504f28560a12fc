"""The command line: parse, call one library function, show its report."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys

import click

from ..commands import table
from ..errors import did_you_mean
from ..io.launcher import is_main_process, process_count
from .console import close_streams, fail
from .signals import Interrupts

COMMANDS = {name: command for name, command in table.COMMANDS.items() if command.show}


class _Commands(click.Group):
    """Makes a command when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        from .parse import click_command  # imports pydantic, which --help does without

        return click_command(COMMANDS[cmd_name])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"No such command '{args[0]}'.{did_you_mean(args[0], COMMANDS)}", ctx)
        if process_count() > 1 and args and not args[0].startswith("-") and not COMMANDS[args[0]].in_processes:
            raise click.UsageError(f"Several processes can train; start '{args[0]}' without a launcher.", ctx)
        if args[:1] == ["search"] and args[1:] and args[1].endswith((".yaml", ".yml")):
            args = ["tune", *args[1:]]
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.summary) for name, command in COMMANDS.items()])


def _version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        from .. import __version__

        click.echo(f"adaptermix {__version__}")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def adaptermix() -> None:
    """Merge task adapters and alignment adapters across languages.

    Train an alignment LoRA and a task LoRA apart, merge them exactly, find the weight on a dev set, score per language,
    publish a plain PEFT adapter.
    """


def _prepare(arguments: list[str]) -> None:
    """Set what must be set before torch and transformers are imported."""
    # Importing makes many objects and no garbage: collecting it less often starts about a tenth faster.
    gc.set_threshold(100_000, 50, 50)
    # The process ends and takes everything with it: a last search through all of torch would cost a quarter second.
    atexit.register(gc.freeze)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Waiting threads sleep instead of spinning: as fast on a free machine, up to 3 times faster on a busy one.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    if "--quiet" in arguments or not sys.stderr.isatty() or not is_main_process():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    # On some processors it warns at every start about a package that adaptermix does not use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 could not be done, 2 wrong usage, 130 after SIGINT or SIGTERM."""
    is_called = arguments is not None  # by a program that continues afterwards
    arguments = sys.argv[1:] if arguments is None else arguments
    interrupts = Interrupts()
    try:
        interrupts.install()
        _prepare(arguments)
        # outside click's error handling, so that failures are JSON with --json
        code = adaptermix.main(arguments, prog_name="adaptermix", standalone_mode=False)
        interrupts.end(restore=is_called)
    except BaseException as error:  # turned into exit codes, or raised again
        interrupts.end(restore=is_called)
        command = COMMANDS.get(arguments[0]) if arguments else None
        after_interrupt = command.after_interrupt if command else ""
        code = fail(error, as_json="--json" in arguments, after_interrupt=after_interrupt)
        close_streams()
    sys.exit(code if isinstance(code, int) else 0)
