"""Laws that every merge method must satisfy, as tests that a test class inherits."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ..algebra import Dense, LowRank, Stack, Update
from ..algebra import stack as stack_module
from ..methods import MergeMethod, StackMethod
from .stacks import generic, generic_stacks, messy_stacks, normal, rounding_scale, with_statistics

LAW = settings(
    max_examples=15,
    deadline=None,
    derandomize=False,
    database=None,
    phases=(Phase.explicit, Phase.generate),  # no shrinking: stacks are tiny and come from a seed
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)


def _demand(holds: bool, sentence: str) -> None:
    if not holds:
        raise AssertionError(sentence)


def _tensors(stack: Stack) -> list[Tensor]:
    tensors = [t for u in stack.updates for t in ((u.w,) if isinstance(u, Dense) else (u.b, u.a))]
    return [*tensors, *stack.statistics]


def _map(stack: Stack, change: Callable[[LowRank], Update]) -> Stack:
    return replace(stack, updates=tuple(change(u) if isinstance(u, LowRank) else u for u in stack.updates))


def _as_dense(update: LowRank) -> Dense:
    return Dense(w=update.dense())


def _cast(update: LowRank, dtype: torch.dtype) -> LowRank:
    return LowRank(b=update.b.to(dtype), a=update.a.to(dtype), scale=update.scale)


def _same_bytes(one: Update, other: Update) -> bool:
    x, y = one.dense(), other.dense()
    return x.dtype == y.dtype and torch.equal(x, y)


class MergeMethodLaws:
    """Laws of a merge method. Name a subclass TestSomething; set `method`, and False for laws that do not hold.

    Attributes:
        method: The method that is tested; its options should have an effect (a density below 1).
        neutral: The same method with options with which it only adds, for the law of one adapter; default `method`.
        max_k: Most adapters that it takes, at most 4.
        signed: Whether weights may be zero or negative.
        acute: Whether to test only with updates at acute angles, for a method that refuses updates that cancel.
        takes_dense: Whether updates may be dense matrices.
        returns_single: Whether one adapter with weight 1 is returned unchanged.
        permutable: Whether the order of the adapters has no effect.
        homogeneous: Whether updates that are c times as large give a result that is c times as large, c > 0.
        gauge_free: Whether the result depends only on the deltas, not on their factors.
        additive: Whether the merge is the sum of the merges of each adapter alone. Off by default.
        linear: Whether the result is the weighted sum. Off by default.
        tolerance: Error allowed in float64, relative to the sizes of the inputs.
    """

    method: MergeMethod
    neutral: MergeMethod | None = None
    max_k: int = 4
    signed: bool = True
    acute: bool = False
    takes_dense: bool = True
    returns_single: bool = True
    permutable: bool = True
    homogeneous: bool = True
    gauge_free: bool = True
    additive: bool = False
    linear: bool = False
    tolerance: float = 1e-8

    @property
    def _is_entrywise(self) -> bool:
        """Whether each entry of the result depends on the same entries of the updates, so that rounding is the same."""
        return isinstance(self.method, StackMethod) and self.method.gives_dense

    def prepared(self, stack: Stack, seed: int = 0) -> Stack:
        """Return a stack with the seed, if the method is random, and the statistics that the method needs."""
        return with_statistics(replace(stack, seed=seed if self.method.is_random else None), self.method.statistics)

    def merged(self, stack: Stack, method: MergeMethod | None = None) -> Update:
        """Return the merge by the method, fitted to a model of this one module."""
        return (method or self.method).fit(lambda: [stack])(stack)

    def drawn(self, data: st.DataObject, min_k: int = 1) -> Stack:
        """Return a generic stack that the method takes."""
        strategy = generic_stacks(min_k=min_k, max_k=self.max_k, signed=self.signed, acute=self.acute)
        return self.prepared(data.draw(strategy, label="stack"))

    def fixed(self, shape: tuple[int, int], *, seed: int = 5) -> Stack:
        """Return a stack of two or three adapters that is always the same."""
        k = min(3, self.max_k)
        weights = [0.9, 0.4, -0.3 if self.signed else 0.3][:k]
        # one rank for all, for methods that add factors
        return self.prepared(generic(shape, [2] * k, weights, seed=seed, acute=self.acute))

    def _demand_close(self, one: Update, other: Update | Tensor, size: float, sentence: str) -> None:
        expected = (other if isinstance(other, Tensor) else other.dense()).double()
        error = float((one.dense().double() - expected).norm())
        _demand(error <= self.tolerance * size, f"{sentence}; they differ by {error:.3g} of {size:.3g}")

    def _one_rank(self, stack: Stack) -> Stack:
        """Return the stack with factors padded with zeros to one rank, if the method needs it."""
        if self.gauge_free:
            return stack
        rank = max(u.rank for u in stack.updates if isinstance(u, LowRank))
        pad = torch.nn.functional.pad
        return _map(
            stack,
            lambda u: LowRank(b=pad(u.b, (0, rank - u.rank)), a=pad(u.a, (0, 0, 0, rank - u.rank)), scale=u.scale),
        )

    @LAW
    @given(data=st.data())
    def test_one_adapter_of_weight_one_comes_back(self, data: st.DataObject) -> None:
        """The merge of one adapter is that adapter."""
        if self.returns_single:
            stack = self.prepared(data.draw(generic_stacks(max_k=1, acute=self.acute))).weighted([1.0])
            merged = self.merged(stack, self.neutral)
            self._demand_close(
                merged,
                stack.updates[0],
                rounding_scale(stack),
                "the merge of one adapter with weight 1 must be that adapter",
            )

    @LAW
    @given(data=st.data(), seed=st.integers(0, 1000))
    def test_the_order_of_the_adapters_does_not_matter(self, data: st.DataObject, seed: int) -> None:
        """Permuting adapters with their weights, names and statistics does not change the merge."""
        if not self.permutable or self.max_k < 2:
            return
        stack = self._one_rank(self.drawn(data, min_k=2))
        order = random.Random(seed).sample(range(len(stack.updates)), len(stack.updates))  # noqa: S311
        other = replace(
            stack,
            updates=tuple(stack.updates[i] for i in order),
            weights=tuple(stack.weights[i] for i in order),
            names=tuple(stack.names[i] for i in order),
            statistics=tuple(stack.statistics[i] for i in order) if stack.statistics else (),
        )
        merged = self.merged(other)
        self._demand_close(merged, self.merged(stack), rounding_scale(stack), f"order {order} must not matter")

    @LAW
    @given(data=st.data())
    def test_zero_adapters_give_zero(self, data: st.DataObject) -> None:
        """The merge of zero adapters is zero."""
        stack = self._one_rank(self.drawn(data))
        zero = _map(stack, lambda u: LowRank(b=torch.zeros_like(u.b), a=u.a, scale=u.scale))
        merged = self.merged(zero)
        _demand(merged.shape == stack.shape, f"the shape must be {stack.shape}, got {merged.shape}")
        _demand(not bool(merged.dense().any()), "the merge of zero adapters must be zero")

    @LAW
    @given(data=st.data(), index=st.integers(0, 3))
    def test_how_an_adapter_is_zero_does_not_matter(self, data: st.DataObject, index: int) -> None:
        """B = 0, A = 0, a scale of 0 and a missing module are all the zero update."""
        if self.max_k < 2:
            return
        stack = self._one_rank(self.drawn(data, min_k=2))
        index %= len(stack.updates)
        update = stack.updates[index]
        assert isinstance(update, LowRank)  # noqa: S101
        nothing = LowRank(b=torch.zeros_like(update.b), a=torch.zeros_like(update.a))
        others: list[Update] = []
        if self.gauge_free:
            others += [LowRank(b=nothing.b, a=update.a), LowRank(b=update.b, a=nothing.a), update * 0.0]
        if self.takes_dense:
            others.append(_as_dense(nothing))

        def with_zero(zero: Update) -> Stack:
            return replace(stack, updates=(*stack.updates[:index], zero, *stack.updates[index + 1 :]))

        expected, size = self.merged(with_zero(nothing)), rounding_scale(stack)
        for zero in others:
            merged = self.merged(with_zero(zero))
            self._demand_close(merged, expected, size, "every form of a zero delta must give the same merge")

    @LAW
    @given(data=st.data(), power=st.sampled_from([-20, -3, 1, 10]))
    def test_longer_adapters_give_a_longer_merge(self, data: st.DataObject, power: int) -> None:
        """m(c x) = c m(x), c > 0."""
        if self.homogeneous:
            stack = self._one_rank(self.drawn(data))
            once = self.merged(stack)
            merged = self.merged(_map(stack, lambda u: u * 2.0**power)) * 2.0**-power
            self._demand_close(merged, once, rounding_scale(stack), f"m(c x) must be c m(x) for c = 2^{power}")

    @LAW
    @given(data=st.data(), seed=st.integers(0, 2**32 - 1))
    def test_only_the_deltas_count_not_their_factors(self, data: st.DataObject, seed: int) -> None:
        """(B R)(R^-1 A) and B A are the same adapter."""
        if not self.gauge_free:
            return
        generator = torch.Generator().manual_seed(seed)

        def refactored(update: LowRank) -> LowRank:
            q = torch.linalg.qr(normal(update.rank, update.rank, generator)).Q
            stretch = 0.5 + 1.5 * torch.rand(update.rank, generator=generator, dtype=torch.float64)
            return LowRank(b=update.b @ (q * stretch), a=(q / stretch).T @ update.a, scale=update.scale)

        stack = self.drawn(data)
        merged = self.merged(_map(stack, refactored))
        self._demand_close(merged, self.merged(stack), rounding_scale(stack), "(B R, R^-1 A) must merge as (B, A) does")

    @LAW
    @given(data=st.data())
    def test_dense_and_factored_adapters_merge_alike(self, data: st.DataObject) -> None:
        """Deltas of full checkpoints and of adapters give the same merge, also when mixed."""
        if not self.takes_dense:
            return
        stack = self.drawn(data)
        expected, size = self.merged(stack), rounding_scale(stack)
        self._demand_close(
            self.merged(_map(stack, _as_dense)), expected, size, "dense updates must merge as factors do"
        )
        mixed = replace(stack, updates=(Dense(w=stack.updates[0].dense()), *stack.updates[1:]))
        self._demand_close(self.merged(mixed), expected, size, "one dense update must merge as factors do")

    @LAW
    @given(data=st.data())
    def test_an_additive_method_is_the_sum_over_its_adapters(self, data: st.DataObject) -> None:
        """The contribution of an adapter does not depend on the other adapters."""
        if not self.additive:
            return
        stack = self.drawn(data)
        total = torch.zeros(stack.shape, dtype=torch.float64)
        each = zip(stack.updates, stack.weights, stack.names, stack.indices, strict=True)
        for update, weight, name, index in each:
            alone = replace(stack, updates=(update,), weights=(weight,), names=(name,), indices=(index,))
            total += self.merged(alone).dense()
        self._demand_close(
            self.merged(stack),
            total,
            rounding_scale(stack),
            "the merge must be the sum of the merges of each adapter alone",
        )

    @LAW
    @given(data=st.data())
    def test_a_linear_method_is_the_weighted_sum(self, data: st.DataObject) -> None:
        """The merge is the sum of w s B A."""
        if not self.linear:
            return
        stack = self.drawn(data)
        total = torch.zeros(stack.shape, dtype=torch.float64)
        for update, weight in zip(stack.updates, stack.weights, strict=True):
            total += weight * update.dense()
        self._demand_close(self.merged(stack), total, rounding_scale(stack), "the merge must be the weighted sum")

    @LAW
    @given(data=st.data(), dense=st.booleans())
    def test_inputs_are_untouched(self, data: st.DataObject, dense: bool) -> None:
        """No tensor of the stack is written to."""
        stack = self._one_rank(self.drawn(data))
        if dense and self.takes_dense:
            stack = _map(stack, _as_dense)
        before = [(tensor._version, tensor.clone()) for tensor in _tensors(stack)]
        self.merged(stack)
        for tensor, (version, copy) in zip(_tensors(stack), before, strict=True):
            _demand(tensor._version == version and torch.equal(tensor, copy), "the inputs must not be written to")

    @LAW
    @given(data=st.data(), state=st.integers(0, 2**32 - 1))
    def test_equal_inputs_give_equal_bytes(self, data: st.DataObject, state: int) -> None:
        """The state of torch's random generator has no effect, and the merge does not change it."""
        stack = self._one_rank(self.drawn(data))
        one = self.merged(stack)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(state)
            before = torch.random.get_rng_state()
            other = self.merged(stack)
            _demand(torch.equal(before, torch.random.get_rng_state()), "torch's random state must not change")
        _demand(_same_bytes(one, other), "equal inputs must give equal bytes")

    @LAW
    @given(data=st.data())
    def test_finite_adapters_give_a_finite_merge_or_one_sentence(self, data: st.DataObject) -> None:
        """This includes zeros, ties, copies, and ranks larger than the matrix."""
        stack = self._one_rank(self.prepared(data.draw(messy_stacks(max_k=self.max_k), label="stack")))
        try:
            merged = self.merged(stack)
        except ValueError as error:
            _demand(len(str(error).strip().splitlines()) == 1, f"a refusal must be one line, got {error!r}")
            return
        _demand(merged.shape == stack.shape, f"the shape must be {stack.shape}, got {merged.shape}")
        _demand(bool(torch.isfinite(merged.dense()).all()), "finite adapters must give a finite merge")

    @pytest.mark.parametrize(
        ("given_dtype", "expected"),
        [
            (torch.float64, torch.float64),
            (torch.float32, torch.float32),
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.float32),
        ],
    )
    def test_half_precision_is_merged_in_float32_and_wider_is_kept(
        self, given_dtype: torch.dtype, expected: torch.dtype
    ) -> None:
        """Half precision is a storage format: merges compute in float32 or wider."""
        stack = _map(self.fixed((6, 5)), lambda u: _cast(u, given_dtype))
        merged = self.merged(stack)
        _demand(merged.dense().dtype == expected, f"{given_dtype} must give {expected}, got {merged.dense().dtype}")
        wide = self.merged(_map(stack, lambda u: _cast(u, torch.float64)))
        error, size = float((merged.dense().double() - wide.dense()).norm()), rounding_scale(stack)
        _demand(
            error <= 1e-4 * size, f"float32 and float64 results must be close; they differ by {error:.3g} of {size:.3g}"
        )

    def test_adapters_of_several_dtypes_merge_in_the_widest(self) -> None:
        """The result equals the merge of adapters that are cast up first."""
        stack = self.fixed((6, 5))
        first = stack.updates[0]
        assert isinstance(first, LowRank)  # noqa: S101
        mixed = replace(stack, updates=(_cast(first, torch.float32), *stack.updates[1:]))
        wide = _map(mixed, lambda u: _cast(u, torch.float64))
        size = rounding_scale(stack)
        self._demand_close(self.merged(mixed), self.merged(wide), size, "a float32 adapter must be cast up first")

    @pytest.mark.parametrize("block", [1, 7, 24])
    def test_the_size_of_the_blocks_does_not_matter(self, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Blocks of one row, of several rows and of all rows give the same result."""
        stack = self.fixed((9, 7))
        if self.takes_dense:
            # Blocks of another size may round a product of factors differently.
            stack = _map(stack, _as_dense)
        whole = self.merged(stack)
        monkeypatch.setattr(stack_module, "BLOCK", block)
        merged = self.merged(stack)
        self._demand_close(merged, whole, rounding_scale(stack), "the size of the blocks must not matter")
        if self._is_entrywise and self.takes_dense:
            _demand(_same_bytes(merged, whole), "the size of the blocks must not change a byte")

    def test_the_number_of_threads_does_not_matter(self) -> None:
        """One thread and two give one result; the matrix is large enough to be split between them."""
        stack = self.fixed((183, 182))
        if self._is_entrywise and self.takes_dense:
            # More threads may round a product of factors differently.
            stack = _map(stack, _as_dense)
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(self.merged(stack))
        finally:
            torch.set_num_threads(before)
        self._demand_close(results[1], results[0], rounding_scale(stack), "the number of threads must not matter")
        if self._is_entrywise and self.takes_dense:
            _demand(_same_bytes(results[0], results[1]), "the number of threads must not change a byte")

    def test_a_random_method_follows_its_seed_and_needs_one(self) -> None:
        """Another seed or module gives other random numbers, and a missing seed is an error."""
        if not self.method.is_random:
            return
        stack = self.fixed((8, 8))
        one = self.merged(stack)
        for other in (replace(stack, seed=1), replace(stack, module="another")):
            _demand(not _same_bytes(one, self.merged(other)), "another seed or module must give other random numbers")
        with pytest.raises(ValueError, match="seed"):
            self.merged(replace(stack, seed=None))
