"""The cache of folders: its bound, the order of removal, and what running processes have taken."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adaptermix.serving.cache import FolderCache

from ..refusals import refuses


def maker(calls: list[str], key: str, size: int = 100) -> Callable[[Path], Path]:
    def make(staging: Path) -> Path:
        assert not list(staging.iterdir())
        calls.append(key)
        (staging / "rest").write_bytes(b"x" * 1000)
        (staging / "made").mkdir()
        (staging / "made" / "file").write_bytes(b"x" * size)
        return staging / "made"

    return make


def fill(cache: FolderCache, keys: str) -> list[str]:
    calls: list[str] = []
    for key in keys:
        assert cache.get(key, maker(calls, key)).is_dir()
        time.sleep(0.01)
    return calls


def kept(cache: FolderCache) -> str:
    return "".join(sorted(path.name for path in (cache.root / "folders").iterdir()))


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    cache = FolderCache(tmp_path / "cache", 1000)
    assert fill(cache, "aabab") == ["a", "b"]
    assert [path.name for path in (cache.root / "folders" / "a").iterdir()] == ["file"]
    assert not (cache.root / "staging").exists()
    assert fill(FolderCache(tmp_path / "cache", 1000), "ba") == []


def test_the_folder_used_longest_ago_is_removed_unless_a_process_has_taken_it(tmp_path: Path) -> None:
    first = FolderCache(tmp_path / "cache", 300)
    fill(first, "abca")
    with refuses("serving.cache-full: ADAPTERMIX_SERVING_GB"):
        fill(first, "d")
    assert kept(first) == "abc"
    del first  # as at the end of its process, its list is no longer locked
    gc.collect()
    second = FolderCache(tmp_path / "cache", 300)
    assert fill(second, "d") == ["d"]
    assert kept(second) == "acd"
    assert fill(second, "ce") == ["e"]
    assert kept(second) == "cde"
    with refuses("serving.cache-full"):
        fill(second, "f")
    assert fill(second, "cde") == []


def test_a_folder_larger_than_the_limit_is_refused(tmp_path: Path) -> None:
    cache = FolderCache(tmp_path / "cache", 50)
    with refuses("serving.cache-full"):
        fill(cache, "a")
    assert kept(cache) == ""
    assert not (cache.root / "staging").exists()


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    cache = FolderCache(tmp_path / "cache", 500)

    def fail(staging: Path) -> Path:
        (staging / "part").touch()
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        cache.get("a", fail)
    assert not (cache.root / "staging").exists()
    assert fill(cache, "a") == ["a"]


def test_threads_make_one_folder(tmp_path: Path) -> None:
    cache, calls = FolderCache(tmp_path / "cache", 500), []

    def slow(staging: Path) -> Path:
        time.sleep(0.1)
        return maker(calls, "a")(staging)

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: cache.get("a", slow), range(8)))
    assert len(calls) == 1
    assert len(set(paths)) == 1


def _in_process(root: Path, limit: int, keys: str, done: object) -> None:
    cache = FolderCache(root, limit)
    log = root.parent / "log"

    def make(key: str, staging: Path) -> Path:
        time.sleep(0.05)
        with log.open("a") as file:
            file.write(key)
        return maker([], key)(staging)

    for key in keys:
        cache.get(key, lambda staging, key=key: make(key, staging))
    done.release()  # type: ignore[attr-defined]
    time.sleep(60)


def test_processes_share_folders_and_never_remove_each_others(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    done = context.Semaphore(0)
    root = tmp_path / "cache"
    workers = [context.Process(target=_in_process, args=(root, 300, "ab", done)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for _ in workers:
        assert done.acquire(timeout=60)
    assert sorted((tmp_path / "log").read_text()) == ["a", "b"]
    cache = FolderCache(root, 300)
    fill(cache, "c")
    with refuses("serving.cache-full"):
        fill(cache, "d")
    assert kept(cache) == "abc"
    workers[0].kill()  # the other one still uses both
    workers[0].join()
    with refuses("serving.cache-full"):
        fill(cache, "d")
    workers[1].kill()
    workers[1].join()
    fill(cache, "d")
    assert kept(cache) in ("acd", "bcd")
