"""Write the LoRA of a stack, and adapters that were trained on the stack, into the model on top."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..adapters import open_adapters
from ..checkpoints.stack_files import copy_stack
from ..errors import PlanError
from ..io.files import check_not_input, check_output, whole_folder
from ..io.fingerprints import fingerprint
from ..merging.merge_adapters import check_trained_on
from ..merging.on_model import refuse_own_adapter
from ..models.base import fingerprint_of
from ..models.stack import ADAPTER, PARTS, Part, StackForm, stack_folder
from ..models.stack_parts import check_found, check_parts
from ..options import BakeSettings
from ..options.paths import holds_output
from ..options.roles import Role, marked
from ..progress import SILENT, Watcher
from ..provenance import manifest
from ..publish.output import write_documents
from .report import BakeReport
from .run import bake as bake_model

BASE = "base"
"""Folder of the model on top in the folder of a baked stack."""
_NOT_ON_STACKS = ("quantize", "calibration", "task")


@holds_output
def bake(settings: BakeSettings, *, watch: Watcher = SILENT) -> BakeReport:
    """Merge adapters into their base model, and measure how much of their effect remains.

    The sum of the adapters' deltas is added in float32 and rounded once. With `--quantize` the base is quantised as
    bitsandbytes does it, or is quantised already, and the strategy decides how the delta is written. transformers and
    bitsandbytes load the result without this package. Only one tensor at a time is in memory. With calibration texts
    the model is in memory too, with the input statistics of as many modules as fit. An interrupted run of a strategy
    that chooses codes continues when it is called again.

    For a stack the output is a stack whose model on top has the stack's own LoRA and the adapters in its weights.

    Raises:
        AdapterMixError: adapters and base do not match, too little of the adapter's effect would remain, or the output
            cannot be written.
    """
    folder = stack_folder(settings.base)
    if folder is not None:
        return _bake_stack(folder, settings, watch)
    if not settings.adapter:
        raise PlanError("bake needs an adapter to write: give --adapter DIR.", code="bake.no-adapter")
    return bake_model(settings, watch=watch)


def _bake_stack(folder: Path, settings: BakeSettings, watch: Watcher) -> BakeReport:
    form, out = StackForm.read(folder), Path(settings.out)
    _check(folder, form, settings)
    tasks = open_adapters(settings.adapter) if settings.adapter else []
    if not settings.allow_base_mismatch:
        check_trained_on(tasks, fingerprint(folder), settings.base)
    refuse_own_adapter(settings.base, tasks)
    first = [str(folder / ADAPTER)] if form.lora else []
    # Adapters of the stack name the stack as their base, which was compared above.
    more = {"base": form.base.id, "adapter": first + settings.adapter, "allow_base_mismatch": True}
    if settings.dry_run:
        return bake_model(settings.model_copy(update=more), watch=watch)
    check_output(out, overwrite=settings.overwrite)
    check_not_input(out, [folder, form.base.id, form.encoder.id, *settings.adapter])
    with whole_folder(out, overwrite=settings.overwrite) as new:
        inner = {"out": str(new / BASE), "overwrite": False}
        report = bake_model(settings.model_copy(update=more | inner), watch=watch)
        top = Part(id=str(new / BASE), fingerprint=fingerprint(new / BASE))
        baked = replace(form, base=top, lora=False)
        copy_stack(folder, new, baked)
        document = dict(manifest.origin_of(new / BASE).manifest)
        document |= {
            "artifact": "stack",
            "plan": settings.model_dump(mode="json", exclude={"out", *marked(settings, Role.HANDLING, Role.MACHINE)}),
            "stack": baked.stored(new),
            **{k: v for k, v in manifest.files_of([manifest.origin_of(folder)], document).items() if v is not None},
        }
        document.pop("files", None)
        write_documents(new, document, name=out.name)
    return replace(report, out=out)


def _check(folder: Path, form: StackForm, settings: BakeSettings) -> None:
    if unused := settings.changed(_NOT_ON_STACKS):
        raise PlanError(
            f"a stack is baked in 16 bits or more, without data, so drop --{unused[0]}. In 4 bits its own LoRA would "
            "be lost: commands that load the stack with --quantize nf4 keep it next to the weights.",
            code="bake.stack-option",
        )
    if settings.strategy not in ("auto", "merge-16"):
        raise PlanError(
            f"a stack is baked by adding to its weights, so drop --strategy {settings.strategy}.",
            code="bake.stack-strategy",
        )
    if not form.lora and not settings.adapter:
        raise PlanError(
            f"the LoRA of the stack {folder} is in its weights already: give --adapter for a further adapter.",
            code="bake.no-adapter",
        )
    check_found(folder, form)
    check_parts(folder, form, {name: fingerprint_of(getattr(form, name).id) for name in PARTS})
