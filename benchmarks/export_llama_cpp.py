"""Greedy answers of llama.cpp with exported adapters, next to those of transformers and PEFT with the adapters.

Both get the same token ids, both compute in float32, and both answers are the tokens with the largest logits. Needs the
packages gguf and llama-cpp-python, the base model as GGUF in float32 (`convert_hf_to_gguf.py MODEL --outtype f32`), and
two adapters. Goal: equal answers, for the base model, each adapter, their merge, and the two adapters scaled by
llama.cpp in place of the merge.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptermix import export, merge
from adaptermix.tasks import get_task
from adaptermix.tasks.base import get_template
from adaptermix.tasks.data.prompt_ids import PromptIds

Step = Callable[[Sequence[int]], np.ndarray]


class Answer(NamedTuple):
    """New tokens, the logits before the first of them, and at each step how far the best token is ahead."""

    ids: list[int]
    logits: np.ndarray
    margins: list[float]


class Engine:
    """llama.cpp with adapters, whose scales are set for each system."""

    def __init__(self, model: Path, folders: dict[str, Path]) -> None:
        wide = llama_cpp.GGML_TYPE_F32  # llama.cpp keeps keys and values in 16 bits by default
        own = {"type_k": wide, "type_v": wide, "verbose": False, "n_threads": 1}
        self.model = llama_cpp.Llama(str(model), n_ctx=512, logits_all=True, **own)
        self.handles = {
            name: llama_cpp.llama_adapter_lora_init(self.model.model, str(folder / "adapter.gguf").encode())
            for name, folder in folders.items()
        }
        if not all(self.handles.values()):
            raise RuntimeError("llama.cpp does not load an adapter")

    def use(self, scales: dict[str, float]) -> None:
        """Set the scales; adapters that are not listed do not act."""
        handles = (llama_cpp.llama_adapter_lora_p_ctypes * len(scales))(*(self.handles[name] for name in scales))
        numbers = (ctypes.c_float * len(scales))(*scales.values())
        if llama_cpp.llama_set_adapters_lora(self.model.ctx, handles, len(scales), numbers):
            raise RuntimeError("llama.cpp does not take the adapters")

    def start(self) -> Step:
        """Return a function that reads tokens and returns the logits after them, with an empty context."""
        self.model.reset()
        return self._next

    def _next(self, ids: Sequence[int]) -> np.ndarray:
        self.model.eval(list(ids))
        return np.array(self.model.scores[self.model.n_tokens - 1])


class Reference:
    """transformers, with an adapter by PEFT."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache = model.eval(), None

    def start(self) -> Step:
        """Return a function that reads tokens and returns the logits after them, with an empty context."""
        self.cache = None
        return self._next

    @torch.no_grad()
    def _next(self, ids: Sequence[int]) -> np.ndarray:
        result = self.model(input_ids=torch.tensor([list(ids)]), past_key_values=self.cache, use_cache=True)
        self.cache = result.past_key_values
        return result.logits[0, -1].float().numpy().copy()


def greedy(prompt: Sequence[int], most: int, end: int, step: Step) -> Answer:
    """Return the answer to a prompt."""
    logits = first = step(prompt)
    ids, margins = [], []
    while True:
        second, best = np.sort(logits)[-2:]
        ids.append(int(logits.argmax()))
        margins.append(float(best - second))
        if ids[-1] == end or len(ids) == most:
            return Answer(ids, first, margins)
        logits = step(ids[-1:])


def compared(there: list[Answer], here: list[Answer]) -> dict[str, Any]:
    """Count equal answers, and describe those that differ: the step, and how far the best token was ahead."""
    differing = []
    for row, (one, other) in enumerate(zip(there, here, strict=True)):
        if one.ids != other.ids:
            pairs = zip(one.ids, other.ids, strict=False)
            step = next(at for at, (a, b) in enumerate(pairs) if a != b)
            differing.append({"row": row, "step": step, "margin": other.margins[step]})
    return {
        "equal": len(here) - len(differing),
        "of": len(here),
        "tokens": sum(len(answer.ids) for answer in here),
        "logits_differ_by": max(float(np.abs(a.logits - b.logits).max()) for a, b in zip(there, here, strict=True)),
        "least_margin": min(min(answer.margins) for answer in here),
        "differing": differing,
    }


def show(**figures: Any) -> None:
    """Print figures as a line of JSON."""
    print(json.dumps(figures), flush=True)  # noqa: T201


def main() -> None:
    """Compare the systems, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, nargs=2, required=True)
    parser.add_argument("--weights", type=float, nargs=2, default=[0.9, 0.5])
    parser.add_argument("--task", default="slots")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--rows", default="0:20")
    parser.add_argument("--most", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, task = AutoTokenizer.from_pretrained(options.base), get_task(options.task)
    rows, _ = task.read(options.data, rows=options.rows)
    encoder, template = PromptIds(tokenizer=tokenizer), get_template(task)
    prompts = [encoder.encode(template, task.fields(row), task.language(row)) for row in rows]

    def answered(system: Engine | Reference) -> list[Answer]:
        return [greedy(ids, options.most, tokenizer.eos_token_id, system.start()) for ids in prompts]

    first, second = options.adapters
    with TemporaryDirectory() as name:
        temporary = Path(name)
        merge([first, second], weights=options.weights, out=temporary / "merged")
        folders = {"first": first, "second": second, "merged": temporary / "merged"}
        for key, folder in folders.items():
            export(folder=folder, engine="llama.cpp", base=str(options.base), out=temporary / f"{key}-gguf")
        engine = Engine(options.gguf, {key: temporary / f"{key}-gguf" for key in folders})
        scaled = dict(zip(("first", "second"), options.weights, strict=True))
        answers: dict[str, list[Answer]] = {}
        for key, scales in {"base": {}, **{key: {key: 1.0} for key in folders}, "scaled": scaled}.items():
            if key != "scaled":  # whose answers must be those of the merge
                model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
                model = PeftModel.from_pretrained(model, folders[key]) if key in folders else model
                answers[key] = answered(Reference(model))
            engine.use(scales)
            show(system=key, **compared(answered(engine), answers.get(key) or answers["merged"]))
    for key in folders:
        changed = sum(a.ids != b.ids for a, b in zip(answers[key], answers["base"], strict=True))
        show(system=key, answers_other_than_the_base_model=changed)


if __name__ == "__main__":
    main()
