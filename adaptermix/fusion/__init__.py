"""LoRAs whose bottleneck fuses a target text with its source in another language (FLARE)."""

from .functions import FUSIONS
from .sources import ALIGNMENTS, Sources, fused, read_sources, starts

__all__ = ["ALIGNMENTS", "FUSIONS", "Sources", "fused", "read_sources", "starts"]
