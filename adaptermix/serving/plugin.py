"""The plugin of vLLM: a resolver of LoRA names.

Read in vLLM: `lora/resolver.py`, `plugins/lora_resolvers/filesystem_resolver.py`, `lora/worker_manager.py` (which reads
the folder again when the adapter has left the memory of the engine).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .settings import from_environment

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


def register() -> None:
    """Register the resolver with vLLM if `ADAPTERMIX_ADAPTERS` is set; vLLM calls this function when it starts.

    Raises:
        UsageError: an environment variable has an invalid value.
    """
    settings = from_environment()
    if settings is None:
        return
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    from .compose import Composer

    composer = Composer(settings)

    class AdapterMixResolver(LoRAResolver):  # type: ignore[misc]
        """Serves merges of the registered adapters."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            folder = await composer.find(base_model_name, lora_name)
            if folder is None:
                return None
            # vLLM replaces the number by its own; it must be positive.
            number = int(folder.name[:15], 16) + 1
            return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(folder))

    LoRAResolverRegistry.register_resolver("adaptermix", AdapterMixResolver())
