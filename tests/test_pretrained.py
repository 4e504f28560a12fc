"""Base models are loaded in one place, which runs none of their code and checks the form of their files first."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import adaptermix
from adaptermix.errors import ModelError
from adaptermix.fusion.latents import Latents, check_encoder
from adaptermix.io.base_files import FILES
from adaptermix.io.checkpoint_files import open_checkpoint
from adaptermix.models.base import load_base, model_kind
from adaptermix.models.head_forms import HEAD_FORMS, Head
from adaptermix.training.dry_run import outline
from tests.tiny import tiny_causal, tiny_encoder

from .refusals import refuses

ROOT = Path(adaptermix.__file__).parent
LOADERS = {"from_pretrained", "from_config", "load_dataset", "pipeline", "SentenceTransformer"}
OWN_CODE = {"PeftModel", "FusionConfig"}
"""Classes whose `from_pretrained` reads an adapter's own files; PEFT runs no code of theirs."""


def test_every_loader_is_in_one_module_and_refuses_code() -> None:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            owner = node.func.value if isinstance(node.func, ast.Attribute) else None
            if name not in LOADERS or (isinstance(owner, ast.Name) and owner.id in OWN_CODE):
                continue
            assert path.name in ("pretrained.py", "hub.py"), f"{path}:{node.lineno} loads beside pretrained.py"
            refusals = [word.value for word in node.keywords if word.arg == "trust_remote_code"]
            assert [ast.literal_eval(value) for value in refusals] == [False], f"{path}:{node.lineno}"
            found.append(path.name)
    assert sorted(found) == ["hub.py", *3 * ["pretrained.py"]]


def with_code(folder: Path, part: str, mark: Path) -> Path:
    """Make a model folder whose Python file leaves a mark when it runs, and which asks for that file."""
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass C: pass\nclass M: pass\nclass T: pass\n")
    config = json.loads((folder / "config.json").read_text())
    if part == "tokenizer":
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings |= {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["own.T", "own.T"]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        config["auto_map"] = {"AutoConfig": "own.C", "AutoModel": "own.M", "AutoModelForCausalLM": "own.M"}
        config["model_type"] = "of_its_own"
        (folder / "config.json").write_text(json.dumps(config))
    return folder


WAYS: dict[str, Callable[[str], Any]] = {
    "kind": model_kind,
    "load": lambda reference: load_base(reference, device="cpu"),
    "outline": outline,
    "encoder": check_encoder,
    "latents": lambda reference: Latents(reference, device="cpu"),
    "head": lambda reference: load_base(
        reference, device="cpu", head=Head(form=HEAD_FORMS["classes"], labels=("a", "b"))
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_base_that_needs_its_own_code_is_refused_by_name_and_nobody_is_asked(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "it_ran"
    folder = with_code(tiny_encoder(tmp_path / "model"), "config", mark)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("code was asked for"))
    with refuses("base.own-code: model'") as caught:
        WAYS[way](str(folder))
    assert "\n" not in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize("way", ["load", "latents", "head"])
def test_a_tokenizer_with_code_does_not_run_it(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "it_ran"
    folder = with_code(tiny_encoder(tmp_path / "model"), "tokenizer", mark)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("code was asked for"))
    try:
        WAYS[way](str(folder))
    except ModelError as error:
        assert "\n" not in str(error)  # noqa: PT017  (a tokenizer that loads without the code is right too)
    assert not mark.exists()


def test_attention_of_the_hub_is_code_too(tmp_path: Path) -> None:
    folder = tiny_causal(tmp_path / "model")
    change(folder / "config.json", attn_implementation="someone/kernel")
    with refuses("base-config.attention"):
        load_base(str(folder), device="cpu")


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def deep(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_causal(tmp_path_factory.mktemp("base") / "model")
    (folder / "generation_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("file", sorted({name for names in FILES.values() for name in names}))
@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("null", "base-config.not-object: null"),
        ("[]", "base-config.not-object: a list"),
        ('"x"', "base-config.not-object: a text"),
        ("5", "base-config.not-object: a number"),
        ("{", "base-config.not-json"),
        ("", "base-config.not-json"),
        ("\ud800", "base-config.not-json"),
        ('{"a": ' + "9" * 5000 + "}", "base-config.not-json"),
        (deep(100_000), "base-config.too-deep: 64"),
    ],
    ids=["null", "list", "text", "number", "cut", "empty", "surrogate", "digits", "deep"],
)
def test_every_json_file_of_a_base_must_be_an_object(
    file: str, content: str, found: str, whole: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    (folder / file).write_bytes(content.encode("utf-8", "surrogatepass"))
    with refuses(found) as caught:
        load_base(str(folder), device="cpu")
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("content", ["null", "[]", "{", deep(100_000)], ids=["null", "list", "cut", "deep"])
def test_commands_that_only_read_weights_check_the_config_too(content: str, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json must be"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "32"),
        ("hidden_size", None),
        ("hidden_size", -1),
        ("hidden_size", 1.5),
        ("hidden_size", [32]),
        ("hidden_size", 10**12),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", True),
        ("num_attention_heads", {}),
        ("num_attention_heads", 0),
        ("vocab_size", 10**9),
        ("vocab_size", 10**8),
        ("vocab_size", "many"),
        ("intermediate_size", None),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", [None]),
        ("model_type", None),
        ("model_type", ["llama"]),
        ("model_type", {}),
        ("rope_parameters", [1]),
        ("quantization_config", "nf4"),
        ("quantization_config", {"quant_method": ["x"]}),
        ("auto_map", []),
        ("id2label", 3),
        ("text_config", []),
        ("dtype", 16),
        ("dtype", "no_such_dtype"),
        ("hidden_act", 7),
        ("pad_token_id", "x"),
        ("rms_norm_eps", "small"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_fields_of_wrong_types_and_sizes_are_refused_in_one_sentence(
    field: str, value: Any, whole: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    change(folder / "config.json", **{field: value})
    with pytest.raises(ModelError) as caught:
        load_base(str(folder), device="cpu")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("length", ["512", [512], float("nan"), 0, -1, {}])
def test_the_length_of_a_tokenizer_must_be_a_number(length: Any, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    change(folder / "tokenizer_config.json", model_max_length=length)
    with refuses("base-config.value: model_max_length"):
        load_base(str(folder), device="cpu")


def test_a_padding_token_without_an_embedding_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    change(folder / "tokenizer_config.json", pad_token="<none of these>")
    with refuses("model.padding-token: <none of these>"):
        load_base(str(folder), device="cpu")


@pytest.mark.parametrize("kind", ["causal", "encoder", "head"])
def test_a_base_that_lacks_weights_of_a_block_is_refused_and_not_made_up(kind: str, tmp_path: Path) -> None:
    """transformers draws them at random and says so in a log that the command line hides."""
    base = tiny_encoder(tmp_path / "base") if kind != "causal" else tiny_causal(tmp_path / "base")
    head = Head(form=HEAD_FORMS["classes"], labels=("x", "y")) if kind == "head" else None
    load_base(str(base), device="cpu", head=head)
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    change(base / "config.json", num_hidden_layers=layers + 1, layer_types=None)
    with refuses(rf"base.missing-weights: lack \d+, such as .*\.{layers}\."):
        load_base(str(base), device="cpu", head=head)


def test_loading_shows_no_bar_and_leaves_the_settings_of_bars(
    causal: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.utils as hub
    from transformers import logging

    monkeypatch.setattr(logging, "_tqdm_active", True)
    before = hub.are_progress_bars_disabled()
    load_base(str(causal), device="cpu")
    assert capfd.readouterr().err == ""
    assert logging.is_progress_bar_enabled()
    assert hub.are_progress_bars_disabled() is before
