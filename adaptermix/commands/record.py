"""The record of one command, and the functions that load and run it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from ..io.json_types import JsonObject

if TYPE_CHECKING:
    from ..options import Settings
    from ..progress import Watcher


STARTS_AGAIN = "The same command starts again from the beginning."
WITH_RESUME = "Continue with the same command and --resume."
CONTINUES = "The same command continues."


class Report(Protocol):
    """What a command returns."""

    def document(self) -> JsonObject:
        """Return the JSON document of the command."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command.

    Args:
        name: Its name on the command line and in recipes.
        summary: Its line in `adaptermix --help`.
        options: Class of its options, in `adaptermix.options`.
        run: The function that does it, as MODULE:FUNCTION in this package. It takes the options and `watch`, and
            returns a report with `document()`, or that document. None where `show` does the work.
        show: The function that shows the report, as MODULE:FUNCTION in `adaptermix.cli`. It takes the report, the
            options and the console. None for steps of recipes that the command line lacks.
        notes: Further paragraphs of its help text.
        takes_fields: Whether `run` takes the options as keyword arguments.
        plan: The function of the options that returns the plan in a dry run, if it is not `run`.
        in_recipes: Whether it can be a step of a recipe.
        in_processes: Whether several processes can run it together.
        hidden: Options that only recipes and Python have.
        function: Its name in `adaptermix`, if it is made from this record.
        makes: Description of its output in the model card.
        after_interrupt: What a user can do after Ctrl-C or SIGTERM, as a sentence.
    """

    name: str
    summary: str
    options: str
    run: str | None = None
    show: str | None
    notes: str = ""
    takes_fields: bool = False
    plan: str | None = None
    in_recipes: bool = True
    in_processes: bool = False
    hidden: tuple[str, ...] = ()
    function: str | None = None
    makes: str | None = None
    after_interrupt: str = STARTS_AGAIN

    def schema(self) -> type[Settings]:
        """Return the class of the options."""
        schema: type[Settings] = load(f"options:{self.options}")
        return schema

    def call(self, settings: Settings, *, watch: Watcher, **more: object) -> Report | JsonObject:
        """Run the command with its options, and further arguments of its function, and return the report.

        Raises:
            AdapterMixError: the work could not be done.
        """
        if self.plan and getattr(settings, "dry_run", False):
            plan: Report | JsonObject = load(self.plan)(settings)
            return plan
        return self.report(settings, watch=watch, **more)

    def report(self, settings: Settings, *, watch: Watcher, **more: object) -> Report | JsonObject:
        """Run the command as `call` does; a dry run for which it has no report is refused.

        Raises:
            AdapterMixError: the work could not be done.
        """
        run = load(self.run or "")
        with self.recorded(lambda: settings):
            report: Report | JsonObject = (
                run(**settings.model_dump(), watch=watch) if self.takes_fields else run(settings, watch=watch, **more)
            )
        return report

    def recorded(self, settings: Callable[[], Settings]) -> AbstractContextManager[None]:
        """Let the manifests that a block writes record this command and its options; see `requested`."""
        from .request import is_recorded, requested  # imports pydantic, which --help does without

        can_repeat = self.in_recipes and is_recorded(self.schema())
        return requested(self.name, settings) if can_repeat else nullcontext()


def load(name: str) -> Any:
    """Return the class or function that a text MODULE:NAME names in this package."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(f"..{module}", __package__), attribute)


def document_of(report: Report | JsonObject) -> JsonObject:
    """Return the JSON document of a report."""
    return report if isinstance(report, dict) else report.document()
