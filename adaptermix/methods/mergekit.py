"""Any of mergekit's methods, run on the deltas."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..algebra import Dense, Stack, norm
from ..errors import InvalidValueError, PlanError, UsageError, did_you_mean
from ..io.json_types import JsonObject
from .base import FAMILIES, MergeMethod
from .mergekit_options import PARTS, Parameters, check_option, per_adapter

if TYPE_CHECKING:
    from mergekit.merge_methods.base import MergeMethod as TheirMethod

NEEDED = (0, 1, 5)
_INTERPOLATE = ("slerp",)
"""Methods whose parameter t is the share of the second of two models, which the weights determine."""
_FIRST_IS_BASE = ("slerp", "nearswap")
"""Methods of exactly two models; mergekit calls the first one the base."""
_ANGLES = ("slerp", "nuslerp", "model_stock")
"""Methods of the angles between the deltas: undefined for a zero delta."""
_DIVIDE = {"linear": "normalize", "multislerp": "normalize_weights"}
"""Methods that always divide by the sum of the weights, and the option that controls it."""
_SEEDLESS = (
    *("linear", "slerp", "nuslerp", "multislerp", "nearswap", "passthrough", "model_stock", "karcher", "ram"),
    *("ramplus_tl", "sce", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties"),
)
"""Methods known to draw no random numbers."""
_REFUSED = {
    "arcee_fusion": "compares the softmax of whole weights, which deltas are not, and uses its first model as the base"
}


@cache
def _registry() -> dict[str, TheirMethod]:
    """Return mergekit's methods by name.

    Raises:
        PlanError: mergekit is not installed, or too old.
    """
    import warnings
    from importlib.metadata import PackageNotFoundError, version

    try:
        result = version("mergekit")
    except PackageNotFoundError as error:
        raise PlanError(
            "methods named mergekit:NAME need mergekit, which is not installed: pip install 'mergekit>=0.1.5'.",
            code="mergekit.not-installed",
        ) from error
    if tuple(int(part) for part in result.split(".")[:3] if part.isdigit()) < NEEDED:
        raise PlanError(
            f"methods named mergekit:NAME need mergekit >= 0.1.5, found {result}: pip install -U mergekit.",
            code="mergekit.version",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from mergekit import merge_methods
        except ImportError as error:
            raise PlanError(
                f"mergekit {result} must import, and does not: {error}. Reinstall it.", code="mergekit.import"
            ) from error
    return {entry.spec.name: entry for entry in merge_methods.registered_methods()}


def mergekit_methods() -> dict[str, JsonObject]:
    """Return the options of each of mergekit's methods with their defaults; `...` where one must be given.

    Raises:
        PlanError: mergekit is not installed, or too old.
    """
    return {
        name: {p.name: ... if p.required else p.default for p in entry.spec.parameters if p.name != "weight"}
        for name, entry in sorted(_registry().items())
        if name not in _REFUSED
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Mergekit(MergeMethod):
    r"""A method of mergekit on the deltas, through its in-memory API.

    Deltas replace the models, and zeros replace the base model where a method needs one, since every delta is
    a difference from one base. For slerp and nearswap, which take exactly two models, mergekit calls the first the
    base; they get two deltas, and nearswap stays with the first. No other method gets an adapter as its base. Vectors
    and kernels have the shape that they have in the model.

    Weights: those of the merge, where the method has weights (the share of the second is `t` of slerp, the weight of a
    single adapter is `scale` of passthrough). A method without weights counts each of k adapters 1/k, and weights that
    say anything else are refused. linear, multislerp, slerp and nuslerp divide by the sum of the weights, and ties and
    della, entry by entry, by that of the survivors: an entry that one adapter alone has keeps its full value.

    Zeros: a delta that is zero, or of a module that an adapter lacks, is one of the inputs. For slerp, nuslerp and
    model_stock, which are about angles, a zero has no angle: the others are merged, times their share of the weights.

    Args:
        member: mergekit's name of the method.
        options: Its parameters. Those that mergekit has per model may be one value, a list in the order of the
            adapters, or a mapping from adapter names.

    Shapes: k updates [out in] give one dense [out in].
    Differs from mergekit: arithmetic in float32 or wider; random methods are seeded per module, and draw for the
    adapters in the order of their content. arcee_fusion is refused: on deltas it would be another method.
    Reference: Goddard et al., Arcee's MergeKit, EMNLP 2024 (industry track), arXiv 2403.13257.
    """

    name: ClassVar[str] = "mergekit"
    member: str
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Family and member."""
        return f"mergekit:{self.member}"

    @property
    def gives_dense(self) -> bool:
        """Whether the result is a full matrix for all kinds of updates."""
        return True

    def __call__(self, stack: Stack) -> Dense:
        """Run mergekit's method.

        Raises:
            ValueError: mergekit refuses the stack, or would ignore its weights.
        """
        if self.is_random and stack.seed is None:
            raise InvalidValueError("a seed is needed for a random method, got none", code="method.no-seed")
        entry = _registry()[self.member]
        _check_count(entry, stack)
        parameters = self._parameters(entry, stack)
        order = self._order(stack)
        if not any(norm(update) > 0 for update in stack.updates):
            return Dense(w=torch.zeros(stack.shape, dtype=stack.dtype, device=stack.device))
        if self.member not in _ANGLES:
            return Dense(w=self._run(entry, stack, order, parameters))
        # A list of one adapter is that of a pair whose other adapter weighs 0.
        shares = _shares(stack, parameters.get("t")) if len(order) > 1 else [1.0]
        acting = [index for index in order if norm(stack.updates[index]) > 0]
        if len(acting) == len(order) > 1:
            return Dense(w=self._run(entry, stack, order, parameters))
        if len(acting) > 1:
            return Dense(w=self._run(entry, stack, acting, parameters) * sum(shares[index] for index in acting))
        total = torch.zeros(stack.shape, dtype=stack.dtype, device=stack.device)
        for index in acting:
            total += shares[index] * stack.updates[index].to(stack.dtype).dense()
        return Dense(w=total)

    def _order(self, stack: Stack) -> list[int]:
        """Return the order in which mergekit gets the updates: for random methods it determines the order of draws."""
        indices = list(range(len(stack.updates)))
        if not self.is_random:
            return indices
        # Zeros last: with or without them the others draw the same numbers.
        return sorted(indices, key=lambda index: (norm(stack.updates[index]) == 0, stack.names[index]))

    def _parameters(self, entry: TheirMethod, stack: Stack) -> Parameters:
        """Return the parameters, with those of single adapters as lists in the order of the stack."""
        result: Parameters = {
            name: per_adapter(name, value, stack) if _is_per_adapter(entry, name) else value
            for name, value in self.options.items()
        }
        weights = list(stack.weights)
        if any(parameter.name == "weight" for parameter in entry.spec.parameters):
            option = _DIVIDE.get(self.member, "")
            if result.get(option, bool(option)) and abs(sum(weights)) <= 1e-9 * sum(map(abs, weights)):
                raise InvalidValueError(
                    f"it divides by the sum of the weights, which must not be 0, got {weights}. "
                    f"Give weights that do not cancel, or --set {option}=false",
                    code="mergekit.zero-sum",
                )
            result["weight"] = weights
        elif self.member in _INTERPOLATE:
            if len(weights) > 1:
                result["t"] = _second_share(weights, result.get("t"))
        elif self.member == "passthrough":
            result["scale"] = [_scale(weights[0], result.get("scale"))]
        else:
            _check_equal(weights)
        return result

    @staticmethod
    def _drops(parameters: Parameters) -> bool:
        density = parameters.get("density", 1.0)
        return any(value < 1 for value in (density if isinstance(density, list) else [density]))

    def _run(self, entry: TheirMethod, stack: Stack, chosen: Sequence[int], parameters: Parameters) -> Tensor:
        """Return mergekit's merge of some of the updates, as [out in]."""
        from mergekit.merge_methods.api import merge_tensors

        shape = stack.tensor_shape or stack.shape
        deltas = [stack.updates[index].to(stack.dtype).dense().reshape(shape) for index in chosen]
        if self.member.startswith("della") and self._drops(parameters):
            _check_rows(shape)
        ids = [f"adapter {index + 1}" for index in chosen]
        base = _base_index(entry)
        if base is not None and self.member not in _FIRST_IS_BASE:
            ids, deltas = ["base model", *ids], [torch.zeros_like(deltas[0]), *deltas]
        by_adapter = {
            name: dict(zip(ids[-len(chosen) :], (value[index] for index in chosen), strict=True))
            if _is_per_adapter(entry, name) and isinstance(value, list)
            else value
            for name, value in parameters.items()
        }
        digest = hashlib.sha256(f"{stack.seed}\0{stack.module}".encode()).digest()
        devices = [stack.device] if stack.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int.from_bytes(digest[:7], "little"))
            try:
                merged: Tensor = merge_tensors(deltas, entry, parameters=by_adapter, ids=ids, base_index=base)
            except (RuntimeError, TypeError, KeyError, AssertionError, ValueError, IndexError) as error:
                raise InvalidValueError(
                    f"mergekit refuses the deltas: {' '.join(str(error).split())}", code="mergekit.refused"
                ) from error
        if not bool(torch.isfinite(merged).all()):
            raise InvalidValueError(
                f"mergekit's result is not finite with weights {list(stack.weights)}", code="mergekit.not-finite"
            )
        return merged.reshape(stack.shape).to(stack.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomMergekit(Mergekit):
    """A method of mergekit that draws random numbers."""

    is_random: ClassVar[bool] = True


def _is_per_adapter(entry: TheirMethod, name: str) -> bool:
    return any(parameter.name == name and parameter.scope.value in PARTS for parameter in entry.spec.parameters)


def _base_index(entry: TheirMethod) -> int | None:
    """Return the index of the base among the inputs: first where a method needs one, else none.

    A method whose base is optional gets none: it would count the zeros as one more model.
    """
    return 0 if entry.spec.contract.base.value == "required" else None


def _check_count(entry: TheirMethod, stack: Stack) -> None:
    """Refuse a count of adapters that the method does not take.

    Raises:
        ValueError: there are too few or too many.
    """
    contract, name, count = entry.spec.contract, entry.spec.name, len(stack.updates)
    with_base = int(_base_index(entry) is not None and name not in _FIRST_IS_BASE)
    least = max(1, contract.min_inputs - with_base, contract.min_non_base or 0)
    if name in _ANGLES and stack.weights == (1.0,):
        least = 1  # the end of a line from one adapter to another
    most = contract.max_inputs - with_base if contract.max_inputs is not None else contract.max_non_base
    if least <= count and (most is None or count <= most):
        return
    expected = f"exactly {least}" if least == most else f"at least {least}" if count < least else f"at most {most}"
    more = "; an adapter of weight 0 is left out" if count < least else ""
    raise InvalidValueError(
        f"it merges {expected} adapter{'s' * (expected[-1] != '1')}, got {count}{more}", code="mergekit.adapter-count"
    )


def _check_rows(shape: Sequence[int]) -> None:
    """Refuse rows of one entry, which have no ranks by size.

    Raises:
        ValueError: mergekit would divide by zero.
    """
    if (shape[0] if len(shape) == 1 else shape[1]) == 1:
        raise InvalidValueError(
            f"it ranks the entries of a row, and rows of {list(shape)} have one entry", code="mergekit.short-rows"
        )


def _check_equal(weights: Sequence[float]) -> None:
    """Refuse weights that a method without weights would ignore.

    Raises:
        ValueError: they are not 1/k each.
    """
    count = len(weights)
    # Weights may be rounded to two digits, such as 0.33 for 1/3.
    if len(set(weights)) > 1 or abs(sum(weights) - 1) > 0.005 * count + 1e-9:
        raise InvalidValueError(
            f"it takes no weights; give equal ones that sum to 1 ({', '.join([f'{1 / count:.3g}'] * count)}), "
            f"got {list(weights)}",
            code="mergekit.equal-weights",
        )


def _shares(stack: Stack, second: float | None) -> list[float]:
    """Return the share of each adapter: as mergekit divides the weights, or 1/k each."""
    total = sum(stack.weights)
    if second is not None:
        return [1 - second, second]
    if abs(total) < 1e-6:
        return [1 / len(stack.weights)] * len(stack.weights)
    return [weight / total for weight in stack.weights]


def _scale(weight: float, option: float | list[float] | None) -> float:
    """Return the scale of the one adapter of passthrough: its weight, which `scale` must not contradict."""
    scale = option[0] if isinstance(option, list) else option
    if scale is None or abs(scale - weight) < 1e-9:
        return weight
    if weight != 1:
        raise InvalidValueError(
            f"scale must be the adapter's weight, {weight:g}, or be left out, got {scale:g}", code="mergekit.scale"
        )
    return float(scale)


def _second_share(weights: Sequence[float], option: float | None) -> float:
    """Return how far to go from the first adapter to the second: as the weights say, which `t` must not contradict."""
    if len(weights) != 2 or sum(weights) == 0:
        raise InvalidValueError(
            f"it interpolates between two adapters, got weights {list(weights)}", code="mergekit.two-adapters"
        )
    share = weights[1] / sum(weights)
    if option is None or abs(option - share) < 1e-9:
        return share
    if weights[0] != weights[1]:
        raise InvalidValueError(
            f"t must be the second weight's share, {share:g}, or be left out, got {option:g}", code="mergekit.share"
        )
    return option


def _build(member: str, options: Mapping[str, object]) -> Mergekit:
    known = mergekit_methods()
    if member in _REFUSED:
        raise UsageError(
            f"mergekit's {member} {_REFUSED[member]}. Use mergekit itself on whole models.", code="mergekit.unsupported"
        )
    if member not in known:
        raise UsageError(
            f"unknown method {member!r} of mergekit.{did_you_mean(member, known)} Known: {', '.join(known)}.",
            code="mergekit.unknown",
        )
    for key in options:
        if key not in known[member]:
            raise UsageError(
                f"unknown option of method 'mergekit:{member}' {key!r}.{did_you_mean(key, known[member])} "
                f"Known: {', '.join(known[member]) or 'none'}.",
                code="mergekit.unknown-option",
            )
    for key, default in known[member].items():
        if default is ... and key not in options and not (key == "t" and member in _INTERPOLATE):
            raise UsageError(
                f"method 'mergekit:{member}' needs the option {key!r}: --set {key}=VALUE.",
                code="mergekit.option-missing",
            )
    for parameter in _registry()[member].spec.parameters:
        if parameter.name in options:
            check_option(member, parameter, options[parameter.name])
    kind = Mergekit if member in _SEEDLESS else RandomMergekit
    return kind(member=member, options=dict(options))


def describe(member: str) -> str:
    """Return the description of mergekit's method for users: the first line is a summary."""
    entry = _registry()[member]
    takes = {parameter.name for parameter in entry.spec.parameters}
    lines = [f"mergekit's {member}, run on the deltas.", "", "Its options are mergekit's own parameters."]
    if member in _INTERPOLATE:
        lines.append("The share of the second weight is its `t`.")
    elif member == "passthrough":
        lines.append("The weight of the one adapter is its `scale`.")
    elif "weight" not in takes:
        lines.append("It takes no weights: each of k adapters counts 1/k, and other weights are refused.")
    if member in _DIVIDE or member in ("slerp", "nuslerp"):
        lines.append("It divides by the sum of the weights.")
    if member in _ANGLES:
        lines.append("A zero delta has no angle: the others are merged, times their share of the weights.")
    if member == "nearswap":
        lines.append("It stays with the first adapter and takes the second's entries where the two are near.")
    lines += ["", *_sentences(entry)]
    return "\n".join(line for line in lines).strip()


def _sentences(entry: TheirMethod) -> Iterable[str]:
    """Yield where mergekit says that a method is from."""
    if entry.spec.reference_url:
        yield f"Reference: {entry.spec.reference_url}"


FAMILIES["mergekit"] = _build
