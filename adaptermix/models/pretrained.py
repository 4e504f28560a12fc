"""The only module that loads configurations, tokenizers and models with transformers.

Code in a model folder is never run, and the form of the folder's files is checked first.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AdapterMixError, ModelError, as_line
from ..io.base_files import CONFIG, check_base_files, unreachable
from ..io.checkpoint_files import open_checkpoint, resolve_checkpoint
from .formats.checkpoint import as_whole, dequantized_on_loading, dequantized_tensors

if TYPE_CHECKING:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoTokenizer,
        GenerationConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

_IN_BLOCK = re.compile(r"\.\d+\.")


def split_revision(reference: str) -> tuple[str, str | None]:
    """Return (id, revision) of `MODEL` or `MODEL@REVISION`; an existing folder is not split."""
    if Path(reference).exists() or "@" not in reference:
        return reference, None
    name, revision = reference.rsplit("@", 1)
    return name, revision


def cached_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """Return the local path of a model's file: in its folder, or in the cache of the Hub."""
    if Path(name).is_dir():
        return Path(name) / file if (Path(name) / file).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:
        return None
    return Path(path) if isinstance(path, str | os.PathLike) else None


def load_config(reference: str, *, what: str = "base model") -> PreTrainedConfig:
    """Return the configuration of a model.

    Args:
        reference: A folder or a Hub id, optionally with `@REVISION`.
        what: The model's role, for messages.

    Raises:
        ModelError: there is no such model, a file is malformed, or the model needs its own code.
    """
    from transformers import AutoConfig

    return _load(AutoConfig, reference, what, "config")


def load_tokenizer(reference: str, *, what: str = "base model", **options: object) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model.

    Args:
        reference: A folder or a Hub id, optionally with `@REVISION`.
        what: The model's role, for messages.
        options: Further arguments of `from_pretrained`.

    Raises:
        ModelError: as in `load_config`.
    """
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, reference, what, "tokenizer", **options)


def load_generation_config(reference: str) -> GenerationConfig:
    """Return the generation settings of a model: those of its file, else those that its configuration implies.

    Args:
        reference: A folder or a Hub id, optionally with `@REVISION`.

    Raises:
        ModelError: as in `load_config`.
    """
    from transformers import GenerationConfig

    name, revision = split_revision(reference)
    if cached_file(name, "generation_config.json", revision) is None:
        return GenerationConfig.from_model_config(load_config(reference))
    return _load(GenerationConfig, reference, "base model", "model")


def load_model(reference: str, loader: str | type, *, what: str = "base model", **options: object) -> PreTrainedModel:
    """Return a model with its weights, and the other results of `from_pretrained` with these options.

    Args:
        reference: A folder or a Hub id, optionally with `@REVISION`.
        loader: The class that loads it, or its name in transformers, such as `AutoModel`.
        what: The model's role, for messages.
        options: Further arguments of `from_pretrained`.

    Raises:
        ModelError: as in `load_config`; or weights have the wrong shape or are missing in a block.
    """
    wants_info = options.pop("output_loading_info", False)
    options |= {"output_loading_info": True}
    with _silent():
        if (stored := _quantised_by(reference)) and dequantized_on_loading(stored, reference):
            model, info = _dequantized(loader, reference, what, **options)
        else:
            model, info = _load(_class(loader), reference, what, "model", **options)
    # transformers initialises missing weights at random and continues, which is right only for a new head.
    lacking = sorted(key for key in info["missing_keys"] if _IN_BLOCK.search(key))
    if lacking:
        raise ModelError(
            f"{what} {as_line(reference)!r} must have all weights of its blocks, and its files lack {len(lacking)}, "
            f"such as {as_line(lacking[0])!r}. Fetch the model again, and compare its config.json.",
            code="base.missing-weights",
        )
    return (model, info) if wants_info else model


def _quantised_by(reference: str) -> Mapping[str, object]:
    """Return the quantisation config of a model; empty without one."""
    name, revision = split_revision(reference)
    config = cached_file(name, CONFIG, revision)
    if config is None:
        return {}
    check_base_files(config.parent, "config")
    return json.loads(config.read_text(encoding="utf-8")).get("quantization_config") or {}


def _dequantized(loader: str | type, reference: str, what: str, **options: object) -> Any:
    """Return a model with dequantised weights, in a format that transformers reads only with other packages."""
    import torch
    from transformers import AutoConfig, GenerationConfig

    checkpoint = as_whole(open_checkpoint(resolve_checkpoint(reference)))
    # The config would take these options, and its entry for the files' format would be lost with them.
    apart = {name: options.pop(name) for name in ("dtype", "quantization_config") if name in options}
    config, others = _load(AutoConfig, reference, what, "config", return_unused_kwargs=True, **options)
    del config.quantization_config
    with torch.device("meta"):
        made: Any = type(model_of_config(config, loader, reference=reference))
    with loading(reference, what):
        dtype = apart.get("dtype")
        weights = dequantized_tensors(checkpoint, dtype if isinstance(dtype, torch.dtype) else None)
        loaded = made.from_pretrained(
            None, config=config, state_dict=weights, trust_remote_code=False, **apart, **others
        )
        file = checkpoint.path / "generation_config.json"
        if file.is_file() and loaded[0].can_generate():
            generation = json.loads(file.read_text(encoding="utf-8"))
            loaded[0].generation_config = GenerationConfig.from_dict(generation)
        return loaded


@contextmanager
def _silent() -> Iterator[None]:
    """Silence the bar and the report of transformers on loading weights; bars of downloads stay.

    Its report on missing and unexpected weights is about the same keys as the checks here and in `headed`.
    """
    import huggingface_hub.utils as hub
    from transformers import logging

    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hides_downloads = hub.are_progress_bars_disabled()  # type: ignore[attr-defined]
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of the Hub too
    if not hides_downloads:
        hub.enable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()
            if hides_downloads:
                hub.disable_progress_bars()  # type: ignore[attr-defined]


def _class(loader: str | type) -> Any:
    import transformers

    return getattr(transformers, loader) if isinstance(loader, str) else loader


def model_of_config(
    config: PreTrainedConfig, loader: str | type, *, reference: str, **options: object
) -> PreTrainedModel:
    """Return a model with new weights.

    Args:
        config: Its configuration.
        loader: The class that creates it, or its name in transformers.
        reference: Origin of the configuration, for messages.
        options: Further arguments of `from_config`.

    Raises:
        ModelError: the configuration is invalid, or needs its own code.
    """
    with loading(reference):
        if isinstance(loader, str):
            return _class(loader).from_config(config, trust_remote_code=False, **options)
        return _class(loader)._from_config(config, **options)


def _load(
    loader: type[AutoConfig | AutoTokenizer | AutoModel | GenerationConfig],
    reference: str,
    what: str,
    part: str,
    **options: object,
) -> Any:
    name, revision = split_revision(reference)
    config = cached_file(name, CONFIG, revision)
    if config is not None:
        check_base_files(config.parent, part)
    pinned = {"revision": revision} if revision else {}
    with loading(reference, what):
        return loader.from_pretrained(name, trust_remote_code=False, **pinned, **options)


@contextmanager
def loading(reference: str, what: str = "base model") -> Iterator[None]:
    """Convert every error of loading a model into a one-sentence message.

    Args:
        reference: The model's folder or Hub id.
        what: The model's role.

    Raises:
        ModelError: loading failed for any reason except lack of memory.
    """
    try:
        yield
    except AdapterMixError:
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and the network raise many classes.
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise unreachable(reference, error, what) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, in tokenizers
            raise
        raise unreachable(reference, ValueError(str(error)), what) from error
