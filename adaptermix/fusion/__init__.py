"""LoRAs whose bottleneck fuses a target text with its source in another language (FLARE)."""

from .functions import FUSIONS
from .sources import ALIGNMENTS, Fuser, Sources, fused, read_sources

__all__ = ["ALIGNMENTS", "FUSIONS", "Fuser", "Sources", "fused", "read_sources"]
