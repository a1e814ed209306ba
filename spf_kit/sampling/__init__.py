"""Pictures from a family, the grid of `spf-kit sample`, contact sheets, and the parameters in a PNG."""

from spf_kit.files import refuse_existing
from spf_kit.sampling.draw import Progress, draw, encode, evaluating, generate, save_png, to_pil
from spf_kit.sampling.grid import sample_loras
from spf_kit.sampling.settings import GridSettings, SampleLora, parse_size, parse_strengths, read_prompts

__all__ = [
    "GridSettings",
    "Progress",
    "SampleLora",
    "draw",
    "encode",
    "evaluating",
    "generate",
    "parse_size",
    "parse_strengths",
    "read_prompts",
    "refuse_existing",
    "sample_loras",
    "save_png",
    "to_pil",
]
