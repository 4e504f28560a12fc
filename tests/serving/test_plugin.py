"""The plugin of vLLM: what a request gets, and what it cannot reach."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import shutil
import time
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptermix import export, merge
from adaptermix.serving import compose
from adaptermix.serving.compose import Composer
from adaptermix.serving.plugin import register
from adaptermix.serving.settings import ServingSettings, from_environment

from ..factories import CONFIG, WEIGHTS, contents, load_base, peft_kind, tiny_llama, write_lora
from ..loaders import deltas_by, distance
from ..refusals import refuses
from .conftest import BASE, SHAPES, LoRAResolver, Registry
from .test_names import HOSTILE


@pytest.fixture
def resolver(registry: Registry, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The registered resolver, for a folder of adapters."""
    monkeypatch.setenv("ADAPTERMIX_ADAPTERS", str(adapters))
    monkeypatch.setenv("ADAPTERMIX_CACHE", str(tmp_path / "cache"))
    register()
    return registry.resolvers["adaptermix"]


def ask(resolver: Any, name: str, base: str = BASE) -> Any:
    return asyncio.run(resolver.resolve_lora(base, name))


def weighted(adapters: Path, **weights: float) -> dict[str, Any]:
    deltas = {name: deltas_by("peft", adapters / name) for name in weights}
    return {path: sum(weights[name] * deltas[name][path] for name in weights) for path in SHAPES}


def test_the_entry_point_leads_to_the_function() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["vllm.general_plugins"].items()
    assert EntryPoint(name, value, "vllm.general_plugins").load() is register
    assert "vllm" in project["optional-dependencies"]


def test_without_adapters_nothing_is_registered(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADAPTERMIX_ADAPTERS", raising=False)
    register()
    assert registry.resolvers == {}


def test_a_name_gets_the_weighted_sum(resolver: Any, adapters: Path) -> None:
    assert isinstance(resolver, LoRAResolver)
    request = ask(resolver, "task@0.9+align@0.1")
    assert request.lora_name == "task@0.9+align@0.1"
    assert request.lora_int_id > 0
    folder = Path(request.lora_path)
    assert distance(deltas_by("vllm", folder), weighted(adapters, task=0.9, align=0.1)) < 1e-7
    config = json.loads((folder / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == 8
    assert config["base_model_name_or_path"] == BASE
    for name, weights in {"task": {"task": 1.0}, "align@-2.5": {"align": -2.5}}.items():
        assert distance(deltas_by("vllm", Path(ask(resolver, name).lora_path)), weighted(adapters, **weights)) < 1e-7


def test_the_files_are_those_of_merge_and_export(resolver: Any, adapters: Path, tmp_path: Path) -> None:
    got = Path(ask(resolver, "align@0.25+task@0.75").lora_path)
    merge([adapters / "align", adapters / "task"], weights=[0.25, 0.75], out=tmp_path / "merged")
    export(folder=tmp_path / "merged", engine="vllm", out=tmp_path / "out")
    assert {WEIGHTS, CONFIG} <= contents(got).keys()
    for name in (WEIGHTS, CONFIG):
        assert (got / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_spellings_of_one_merge_share_a_folder_until_an_adapter_changes(resolver: Any, adapters: Path) -> None:
    spellings = ("task@0.9+align@0.1", "align@1e-1+task@.90")
    before = {ask(resolver, name).lora_path for name in spellings}
    assert len(before) == 1
    write_lora(adapters / "align", SHAPES, base=BASE, seed=7)
    after = ask(resolver, spellings[0]).lora_path
    assert after not in before
    assert distance(deltas_by("vllm", Path(after)), weighted(adapters, task=0.9, align=0.1)) < 1e-7


def test_two_requests_at_once_merge_once_and_the_loop_goes_on(resolver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    real = compose._write

    def slow(parts: Any, base: str | None, staging: Path) -> Path:
        time.sleep(0.3)
        calls.append(staging)
        return real(parts, base, staging)

    monkeypatch.setattr(compose, "_write", slow)

    async def main() -> tuple[list[Any], int]:
        ticks = 0
        tasks = [asyncio.create_task(resolver.resolve_lora(BASE, "task@0.5+align@0.5")) for _ in range(4)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0.01)
            ticks += 1
        return [task.result() for task in tasks], ticks

    requests, ticks = asyncio.run(main())
    assert len(calls) == 1
    assert len({request.lora_path for request in requests}) == 1
    assert ticks > 10


@pytest.mark.parametrize(
    "name",
    ["secret", "../secret", "notes", "task/../../secret", "{adapters}/task", "task@nan", "task@1+align", "", "task\0"],
)
def test_other_names_get_none_and_a_line(
    resolver: Any, adapters: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert ask(resolver, name.format(adapters=adapters)) is None
    (record,) = caplog.records
    assert record.name == "vllm.adaptermix"
    assert record.getMessage().isprintable()


@given(st.one_of(HOSTILE, st.text(max_size=50), st.text(st.sampled_from("task@+0.9/align~\\\0"), max_size=30)))
def test_no_name_reads_or_writes_elsewhere(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    root = tmp_path_factory.getbasetemp() / "any-name"
    if not root.exists():
        write_lora(root / "adapters" / "task", SHAPES, base=BASE)
        write_lora(root / "secret", SHAPES, base=BASE)
    composer = Composer(ServingSettings(adapters=root / "adapters", cache=root / "cache", limit=10**9))
    folder = asyncio.run(composer.find(BASE, name))
    assert folder is None or folder.resolve().is_relative_to((root / "cache" / "folders").resolve())
    assert sorted(path.name for path in root.iterdir()) in (["adapters", "secret"], ["adapters", "cache", "secret"])


def test_faults_of_a_merge_are_logged(resolver: Any, adapters: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_lora(adapters / "other", SHAPES, base="org/other")
    (adapters / "broken").mkdir()
    (adapters / "broken" / CONFIG).write_text("{")
    shutil.copytree(adapters / "task", adapters / "cut")
    (adapters / "cut" / WEIGHTS).write_bytes(b"short")
    write_lora(adapters / "wide", {"model.layers.0.mlp.up_proj": (600, 600, 513)}, base=BASE)
    expected = {"other@1+task@1": "org/other", "broken": "JSON", "cut@2": "", "wide": "rank 512", "task@1e300": ""}
    for name, text in expected.items():
        caplog.clear()
        assert ask(resolver, name) is None, name
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert text in caplog.text
    assert ask(resolver, "task") is not None
    assert ask(resolver, "task", base="org/third") is None


def test_the_base_may_be_a_folder_with_the_same_weights(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, copy = tiny_llama(tmp_path / "base"), tmp_path / "copy"
    shutil.copytree(base, copy)
    peft_kind(load_base(base), tmp_path / "adapters" / "pissa", init_lora_weights="pissa")
    (tmp_path / "plain").mkdir()
    merge([tmp_path / "adapters" / "pissa"], weights=[1], base=base, out=tmp_path / "adapters" / "plain")
    monkeypatch.setenv("ADAPTERMIX_ADAPTERS", str(tmp_path / "adapters"))
    monkeypatch.setenv("ADAPTERMIX_CACHE", str(tmp_path / "cache"))
    register()
    resolver = registry.resolvers["adaptermix"]
    expected = deltas_by("peft", tmp_path / "adapters" / "plain")
    assert (
        distance(
            deltas_by("vllm", Path(ask(resolver, "plain@0.5", str(base)).lora_path)),
            {path: 0.5 * delta for path, delta in expected.items()},
        )
        < 1e-6
    )
    got = ask(resolver, "pissa", str(base))
    assert distance(deltas_by("vllm", Path(got.lora_path)), expected) < 1e-5
    assert ask(resolver, "plain", str(copy)) is not None  # the manifest has the hash of the base
    tiny_llama(tmp_path / "third", seed=3)
    assert ask(resolver, "plain", str(tmp_path / "third")) is None


def test_settings(adapters: Path, tmp_path: Path) -> None:
    env = {"ADAPTERMIX_CACHE": str(tmp_path / "c")}
    listed = from_environment({**env, "ADAPTERMIX_ADAPTERS": f"t={adapters / 'task'}, a={adapters / 'align'}"})
    assert listed is not None
    assert listed.registered() == {"t": adapters / "task", "a": adapters / "align"}
    assert (listed.cache, listed.limit) == (tmp_path / "c" / "serving", 20 * 10**9)
    folder = from_environment({**env, "ADAPTERMIX_ADAPTERS": str(adapters), "ADAPTERMIX_SERVING_GB": "0.5"})
    assert folder is not None
    assert folder.limit == 5 * 10**8
    assert folder.registered() == {"task": adapters / "task", "align": adapters / "align"}
    assert from_environment({}) is None
    task = adapters / "task"
    for text in ("nowhere", f"t={task},t={task}", f"../t={task}", f"t={adapters}", f"t@1={task}", f"t={task},"):
        with refuses("serving.adapters"):
            from_environment({"ADAPTERMIX_ADAPTERS": text})
    for text in ("0", "-1", "nan", "inf", "many"):
        with refuses("serving.limit"):
            from_environment({"ADAPTERMIX_ADAPTERS": str(adapters), "ADAPTERMIX_SERVING_GB": text})


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllms_own_classes(adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolverRegistry

    monkeypatch.setenv("ADAPTERMIX_ADAPTERS", str(adapters))
    monkeypatch.setenv("ADAPTERMIX_CACHE", str(tmp_path / "cache"))
    register()
    request = ask(LoRAResolverRegistry.get_resolver("adaptermix"), "task@0.9+align@0.1")
    assert isinstance(request, LoRARequest)
    assert distance(deltas_by("vllm", Path(request.lora_path)), weighted(adapters, task=0.9, align=0.1)) < 1e-7
