"""What is searched: parameters to candidates and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptermix.merging.overrides import Override
from adaptermix.weight_search.parameters import Choice, Interval
from adaptermix.weight_search.space import Candidate, Space, alone, depth_groups, grid_weights

units = st.floats(0, 1, allow_nan=False)


@st.composite
def spaces(draw):
    layers = draw(st.integers(0, 3))
    return Space(
        count=draw(st.integers(2, 5)),
        simplex=draw(st.booleans()),
        places=depth_groups(range(12), layers) if layers else (),
        knots=draw(st.integers(1, 3)) if layers else 1,
        options={"density": Interval(0.1, 0.9)} if draw(st.booleans()) else {},
    )


@given(spaces(), st.data())
def test_every_point_is_a_candidate_of_the_space(space, data):
    point = {name: data.draw(st.floats(parameter.low, parameter.high)) for name, parameter in space.parameters.items()}
    candidate = space.candidate(point)
    vectors = [point for place in candidate.overrides for point in place.points] or [candidate.weights]
    assert len(vectors) == max(1, len(space.places)) * space.knots
    for vector in vectors:
        assert len(vector) == space.count
        assert min(vector) >= 0
        if space.simplex:
            assert sum(vector) == pytest.approx(1, abs=1e-9)
        else:
            assert max(vector) <= space.reach[1]
    assert candidate.weights == pytest.approx(tuple(np.mean(vectors, axis=0)), abs=1e-3)
    assert candidate.options == {name: point[name] for name in space.options}


@given(st.lists(st.integers(0, 100), min_size=2, max_size=5).filter(any))
def test_weights_that_hold_everywhere_come_back(parts):
    weights = [part / sum(parts) for part in parts]
    space = Space(count=len(parts), places=depth_groups(range(8), 2))
    found = space.candidate(space.point(weights, {}))
    for place in found.overrides:
        assert place.points[0] == pytest.approx(weights, abs=2e-3)


def test_uniform_parameters_are_uniform_weights():
    """Of uniform weights on the simplex each has the mean 1/k and the variance (k - 1) / (k^2 (k + 1))."""
    rng = np.random.default_rng(0)
    space = Space(count=4)
    drawn = np.array([space.candidate({f"w{i}": rng.random() for i in range(3)}).weights for _ in range(20_000)])
    assert drawn.mean(axis=0) == pytest.approx([0.25] * 4, abs=0.01)
    assert drawn.var(axis=0) == pytest.approx([3 / 80] * 4, rel=0.05)


def test_of_two_adapters_the_parameter_is_the_first_ones_weight():
    assert Space(count=2).candidate({"w0": 0.9}).weights == (0.9, 0.1)


def test_weights_outside_are_no_point():
    assert Space(count=2).point([1.2, -0.2], {}) is None
    assert Space(count=2).point([0.5, 0.4], {}) is None
    assert Space(count=2, simplex=False).point([1.6, 0.0], {}) is None
    assert Space(count=2, simplex=False).point([1.5, 0.0], {}) == {"w0": 1.5, "w1": 0.0}


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("simplex", [True, False])
def test_starts_lie_in_the_space(count, simplex):
    space = Space(count=count, simplex=simplex)
    for weights in space.starts():
        assert space.candidate(space.point(weights, {})).weights == pytest.approx(weights, abs=2e-3)


def test_a_curve_has_its_points_in_order():
    space = Space(count=2, places=depth_groups(range(10), 1), knots=3)
    point = {"place0.0.w0": 1.0, "place0.1.w0": 0.8, "place0.2.w0": 0.2}
    (place,) = space.candidate(point).overrides
    assert place == Override(layers=(0, 9), points=((1.0, 0.0), (0.8, 0.2), (0.2, 0.8)))
    assert space.candidate(point).weights == (0.667, 0.333)


def test_distance_is_from_the_first_adapter_alone():
    assert alone(3).distance == 0
    assert Candidate(weights=(0.9, 0.1)).distance == pytest.approx(0.2)
    both = (Override(points=((1.0, 0.0),)), Override(points=((0.5, 0.5),)))
    assert Candidate(weights=(0.75, 0.25), overrides=both).distance == pytest.approx(0.5)


@pytest.mark.parametrize(("layers", "count"), [(1, 1), (7, 3), (30, 4), (5, 5)])
def test_groups_part_the_layers(layers, count):
    places = depth_groups(range(layers), count)
    numbers = [number for place in places for number in range(place.layers[0], place.layers[1] + 1)]
    assert numbers == list(range(layers))
    sizes = [place.layers[1] - place.layers[0] + 1 for place in places]
    assert max(sizes) - min(sizes) <= 1


def test_a_grid_of_a_pair_may_go_beyond_one_and_of_three_not_below_zero():
    assert grid_weights([1.2], 2, simplex=True) == [(1.2, -0.2)]
    assert grid_weights([0.0, 0.6], 3, simplex=True) == [(0.0, 0.0, 1.0), (0.0, 0.6, 0.4), (0.6, 0.0, 0.4)]


def test_choices_keep_their_order():
    assert Space(count=2, options={"order": Choice(("b", "a"))}).parameters["order"].values == ("b", "a")


def test_free_weights_that_change_nothing_are_not_searched():
    """The second adapter acts in the lower half only, so its weight in the upper half is no parameter."""
    space = Space(count=2, simplex=False, places=depth_groups(range(8), 2), idle=(frozenset(), frozenset({1})))
    assert list(space.parameters) == ["place0.0.w0", "place0.0.w1", "place1.0.w0"]
    found = space.candidate({"place0.0.w0": 1.0, "place0.0.w1": 0.5, "place1.0.w0": 0.75})
    assert [place.points for place in found.overrides] == [((1.0, 0.5),), ((0.75, 0.0),)]
    assert space.point([1.0, 0.5], {}) == {"place0.0.w0": 1.0, "place0.0.w1": 0.5, "place1.0.w0": 1.0}
    # weights that must sum to 1 scale the first adapter there, so they act
    assert len(Space(count=2, places=space.places, idle=space.idle).parameters) == 2


def test_bounds_that_are_one_number_fix_the_weights() -> None:
    vary = {"bottom": Interval(0, 6, whole=True)}
    space = Space(count=2, simplex=False, reach=(1.0, 1.0), options=vary)
    assert space.parameters == vary
    assert space.candidate({"bottom": 3}).weights == (1.0, 1.0)
    assert space.point((1.0, 1.0), {"bottom": 3}) == {"bottom": 3}
    assert space.point((0.9, 0.1), {"bottom": 3}) is None
