"""spf-kit: LoRA training for text-to-image diffusion models with pluggable losses."""

__version__ = "0.1.0"
