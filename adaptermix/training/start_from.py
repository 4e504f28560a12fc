"""The adapter that training starts from: the settings that it decides, and its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from ..adapters import AdapterSource, open_adapter
from ..adapters.keys import PREFIX, in_modules
from ..adapters.paths import fitted
from ..errors import IncompatibleAdapters, PlanError
from ..io.files import check_not_input
from ..merging.merge_adapters import check_trained_on
from ..merging.on_model import refuse_own_adapter
from ..merging.overrides import layer_of
from ..options import TrainingSettings
from ..tasks.heads.from_adapters import form_of_head
from .lora import factor_name, is_head, stored_name

S = TypeVar("S", bound=TrainingSettings)


def open_start(settings: S) -> tuple[S, AdapterSource | None]:
    """Return the settings completed from the adapter that training starts from, and that adapter, if there is one.

    Args:
        settings: The run's settings. Rank, alpha and blocks are those of the adapter; where its modules differ in rank
            or alpha, the commonest stands for all.

    Raises:
        AdapterFormatError: the adapter is damaged.
        OutputError: it would be replaced.
        PlanError: it has modules that are not trained here, is also in `on_top_of`, or contradicts the settings.
    """
    if settings.start_from is None:
        return settings, None
    check_not_input(Path(settings.out), [settings.start_from])
    source = open_adapter(Path(settings.start_from))
    _check_kind(source)
    if source.saved_headers and not hasattr(settings, "task"):
        raise PlanError(
            f"the adapter '{source.name}' has a head, which would be lost: train --on-top-of it instead.",
            code="start-from.head",
        )
    if settings.on_top_of and open_adapter(Path(settings.on_top_of)).digest == source.digest:
        raise PlanError(
            f"--start-from and --on-top-of name the same adapter, '{source.name}', which would act twice: drop one.",
            code="start-from.same-adapter",
        )
    decided = _decided(source)
    _check_given(settings, source, {name: values for name, values in decided.items() if name != "targets"})
    taken = {name: values[0] for name, values in decided.items()}
    if "targets" in settings.model_fields_set:  # `all-linear` depends on the model
        del taken["targets"]
    settings = settings.model_copy(update=taken)
    try:
        settings.check_together()
    except ValueError as error:
        raise PlanError(f"{error} (the adapter '{source.name}' is one with --dora).", code="start-from.dora") from error
    return settings, source


def _check_kind(source: AdapterSource) -> None:
    """Refuse an adapter with parts that training would drop or not change."""
    meta, form = source.meta, form_of_head(source)
    heads = (*meta.saved_modules, *(form.modules if form else ()))
    whole = [key for key in source.saved_headers if not in_modules(key.removeprefix(PREFIX), heads)]
    plain = replace(source.settings, meta=replace(meta, dora=False))
    others = list(
        replace(source, settings=plain, saved_headers={key: source.saved_headers[key] for key in whole}).beyond_linear
    )
    others += [f"modules outside the blocks ({module})" for module in source.modules if layer_of(module) is None][:1]
    if others:
        raise PlanError(
            f"training can start from LoRAs and DoRAs on linear layers of the blocks, with or without a head, but "
            f"'{source.name}' has {', '.join(others)}. "
            + (
                "'adaptermix merge --base' makes a plain LoRA of it."
                if meta.initial
                else "Pass an adapter without them."
            ),
            code="start-from.kind",
        )


def _decided(source: AdapterSource) -> dict[str, list[object]]:
    """Return the values of each setting that an adapter decides, the commonest first."""
    modules, lora = source.modules, source.settings
    numbers = [number for module in modules if (number := layer_of(module)) is not None]

    def by_count(values: Iterable[object]) -> list[object]:
        return [value for value, _ in Counter(values).most_common()]

    return {
        "rank": by_count(header.rank for header in modules.values()),
        "alpha": by_count(lora.alpha_of(module) for module in modules),
        "rslora": [lora.rslora],
        "dora": [lora.meta.dora],
        "blocks": [f"{min(numbers)}-{max(numbers)}"],
        "targets": [sorted({module.rpartition(".")[2] for module in modules})],
    }


def _check_given(settings: TrainingSettings, source: AdapterSource, decided: Mapping[str, list[object]]) -> None:
    """Refuse settings that were given and are not those of the adapter."""
    clashes = [
        f"--{name} {getattr(settings, name)} (it has {' and '.join(map(str, values))})"
        for name, values in decided.items()
        if name in settings.model_fields_set and values != [getattr(settings, name)]
    ]
    if clashes:
        # a user who trained it with another alpha will wonder
        scaled = any("--alpha" in clash for clash in clashes) and bool(source.meta.manifest)
        raise PlanError(
            f"with --start-from the adapter '{source.name}' decides, so drop {', '.join(clashes)}"
            f"{'; its alpha is its rank, since its scale lies in its factors' if scaled else ''}.",
            code="start-from.option",
        )


def fit_start(
    model: nn.Module, start: AdapterSource, settings: TrainingSettings, *, fingerprint: str | None
) -> AdapterSource:
    """Return the adapter with the paths that its modules have in the model.

    Args:
        model: The base model, whole and without a LoRA.
        start: The adapter.
        settings: The run's settings.
        fingerprint: Hash of the base model's files, if they are on disk.

    Raises:
        IncompatibleAdapters: files, names or shapes show that it was trained on another base model.
        PlanError: it is the adapter of a stack.
    """
    refuse_own_adapter(settings.base, [start])
    if not settings.allow_base_mismatch:
        check_trained_on([start], fingerprint, settings.base)
    modules = dict(model.named_modules())
    start = fitted(start, modules)
    for path, header in start.modules.items():
        module = modules.get(path)
        shape = (getattr(module, "out_features", header.out), getattr(module, "in_features", header.into))
        if module is None or (header.out, header.into) != shape:
            there = "the model lacks the module" if module is None else f"the model's weight is {list(shape)}"
            raise IncompatibleAdapters(
                f"module '{path}': the update of '{start.name}' is {[header.out, header.into]}, and {there}. The "
                "adapter was trained on another base model.",
                code="start-from.shape",
            )
    return start


def values_of(start: AdapterSource, names: Iterable[str]) -> dict[str, Tensor]:
    """Return an adapter's tensors by the names of the parameters that start from them.

    Args:
        start: The adapter, fitted to the model.
        names: Names of all trainable parameters; a head that the adapter does not have is left out.

    Raises:
        AdapterFormatError: a tensor holds NaN or infinity.
        PlanError: the adapter has a head that the model has not.
    """
    tensors: dict[str, Tensor] = {}
    for module in start.modules:
        update, magnitude = start.load(module), start.magnitude(module)
        tensors |= {factor_name(module, "A"): update.a, factor_name(module, "B"): update.b}
        tensors |= {} if magnitude is None else {factor_name(module, "magnitude_vector"): magnitude}
    heads = {stored_name(name): name for name in names if is_head(name)}
    if start.saved_headers and set(heads) != set(start.saved_headers):
        odd = sorted(set(heads) ^ set(start.saved_headers))[0].removeprefix(PREFIX)
        raise PlanError(
            f"the adapter '{start.name}' has a head, and this run has not the same ('{odd}'), so it would be lost or "
            "mixed up. Train the task of that head, or merge the adapter without it.",
            code="start-from.other-head",
        )
    return tensors | {heads[key]: start.load_saved(key) for key in start.saved_headers}
