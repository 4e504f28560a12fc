"""`methods`."""

from __future__ import annotations

from ..options import MethodsSettings
from .console import Console
from .options import settings_command


@settings_command(
    MethodsSettings,
    name="methods",
    text="Example: adaptermix methods ties   (the formula, the options, the paper)",
)
def methods(settings: MethodsSettings, console: Console) -> None:
    """List the methods."""
    from ..methods.listing import list_methods

    found = list_methods(settings.names)
    for entry in found:
        options = ", ".join(
            key if value is ... else f"{key}={'none' if value is None else value}"
            for key, value in entry.options.items()
        )
        if settings.names:
            console.say(f"{entry.name}\n\n{entry.text}\n\nOptions (--set KEY=VALUE): {options or 'none'}\n")
        else:
            console.say(f"{entry.name}\n    {entry.summary}" + (f"\n    options: {options}" if options else ""))
    console.document({"methods": [entry.document() for entry in found]})
