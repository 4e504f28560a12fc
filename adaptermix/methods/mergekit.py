"""Any of mergekit's methods, run on the deltas."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..algebra import Dense, Stack
from ..errors import PlanError, UsageError, did_you_mean
from .base import FAMILIES, MergeMethod

NEEDED = (0, 1, 5)
_INTERPOLATE = ("slerp",)
"""Methods whose parameter t is the share of the second of two models, which is what the weights say."""


def _registry() -> dict[str, Any]:
    """Return mergekit's methods by name.

    Raises:
        PlanError: mergekit is not installed, or too old.
    """
    import warnings
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("mergekit")
    except PackageNotFoundError as error:
        raise PlanError(
            "methods named mergekit:NAME need mergekit, which is not installed: pip install 'mergekit>=0.1.5'."
        ) from error
    if tuple(int(part) for part in found.split(".")[:3] if part.isdigit()) < NEEDED:
        raise PlanError(f"methods named mergekit:NAME need mergekit >= 0.1.5, found {found}: pip install -U mergekit.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from mergekit import merge_methods
        except ImportError as error:
            raise PlanError(f"mergekit {found} must import, and does not: {error}. Reinstall it.") from error
    return {entry.spec.name: entry for entry in merge_methods.registered_methods()}


def mergekit_methods() -> dict[str, dict[str, Any]]:
    """Return the options of each of mergekit's methods with their defaults; `...` where one must be given.

    Raises:
        PlanError: mergekit is not installed, or too old.
    """
    return {
        name: {p.name: ... if p.required else p.default for p in entry.spec.parameters if p.name != "weight"}
        for name, entry in sorted(_registry().items())
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Mergekit(MergeMethod):
    r"""A method of mergekit on the deltas, through its in-memory API.

    Deltas take the place of the models. A method that wants a base model gets zeros, since every delta is a difference
    from one base; one that takes exactly two models, the first being its base (slerp, nearswap), gets the deltas alone.

    Args:
        member: mergekit's name of the method.
        options: Its parameters; the weights are those of the merge.

    Shapes: k updates [out in] give one dense [out in].
    Differs from mergekit: arithmetic in float32 or wider; random methods are seeded per module.
    Reference: Goddard et al., Arcee's MergeKit, EMNLP 2024 (industry track), arXiv 2403.13257.
    """

    name: ClassVar[str] = "mergekit"
    is_random: ClassVar[bool] = True
    member: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Family and member."""
        return f"mergekit:{self.member}"

    def __call__(self, stack: Stack) -> Dense:
        """Run mergekit's method.

        Raises:
            ValueError: mergekit refuses the stack, or the method takes no weights and they are not equal.
        """
        from mergekit.merge_methods.api import merge_tensors

        entry = _registry()[self.member]
        deltas = [update.to(stack.dtype).dense() for update in stack.updates]
        parameters = dict(self.options)
        if any(parameter.name == "weight" for parameter in entry.spec.parameters):
            parameters["weight"] = dict(zip(stack.names, stack.weights, strict=True))
        elif self.member in _INTERPOLATE:
            parameters["t"] = _second_share(stack.weights, parameters.get("t"))
        elif len(set(stack.weights)) > 1:
            raise ValueError(f"it takes no weights; give equal ones, got {list(stack.weights)}")
        ids, base = self._inputs(entry, list(stack.names))
        if len(ids) > len(deltas):
            deltas.insert(0, torch.zeros_like(deltas[0]))
        digest = hashlib.sha256(f"{stack.seed}\0{stack.module}".encode()).digest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(digest[:7], "little"))
            try:
                merged = merge_tensors(deltas, entry, parameters=parameters, ids=ids, base_index=base)
            except (RuntimeError, TypeError, KeyError, AssertionError) as error:
                raise ValueError(f"it refuses the deltas: {error}") from error
        return Dense(w=merged.to(stack.dtype))

    def _inputs(self, entry: Any, names: list[str]) -> tuple[list[str], int | None]:
        """Return ids and the place of the base, for the first arrangement that the method accepts.

        Without a base first: methods that can do without would count the zeros as one more model.
        """
        reason: Exception | None = None
        for ids, base in ((names, None), (["base model", *names], 0), (names, 0)):
            try:
                entry.validate_inputs(ids, None if base is None else ids[base])
            except (ValueError, RuntimeError, TypeError) as error:
                reason = error
                continue
            return ids, base
        raise ValueError(f"it cannot merge {len(names)} adapters: {reason}")


def _second_share(weights: Sequence[float], given: float | None) -> float:
    """Return how far to go from the first adapter to the second: as the weights say, which `t` must not contradict."""
    if len(weights) != 2 or sum(weights) == 0:
        raise ValueError(f"it interpolates between two adapters, got weights {list(weights)}")
    share = weights[1] / sum(weights)
    if given is None or abs(given - share) < 1e-9:
        return share
    if weights[0] != weights[1]:
        raise ValueError(f"t must be the second weight's share, {share:g}, or be left out, got {given:g}")
    return given


def _build(member: str, options: Mapping[str, Any]) -> Mergekit:
    known = mergekit_methods()
    if member not in known:
        raise UsageError(
            f"unknown method {member!r} of mergekit.{did_you_mean(member, known)} Known: {', '.join(known)}."
        )
    for key in options:
        if key not in known[member]:
            raise UsageError(
                f"unknown option of method 'mergekit:{member}' {key!r}.{did_you_mean(key, known[member])} "
                f"Known: {', '.join(known[member]) or 'none'}."
            )
    for key, default in known[member].items():
        if default is ... and key not in options and not (key == "t" and member in _INTERPOLATE):
            raise UsageError(f"method 'mergekit:{member}' needs the option {key!r}: --set {key}=VALUE.")
    return Mergekit(member=member, options=dict(options))


FAMILIES["mergekit"] = _build
