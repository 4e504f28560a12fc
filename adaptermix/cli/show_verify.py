"""Show the result of `verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .console import Console

if TYPE_CHECKING:
    from ..commands.verification import Verification
    from ..options import VerifySettings

_MOST = 20


def show(report: Verification, settings: VerifySettings, console: Console) -> int:
    """Show the differences, and return the exit code: 0 for the same, else 1."""
    for name, (before, now) in report.versions.items():
        console.say(f"version of {name}: {before or 'none'} in the manifest, {now or 'none'} here")
    for change in report.inputs:
        console.say(f"{change.text}: {change.path} (--{change.option.replace('_', '-')})")
    if report.failure:
        console.say(f"{report.command} failed: {report.failure}")
    for difference in report.differences[:_MOST]:
        where = f"{difference.file}, {difference.entry}" if difference.entry else difference.file
        size = "" if difference.largest is None else f" (largest difference {difference.largest:.3g})"
        console.say(f"{where}: {difference.text}{size}")
    if (more := len(report.differences) - _MOST) > 0:
        console.say(f"and {more} more differences; --json lists all")
    console.say(f"{report.output}: {_verdict(report, settings)}")
    return 0 if report.is_same else 1


def _verdict(report: Verification, settings: VerifySettings) -> str:
    if settings.inputs:
        return "inputs differ" if report.inputs else "all inputs are the same"
    if not report.is_rebuilt:
        return "cannot be rebuilt"
    within = f"up to {report.tolerance:g}" if report.tolerance else "to the byte"
    if report.is_same:
        return f"{report.command} made the same again, {within}"
    cause = " The other versions are the likely cause." if report.versions else ""
    return f"{report.command} made something else again.{cause}"
