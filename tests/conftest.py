"""Shared by all tests: one thread (tiny models are slower with more), no network, the command line."""

from __future__ import annotations

import atexit
import gc
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from spf_kit.families.base import Family

atexit.register(gc.freeze)  # as `spf-kit` ends
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _settled() -> None:
    """What the libraries made stays: without this, Python looks through it again and again for cycles."""
    gc.collect()
    gc.freeze()


PRELOAD = [
    "spf_kit.training.trainer", "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl", "transformers.models.clip.modeling_clip",
]  # fmt: skip
TINY_TEXT = {
    "vocab_size": 49408, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 2, "max_position_embeddings": 77, "eos_token_id": 49407, "bos_token_id": 49406,
}  # fmt: skip
TINY_UNET = {
    "sample_size": 16, "block_out_channels": (16, 32), "norm_num_groups": 4, "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4), "use_linear_projection": True,
}  # fmt: skip
TINY_VAE = {
    "block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SDXL with every kind of block, some with several transformers, as diffusers saves it."""
    import torch
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from spf_kit.families.detect import shipped_config
    from spf_kit.families.tokenizer import clip_tokenizer

    folder = tmp_path_factory.mktemp("tiny-sdxl")
    torch.manual_seed(0)
    second = {
        **TINY_TEXT,
        "hidden_size": 24,
        "hidden_act": "gelu",
        "projection_dim": 20,
        "num_hidden_layers": 4,
    }
    scheduler = {k: v for k, v in shipped_config("sdxl", "scheduler").items() if k != "_class_name"}
    scheduler = {k: v for k, v in scheduler.items() if k not in ("clip_sample", "set_alpha_to_one")}
    StableDiffusionXLPipeline(
        vae=AutoencoderKL(**TINY_VAE, scaling_factor=0.13025),
        text_encoder=CLIPTextModel(CLIPTextConfig(**TINY_TEXT, hidden_act="quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**second)),
        tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer("!"),
        unet=UNet2DConditionModel(
            **TINY_UNET, cross_attention_dim=40, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=20 + 6 * 8,
        ),
        scheduler=EulerDiscreteScheduler(**scheduler),
    ).save_pretrained(folder)  # fmt: skip
    for name in ("tokenizer", "tokenizer_2"):  # CLIP's own is in the package, and read in a fifth of the time
        shutil.rmtree(folder / name)
    return folder


@pytest.fixture(scope="module")
def picture_count() -> int:
    """Of `pictures`. A file of tests whose numbers need another says so."""
    return 3


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, picture_count: int) -> Path:
    """Pictures with glasses and their captions, a copy for each file of tests."""
    from spf_kit import embedded

    folder = tmp_path_factory.mktemp("pictures")
    for picture in sorted(embedded.data_path("glasses").glob("*.png"))[:picture_count]:
        shutil.copy(picture, folder)
        shutil.copy(picture.with_suffix(".txt"), folder)
    return folder


@pytest.fixture(scope="session")
def start() -> Callable[..., BaseProcess]:
    """Start `function(*arguments)` in a process of its own: a fork of one server that has torch and diffusers
    loaded, so that each starts at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)

    def run(function: Callable[..., Any], *arguments: Any, **named: Any) -> BaseProcess:
        process = context.Process(target=function, args=arguments, kwargs=named, daemon=True)
        process.start()
        return process

    return run


@pytest.fixture(scope="module")
def base() -> Family:
    """The embedded base, loaded once for each file of tests."""
    from spf_kit import families
    from spf_kit.schema import Base

    return families.load(Base(model="embedded"))


@pytest.fixture
def family(base: Family) -> Iterator[Family]:
    """The base, which every test must leave as it found it."""
    import torch

    before = {name: dict(module.named_modules()) for name, module in base.components().items()}
    weights = {name: module.state_dict() for name, module in base.components().items()}
    weights = {name: {k: v.clone() for k, v in state.items()} for name, state in weights.items()}
    yield base
    for name, module in base.components().items():
        assert dict(module.named_modules()) == before[name]  # the very objects
        assert all(torch.equal(value, weights[name][key]) for key, value in module.state_dict().items())
        assert not hasattr(module, "peft_config")


@dataclass(frozen=True)
class Result:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


@pytest.fixture
def spf_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command in an empty directory: `spf_kit("train", "glasses", "--steps", "2")`.

    In this process, for torch and diffusers take seconds to import; whole processes are tested beside it.
    """
    from typer.testing import CliRunner

    from spf_kit.cli import app

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Result:
        before = signal.getsignal(signal.SIGTERM)
        try:
            done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        finally:
            signal.signal(signal.SIGTERM, before)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Result(done.exit_code, done.stdout, done.stderr)

    return run
