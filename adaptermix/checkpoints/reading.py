"""Read full checkpoints: differences of tensors, configs, and manifest entries."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ModelError
from ..io.checkpoint_files import Checkpoint, config_of, open_checkpoint, resolve_checkpoint
from ..io.files import sha256
from ..io.fingerprints import fingerprint
from ..io.json_types import JsonObject
from ..models.pretrained import split_revision
from ..progress import SILENT, Watcher

FLOATS = {"F64", "F32", "F16", "BF16"}
"""Float dtypes, by their names in safetensors."""
_HEADS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "Model": "FEATURE_EXTRACTION",
}


def open_model(reference: str | Path) -> Checkpoint:
    """Open a model folder or a Hub id with @REVISION; headers only.

    Raises:
        ModelError: there is no such model, or it is damaged.
    """
    return open_checkpoint(resolve_checkpoint(str(reference)))


def check_whole(checkpoint: Checkpoint) -> Checkpoint:
    """Return a model whose weights are not quantised.

    Raises:
        ModelError: they are quantised.
    """
    stored = config_of(checkpoint).get("quantization_config")
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    if method:
        raise ModelError(
            f"a model must be in whole precision here, and {checkpoint.path} is quantised by '{method}'. Give the "
            "model that it was made from, or first write it in 16 bits: bake reads 4 bits of GPTQ, AWQ, bitsandbytes "
            "and compressed-tensors.",
            code="quantized.whole",
        )
    return checkpoint


def task_type(config: JsonObject) -> str | None:
    """Return PEFT's task type for the architecture that a config names, if it names one."""
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    task = next((kind for ending, kind in _HEADS.items() if name.endswith(ending)), None)
    # Decoders with an image tower are named "for conditional generation" too.
    return "CAUSAL_LM" if task == "SEQ_2_SEQ_LM" and not config.get("is_encoder_decoder") else task


def wide(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic: float32, or float64 if a tensor is float64 or integer."""
    exact = any(tensor.dtype == torch.float64 or not tensor.is_floating_point() for tensor in tensors)
    return torch.float64 if exact else torch.float32


def difference(base: Tensor, tuned: Tensor) -> Tensor | None:
    r"""Return $W - W_0$ in float32, or float64 if a tensor is float64 or integer; None if the two are equal.

    Args:
        base: Tensor of the base model.
        tuned: The same tensor of the other model.

    Shapes: all three have the same shape.
    """
    dtype = wide(base, tuned)
    result = torch.sub(tuned.to(dtype), base.to(dtype))
    return result if bool(result.any()) else None


def check_shapes(base: Checkpoint, other: Checkpoint, keys: Sequence[tuple[str, str]]) -> None:
    """Refuse a pair of models in which a tensor has two shapes; reads only headers.

    Args:
        base: The base model.
        other: The other model.
        keys: Names in the base and in the other.

    Raises:
        ModelError: two shapes differ, or just one of two tensors is of a float dtype.
    """
    for ours, theirs in keys:
        one, two = base.tensors[ours], other.tensors[theirs]
        if one.shape != two.shape:
            raise ModelError(
                f"'{ours}' must have one shape in both models, found {list(one.shape)} in {base.path} and "
                f"{list(two.shape)} in {other.path}. The model was not tuned from this base, or its vocabulary grew.",
                code="checkpoint.shapes",
            )
        if (one.dtype in FLOATS) != (two.dtype in FLOATS):
            raise ModelError(
                f"'{ours}' must be of a float dtype in both models or in neither, found {one.dtype} in {base.path} and "
                f"{two.dtype} in {other.path}. Give unquantised models.",
                code="checkpoint.dtypes",
            )


def base_entry(reference: str | Path, base: Checkpoint) -> JsonObject:
    """Return the base model's entry of a manifest."""
    name, revision = split_revision(str(reference))
    return {
        "id": name,
        "revision": revision,
        "fingerprint": fingerprint(base.path),
        "class": "encoder" if task_type(config_of(base)) == "FEATURE_EXTRACTION" else "causal",
    }


def input_entry(reference: str | Path, checkpoint: Checkpoint, weight: float, *, watch: Watcher = SILENT) -> JsonObject:
    """Return the manifest entry of an input checkpoint: the hash of each weight file, and a hash of these."""
    name, revision = split_revision(str(reference))
    files = {}
    with watch.track("hash", len(checkpoint.files())) as advance:
        for file in checkpoint.files():
            files[file] = sha256(checkpoint.path / file)
            advance(1, file)
    together = "".join(f"{file}:{digest}\n" for file, digest in files.items())
    return {
        "name": checkpoint.name,
        "path": name,
        "revision": revision,
        "kind": "checkpoint",
        "weight": weight,
        "weights_sha256": next(iter(files.values()))
        if len(files) == 1
        else hashlib.sha256(together.encode()).hexdigest(),
        "files": files,
    }
