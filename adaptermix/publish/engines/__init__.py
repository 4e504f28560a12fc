"""The inference engines that `export` writes for, one file each."""

from .base import ENGINES, Engine, PlainAdapter, fill, refuse_unserved
from .llama_cpp import LlamaCpp
from .mlx import Mlx
from .sglang import Sglang
from .tensorrt_llm import TensorRtLlm
from .vllm import Vllm

__all__ = [
    "ENGINES",
    "Engine",
    "LlamaCpp",
    "Mlx",
    "PlainAdapter",
    "Sglang",
    "TensorRtLlm",
    "Vllm",
    "fill",
    "refuse_unserved",
]
