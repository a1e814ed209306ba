"""Everything that a run needs, made in the order that errors should come in: cheap checks first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch.optim import Optimizer

from spf_kit import families, heap, launch
from spf_kit.adapters.earlier import Earlier
from spf_kit.adapters.inject import AdapterHandle
from spf_kit.data.dataset import Dataset
from spf_kit.data.split import Split
from spf_kit.errors import UserError
from spf_kit.losses import Mask, Plugin
from spf_kit.schema import Config, Train
from spf_kit.training import compiled, machine, modes, optimizers, parts, prior, stages, tools
from spf_kit.training.drift import Probe
from spf_kit.training.logs import Report
from spf_kit.training.preview import Preview
from spf_kit.training.run_folder import RunFolder
from spf_kit.training.selection import Selection
from spf_kit.training.step import Draws, Model, Noised, Outcome, noised
from spf_kit.training.text import TextCache
from spf_kit.training.update import Updater
from spf_kit.training.walks import Walks

if TYPE_CHECKING:
    from spf_kit.config import Resolved
    from spf_kit.data.dataset import Batch
    from spf_kit.families.base import Condition, Family


@dataclass
class Session:
    """One run in memory."""

    config: Config
    folder: RunFolder
    accelerator: Accelerator
    family: Family
    handle: AdapterHandle
    model: Model
    dataset: Dataset
    prior: Dataset | None
    plugins: list[Plugin]
    updater: Updater
    preview: Preview
    total: int  # steps
    threads: int
    report: Report
    earlier: Earlier  # LoRAs under the adapter; never switched off
    frozen: Mapping[str, str]  # what lies under the adapter, by a name for messages, and its hash
    walks: Walks
    split: Split  # which samples of a batch are this process's
    selection: Selection | None = None  # where drift is measured

    def phase(self, name: str) -> Callable[[int, int, str], None]:
        """A progress callback (done, total, text) that reports under this name."""
        return phase(self.report, name)

    def forward(self, number: int, micro: int) -> Outcome:
        """One micro-batch of step `number` where it is one pass, from pictures to losses."""
        (outcome,) = self.passes(number, micro)
        return outcome

    def passes(self, number: int, micro: int) -> Iterator[Outcome]:
        """As `forward`, in as many passes as it takes, see `parts.passes`."""
        return parts.passes(self, number, micro)

    def batches(self, data: Dataset, seed: int, number: int, micro: int) -> list[Batch]:
        """This process's part of a micro-batch, a batch for each pass."""
        return data.passes(seed, number - 1, self.split, micro, self.config.train.gradient_accumulation)

    def noised(self, batch: Batch, kind: str) -> Noised:
        """z_t of a batch, by random numbers of this kind."""
        train = self.config.train
        draws = Draws.keyed(batch.mean.shape, train.seed, kind, batch.indices)
        return noised(self.family.noise, batch, draws, train.noise_offset, self.family.device)


def check(resolved: Resolved) -> None:
    """What can be said about the training without a weight or a picture. Raises UserError."""
    stages.check(resolved.plugins)
    optimizers.check(resolved.config.train)


def accelerator(train: Train) -> Accelerator:
    """accelerate's view of devices, processes and precision.

    Raises UserError if they cannot be had.
    """
    check_devices(train)
    AcceleratorState._reset_state()  # or a second run in one process could not have another precision
    if launch.count() == 1:
        return Accelerator(mixed_precision=train.mixed_precision)
    # The main process draws while the others wait, and that may take longer than the ten minutes after which
    # a process group gives up. The launcher ends all as soon as one has ended, so nothing waits in vain.
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))
    # or accelerate would take each process on a machine without a GPU for a run of its own
    cpu = torch.accelerator.current_accelerator() is None or torch.backends.mps.is_available()
    return Accelerator(mixed_precision=train.mixed_precision, cpu=cpu, kwargs_handlers=[patient])


def check_devices(train: Train) -> None:
    """Raises UserError for what this machine has no device for, fp16 or more processes than GPUs, and if
    there is no compiler where one is asked for."""
    if train.mixed_precision == "fp16" and machine.device() == "cpu":
        raise UserError("train.mixed_precision = 'fp16' needs a GPU and there is none: use 'bf16' or 'no'")
    compiled.check(train, machine.device())
    launch.check(torch.cuda.device_count())


def open_session(
    resolved: Resolved,
    folder: RunFolder,
    processes: Accelerator,
    report: Report,
    threads: int | None,
    began: int | None = None,
) -> Session:
    """Load the base, check and encode the data, put the adapter on.

    Args:
        threads: of the run that is resumed; None chooses.
        began: how many processes began the run that is resumed; None: as many as there are.
    """
    config = resolved.config
    plugins = [plugin.model_copy(deep=True) for plugin in resolved.plugins]  # they keep state
    report(0, 0, {"phase": "loading the base"})
    # the UNet comes when pictures and captions are encoded and the encoders gone, but for earlier LoRAs
    family = families.load(config.base, device=str(processes.device), unet=bool(config.adapter.on))
    plugins, idle = tools.split_by_clip(plugins, config, family)
    stages.check(plugins)
    clip = tools.clip_pair(stages.union(plugins), config, family)
    tools.check_layers(plugins, family)
    threads = config.train.threads or threads or machine.choose_threads(_count(family.unet))
    torch.set_num_threads(threads)
    # before anything is drawn or any text is encoded: from here on they are part of the frozen model
    earlier = Earlier.attach(family, config.adapter.on)
    frozen = _frozen(config, family, earlier)
    with machine.resting(family.unet, processes.device):
        dataset = Dataset.prepare(
            config.data, config.attribute.target, family,
            clip_skip=config.base.clip_skip, progress=phase(report, "reading pictures"),
            masks=stages.union(plugins).picture_masks, processes=processes,
        )  # fmt: skip
    split = Split.of(config.train.batch_size, processes.process_index, processes.num_processes, began)
    warnings = [*dataset.report.lines(), *optimizers.advice(config.train), *launch.advice(), *split.advice()]
    warnings += idle
    if config.base.offload and processes.device.type != "cuda":
        warnings.append("base.offload = true has no effect here: there is no CUDA GPU that could be relieved")
    report(len(dataset), len(dataset), {"phase": "reading pictures", "warnings": warnings})
    if processes.is_main_process and not folder.config.is_file():
        folder.claim(resolved)
    prior_data = _prior(config, plugins, family, base_prompts(dataset), folder, processes, report)

    needs = stages.union(plugins)
    phrases = tools.phrases_of(needs, config, family, dataset)
    linear = tools.linear_decoder(needs, family, dataset)
    if linear:
        report(1, 1, {"phase": "fitting the decoder", "notes": [linear.sentence]})
    on_disk = config.data.cache == "disk"
    encode = encoding(config, family, dataset, prior_data, report, keep=earlier.change_text, on_disk=on_disk)
    if not ("vae" in needs.decode or any(d.needs_image_encoder for d in (dataset, prior_data) if d)):
        family.free_encoders(["vae"])
    _load_unet(family, report)
    handle = AdapterHandle.inject(family, config.adapter, seed=config.train.seed)
    modes.training_mode(config, family)

    model = Model(
        family, handle, encode, processes.autocast,
        spans=phrases.spans if phrases else None,
        tools=tools.build(needs, family, handle, phrases, clip, linear),
    )  # fmt: skip
    total = steps(config, dataset, split)
    opened = Session(
        config, folder, processes, family, handle, model, dataset, prior_data, plugins,
        updater(config, handle, total, processes), _preview(config, model, dataset, plugins, report),
        total, threads, report, earlier, frozen, Walks(family.noise), split,
    )  # fmt: skip
    opened.selection = _selection(opened)
    if config.train.compile != "no":
        compiled.put_on(config.train.compile, family, plugins)
    return opened


def phase(report: Report, name: str) -> Callable[[int, int, str], None]:
    return lambda done, total, text: report(done, total, {"phase": name, "text": text})


def warn(report: Report) -> Callable[[str], None]:
    """Tells the user a sentence, each one once."""
    told: set[str] = set()

    def tell(sentence: str) -> None:
        if sentence not in told:
            told.add(sentence)
            report(0, 0, {"phase": "keeping records", "warnings": [sentence]})

    return tell


def _preview(
    config: Config, model: Model, dataset: Dataset, plugins: Sequence[Plugin], report: Report
) -> Preview:
    masks = [plugin for plugin in plugins if isinstance(plugin, Mask)]
    return Preview(config, model, config.preview.prompts or base_prompts(dataset), masks, warn(report))


def steps(config: Config, dataset: Dataset, split: Split) -> int:
    """Optimizer steps of the run, from `steps` or `epochs`."""
    train = config.train
    if train.epochs is None:
        return train.steps
    return dataset.steps(train.epochs, split.whole, accumulation=train.gradient_accumulation)


def base_prompts(dataset: Dataset) -> list[str]:
    """The different c_base of the data, in the pictures' order."""
    return list(dict.fromkeys(entry.caption.base for entry in dataset.entries))


def _prior(
    config: Config,
    plugins: Sequence[Plugin],
    family: Family,
    prompts: Sequence[str],
    folder: RunFolder,
    processes: Accelerator,
    report: Report,
) -> Dataset | None:
    """Before the adapter: the frozen base draws, earlier LoRAs on. One process does, the others read it."""
    wanted = stages.union(plugins).prior
    if wanted is None:
        return None
    place = Path(wanted.path) if wanted.path else folder.prior
    if not wanted.path:
        family.load_unet()
    if not wanted.path and processes.is_main_process:
        prior.draw(wanted, config, family, prompts, place, phase(report, "drawing prior pictures"))
    processes.wait_for_everyone()
    return prior.prepare(config, family, place, phase(report, "reading prior pictures"), processes)


class HasTexts(Protocol):
    """As much of a data set as the encoding of texts looks at."""

    def texts(self) -> set[str] | None: ...


def encoding(
    config: Config,
    family: Family,
    dataset: HasTexts,
    prior_data: HasTexts | None,
    report: Report,
    *,
    keep: bool,
    on_disk: bool = False,
) -> Callable[[Sequence[str]], Condition]:
    """Embeddings computed once, and the text encoders freed, unless trained or texts are countless.

    Args:
        keep: do not free them: previews would load them anew, without the earlier LoRAs that change them.
        on_disk: keep embeddings there, where the next run finds them.
    """
    how: dict[str, Any] = {"clip_skip": config.base.clip_skip, "chunks": config.data.chunks}
    encode = functools.partial(family.encode_text, **how)
    texts = dataset.texts()
    if modes.trains_text(config) or texts is None:
        return encode
    texts |= {""} | ((prior_data.texts() or set()) if prior_data else set())
    tell = phase(report, "encoding captions")
    # where earlier LoRAs change the encoders, their weights do not name what they answer
    keys = functools.partial(family.text_keys, **how) if on_disk and not keep else None
    cache = TextCache(encode, texts, family.device, lambda done, total: tell(done, total, ""), keys)
    if not keep:
        family.free_encoders(family.text_components)
    return cache


def _frozen(config: Config, family: Family, earlier: Earlier) -> dict[str, str]:
    """Hashes of what the run is trained on, by what a person calls it."""
    return {
        f"the base model {config.base.model!r}": family.base_hash(),
        **{f"the earlier LoRA {str(entry.path)!r}": entry.sha256 for entry in earlier.entries},
    }


def _load_unet(family: Family, report: Report) -> None:
    """Once all is encoded, with what the encoders took given back before."""
    heap.return_freed()
    report(0, 0, {"phase": "loading the UNet"})
    family.load_unet()


def updater(
    config: Config,
    handle: AdapterHandle,
    total: int,
    processes: Accelerator,
    *,
    build: Callable[[Train, Mapping[str, Any]], Optimizer] = optimizers.build,
) -> Updater:
    """The configured updates of an adapter over `total` steps; `build` makes the optimizer."""
    train = config.train
    parameters: Mapping[str, Any] = handle.groups(train.learning_rates)
    return Updater(
        build(train, parameters),
        optimizers.Schedule.of(train, total, list(parameters)),
        processes,
        max_grad_norm=train.max_grad_norm,
        ema_decay=train.ema,
        accumulation=train.gradient_accumulation,
    )


def _selection(s: Session) -> Selection | None:
    """None where nothing is measured: not a pass more than the training's own."""
    train = s.config.train
    if not train.drift_every:
        return None
    return Selection(train, s.total, Probe(s.model, s.dataset, train.batch_size), s.updater)


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
