"""Draw pictures with a family's own diffusers pipeline.

Shapes: N pictures, H x W pixels, L tokens, D text features.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spf_kit.errors import UserError
from spf_kit.files import atomic
from spf_kit.parallel import in_order, lanes, split
from spf_kit.sampling.png_info import PictureInfo

if TYPE_CHECKING:
    from PIL.Image import Image

    from spf_kit.families.base import Condition, Family

Progress = Callable[[int, int, str], None]  # done, total, text
SLICED_ABOVE = 256 * 256  # pixels: beyond it the VAE decodes one by one, or it would need most of the memory


# --- drawing ----------------------------------------------------------------------------------------------


def generate(
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    negative: str = "",
    steps: int = 25,
    cfg: float = 5.0,
    scheduler: str = "ddim",
    width: int | None = None,
    height: int | None = None,
    clip_skip: int = 1,
    chunks: int = 1,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Tensor:
    """One picture for each pair of prompt and seed: (N, 3, H, W) in [0, 1], float32, on the CPU.

    A picture's noise depends on its seed alone: each has its own `torch.Generator("cpu")`, so it is the
    picture that `StableDiffusionPipeline(prompt, generator=torch.Generator().manual_seed(seed))` draws,
    whatever is drawn beside it and on whatever device, up to rounding: floating-point sums depend on the
    size of a batch. The global random state is left alone.

    Args:
        prompts: N prompts; each different one is encoded once.
        seeds: N seeds.
        negative: one negative prompt for all; without effect unless cfg > 1.
        steps: of the sampler.
        cfg: classifier-free guidance scale; at most 1 means none, in half the time.
        scheduler: a name that `family.pipeline` knows.
        width, height: pixels, multiples of 8; default: what the base was trained on.
        clip_skip: text layer counted from the end, 1 is the last.
        chunks: windows of 75 tokens that a prompt may fill.
        batch_size: pictures drawn at once.
        progress: called as (pictures done, pictures, text).

    Raises:
        UserError: a size that the model cannot draw, an unknown scheduler, or pictures with NaN.
    """
    batches = draw(
        family, prompts, seeds, negative=negative, steps=steps, cfg=cfg, scheduler=scheduler, width=width,
        height=height, clip_skip=clip_skip, chunks=chunks, batch_size=batch_size, progress=progress,
    )  # fmt: skip
    done = [pictures for _, pictures in batches]
    return torch.cat(done) if done else torch.zeros(0, 3, height or 0, width or 0)


def draw(
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    negative: str,
    steps: int,
    cfg: float,
    scheduler: str,
    width: int | None,
    height: int | None,
    clip_skip: int,
    chunks: int,
    batch_size: int,
    progress: Progress | None,
) -> Iterator[tuple[range, Tensor]]:
    """`generate` batch by batch, (which pictures, the pictures), so that each is kept as soon as drawn."""
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
    for name, side in (("width", width), ("height", height)):
        if side is not None and (side < 8 or side % 8):
            raise UserError(f"the {name} must be a multiple of 8 pixels, not {side}")
    family.reload_encoders()
    pipeline = family.pipeline(scheduler)
    guided = cfg > 1  # diffusers' own rule
    encoded = encode(family, [*prompts, *[negative] * guided], clip_skip=clip_skip, chunks=chunks)
    against = family.negative(negative, encoded[negative]) if guided else None
    beside = 1 if family.offload else lanes(family.unet)  # turns are one at a time
    batches = split(len(prompts), batch_size, beside)
    reporter = _Reporter(progress, batches)

    def run(batch: range) -> Tensor:
        """One batch, through a pipeline of its own: schedulers keep state."""
        own = pipeline if beside == 1 else family.pipeline(scheduler)
        own.set_progress_bar_config(disable=True)
        asked = stacked([encoded[prompts[i]] for i in batch])
        result = own(
            **family.prompt_arguments(asked, stacked([against] * len(batch)) if against else None),
            generator=[torch.Generator("cpu").manual_seed(int(seeds[i])) for i in batch],
            num_inference_steps=steps,
            guidance_scale=cfg,
            width=width,
            height=height,
            output_type="pt",
            callback_on_step_end=reporter.of(batch),
        )
        pictures: Tensor = result.images.float().cpu()
        if not torch.isfinite(pictures).all():
            raise UserError(
                f"the base {family.base_id!r} draws NaN in {str(family.dtype).removeprefix('torch.')}: take "
                "bfloat16 or float32 (--dtype, in a preset base.dtype), or give it another VAE with base.vae"
            )
        return pictures

    with _drawing(pipeline, width, height):
        yield from zip(batches, in_order(run, batches, beside, stop=reporter.stop), strict=True)


@torch.no_grad()
def encode(
    family: Family, texts: Sequence[str], *, clip_skip: int = 1, chunks: int = 1, batch_size: int = 32
) -> dict[str, Condition]:
    """The condition of each different text, without the batch's axis, encoded once, with dropout off."""
    unique = list(dict.fromkeys(texts))
    encoded: dict[str, Condition] = {}
    with evaluating(*family.text_encoders().values()):
        for start in range(0, len(unique), batch_size):
            batch = unique[start : start + batch_size]
            condition = family.encode_text(batch, clip_skip=clip_skip, chunks=chunks)
            for i, text in enumerate(batch):
                encoded[text] = {name: value[i] for name, value in condition.items()}
    return encoded


def stacked(rows: Sequence[Condition]) -> Condition:
    """Conditions without the batch's axis as one batch."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class _Reporter:
    """The pipelines' callbacks after each call of the model, from several threads, as one progress."""

    def __init__(self, progress: Progress | None, batches: Sequence[range]) -> None:
        self.progress, self.total = progress, sum(map(len, batches))
        self.shares = {batch.start: 0.0 for batch in batches}  # pictures done of each batch
        self.lock, self.stop = threading.Lock(), threading.Event()

    def of(self, batch: range) -> Callable[..., dict[str, Any]]:
        def report(pipeline: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if self.stop.is_set():
                pipeline._interrupt = True  # diffusers' way to end the loop early
            calls = pipeline.num_timesteps  # some samplers call the model twice in a step
            with self.lock:
                self.shares[batch.start] = len(batch) * (index + 1) / calls
                if self.progress is not None:
                    done = round(sum(self.shares.values()))
                    self.progress(done, self.total, f"step {index + 1} of {calls}")
            return values

        return report


@contextmanager
def evaluating(*modules: nn.Module | None) -> Iterator[None]:
    """Dropout off, also where an adapter in training has some; every module's own mode comes back."""
    training = [m for root in modules if root is not None for m in root.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _drawing(pipeline: Any, width: int | None, height: int | None) -> Iterator[None]:
    """Dropout off; the VAE decodes large pictures one by one: the same result in one picture's memory."""
    default = pipeline.vae_scale_factor * pipeline.unet.config.sample_size
    before = pipeline.vae.use_slicing
    pipeline.vae.use_slicing = before or (width or default) * (height or default) > SLICED_ABOVE
    try:
        with evaluating(pipeline.unet, pipeline.vae):
            yield
    finally:
        pipeline.vae.use_slicing = before


def to_pil(pictures: Tensor) -> list[Image]:
    """(N, 3, H, W) in [0, 1] to 8-bit RGB pictures, rounded as diffusers rounds."""
    from PIL import Image as Pillow

    arrays = (pictures.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Pillow.fromarray(array) for array in arrays]


def save_png(picture: Image, path: Path, info: PictureInfo | None = None) -> None:
    """Write a PNG, whole or not at all, with its parameters in the text chunk."""
    with atomic(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info.chunk() if info else None)
