"""Sums of tensors and deltas: the bits of a plain loop, whoever computes them, and no error that is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adaptermix.algebra import LowRank
from adaptermix.checkpoints import adding
from adaptermix.checkpoints.adding import Crew, write_sum
from adaptermix.checkpoints.writing import write_checkpoint
from adaptermix.io.checkpoint_files import open_checkpoint

from ..analysis.models import decoder, write_model
from ..refusals import refuses
from .models import tensors_of

Q0 = "model.layers.0.self_attn.q_proj.weight"
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def summed(base: Tensor, delta: Tensor | LowRank | None, stored: torch.dtype) -> Tensor:
    """What is written, put together by its places."""
    found = torch.zeros(base.numel(), dtype=stored)

    def write(part: Tensor, first: int) -> None:
        assert part.dtype == stored
        found[first : first + len(part)] = part

    with Crew() as crew:
        write_sum(crew, write, base, delta, stored=stored, name="x")
        crew.finish()
    return found.reshape(base.shape)


def factors(out: int, into: int) -> LowRank:
    """Whole numbers over a power of two, whose product is exact in whatever order."""
    b, a = (torch.randint(-8, 9, shape) / 64 for shape in ((out, 3), (3, into)))
    return LowRank(b=b, a=a, scale=0.5)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("kept", DTYPES)
def test_a_delta_is_added_in_float32_and_rounded_once(
    threads: int, kept: torch.dtype, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adding, "_BLOCK", 24)
    torch.manual_seed(0)
    wide = torch.float64 if kept == torch.float64 else torch.float32
    for shape in [(1, 1), (7, 5), (4, 24), (3, 50)]:
        base, delta = torch.randn(shape).to(kept), factors(*shape)
        expected = torch.stack([row.to(wide) + more for row, more in zip(base, delta.dense(), strict=True)]).to(stored)
        assert torch.equal(summed(base, delta, stored), expected)
        assert torch.equal(summed(base, delta.dense(), stored), expected)
        assert torch.equal(summed(base, delta.dense().double(), stored), (base.double() + delta.dense()).to(stored))
        assert torch.equal(summed(base, None, stored), base.to(stored))


def test_what_is_no_matrix_is_added_to_too(threads: int) -> None:
    for shape in [(), (5,), (2, 3, 4)]:
        base = torch.randn(shape).bfloat16()
        assert torch.equal(summed(base, torch.ones(shape), torch.bfloat16), (base.float() + 1).bfloat16())
        assert torch.equal(summed(base, None, torch.bfloat16), base)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_one_overflow_anywhere_is_refused(threads: int, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adding, "_BLOCK", 8)
    delta = torch.zeros(16, 8)
    delta[13, 3] = torch.finfo(torch.float32).max  # of float32, and beyond what rounds to a bfloat16
    with refuses("write.overflow: x"):
        summed(torch.ones(16, 8, dtype=stored), delta, stored)
    with refuses("write.overflow: x"):
        summed(torch.ones(16, 8, dtype=stored), -delta, stored)
    base = torch.ones(16, 8, dtype=stored)
    base[12:14] = torch.inf  # was there before
    assert torch.equal(summed(base, delta, stored), base)
    base[12:14] = torch.finfo(stored).max
    assert torch.equal(summed(base, torch.zeros(16, 8), stored), base)


class TestCrew:
    def test_every_place_has_its_turn_once(self, threads: int) -> None:
        done: list[slice] = []
        places = [slice(place, place + 1) for place in range(500)]
        with Crew() as crew:
            for _ in range(3):
                crew.start(done.append, places)
            crew.finish()
        assert sorted(place.start for place in done) == sorted([*range(500)] * 3)

    def test_an_error_stops_all_and_is_raised_once_nobody_works(self, threads: int) -> None:
        begun: list[int] = []

        def work(place: slice) -> None:
            begun.append(place.start)
            if place.start == 3:
                raise KeyboardInterrupt

        with Crew() as crew:
            crew.start(work, [slice(place, None) for place in range(10**5)])
            with pytest.raises(KeyboardInterrupt):
                crew.finish()
        assert len(begun) < 10**5

    def test_who_leaves_early_leaves_nobody_at_work(self, threads: int) -> None:
        with Crew() as crew:
            crew.start(lambda place: None, [slice(place, None) for place in range(10**5)])
        assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]

    def test_others_keep_their_number_of_threads(self, threads: int) -> None:
        found = []
        with Crew() as crew:
            crew.start(lambda place: found.append(torch.get_num_threads()), [slice(0)] * 5)
            crew.finish()
        later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert found == [1] * 5 + [threads]
        assert torch.get_num_threads() == threads


class TestWhatGoesWrongLeavesNoFile:
    def write(self, tmp_path: Path, delta: Tensor, base: dict[str, Tensor] | None = None) -> None:
        checkpoint = open_checkpoint(write_model(tmp_path / "base", base or decoder(dtype=torch.float16)))
        (tmp_path / "out").mkdir()
        try:
            write_checkpoint(checkpoint, tmp_path / "out", {Q0: lambda: delta})
        finally:
            assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]

    def test_an_overflow(self, threads: int, tmp_path: Path) -> None:
        with refuses("write.overflow: float16"):
            self.write(tmp_path, torch.full((12, 8), 1e5))
        assert list((tmp_path / "out").iterdir()) == []

    def test_an_overflow_of_factors_in_the_last_tensor(self, threads: int, tmp_path: Path) -> None:
        base = open_checkpoint(write_model(tmp_path / "base", {"x": torch.ones(4, 4, dtype=torch.float16)}))
        (tmp_path / "out").mkdir()
        delta = LowRank(b=torch.full((4, 1), 1e3), a=torch.full((1, 4), 1e3))
        with refuses("write.overflow: float16"):
            write_checkpoint(base, tmp_path / "out", {"x": lambda: delta})
        assert list((tmp_path / "out").iterdir()) == []

    def test_a_disk_that_takes_no_more(self, threads: int, tmp_path: Path) -> None:
        resource = pytest.importorskip("resource")
        base = {Q0: torch.ones(512, 512), "y": torch.ones(512, 512)}
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        checkpoint = open_checkpoint(write_model(tmp_path / "base", base))
        (tmp_path / "out").mkdir()
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20 + 2**19, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                write_checkpoint(checkpoint, tmp_path / "out", {Q0: lambda: torch.ones(512, 512)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert list((tmp_path / "out").iterdir()) == []
        write_checkpoint(checkpoint, tmp_path / "out", {Q0: lambda: torch.ones(512, 512)})
        assert torch.equal(tensors_of(tmp_path / "out")[Q0], torch.full((512, 512), 2.0))
