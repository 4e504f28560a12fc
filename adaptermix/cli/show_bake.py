"""Show how much of the adapters' effect a bake kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .console import Console

if TYPE_CHECKING:
    from ..baking import BakedModule, BakeReport
    from ..baking.fidelity import Fidelity
    from ..baking.report import Compared
    from ..options import BakeSettings

_ROWS = 12


def show(report: BakeReport, settings: BakeSettings, console: Console) -> None:
    """Show the worst modules, the means over all, and the strategies."""
    overall = report.overall
    has_rest = overall.kept_rest is not None
    titles = ["kept", "error", *(["kept, rest", "error, rest"] if has_rest else [])]
    worst = sorted(report.modules.items(), key=lambda item: item[1].fidelity.least_kept)[:_ROWS]
    rows = [[path, module.strategy, *_figures(module.fidelity, has_rest), _share(module)] for path, module in worst]
    console.table(["module", "strategy", *titles, "codes changed"], rows)
    if len(report.modules) > len(rows):
        console.say(
            f"  and {len(report.modules) - len(rows)} more that keep as much or more; --json lists every module"
        )
    counts = ", ".join(f"{count} {name}" for name, count in report.counts().items())
    console.say(
        f"kept {overall.kept:.3f} of the adapter's effect, error {overall.error:.3f} of it, on "
        f"{report.measured_on} (means over {len(report.modules)} modules: {counts}); {report.bytes / 1e9:.2f} GB"
    )
    if has_rest:
        console.say(
            f"without the first token of each text (rest): kept {overall.kept_rest:.3f}, error {overall.error_rest:.3f}"
        )
    ways = report.compared()
    if len(ways) > 1:
        console.table(
            ["strategy", *titles, "GB"],
            [[name, *_figures(way, has_rest), f"{way.bytes / 1e9:.3f}"] for name, way in ways.items()],
        )
    if overall.most_error >= 1:
        console.say("the error is as large as the effect: outputs are no closer to the target than without the adapter")
    for name, score in (report.task or {}).items():
        console.say(f"dev score, {name}: {score:.4f}")
    if settings.dry_run:
        console.say("wrote nothing" + ("" if report.is_enough else f"; less than {report.least:g} is kept: refused"))
    else:
        console.say(f"wrote {settings.out}")


def _figures(fidelity: Fidelity | Compared, has_rest: bool) -> list[str]:
    """Return the kept share and the error, then both without first tokens if some module has these."""
    figures = [fidelity.kept, fidelity.error, *([fidelity.kept_rest, fidelity.error_rest] if has_rest else [])]
    return ["" if figure is None else f"{figure:.3f}" for figure in figures]


def _share(module: BakedModule) -> str:
    changed = module.fidelity.codes_changed
    return "" if changed is None else f"{changed:.1%}"
