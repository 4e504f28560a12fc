"""`bake`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..settings import BakeSettings
from .console import Console
from .options import settings_command

if TYPE_CHECKING:
    from ..baking import BakedModule

_SHOWN = 12


@settings_command(
    BakeSettings,
    name="bake",
    text="Example: adaptermix bake --base MODEL --adapter task --out merged   (one rounding, in the base's dtype)\n\n"
    "Example: adaptermix bake --base MODEL --adapter task --quantize nf4 --calibration texts.txt --out merged-nf4",
)
def bake(settings: BakeSettings, console: Console) -> None:
    """Write adapters into a base model."""
    from ..baking import bake as work

    report = work(settings, watch=console.watch)
    worst = sorted(report.modules.items(), key=lambda item: item[1].fidelity.kept)[:_SHOWN]
    rows = [
        [path, module.strategy, f"{module.fidelity.kept:.3f}", f"{module.fidelity.error:.3f}", _share(module)]
        for path, module in worst
    ]
    console.table(["module", "strategy", "kept", "error", "codes changed"], rows)
    if len(report.modules) > len(rows):
        console.say(
            f"  and {len(report.modules) - len(rows)} more that keep as much or more; --json lists every module"
        )
    counts = ", ".join(f"{count} {name}" for name, count in report.counts().items())
    console.say(
        f"kept {report.overall.kept:.3f} of the adapter's effect, error {report.overall.error:.3f} of it, on "
        f"{report.measured_on} (means over {len(report.modules)} modules: {counts}); {report.bytes / 1e9:.2f} GB"
    )
    ways = report.compared()
    if len(ways) > 1:
        console.table(
            ["strategy", "kept", "error", "GB"],
            [[name, f"{way.kept:.3f}", f"{way.error:.3f}", f"{way.bytes / 1e9:.3f}"] for name, way in ways.items()],
        )
    if report.overall.error >= 1:
        console.say(
            "the error is as large as the effect: outputs are no nearer to what is meant than without the adapter"
        )
    for name, score in (report.task or {}).items():
        console.say(f"dev score, {name}: {score:.4f}")
    if settings.dry_run:
        console.say("wrote nothing" + ("" if report.is_enough else f"; less than {report.least:g} is kept: refused"))
    else:
        console.say(f"wrote {settings.out}")
    console.document(report.document())


def _share(module: BakedModule) -> str:
    changed = module.fidelity.codes_changed
    return "" if changed is None else f"{changed:.1%}"
