"""`push`."""

from __future__ import annotations

from ..options import PushSettings
from .console import Console
from .options import settings_command


@settings_command(PushSettings, name="push", text="Example: adaptermix push merged me/slots-merged --dry-run")
def push(settings: PushSettings, console: Console) -> None:
    """Publish an adapter."""
    from ..publish.hub import push as work

    report = work(settings, watch=console.watch)
    if settings.dry_run:
        console.say(report.card)
    console.say(f"{'would push' if report.url is None else 'pushed'} {len(report.files)} files to {report.repo}:")
    console.table(["file", "bytes"], [[name, f"{size:,}"] for name, size in report.files])
    if report.url:
        console.say(report.url)
    console.document(report.document())
