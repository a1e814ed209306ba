"""The command line: parse, call, print. Imports no torch, so that `spf-kit --help` answers at once."""

from __future__ import annotations

import atexit
import gc
from pathlib import Path
from typing import Annotated, Any

import typer

from spf_kit import __version__, cli_about, cli_files, cli_studio, heap
from spf_kit.cli_options import (
    BaseDtype,
    BaseModel,
    DataFolder,
    Dtype,
    Json,
    On,
    Overwrite,
    Plugins,
    Preset,
    Profile,
    Quantize,
    Recipe,
    Sets,
)
from spf_kit.console import command

app = typer.Typer(
    name="spf-kit",
    help="Train LoRAs that add one attribute and leave everything else as the base model drew it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_about.losses_app, name="losses")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"spf-kit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    # at its end Python looks through all objects for cycles, several times: a second and more with torch
    atexit.register(gc.freeze)
    heap.keep_no_buffers()
    try:
        code = app(standalone_mode=False)
    except Exception as error:  # typer keeps its click, and click's exceptions, to itself
        if not hasattr(error, "format_message"):
            raise
        raise SystemExit(_misused(error)) from None
    raise SystemExit(code if isinstance(code, int) else 0)


def _misused(error: Any) -> int:
    """A command line that cannot be read: one sentence, or the help if nothing was asked. Exit code 2."""
    import sys

    from spf_kit.console import Console, fail

    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return 2
    place = error.ctx.command_path if error.ctx else "spf-kit"
    sentence = f"{error.format_message().rstrip('.')}; see {place} --help"
    return fail(Console(json_mode="--json" in sys.argv), "error", sentence, 2)


@app.command()
def train(
    preset: Preset,
    base: BaseModel = None,
    profile: Profile = None,
    data: DataFolder = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder (default: runs/NAME).")
    ] = None,
    recipe: Recipe = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Same seed, same machine: same LoRA.")] = None,
    on: On = [],
    set_: Sets = [],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Resolve and check; train nothing.")] = False,
    plugin: Plugins = [],
    json: Json = False,
) -> None:
    """Train a LoRA from a preset, measure it, and draw a contact sheet."""
    with command(json, several=not dry_run) as console:
        from spf_kit import config, workflow
        from spf_kit.console import interrupt_on_terminate

        interrupt_on_terminate()
        resolved = config.load(
            preset,
            base=base,
            profile=profile,
            data=data,
            recipe=recipe,
            steps=steps,
            seed=seed,
            on=on,
            sets=set_,
            plugin_files=plugin,
        )
        run = output or Path("runs") / resolved.config.attribute.name
        if dry_run:
            workflow.dry_run(resolved, run, console)
        else:
            workflow.train(resolved, run, resume=resume, console=console)


app.command()(cli_about.estimate)


@app.command()
def sample(
    lora: Annotated[
        list[str] | None, typer.Argument(help="LoRA file; none draws with the base alone.")
    ] = None,
    base: BaseModel = None,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to draw (repeatable).")] = [],
    prompts: Annotated[Path | None, typer.Option("--prompts", help="File with one prompt a line.")] = None,
    negative: Annotated[str, typer.Option("--negative", help="What not to draw.")] = "",
    strength: Annotated[str, typer.Option("--strength", help="Strengths of the LoRA, as 0,0.5,1.")] = "1",
    seed: Annotated[int, typer.Option("--seed", help="Seed of the first picture.")] = 0,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Pictures of each prompt.")] = 1,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Sampler steps.")] = 25,
    cfg: Annotated[float, typer.Option("--cfg", min=0, help="Classifier-free guidance scale.")] = 5.0,
    scheduler: Annotated[
        str, typer.Option("--scheduler", help="ddim, dpm++2m, euler, euler_a, ...")
    ] = "ddim",
    size: Annotated[
        str | None, typer.Option("--size", help="WIDTHxHEIGHT (default: the base's own).")
    ] = None,
    clip_skip: Annotated[int, typer.Option("--clip-skip", min=1, help="Text layer from the end.")] = 1,
    dtype: BaseDtype = None,
    quantize: Quantize = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")] = Path(
        "samples"
    ),
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Draw pictures over prompts, strengths and seeds; the same seed across strengths."""
    with command(json) as console:
        from spf_kit import workflow

        workflow.sample(
            lora or [],
            base=base,
            prompts=prompt,
            prompts_file=prompts,
            negative=negative,
            strengths=strength,
            seed=seed,
            count=count,
            steps=steps,
            cfg=cfg,
            scheduler=scheduler,
            size=size,
            clip_skip=clip_skip,
            dtype=dtype,
            quantize=quantize,
            output=output,
            overwrite=overwrite,
            console=console,
        )


@app.command()
def merge(
    lora: Annotated[
        list[str], typer.Argument(metavar="LORA[:WEIGHT]", help="LoRA files with their weights.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File or folder to write.")],
    into: Annotated[
        str | None, typer.Option("--into", help="Checkpoint file, diffusers folder or 'embedded'.")
    ] = None,
    dtype: Dtype = None,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Without --into: rank of the result.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Prove that base + LoRA equals the merged.")] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Merge LoRAs into a checkpoint, or without --into several LoRAs into one."""
    with command(json) as console:
        from spf_kit import workflow

        workflow.merge(
            lora,
            into=into,
            output=output,
            dtype=dtype,
            rank=rank,
            check=check,
            overwrite=overwrite,
            console=console,
        )


for _function in cli_files.COMMANDS:
    app.command()(_function)


@app.command()
def evaluate(
    lora: Annotated[list[Path], typer.Argument(help="LoRA files, all of one attribute.")],
    base: BaseModel = None,
    target: Annotated[
        str | None, typer.Option("--target", help="Trigger phrase (default: the LoRA's own).")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="File of prompts without the target.")
    ] = None,
    count: Annotated[int | None, typer.Option("--count", "-n", min=1, help="How many prompts.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the first prompt.")] = None,
    strength: Annotated[float, typer.Option("--strength", help="Of every LoRA.")] = 1.0,
    on: On = [],
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Sampler steps.")] = None,
    cfg: Annotated[float | None, typer.Option("--cfg", min=0, help="Guidance scale.")] = None,
    dtype: BaseDtype = None,
    quantize: Quantize = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Contact sheet to write.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Measure response, preservation, leakage and drift of LoRAs beside their base."""
    with command(json) as console:
        from spf_kit import workflow

        workflow.evaluate(
            lora,
            base=base,
            target=target,
            prompts_file=prompts,
            strength=strength,
            on=on,
            dtype=dtype,
            quantize=quantize,
            output=output,
            overwrite=overwrite,
            console=console,
            settings={"count": count, "seed": seed, "steps": steps, "cfg": cfg},
        )


@app.command()
def share(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    base: BaseModel = None,
    prompt: Annotated[
        list[str], typer.Option("--prompt", "-p", help="What to draw (default: evaluated prompts).")
    ] = [],
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="Pictures, without --prompt.")] = 4,
    base_id: Annotated[
        str | None, typer.Option("--base-id", help="OWNER/NAME of the base on the hub, for the card.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--licence", "--license", help="Identifier (default: the base family's).")
    ] = None,
    thumbnail: Annotated[
        str | None,
        typer.Option(
            "--thumbnail", help="Picture for the LoRA's metadata; 'first': the first that is drawn."
        ),
    ] = None,
    dtype: BaseDtype = None,
    push: Annotated[str | None, typer.Option("--push", help="OWNER/NAME on the hub to upload to.")] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: only you see it.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write (default: RUN/share).")
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a folder ready to upload: the LoRA, a model card, pictures with their parameters."""
    with command(json) as console:
        from spf_kit import workflow

        workflow.share(
            run,
            base=base,
            prompts=prompt,
            count=count,
            base_id=base_id,
            licence=licence,
            thumbnail=thumbnail,
            dtype=dtype,
            push=push,
            private=private,
            output=output,
            overwrite=overwrite,
            console=console,
        )


for said in (cli_about.inspect, cli_about.presets, cli_about.doctor, cli_studio.studio):
    app.command()(said)
