"""What a training step costs beside the bare UNet, and beside a loop as diffusers' LoRA example has it.

    python bench/step.py --model embedded                            # a minute
    python bench/step.py --model sd15 --pixels 128 --batch 1         # Stable Diffusion 1.5's true shape
    python bench/step.py --model sd15 --peer ~/other/train_step.py   # and a script of yours

All rows are steps of one model with one adapter (rank 8), taken in turn in one run; CPU seconds and wall,
median and the range of the middle 80%, and medians of the ratios of CPU seconds within a round. True shapes
have random weights, and hold one model at a time: its memory format is changed between the rows.

    floor                 UNet forward, mean square, backward to the adapter's weights, nothing else
    naive                 our step with the recipe naive: data, noise, losses, backward, clipping, AdamW
    naive, contiguous     the same in the other memory format ("naive, channels_last" where that is the other)
    naive, convolutions   where channels are last: with oneDNN's in place of products of matrices
    spf                   our step with the recipe spf in its second stage
    spf-paper             the same of spf-paper, response enhancement apart
    naive, compiled       with --compiled: train.compile = "regional"; what the first step took is told apart
    spf, compiled         the same
    diffusers             its example's loop: VAE and text encoder in each step, no channels_last
    diffusers, latents    the same on cached latents
"""

from __future__ import annotations

import argparse
import gc
import logging
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from common import write_checkpoint

from spf_kit import config
from spf_kit.data.split import Split
from spf_kit.embedded import data_path
from spf_kit.families import convolutions
from spf_kit.training import compiled, session
from spf_kit.training.run_folder import RunFolder
from spf_kit.training.session import Session

STEPS = 1000  # of the run; the measured ones lie in its second half, where spf is in stage two
QUIET = [
    "evaluate.enabled=false", "preview.every=0", "train.log_tensorboard=false", "train.optimizer=adamw",
    "train.gradient_checkpointing=false", "data.bucket_step=64", f"train.steps={STEPS}", "adapter.rank=8",
]  # fmt: skip
OURS = {
    "naive": ("naive", []),
    "spf": ("spf", []),
    "spf-paper": ("spf-paper", ["loss.response_enhancement.enabled=false"]),
}


@dataclass
class Row:
    """One kind of step and what it took."""

    step: Callable[[], None]
    channels_last: bool
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def take(self) -> None:
        cpu, wall = cpu_seconds(), time.perf_counter()
        self.step()
        self.cpu.append(cpu_seconds() - cpu)
        self.wall.append(time.perf_counter() - wall)


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def opened(model: str, folder: Path, pixels: int, dtype: str, sets: list[str]) -> Session:
    """A session of the recipe spf that is ready to train on four pictures."""
    data = folder / "pictures"
    if not data.is_dir():
        data.mkdir()
        for picture in sorted(data_path("glasses").glob("*.png"))[:4]:
            for file in (picture, picture.with_suffix(".txt")):
                shutil.copy(file, data)
    precision = {"float32": "no", "bfloat16": "bf16"}[dtype]
    own = [f"data.resolution={pixels}", f"base.dtype={dtype}", f"train.mixed_precision={precision}"]
    resolved = config.load("glasses", base=model, data=data, recipe="spf", sets=[*QUIET, *own, *sets])
    processes = session.accelerator(resolved.config.train)
    run = RunFolder(Path(tempfile.mkdtemp(dir=folder)) / "run")
    return session.open_session(resolved, run, processes, lambda *_: None, 1)


def ours(s: Session, recipe: str, batch: int) -> Callable[[], None]:
    """Steps of the same session with the losses of a recipe, from batch to update."""
    name, sets = OURS[recipe]
    plugins = config.load("glasses", recipe=name, sets=sets).plugins
    train = s.config.train.model_copy(update={"batch_size": batch})
    changed = s.config.model_copy(update={"train": train})
    mine = replace(s, plugins=plugins, config=changed, split=Split.of(batch, 0, 1))
    numbers = iter(range(STEPS // 2 + 1, STEPS))

    def step() -> None:
        number = next(numbers)
        mine.updater.backward(mine.forward(number, 0).loss)
        mine.updater.gradients()
        mine.updater.apply(number)

    return step


def compiled_ours(s: Session, recipe: str, batch: int) -> Callable[[], None]:
    """The same with transformer blocks compiled. Compiles here, and says what that took."""
    plain, plugins = ours(s, recipe, batch), config.load("glasses", recipe=recipe).plugins

    def step() -> None:
        compiled.put_on("regional", s.family, plugins)
        try:
            plain()
        finally:
            compiled.take_off(s.family)

    cpu, wall = cpu_seconds(), time.perf_counter()
    step()
    took = f"{cpu_seconds() - cpu:.1f} CPU s, {time.perf_counter() - wall:.1f} s"
    print(f"the first compiled step of {recipe}: {took}", flush=True)
    return step


def without_products(step: Callable[[], None]) -> Callable[[], None]:
    """The same with torch's own convolutions everywhere."""

    def plain() -> None:
        few, convolutions.FEW = convolutions.FEW, 0
        try:
            step()
        finally:
            convolutions.FEW = few

    return plain


def floor(s: Session, batch: int, pixels: int) -> Callable[[], None]:
    family = s.family
    side = pixels // family.latent_factor
    noisy, target = (torch.randn(batch, 4, side, side) for _ in range(2))
    noisy, timesteps = noisy.to(family.dtype), torch.full((batch,), 500)
    states = s.model.encode([s.dataset.entries[0].caption.full] * batch)["encoder_hidden_states"]
    states = states.to(family.dtype)

    def step() -> None:
        with s.model.autocast():
            prediction = family.unet(noisy, timesteps, encoder_hidden_states=states).sample
        (prediction.float() - target).square().mean().backward()
        for parameter in s.updater.parameters:
            parameter.grad = None

    return step


def diffusers_loop(s: Session, batch: int, pixels: int, *, cached: bool) -> Callable[[], None]:
    """`train_text_to_image_lora.py` of diffusers, its inner loop, on the same adapter layers."""
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler

    family, accelerator = s.family, s.accelerator
    vae, text_encoder, unet = family.vae, family.text_encoder, family.unet
    noise_scheduler = DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    parameters = s.updater.parameters
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    lr_scheduler = get_scheduler("constant", optimizer, num_warmup_steps=0, num_training_steps=STEPS)
    pixel_values = torch.rand(batch, 3, pixels, pixels) * 2 - 1
    input_ids = family.windows([s.dataset.entries[0].caption.full] * batch, 1)["text_encoder"].flatten(0, 1)
    with torch.no_grad():
        kept = vae.encode(pixel_values.to(vae.dtype)).latent_dist.sample() * vae.config.scaling_factor

    def step() -> None:
        latents = kept
        if not cached:
            latents = vae.encode(pixel_values.to(dtype=vae.dtype)).latent_dist.sample()
            latents = latents * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (batch,)).long()
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        encoder_hidden_states = text_encoder(input_ids, return_dict=False)[0]
        with accelerator.autocast():
            model_pred = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
        loss = F.mse_loss(model_pred.float(), noise.float(), reduction="mean")
        avg_loss = accelerator.gather(loss.repeat(batch)).mean()
        avg_loss.item()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()

    return step


def peer(script: Path) -> Callable[[], None]:
    """A whole process of another script, start included."""

    def step() -> None:
        subprocess.run([sys.executable, str(script)], check=True, stdout=subprocess.DEVNULL)

    return step


def is_channels_last(unet: torch.nn.Module) -> bool:
    return not unet.conv_in.weight.is_contiguous()


def in_format(unet: torch.nn.Module, channels_last: bool) -> None:
    kind = torch.channels_last if channels_last else torch.contiguous_format
    for parameter in unet.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=kind)


def measured(
    s: Session,
    batch: int,
    pixels: int,
    rounds: int,
    *,
    wanted: list[str] | None,
    script: Path | None,
    with_compiled: bool,
) -> dict[str, Row]:
    """The wanted rows, in turn. Rows of one memory format follow each other, and one step after each change
    of it is not counted."""
    as_loaded = is_channels_last(s.family.unet)
    other = "naive, contiguous" if as_loaded else "naive, channels_last"
    products = {"naive, convolutions": Row(without_products(ours(s, "naive", batch)), True)}
    rows = {
        "floor": Row(floor(s, batch, pixels), as_loaded),
        **{name: Row(ours(s, name, batch), as_loaded) for name in OURS},
        other: Row(ours(s, "naive", batch), not as_loaded),
        **(products if as_loaded else {}),
        "diffusers, latents": Row(diffusers_loop(s, batch, pixels, cached=True), False),
        "diffusers": Row(diffusers_loop(s, batch, pixels, cached=False), False),
    }
    for name in ("naive", "spf") if with_compiled else ():
        rows[f"{name}, compiled"] = Row(compiled_ours(s, name, batch), as_loaded)
    rows = {name: row for name, row in rows.items() if name in (wanted or rows)}
    theirs = Row(peer(script), False) if script else None
    for _ in range(rounds):
        for channels_last in (as_loaded, not as_loaded):
            some = [row for row in rows.values() if row.channels_last is channels_last]
            if some:
                in_format(s.family.unet, channels_last)
                some[0].step()
            for row in some:
                row.take()
        if theirs:
            theirs.take()
    return rows | ({"peer, whole process": theirs} if theirs else {})


def printed(rows: dict[str, Row]) -> Iterator[str]:
    yield "| step | CPU ms | wall ms | / floor | / naive | diffusers / this |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, row in rows.items():
        pairs = [(row, rows.get("floor")), (row, rows.get("naive")), (rows.get("diffusers"), row)]
        cells = " | ".join(f"{paired(a, b):.3f}" if a and b else "" for a, b in pairs)
        yield f"| {name} | {spread(row.cpu)} | {spread(row.wall)} | {cells} |"


def paired(above: Row, below: Row) -> float:
    """The median over rounds of the ratio within a round: what slows the machine slows both."""
    return median(a / b for a, b in zip(above.cpu, below.cpu))


def spread(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    cut = len(ordered) // 10
    return f"{median(ordered) * 1e3:.0f} ({ordered[cut] * 1e3:.0f} to {ordered[-1 - cut] * 1e3:.0f})"


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", choices=["embedded", "sd15"], default="embedded")
    parser.add_argument("--checkpoint", type=Path, help="an SD 1.5 file to use instead of writing one")
    parser.add_argument("--pixels", type=int, nargs="+")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rows", nargs="+", help="of the table; default: all")
    parser.add_argument("--set", action="append", default=[], dest="sets", help="as of spf-kit train")
    parser.add_argument("--compiled", action="store_true", help="with the rows of compiled steps")
    parser.add_argument("--peer", type=Path, help="a script to run, as it is, once a round")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = "embedded"
        if options.model == "sd15":
            model = str(options.checkpoint or write_checkpoint(folder / "sd15.safetensors"))
        sizes = options.pixels or ([64] if model == "embedded" else [128, 256])
        for dtype, pixels in product(options.dtype, sizes):
            s = opened(model, folder, pixels, dtype, options.sets)
            s.family.reload_encoders()  # the rival keeps both
            for batch, threads in product(options.batch, sorted(set(options.threads))):
                torch.set_num_threads(threads)
                title = f"{options.model}, {dtype}, {pixels} pixels, batch {batch}, threads {threads}"
                print(f"\n### {title}\n", flush=True)
                rows = measured(
                    s, batch, pixels, options.rounds,
                    wanted=options.rows, script=options.peer, with_compiled=options.compiled,
                )  # fmt: skip
                for line in printed(rows):
                    print(line, flush=True)
            del s  # one model at a time
            gc.collect()


if __name__ == "__main__":
    main()
