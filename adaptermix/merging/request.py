"""Run the `merge` command: adapters or full checkpoints."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from ..errors import PlanError, UsageError
from ..io.checkpoint_files import INDEX, SINGLE
from ..methods.base import build
from ..models.stack import stack_folder
from ..options import MergeSettings
from ..options.paths import holds_output
from ..options.roles import Role, marked
from ..progress import SILENT, Watcher
from .merge_adapters import merge
from .report import MergeReport
from .stacks import merge_stacks


def is_checkpoint(path: str | Path) -> bool:
    """Return whether a folder contains a full checkpoint and not an adapter."""
    folder = Path(path)
    return not (folder / "adapter_config.json").exists() and any((folder / name).is_file() for name in (SINGLE, INDEX))


@holds_output
def merge_with_settings(settings: MergeSettings, *, watch: Watcher = SILENT) -> MergeReport:
    """Merge the inputs of the settings and return the report; a method with learned weights learns them first.

    Raises:
        AdapterMixError: as `merge` and `merge_checkpoints`; UsageError for data that the method does not use; PlanError
            for a mixture of adapters and checkpoints.
    """
    stacks = [path for path in settings.adapters if stack_folder(path)]
    method = build(settings.method, {key: value for key, value in settings.options.items() if "@" not in key})
    if method.learner:
        if stacks:
            raise PlanError(
                f"method '{method.title}' learns weights of adapters, and {stacks[0]!r} is a stack, which is a base "
                f"model. Pass adapters that were trained on it (--base {stacks[0]}).",
                code="merge.stack",
            )
        module, _, function = method.learner.partition(":")
        learned: MergeReport = getattr(import_module(module), function)(settings, watch=watch)
        return learned
    if unused := settings.changed(sorted(marked(settings, Role.LEARNING))):
        raise UsageError(
            f"--{unused[0].replace('_', '-')} is for methods that learn their weights (fuse); "
            f"method '{method.title}' does not. Leave it out.",
            code="gates.option",
        )
    if stacks:
        return merge_stacks(settings, watch=watch)
    full = [is_checkpoint(path) for path in settings.adapters]
    if not any(full):
        options = settings.model_dump(exclude=marked(settings, Role.LEARNING))
        return merge(options.pop("adapters"), watch=watch, **options)
    if not all(full):
        raise PlanError(
            "inputs must be all adapters or all checkpoints, got both. Merge the adapters into the base first: "
            "--form dense --base MODEL.",
            code="merge.mixed-inputs",
        )
    if settings.base is None:
        raise PlanError(
            "checkpoints are merged as differences from their base model: pass --base MODEL.",
            code="checkpoint.needs-base",
        )
    only = marked(settings, Role.ADAPTERS_ONLY)
    unused = settings.changed(name for name in MergeSettings.model_fields if name in only)
    unused += [key for key in settings.options if "@" in key]
    if unused:
        raise PlanError(
            f"checkpoints are merged whole, and {unused[0]!r} is for adapters. Leave it out.",
            code="checkpoint.adapter-option",
        )
    from .checkpoints import merge_checkpoints

    return merge_checkpoints(
        settings.base,
        settings.adapters,
        settings.weights,
        method=settings.method,
        options=settings.options,
        out=None if settings.dry_run else settings.out,
        dtype=settings.dtype,
        device=settings.device,
        overwrite=settings.overwrite,
        seed=settings.seed,
        watch=watch,
    )


merge_learned = merge_with_settings
"""The earlier name of `adaptermix.merge` with settings."""
