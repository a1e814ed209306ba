"""Settings that are each right and together wrong, and settings that have no effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from spf_kit.adapters.earlier import faults, same_file
from spf_kit.adapters.parts import NAMES
from spf_kit.config.paths import EMBEDDED
from spf_kit.config.problems import Origin, Problems, show, unknown
from spf_kit.embedded import data_names
from spf_kit.errors import UserError
from spf_kit.families import is_bare
from spf_kit.schema import Config

if TYPE_CHECKING:
    from spf_kit.losses import Loss, Plugin

Origins = Mapping[str, Origin]
_OF_KINDS = {
    "alpha": ("lora", "loha", "lokr"),
    "alphas": ("lora", "loha", "lokr"),
    "rank_stabilized": ("lora", "loha", "lokr"),
    "factor": ("lokr",),
    "decompose_both": ("lokr",),
    "constraint": ("oft",),
}


def check_sections(
    config: Config,
    origins: Origins,
    wrong: set[str],
    family: str | None,
    preset: Origin,
    problems: Problems,
) -> None:
    """Report contradictions between sections. `wrong` keys have been reported and count as their defaults;
    `family` is None where the base is unknown."""
    if "data.path" not in wrong:
        _check_pictures(config, origins, family, preset, problems)
    train, data = config.train, config.data
    text_rate = (
        train.learning_rate / 2
        if train.text_encoder_learning_rate is None
        else train.text_encoder_learning_rate
    )
    rates = [text_rate if "text-encoder" in config.adapter.targets else 0.0, *train.learning_rates.values()]
    if train.learning_rate == 0 and not any(rates):
        problems.add(
            origins["train.learning_rate"], "train.learning_rate = 0: nothing would be trained; 1e-4 is usual"
        )
    if not data.buckets and data.resolution % data.bucket_step:
        below = max(data.resolution // data.bucket_step, 1) * data.bucket_step
        problems.add(
            origins["data.resolution"],
            f"data.resolution = {data.resolution}: without buckets it must be a multiple of "
            f"data.bucket_step = {data.bucket_step}; take {below} or {below + data.bucket_step}",
        )
    if data.resolution < data.bucket_step:
        problems.add(
            origins["data.resolution"],
            f"data.resolution = {data.resolution}: must be at least data.bucket_step = {data.bucket_step}",
        )
    _check_selection(config, origins, wrong, problems)
    _check_precision(config, origins, wrong, problems)
    _check_compile(config, origins, wrong, problems)
    _check_offload(config, origins, wrong, problems)
    _check_kind(config, origins, wrong, problems)
    targets = config.adapter.targets
    if len(set(targets)) < len(targets):
        twice = next(target for target in targets if targets.count(target) > 1)
        problems.add(
            origins["adapter.targets"], f"adapter.targets = {show(targets)}: {twice!r} stands in it twice"
        )
    _check_earlier(config, origins, problems)


def _check_precision(config: Config, origins: Origins, wrong: set[str], problems: Problems) -> None:
    """Two half types do not meet in one operation."""
    held, computed = config.base.dtype, config.train.mixed_precision
    types = {"fp16": "float16", "bf16": "bfloat16"}
    if {"base.dtype", "train.mixed_precision"} & wrong or held == "float32" or computed == "no":
        return
    if types[computed] != held:
        problems.add(
            origins["train.mixed_precision"],
            f"train.mixed_precision = {show(computed)}: computes in {types[computed]}, but base.dtype = "
            f"{show(held)} ({origins['base.dtype']}) holds the weights in the other half precision; take "
            f"base.dtype = {show(types[computed])} or 'float32'",
        )


def _check_compile(config: Config, origins: Origins, wrong: set[str], problems: Problems) -> None:
    """Compiled code keeps what autograd's own functions let go of."""
    how, kept = config.train.compile, config.base.quantize
    if how != "no" and kept and not {"train.compile", "base.quantize"} & wrong:
        problems.add(
            origins["train.compile"],
            f"train.compile = {show(how)}: compiled code keeps every widened weight until the backward pass, "
            f"which takes back what base.quantize = {show(kept)} ({origins['base.quantize']}) saves; take "
            "one of the two",
        )


def _check_offload(config: Config, origins: Origins, wrong: set[str], problems: Problems) -> None:
    """Compiled code is made for weights that stay where they are."""
    if config.base.offload and config.train.compile != "no" and not {"base.offload", "train.compile"} & wrong:
        problems.add(
            origins["base.offload"],
            f"base.offload = true: weights come and go, which train.compile = {show(config.train.compile)} "
            f"({origins['train.compile']}) compiles anew each time; take one of the two",
        )


def _check_kind(config: Config, origins: Origins, wrong: set[str], problems: Problems) -> None:
    """What some kinds of adapters cannot do."""
    adapter, name = config.adapter, NAMES[config.adapter.kind]
    if "adapter.kind" in wrong:
        return
    if adapter.kind == "oft" and "convolutions" in adapter.targets and "adapter.targets" not in wrong:
        problems.add(
            origins["adapter.targets"],
            "adapter.targets names 'convolutions', and OFT is trained on linear layers alone: leave them "
            "out, or choose adapter.kind = 'lora', 'loha' or 'lokr'",
        )
    if adapter.kind != "lora" and adapter.dora:
        problems.add(
            origins["adapter.dora"],
            f"adapter.dora = true: magnitudes are trained with LoRA alone, adapter.kind is {adapter.kind!r} "
            f"({origins['adapter.kind']})",
        )
    if adapter.factor == 0:
        problems.add(origins["adapter.factor"], "adapter.factor = 0: give a size such as 8, or -1")
    if adapter.kind != "lora" and config.output.format != "kohya":
        problems.add(
            origins["output.format"],
            f"output.format = {show(config.output.format)}: {name} is written in kohya's format alone, "
            "as LyCORIS writes it and ComfyUI and A1111 read it",
        )


def _check_earlier(config: Config, origins: Origins, problems: Problems) -> None:
    start = config.adapter.start_from
    if not start or faults(config.adapter.on, "adapter.on"):
        return  # what is wrong with the list alone is told elsewhere
    if twin := same_file(config.adapter.on, start):
        problems.add(
            origins["adapter.on"],
            f"adapter.on: {twin!r}: is adapter.start_from ({origins['adapter.start_from']}) and would act "
            "twice; to go on with that LoRA take it out of adapter.on",
        )


def _check_selection(config: Config, origins: Origins, wrong: set[str], problems: Problems) -> None:
    """A budget to select by, and measurements to compare with it."""
    train = config.train
    if train.select != "budget":
        return
    for key, missing, remedy in (
        ("train.drift_budget", train.drift_budget is None, "how far predictions may move, such as 0.005"),
        ("train.drift_every", train.drift_every == 0, "the steps between measurements, such as 20"),
    ):
        if missing and key not in wrong:
            problems.add(origins["train.select"], f'train.select = "budget" needs {key}: {remedy}')


def _check_pictures(
    config: Config, origins: Origins, family: str | None, preset: Origin, problems: Problems
) -> None:
    path, remedy = (
        config.data.path,
        "give a folder of pictures with --data FOLDER, or [data] path in the preset",
    )
    if not path:
        origin = origins["data.path"] if origins["data.path"].source != "default" else preset
        problems.add(origin, f"data.path is missing: {remedy}")
    elif path.startswith(EMBEDDED + ":") and path.removeprefix(EMBEDDED + ":") not in data_names():
        names = [f"{EMBEDDED}:{name}" for name in data_names()]
        problems.add(
            origins["data.path"], f"data.path = {show(path)}: no such sample pictures{unknown(path, names)}"
        )
    elif (
        path.startswith(EMBEDDED + ":") and family not in (None, EMBEDDED) and not is_bare(config.base.model)
    ):
        problems.add(
            origins["base.model"],
            f"base.model = {show(config.base.model)}: needs pictures of its own size, but data.path = "
            f"{show(path)} ({origins['data.path']}) are 64-pixel drawings for the embedded base; {remedy}",
        )


def check_losses(plugins: Sequence[Plugin], origins: Origins, preset: Origin, problems: Problems) -> None:
    """Report masks that are missing or too late, stretches of the run without a loss, and needs at odds."""
    from spf_kit.losses import Loss, Mask

    losses = [plugin for plugin in plugins if isinstance(plugin, Loss)]
    if not losses:
        problems.add(
            preset, 'no loss: extend a recipe, as extends = "recipes/naive", or add a [[loss]] with a plugin'
        )
        return
    masks = {plugin.id: place for place, plugin in enumerate(plugins) if isinstance(plugin, Mask)}
    for place, plugin in enumerate(plugins):
        mask = getattr(plugin, "mask", None)
        if mask is None:
            continue
        where, text = origins[f"loss.{plugin.id}.mask"], f"loss.{plugin.id}.mask = {show(mask)}"
        if mask not in masks:
            other = any(other.id == mask for other in plugins)
            hint = "; this is the id of a loss" if other else unknown(mask, masks)
            problems.add(where, f"{text}: expected the id of a mask{hint or '; the preset has none'}")
        elif masks[mask] > place:
            problems.add(where, f"{text}: the mask stands after this entry; put its [[loss]] before")
        elif not (plugins[masks[mask]].start <= plugin.start and plugin.end <= plugins[masks[mask]].end):
            by = plugins[masks[mask]]
            problems.add(
                where,
                f"{text}: the mask acts from {by.start} to {by.end} of the run, this loss from "
                f"{plugin.start} to {plugin.end}; widen the mask or narrow the loss",
            )
    _check_coverage(losses, origins, problems)
    _check_needs(plugins, origins, problems)


def _check_coverage(losses: Sequence[Loss], origins: Origins, problems: Problems) -> None:
    """Every share of the run must have a loss that counts, or there is nothing to minimise there."""
    acting = sorted((loss for loss in losses if loss.weight), key=lambda loss: loss.start)
    if not acting:
        first = losses[0]
        problems.add(origins[f"loss.{first.id}.weight"], "every loss has weight 0: nothing would be trained")
        return
    reached = 0.0
    for loss in acting:
        if loss.start > reached:
            problems.add(
                origins[f"loss.{loss.id}.start"],
                f"loss.{loss.id}.start = {loss.start}: no loss acts between {reached} and {loss.start}",
            )
            return
        reached = max(reached, loss.end)
    if reached < 1:
        last = max(acting, key=lambda loss: loss.end)
        problems.add(
            origins[f"loss.{last.id}.end"],
            f"loss.{last.id}.end = {last.end}: no loss acts from there to the end",
        )


def _check_needs(plugins: Sequence[Plugin], origins: Origins, problems: Problems) -> None:
    from spf_kit.losses import Needs

    needs = Needs.nothing()
    for plugin in plugins:
        try:
            needs = needs | plugin.needs
        except UserError as error:
            problems.add(origins[f"loss.{plugin.id}.plugin"], f"loss.{plugin.id}: {error}")


def ineffective(config: Config, origins: Origins) -> list[str]:
    """Settings made by hand that change nothing as the others stand: worth a word, no error."""
    train, data, found = config.train, config.data, []

    def note(key: str, why: str) -> None:
        if origins[key].source != "default":
            found.append(f"{origins[key]}: {key} has no effect {why}")

    adapter = config.adapter
    for key, kinds in _OF_KINDS.items():
        if adapter.kind not in kinds:
            note(f"adapter.{key}", f"with adapter.kind = {adapter.kind!r}")
    if data.keep_tokens and not data.shuffle_tags:
        note("data.keep_tokens", "without data.shuffle_tags = true")
    if train.text_encoder_learning_rate is not None and "text-encoder" not in config.adapter.targets:
        note("train.text_encoder_learning_rate", "without 'text-encoder' among adapter.targets")
    if train.epochs is None and train.warmup >= train.steps:
        note("train.schedule", f"because train.warmup = {train.warmup} lasts the whole run")
    if train.drift_budget is not None and not train.drift_every:
        note("train.drift_budget", "while train.drift_every = 0")
    if train.select == "budget" and train.epochs is None and train.drift_every >= train.steps:
        note("train.select", f"because train.drift_every = {train.drift_every} leaves only the last step")
    if config.preview.prompts and not config.preview.every:
        note("preview.prompts", "while preview.every = 0")
    if config.calibrate.prompts and not config.calibrate.enabled:
        note("calibrate.prompts", "while calibrate.enabled = false")
    if config.evaluate.prompts and not config.evaluate.enabled:
        note("evaluate.prompts", "while evaluate.enabled = false")
    return found
