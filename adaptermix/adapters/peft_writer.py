"""PEFT LoRA folders, written so that PEFT alone loads them: scale 1, one tensor in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..algebra import LowRank, all_finite
from ..algebra.storage import scaled, to_storage
from ..errors import OutputError
from ..io.safetensors_writer import Headers, file_order, file_size, stream_tensors
from ..io.weight_files import WEIGHTS
from .keys import PREFIX, lacks_head
from .lora_config import dump_config
from .paths import two_roots
from .source import CONFIG
from .state import LINEAR, AdapterState, Layout
from .targets import unreached, written_targets

Makers = dict[str, tuple[tuple[int, ...], torch.dtype, Callable[[], Tensor]]]
METADATA = {"format": "pt"}
_EXPERT = re.compile(r"\.experts\.\d+\.")


class _Halves:
    """Rounds factors to a 16-bit dtype, and keeps the last module's, whose two factors are written in turn."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._last: tuple[str, LowRank] | None = None

    def of(self, module: str, update: LowRank) -> LowRank:
        """Return the update of a module as it is stored."""
        if self._last is None or self._last[0] != module:
            self._last = None  # before the next one is made
            found = LowRank(b=update.b, a=update.a, scale=update.scale)
            if found.scale != 1 or {found.a.dtype, found.b.dtype} != {self._dtype}:
                found, _ = to_storage(found, self._dtype)
            self._last = module, found
        return self._last[1]


def _factors(module: str, update: LowRank, layout: Layout, *, rank: int, dtype: torch.dtype, halves: _Halves) -> Makers:
    """Return names, shapes and makers of a module's two factors in its layout, with zeros up to the rank."""
    out, into = update.shape
    ones = (1,) * len(layout.kernel)
    if layout.kind == "embedding":
        names = "lora_embedding_A", "lora_embedding_B"
    else:
        names = "lora_A.weight", "lora_B.weight"
    channels = into // torch.Size(layout.kernel).numel()
    shapes = (rank, channels, *layout.kernel), (out, rank, *ones)

    def factor(which: int) -> Tensor:
        found = halves.of(module, update) if dtype.itemsize < 4 else update
        tensor = scaled(found.a, found.scale) if which == 0 else found.b
        missing = rank - tensor.shape[which]
        padded = pad(tensor, (0, 0, 0, missing) if which == 0 else (0, missing)) if missing else tensor
        return padded.reshape(shapes[which])

    def make(which: int) -> Callable[[], Tensor]:
        return lambda: factor(which)

    return {f"{PREFIX}{module}.{names[which]}": (shapes[which], dtype, make(which)) for which in (0, 1)}


def _vectors(state: AdapterState, dtype: torch.dtype) -> Makers:
    """Return DoRA's magnitudes and the biases inside the LoRA: for every module or for none, as PEFT wants them."""
    if state.magnitudes and set(state.magnitudes) != set(state.updates):
        missing = sorted(set(state.updates) - set(state.magnitudes))[:3]
        raise OutputError(
            f"a DoRA must have a magnitude for every module, and {', '.join(missing)} has none. "
            "Give such modules the row norms of their weight plus update."
        )
    found: Makers = {}
    for module, update in state.updates.items():
        out = update.shape[0]
        if state.magnitudes:
            # The delta is a small difference of rows this long, and 16 bits would round it away.
            wide = torch.promote_types(dtype, torch.float32)
            found[f"{PREFIX}{module}.lora_magnitude_vector"] = ((out,), wide, state.magnitudes[module].clone)
        if state.biases:
            zero = torch.zeros(out)
            found[f"{PREFIX}{module}.lora_B.bias"] = ((out,), dtype, state.biases.get(module, zero).clone)
    return found


def _check_loads(state: AdapterState) -> None:
    """Refuse an adapter of which PEFT would load a part only: module paths of two classes, or modules left out."""
    clash = two_roots([*state.updates, *(key.removeprefix(PREFIX) for key in state.saved)])
    if clash is not None:
        raise OutputError(
            f"all modules of an adapter must be those of one model class, and '{clash[0]}' and '{clash[1]}' are of "
            "two. Save the adapters that it is made from with one class of the base model."
        )
    left_out = unreached(replace(state.meta, targets=written_targets(state.meta, state.updates)), state.updates)
    if left_out:
        raise OutputError(
            f"module '{left_out[0]}' has a LoRA, so it must not belong to the fully trained modules "
            f"({', '.join(state.meta.saved_modules)}), which PEFT never adapts. Leave one of the adapters out."
        )


def _check(state: AdapterState) -> None:
    if state.meta.initial is not None:
        raise OutputError(
            f"factors that began from a part of the base ({state.meta.initial}) must be converted to a plain delta "
            "before they are written."
        )
    if state.meta.dora != bool(state.magnitudes):
        raise OutputError(
            f"an adapter must have magnitudes where it is a DoRA and only there, found dora={state.meta.dora} and "
            f"{len(state.magnitudes)} magnitudes."
        )
    odd = sorted(module for module, layout in state.layouts.items() if layout != LINEAR)
    embedding = [module for module in odd if state.layouts[module].kind == "embedding"]
    if state.biases and embedding:
        raise OutputError(
            f"PEFT has no bias inside the LoRA of an embedding, and '{embedding[0]}' is one while other modules have "
            "biases. Merge the adapters without one or the other."
        )
    if state.magnitudes and odd:
        raise OutputError(f"only linear modules can be DoRA, and '{odd[0]}' is a {state.layouts[odd[0]]}.")


def _tensors(makers: Makers, headers: Headers) -> Iterator[tuple[str, Tensor]]:
    for name in file_order(headers):
        _, dtype, make = makers[name]
        tensor = make().to(dtype)
        if tensor.is_floating_point() and not all_finite(tensor):
            raise OutputError(
                f"{_owner(name)} must be finite in {str(dtype).removeprefix('torch.')}, and overflow it. "
                "Choose a wider dtype or smaller weights."
            )
        yield name, tensor


def _owner(name: str) -> str:
    module, mark, _ = name.removeprefix(PREFIX).partition(".lora_")
    return f"the factors of module '{module}'" if mark else f"the entries of '{name}'"


def _ranks(state: AdapterState, *, compact: bool) -> dict[str, int]:
    """Return the rank that each module has in the file."""
    own = {module: update.rank for module, update in state.updates.items()}
    # PEFT joins the experts of a layer into one module, whose rank it takes from `r`.
    return {m: rank if compact and not _EXPERT.search(m) else max(own.values()) for m, rank in own.items()}


def _makers(state: AdapterState, dtype: torch.dtype, *, compact: bool) -> Makers:
    """Return shape, dtype and maker of every tensor of the file."""
    makers: Makers = {}
    halves = _Halves(dtype)
    for module, rank in _ranks(state, compact=compact).items():
        layout = state.layouts.get(module, LINEAR)
        makers |= _factors(module, state.updates[module], layout, rank=rank, dtype=dtype, halves=halves)
    makers |= _vectors(state, dtype)
    return makers | {key: (tuple(tensor.shape), tensor.dtype, tensor.detach) for key, tensor in state.saved.items()}


def _headers(makers: Makers) -> Headers:
    return {name: (made, shape) for name, (shape, made, _) in makers.items()}


def adapter_size(state: AdapterState, *, dtype: torch.dtype = torch.float32, compact: bool = False) -> int:
    """Return the size in bytes of the weights file that `write_adapter` writes; no factor is made."""
    return file_size(_headers(_makers(state, dtype, compact=compact)), METADATA)


def write_adapter(
    folder: Path, state: AdapterState, *, dtype: torch.dtype = torch.float32, compact: bool = False
) -> None:
    """Write a PEFT LoRA folder with scale 1: alpha equals rank, and each update's scale lies in its A.

    Every module gets the largest rank, by zeros in its factors: many programs apply one alpha and one rank to all
    modules and ignore the patterns, so only this form means the same to each of them.

    Args:
        folder: An existing folder.
        state: The adapter. Modules without a bias get one of zeros where others have one, as PEFT has them on all or
            none.
        dtype: Storage dtype of factors and biases; magnitudes are float32 or wider, tensors kept whole keep theirs.
        compact: Keep each module's own rank, in `rank_pattern` and `alpha_pattern`, but for experts.

    Raises:
        OutputError: a factor overflows the storage dtype; magnitudes for some modules only; factors that are not the
            delta; a combination that PEFT cannot load.
    """
    _check(state)
    _check_loads(state)
    makers = _makers(state, dtype, compact=compact)
    headers = _headers(makers)
    stream_tensors(folder / WEIGHTS, headers, _tensors(makers, headers), METADATA)
    ranks = _ranks(state, compact=compact)
    # Without a task type PEFT loads the LoRA alone, on a model with a head or without.
    meta = replace(state.meta, task_type=None) if lacks_head(state.meta.task_type, state.saved) else state.meta
    (folder / CONFIG).write_bytes(dump_config(meta, ranks, lora_bias=bool(state.biases)))
