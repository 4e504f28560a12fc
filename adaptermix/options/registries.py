"""Registries of names that other packages can extend; options are checked without importing torch.

The entries themselves are registered by the packages that define them: `tasks`, `tasks.heads`, `fusion`,
`baking`, `models.formats` and `publish.engines`.
"""

from __future__ import annotations

from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from pydantic import AfterValidator

from ..errors import InvalidValueError
from ..io.registry import Registry

_SHARED = {"base", "labels", "metrics", "overlap", "prompts", "splits", "tagged", "test_record"}
"""Modules of `tasks` that tasks share. Every other module there is a task of the module's name."""


def _task_names() -> list[str]:
    modules = iter_modules([str(Path(__file__).parent.parent / "tasks")])
    return [each.name.replace("_", "-") for each in modules if not each.ispkg and each.name not in _SHARED]


TASKS: Registry[Any] = Registry("task", "adaptermix.tasks", built_in=_task_names(), instances=True)
HEADS: Registry[Any] = Registry(
    "head", "adaptermix.heads", built_in=("classes", "tokens", "span", "choices"), instances=True
)
FUSIONS: Registry[Any] = Registry(
    "fusion",
    "adaptermix.fusions",
    built_in=("add", "mul", "add-relu", "mul-relu", "gated", "cross-attention", "cross-attention-paper"),
)
STRATEGIES: Registry[Any] = Registry(
    "strategy", "adaptermix.strategies", built_in=("requantize", "stochastic", "calibrated", "residual")
)
FORMATS: Registry[Any] = Registry(
    "quantised format", "adaptermix.formats", built_in=("nf4", "fp4", "int8", "int4"), instances=True
)
ENGINES: Registry[Any] = Registry(
    "engine",
    "adaptermix.engines",
    built_in=("vllm", "sglang", "tensorrt-llm", "llama.cpp", "mlx"),
    instances=True,
)


class OneOf(AfterValidator):
    """Annotation of an option whose value is a name: one of a registry, or one of a few other names.

    Attributes:
        choices: The names that this package has, for help texts.
    """

    choices: tuple[str, ...]


def one_of(*choices: str | Registry[Any]) -> OneOf:
    """Return the annotation of an option that may be any of these names, or any name of these registries."""
    registries = [each for each in choices if isinstance(each, Registry)]
    words = [each for each in choices if isinstance(each, str)]

    def check(name: str) -> str:
        if name not in words and not any(name in registry for registry in registries):
            names = [*words, *(name for registry in registries for name in registry.names())]
            raise InvalidValueError(f"must be one of {', '.join(names)}", code="option.unknown")
        return name

    listed = [each.built_in if isinstance(each, Registry) else (each,) for each in choices]
    made = OneOf(check)
    object.__setattr__(made, "choices", tuple(name for names in listed for name in names))
    return made
