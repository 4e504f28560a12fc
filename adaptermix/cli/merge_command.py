"""`merge`."""

from __future__ import annotations

from ..settings import MergeSettings
from .console import Console
from .options import settings_command


@settings_command(
    MergeSettings,
    name="merge",
    text="Example: adaptermix merge task align --weights 0.9 --out merged   (0.9 of the first, 0.1 of the second)",
)
def merge(settings: MergeSettings, console: Console) -> None:
    """Merge adapters."""
    from ..compose import merge as work

    report = work(**settings.model_dump())
    weights = ", ".join(f"{weight:g}" for weight in report.weights)
    console.say(
        f"{'would merge' if settings.dry_run else 'merged'} {len(settings.adapters)} adapters, weights {weights}, "
        f"method {report.method}: {len(report.modules)} modules, norm {report.norm:.4g}, "
        f"lost to truncation {report.residual:.2%}, sign conflicts {report.sign_conflict:.1%}"
    )
    if not settings.dry_run:
        console.say(f"wrote {settings.out}")
    console.document(report.document())
