"""Which modules the settings of an adapter select, as PEFT decides it when it loads the adapter.

PEFT builds a LoRA on the modules that the settings select, and ignores tensors of any others without a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from ..errors import AdapterFormatError
from .keys import plain_path
from .patterns import whole_match
from .state import AdapterMeta, TargetSpec

_BLOCK = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")
_EVERY = ("all-linear", "dummy-target-modules")
"""Keywords of PEFT. The modules that they select depend on the base model, which is not loaded here."""
_TIED = ("embed_tokens", "lm_head")
"""Modules that PEFT ties with `ensure_weight_tying`, and then removes one of them from the targets."""


class Selection:
    """The modules that the settings of an adapter select.

    Args:
        spec: The target modules.
        saved: Names of fully trained modules, which PEFT never adapts.
    """

    def __init__(self, spec: TargetSpec, saved: Iterable[str] = ()) -> None:
        self._spec, self._saved = spec, tuple(saved)
        self._names = frozenset(() if isinstance(spec.modules, str) else spec.modules)
        self._left_out = frozenset(() if isinstance(spec.exclude, str) else spec.exclude or ())

    @property
    def is_known(self) -> bool:
        """Whether every part of the settings is understood here, so that `reaches` decides what PEFT decides."""
        regular = self._matches if isinstance(self._spec.modules, str) else True
        excluded = self._excludes if isinstance(self._spec.exclude, str) else True
        return regular is not None and excluded is not None and not self.is_refused and not self._has_regular_layers

    @property
    def is_refused(self) -> bool:
        """Whether PEFT refuses the settings: block numbers with a regular expression."""
        spec = self._spec
        return isinstance(spec.modules, str) and bool(spec.layers or spec.layers_pattern)

    @property
    def _has_regular_layers(self) -> bool:
        return bool(self._spec.layers) and not all(
            re.fullmatch(r"\w+", name) for name in self._spec.layers_pattern or ()
        )

    @cached_property
    def _matches(self) -> Callable[[str], bool] | None:
        return whole_match(self._spec.modules) if isinstance(self._spec.modules, str) else None

    @cached_property
    def _excludes(self) -> Callable[[str], bool] | None:
        return whole_match(self._spec.exclude) if isinstance(self._spec.exclude, str) else None

    def reaches(self, module: str) -> bool:
        """Return whether PEFT adapts a module; True where a regular expression is not understood here."""
        if self._is_excluded(module) or any(f".{name}." in f".{module}." for name in self._saved):
            return False
        modules = self._spec.modules
        if isinstance(modules, str):
            return modules.lower() in _EVERY or self._matches is None or self._matches(module)
        return module in self._names or (_ends_with(module, self._names) and self._is_in_layers(module))

    def _is_excluded(self, module: str) -> bool:
        if isinstance(self._spec.exclude, str):
            return self._excludes is not None and self._excludes(module)
        return _ends_with(module, self._left_out)

    def _is_in_layers(self, module: str) -> bool:
        if not self._spec.layers or self._has_regular_layers:
            return True
        match = None
        for name in self._spec.layers_pattern or ("",):
            match = re.match(rf"(?:^|.*?\.){name}\.(?P<index>\d+)\.", module) if name else _BLOCK.match(module)
            if match is not None:
                break
        return match is not None and int(match["index"]) in self._spec.layers


def _ends_with(module: str, names: Collection[str]) -> bool:
    """Return whether a path is one of the names or ends in a dot and a name. Fast, since names may be thousands."""
    start = 0
    while True:
        if module[start:] in names:
            return True
        start = module.find(".", start) + 1
        if not start:
            return False


def unreached(meta: AdapterMeta, modules: Iterable[str]) -> list[str]:
    """Return the modules of an adapter that PEFT would leave out when it loads it.

    Args:
        meta: Description of the adapter.
        modules: Paths of the modules that it has factors for.
    """
    selection = Selection(meta.targets, meta.saved_modules)
    left_out = [module for module in modules if not selection.reaches(module)]
    if meta.targets.tied:
        return [module for module in left_out if module.rpartition(".")[2] not in _TIED]
    return left_out


def selecting(meta: AdapterMeta, stored: Mapping[str, str], path: Path) -> TargetSpec:
    """Return target modules that select every module of a file.

    Args:
        meta: Description of the adapter.
        stored: Path of each module as the file has it, by its path without wrapper modules.
        path: The file, for messages.

    Raises:
        AdapterFormatError: the settings leave out modules that the file holds.
    """
    targets = meta.targets
    if not isinstance(targets.modules, str):
        targets = replace(targets, modules=tuple(map(plain_path, targets.modules)))
    left_out = unreached(replace(meta, targets=targets), stored)
    if not left_out:
        return targets
    # Settings of a wrapped model may name the wrappers.
    left_out = unreached(meta, (stored[module] for module in left_out))
    if not left_out:
        return TargetSpec(modules=tuple(sorted(stored)))
    raise AdapterFormatError(
        f"{path.parent} must have settings that select every module of its {path.name}, but they leave out "
        f"{len(left_out)} of {len(stored)}, such as '{left_out[0]}', so peft would load only the others. Correct "
        "target_modules, exclude_modules, layers_to_transform or modules_to_save, or remove their tensors.",
        code="config.leaves-out",
    )


def written_targets(meta: AdapterMeta, modules: Iterable[str]) -> TargetSpec:
    """Return target modules that select every module of an adapter: its own, or full paths if these may miss some.

    Args:
        meta: Description of the adapter.
        modules: Paths of the modules that it has factors for.
    """
    paths = tuple(sorted(modules))
    selection = Selection(meta.targets, meta.saved_modules)
    if meta.targets.tied or not selection.is_known or not all(map(selection.reaches, paths)):
        return TargetSpec(modules=paths)
    return meta.targets
