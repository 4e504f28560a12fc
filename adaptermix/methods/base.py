"""What a merge method is, and the table of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from ..algebra import Stack, Update
from ..algebra.operators import Operator, chain
from ..errors import InvalidValueError, PlanError, UsageError, code_of, did_you_mean
from ..io.json_types import JsonObject
from ..io.registry import Registry

Stacks = Callable[[], Iterable[Stack]]
"""Returns a new iterator over the stacks of all modules at each call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeMethod(ABC):
    """A pure function from the updates of one module to their merge; its fields are its hyper-parameters."""

    name: ClassVar[str]
    is_random: ClassVar[bool] = False
    """Whether it draws random numbers, so that the stack must have a seed."""
    statistics: ClassVar[Literal["out in", "in in"] | None] = None
    """Shape of the statistics that it needs for each update, if any."""
    is_linear: ClassVar[bool] = False
    """Whether the result is a linear combination of the updates, so of low rank if they are."""
    cuts_to_largest_rank: ClassVar[bool] = False
    """Whether the result is cut to the largest rank of the inputs unless another is requested."""
    takes_factors: ClassVar[bool] = False
    """Whether it works on the factors themselves, whose ranks must then be those of the files."""
    learner: ClassVar[str] = ""
    """For a method that learns or measures before it merges, the function that does both, as `package.module:name`: it
    gets the merge settings and `watch`, and returns the merge report."""
    roles: ClassVar[tuple[str, ...]] = ()
    """What each adapter is, in their order, where that matters; it then takes exactly so many."""
    factor: ClassVar[str | None] = None
    """The option that does nothing but multiply the result, if there is one."""

    @property
    def title(self) -> str:
        """Name for messages."""
        return self.name

    @property
    def is_learned(self) -> bool:
        """Whether the method learns or measures before it merges."""
        return bool(self.learner)

    @property
    def gives_dense(self) -> bool:
        """Whether the result is a full matrix for all kinds of updates."""
        return False

    @abstractmethod
    def __call__(self, stack: Stack) -> Update:
        """Merge the updates of one module.

        Shapes: k updates of [out in] give one of [out in].

        Raises:
            ValueError: the method cannot do this stack (a count, a weight, a missing seed).
        """

    def measured(self, stack: Stack) -> tuple[Update, float]:
        """Return the merge, and the share of the weighted updates' norm that the method itself truncated, in [0, 1].

        A method that truncates its inputs overrides this; all others cut nothing.
        """
        return self(stack), 0.0

    def check_depth(self, depth: int) -> None:  # noqa: B027
        """Refuse options that count more blocks than the model has.

        Args:
            depth: Number of blocks of its deepest stack, according to the adapters.

        Raises:
            ValueError: there are fewer.
        """

    def fit(self, stacks: Stacks) -> MergeMethod:  # noqa: ARG002
        """Return the method fitted to the whole model, before the first module is merged."""
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearMethod(MergeMethod):
    """A method that gives one coefficient per update; its result is exact and stays low rank."""

    is_linear: ClassVar[bool] = True
    depends_on_deltas: ClassVar[bool] = False
    """Whether the coefficients depend on lengths and angles of the deltas, and not on the weights alone."""

    @abstractmethod
    def coefficients(self, stack: Stack) -> Sequence[float]:
        """Return one coefficient per update; they may depend on norms and angles."""

    def multipliers(self, stack: Stack, weights: Sequence[float]) -> tuple[float, ...]:
        """Return the factor on each adapter's delta that reports show: its weight or, in a role, its coefficient.

        Args:
            stack: The updates that enter the merge of a module.
            weights: Weight of every adapter of the merge there.
        """
        if not self.roles:
            return tuple(weights)
        result = dict(zip(stack.indices, self.coefficients(stack), strict=True))
        return tuple(result.get(index, 0.0) for index in range(len(weights)))

    def __call__(self, stack: Stack) -> Update:
        """Combine the updates."""
        return stack.combined(self.coefficients(stack))


def is_weighted_sum(method: MergeMethod | type[MergeMethod]) -> bool:
    """Return whether the coefficients of a method, or of a class of them, come from the weights alone."""
    cls = method if isinstance(method, type) else type(method)
    return issubclass(cls, LinearMethod) and not cls.depends_on_deltas


def check_roles(method: MergeMethod, count: int) -> None:
    """Refuse a number of adapters that a method with a role for each cannot take.

    Raises:
        UsageError: it cannot.
    """
    if method.roles and count != len(method.roles):
        raise UsageError(
            f"method '{method.title}' takes {len(method.roles)} adapters in this order: {', '.join(method.roles)}. "
            f"Got {count}.",
            code="method.roles",
        )


def check_depths(method: MergeMethod, depths: Mapping[str, int]) -> None:
    """Refuse options that count more blocks than the model has, before anything is merged or evaluated.

    Args:
        method: The method.
        depths: Number of blocks of each stack, according to the adapters.

    Raises:
        PlanError: the deepest stack has fewer.
    """
    try:
        method.check_depth(max(depths.values(), default=0))
    except ValueError as error:
        raise PlanError(f"method '{method.title}': {error}.", code=code_of(error, "method.failed")) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class StackMethod(MergeMethod):
    """A method that works entry by entry on the dense updates, as a chain of operators; its result is dense."""

    @property
    def is_learned(self) -> bool:
        """Whether the method learns or measures before it merges."""
        return bool(self.learner)

    @property
    def gives_dense(self) -> bool:
        """Whether the result is a full matrix for all kinds of updates."""
        return True

    @abstractmethod
    def operators(self) -> Sequence[Operator]:
        """Return the chain; the last but the gain is a reduction."""

    def __call__(self, stack: Stack) -> Update:
        """Run the chain, block by block."""
        return chain(stack, self.operators())


METHODS: Registry[type[MergeMethod]] = Registry("merge method", "adaptermix.methods")
"""Methods by name. Entry points of other packages load to a class with the decorator `@method`."""
FAMILIES: dict[str, Callable[[str, Mapping[str, object]], MergeMethod]] = {}
"""What makes the methods of names such as `mergekit:NAME`, by the word before the colon."""

_M = TypeVar("_M", bound=type[MergeMethod])


def method(name: str) -> Callable[[_M], _M]:
    """Enter a method in the table under a name that is not taken."""

    def enter(cls: _M) -> _M:
        METHODS.add(name, cls)
        cls.name = name
        return cls

    return enter


def options_of(cls: type[MergeMethod]) -> JsonObject:
    """Return the options of a method with their defaults; `...` where one must be given."""
    result = {}
    for field in fields(cls):
        if field.metadata.get("internal"):
            continue
        default = field.default if field.default is not MISSING else ...
        result[field.name] = default
    return result


def require_share(name: str, value: float) -> None:
    """Refuse a share outside (0, 1].

    Raises:
        ValueError: it is.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise InvalidValueError(f"{name} must be in (0, 1], got {value!r}", code="method.share")


def require_floor(value: float) -> None:
    """Refuse a floor outside [0, 1).

    Raises:
        ValueError: it is.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise InvalidValueError(f"floor must be in [0, 1), got {value!r}", code="method.floor")


def _check_type(cls: type[MergeMethod], key: str, value: object) -> None:
    """Refuse a value that is not of the field's type, or not finite.

    Raises:
        PlanError: it is not.
    """
    from pydantic import TypeAdapter, ValidationError

    hint = get_type_hints(cls)[key]
    try:
        TypeAdapter(hint).validate_python(value, strict=True)
    except ValidationError as error:
        expected = getattr(hint, "__name__", str(hint)).replace("typing.", "")
        if get_origin(hint) is Literal:
            expected = " or ".join(map(str, get_args(hint)))
        raise UsageError(
            f"option '{key}' of method '{cls.name}' must be {expected}, got {value!r}.", code="method.option-type"
        ) from error
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(
            f"option '{key}' of method '{cls.name}' must be finite, got {value!r}.", code="method.option-finite"
        )


def _unknown(what: str, name: str, known: Sequence[str]) -> str:
    return f"unknown {what} {name!r}.{did_you_mean(name, known)} Known: {', '.join(known) or 'none'}."


def build(name: str, options: Mapping[str, object]) -> MergeMethod:
    """Return the method of this name with these hyper-parameters.

    Raises:
        PlanError: no such method, no such option, or a value that the method refuses.
    """
    family, colon, member = name.partition(":")
    if colon and family in FAMILIES:
        return FAMILIES[family](member, options)
    if name not in METHODS:
        raise UsageError(_unknown("merge method", name, METHODS.names()), code="method.unknown")
    cls = METHODS[name]
    known = list(options_of(cls))
    for key in options:
        if key not in known:
            raise UsageError(_unknown(f"option of method '{name}'", key, known), code="method.unknown-option")
    for key, value in options.items():
        _check_type(cls, key, value)
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"method '{name}': {str(error).rstrip('.')}.", code=code_of(error, "method.option-value")
        ) from error
