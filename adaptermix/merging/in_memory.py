"""Adapters in memory as inputs of a merge, and adapters added to a loaded model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from safetensors.torch import save_file
from torch import Tensor, nn

from ..adapters import AdapterState, write_adapter
from ..adapters.lora_config import CONFIG
from ..errors import PlanError
from ..io.temporary import temporary_folder
from ..io.weight_files import WEIGHTS

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    AdapterInput: TypeAlias = (
        str
        | Path
        | AdapterState
        | PeftModel
        | tuple[PeftModel, str]
        | tuple[Mapping[str, Tensor], PeftConfig | Mapping[str, Any]]
    )


def is_in_memory(adapter: object) -> bool:
    """Return whether an adapter is an object, not the path of a folder."""
    return not isinstance(adapter, str | os.PathLike)


@contextmanager
def folders_of(adapters: Sequence[AdapterInput]) -> Iterator[list[str | Path]]:
    """Yield a folder per adapter; adapters in memory are written as PEFT writes them, until the context ends.

    Args:
        adapters: Each is a folder, an `AdapterState`, a `PeftModel` (its active adapter), a `PeftModel` with the name
            of one of its adapters, or a state dict of peft with its config (a `PeftConfig`, or a mapping).

    Raises:
        PlanError: an adapter is of another kind.
    """
    with temporary_folder() as parent:
        yield [
            _written(adapter, parent / str(index), f"adapter{index + 1}") if is_in_memory(adapter) else adapter  # type: ignore[misc]
            for index, adapter in enumerate(adapters)
        ]


def _written(adapter: Any, parent: Path, default: str) -> Path:
    """Write an adapter below a folder, and return its own folder, which has its name."""
    first, second = adapter if isinstance(adapter, tuple) and len(adapter) == 2 else (adapter, None)
    if isinstance(first, AdapterState) and second is None:
        folder = parent / default
        folder.mkdir(parents=True)
        write_adapter(folder, first)
        return folder
    if hasattr(first, "peft_config") and isinstance(first, nn.Module):
        return _of_model(first, second, parent)
    if isinstance(first, Mapping) and second is not None:
        return _of_state_dict(first, second, parent / default)
    raise PlanError(
        "an adapter must be a folder, an AdapterState, a PeftModel, a PeftModel with the name of an adapter, or a "
        f"state dict of peft with its config, got {type(adapter).__name__}.",
        code="adapter.object",
    )


def _of_model(model: Any, name: object, parent: Path) -> Path:
    active = model.active_adapter if name is None else name
    if not isinstance(active, str) or active not in model.peft_config:
        raise PlanError(
            f"the model must have an adapter {active!r}; it has {', '.join(map(repr, model.peft_config))}. "
            "Give (model, name).",
            code="adapter.name",
        )
    folder = parent / active
    # peft writes the adapter "default" into the folder itself, and any other one into a folder of its name
    model.save_pretrained(str(folder if active == "default" else parent), selected_adapters=[active])
    return folder


def _of_state_dict(tensors: Mapping[str, Tensor], config: Any, folder: Path) -> Path:
    if not isinstance(config, Mapping) and not hasattr(config, "save_pretrained"):
        raise PlanError(
            f"the config of a state dict must be a PeftConfig or a mapping, got {type(config).__name__}.",
            code="adapter.object-config",
        )
    folder.mkdir(parents=True)
    stored = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    if isinstance(config, Mapping):
        text = json.dumps(dict(config), default=lambda value: sorted(value) if isinstance(value, set) else str(value))
        (folder / CONFIG).write_text(text, encoding="utf-8")
    else:
        config.save_pretrained(str(folder))
    return folder


def add_to(model: nn.Module, adapter: AdapterInput, name: str = "merged") -> PeftModel:
    """Add an adapter to a loaded model under a name, as `PeftModel.load_adapter` does for a folder.

    Args:
        model: A base model of transformers, which is wrapped with the adapter active; or a `PeftModel`, whose active
            adapter stays: `model.set_adapter(name)` changes to the new one.
        adapter: A folder, the `adapter` of a merge report, or any other input of `merge`.
        name: Name of the adapter in the model.

    Raises:
        PlanError: the model has an adapter of this name, or the adapter is not one of the kinds above.
    """
    from peft import PeftModel

    if isinstance(model, PeftModel) and name in model.peft_config:
        raise PlanError(
            f"the name of an added adapter must be new, and the model has an adapter {name!r}. Give another name.",
            code="adapter.name-in-use",
        )
    with folders_of([adapter]) as folders:
        if not isinstance(model, PeftModel):
            return PeftModel.from_pretrained(model, str(folders[0]), adapter_name=name)
        model.load_adapter(str(folders[0]), adapter_name=name)
        return model
