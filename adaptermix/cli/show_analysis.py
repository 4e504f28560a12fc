"""Show the contents of adapters and models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .console import Console

if TYPE_CHECKING:
    from ..analysis import Inspection, SpectrumReport
    from ..analysis.inspect_stack import StackInspection
    from ..commands.page_report import PageReport
    from ..options import InspectSettings, ReportSettings, SpectrumSettings

_MOST_PAIRS = 3


def show_report(result: PageReport, _: ReportSettings, console: Console) -> None:
    """Show the file of the page, with the number of outputs on it."""
    console.say(f"wrote {result.out}: {len(result.entries)} outputs, {len(result.scores)} tables of scores")


def show_inspection(result: Inspection, settings: InspectSettings, console: Console) -> None:
    """Show each adapter, and every two of them together."""
    for name, stack in result.stacks.items():
        _show_stack(name, stack, console)
    if result.adapters:
        _show_adapters(result, console)
    if result.pairs:
        _show_pairs(result, console)
    if settings.plot:
        console.say(f"wrote {settings.plot}")


def _show_stack(name: str, stack: StackInspection, console: Console) -> None:
    console.say(f"stack '{name}': {stack.encoder.id} under {stack.base.id}")
    console.say(
        f"  projection of {stack.width} to {stack.own_width} dimensions, norm {stack.norm:.4g}, norm of the bias "
        f"{stack.bias_norm:.4g}; attention {stack.attention}, pooling {stack.pooling}"
    )
    tags = f"{len(stack.languages)} languages" if stack.languages else "none"
    console.say(f"  language tags: {tags}")
    if stack.unexplained is not None:
        console.say(f"  unexplained variance on dev texts: {stack.unexplained:.3f}")
    if not stack.lora:
        console.say("  without a LoRA: it is in the weights of the model on top")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _show_adapters(result: Inspection, console: Console) -> None:
    rows = []
    for adapter in result.adapters:
        numbers = adapter.group(adapter.modules) or {}
        rows.append([adapter.name, *(str(numbers[key]) for key in ("modules", "rank", "numerical_rank"))])
        rows[-1].append(f"{numbers['norm']:.4g}")
    console.table(["adapter", "modules", "rank", "numerical rank", "norm"], rows)
    for adapter in result.adapters:
        for note in adapter.notes:
            console.say(f"  note: '{adapter.name}': {note}.")
    for title, groups in (("layer", result.layers), ("module", result.kinds)):
        console.say("\nNorm, and share of the squared norm")
        rows = []
        for name, paths in groups.items():
            cells = []
            for adapter in result.adapters:
                numbers = adapter.group(paths) or {}
                cells += [_number(numbers.get("norm"), ".4g"), _number(numbers.get("share"), ".1%")]
            rows.append([name, *cells])
        console.table([title, *(cell for adapter in result.adapters for cell in (adapter.name, "share"))], rows)


def _show_pairs(result: Inspection, console: Console) -> None:
    forms = {
        "cosine": (".4f", "cosine"),
        "sign_conflict": (".1%", "sign conflict (50% is chance)"),
        "overlap": (".4f", "overlap"),
        "overlap_left": (".4f", "left"),
        "overlap_right": (".4f", "right"),
        "overlap_by_chance": (".4f", "by chance"),
        "share_a_in_b": (".2%", "first in second"),
        "share_b_in_a": (".2%", "second in first"),
    }
    console.say("\nBetween adapters")
    rows = []
    for pair in result.pairs:
        numbers = pair.group(result.locations) or {}
        rows.append([pair.name, str(len(pair.modules)), *(_number(numbers.get(key), forms[key][0]) for key in forms)])
    console.table(["pair", "modules", *(title for _, title in forms.values())], rows)
    for pair in result.pairs:
        for note in pair.notes:
            console.note(f"{note}.", "  ")
    comparable = [pair for pair in result.pairs if pair.modules]
    if len(comparable) > _MOST_PAIRS:
        console.say("  Per layer and module: --json or --plot.")
        return
    if not comparable:
        return
    for title, groups in (("layer", result.layers), ("module", result.kinds)):
        console.say(f"\nBetween adapters, per {title}: cosine, sign conflict, overlap")
        rows = []
        for name, paths in groups.items():
            cells = []
            for pair in comparable:
                numbers = pair.group(paths) or {}
                cells += [_number(numbers.get(key), forms[key][0]) for key in ("cosine", "sign_conflict", "overlap")]
            rows.append([name, *cells])
        console.table([title, *(cell for pair in comparable for cell in (pair.name, "conflict", "overlap"))], rows)


def show_spectrum(report: SpectrumReport, settings: SpectrumSettings, console: Console) -> None:
    """Show how the singular values of the models differ from those of the base."""
    if report.others:
        _show_table(report, console)
    else:
        _show_pair(report, console)
    for path in filter(None, (settings.csv, settings.table)):
        console.say(f"wrote {path}")


def _show_table(report: SpectrumReport, console: Console) -> None:
    table = report.table()
    console.say(f"Singular values of {len(table.models)} models: norm, and distance d to {report.a}")
    console.table(*table.by_layer())
    console.say("")
    console.table(*table.ratios())
    for each in (report, *report.others):
        for note in each.notes:
            console.note(f"{each.b}: {note}.", "  ")


def _show_pair(report: SpectrumReport, console: Console) -> None:
    console.say(
        f"Singular values of {report.a} (A) and {report.b} (B): {report.compared}, {len(report.modules)} modules"
    )
    rows = []
    for layer in report.layers:
        cells = [report.cell(layer, kind) for kind in report.kinds]
        rows.append(
            [
                layer,
                *(f"{c['norm_a']:.4g} -> {c['norm_b']:.4g} ({c['distance']:.3g})" if c else "-" for c in cells),
            ]
        )
    console.table(["layer", *report.kinds], rows)
    console.say("\nMeans over the layers")
    rows = []
    for kind, paths in report.kinds.items():
        numbers = report.together(paths) or {}
        means = [numbers[key] for key in ("mean_ratio", "mean_distance", "mean_relative_distance")]
        rows.append([kind, *("-" if value is None else f"{value:.4g}" for value in means)])
    console.table(["module", "ratio B/A", "d", "d / norm A"], rows)
    for note in report.notes:
        console.note(f"{note}.", "  ")
