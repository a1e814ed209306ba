"""The preset format: every section, key, type, default and meaning. `config.py` reads files into it.

One pydantic model for each TOML section; the JSON Schema for editors is generated from these. The `[[loss]]`
entries are checked against the plugins' own fields, which this module does not know.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# of 1000 timesteps: samplers that space them by "leading" begin at up to two more than they have steps
MAX_SAMPLER_STEPS = 998

Precision = Literal["float32", "float16", "bfloat16"]
Quantization = Literal["fp8", "8bit", "nf4"]
TargetGroup = Literal["cross-attention", "self-attention", "feed-forward", "convolutions", "text-encoder"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class Attribute(Section):
    """What is taught: a name and the phrase that asks for it."""

    name: str = Field(
        min_length=1, pattern=r"^[A-Za-z0-9._-]+$", description="names the run and the LoRA file"
    )
    target: str = Field(min_length=1, description="c_tar, the trigger phrase; captions may hold or lack it")


class Base(Section):
    """The model that is fine-tuned."""

    model: str = Field(
        "embedded", description="'embedded', a .safetensors file, a diffusers folder or a hub id"
    )
    profile: str | None = Field(
        None, description="settings that suit a card, as the base has them: '6gb', '8gb', '12gb', '24gb'"
    )
    vae: str | None = Field(None, description="another VAE: a .safetensors file or a diffusers folder")
    dtype: Precision = Field("float32", description="of the frozen weights")
    quantize: Quantization | None = Field(
        None, description="keep the UNet's linear layers in 8-bit floats, 8-bit integers or 4 bits"
    )
    attention: Literal["sdpa", "xformers", "sliced"] = Field("sdpa", description="attention backend")
    vae_tiling: bool = Field(
        False, description="encode and decode in tiles what is larger than the VAE's own size: less memory"
    )
    vae_slicing: bool = Field(False, description="decode the pictures of a batch one by one: less memory")
    offload: bool = Field(
        False, description="on a GPU: what the moment does not need waits in the host's memory"
    )
    channels_last: bool | None = Field(
        None, description="memory format of the UNet's convolutions; default: where it is known to be faster"
    )
    clip_skip: int = Field(
        1, ge=1, le=12, description="text layer counted from the end; 2 for most anime models of SD 1.5"
    )
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        None, description="what the model predicts; default: what its files say"
    )
    zero_terminal_snr: bool | None = Field(
        None, description="v prediction whose noise ends in pure noise; default: what the model's files say"
    )


class Clip(Section):
    """The CLIP pair for response enhancement and CLIP scores."""

    model: str | None = Field(None, description="folder of a CLIPModel; the embedded base brings its own")


class Data(Section):
    """The pictures and their captions."""

    path: str = Field(
        "", description="folder of pictures with .txt captions or metadata.jsonl; 'embedded:NAME'"
    )
    resolution: int = Field(512, ge=32, le=4096, description="pixels; pictures are scaled to this area")
    buckets: bool = Field(True, description="keep aspect ratios by grouping pictures of like shape")
    bucket_step: int = Field(64, ge=8, description="pixels; sides of a bucket are multiples of it")
    upscale: bool = Field(True, description="enlarge pictures under the resolution; false: leave them out")
    crop: Literal["center", "random"] = Field(
        "center", description="which part of an overlapping picture stays"
    )
    flip: bool = Field(False, description="mirror half of the pictures; not for one-sided attributes")
    repeats: int = Field(
        1, ge=1, description="times each picture counts in an epoch; `10_name` folders override"
    )
    shuffle_tags: bool = Field(False, description="new order of the comma-separated tags at each step")
    keep_tokens: int = Field(0, ge=0, description="tags at the start that are not shuffled")
    caption_dropout: float = Field(
        0.0, ge=0, le=1, description="share of samples trained with an empty caption"
    )
    caption_extension: str = Field(".txt", description="of the caption files")
    chunks: int = Field(1, ge=1, le=3, description="windows of 75 tokens; 2 reads captions of 150 tokens")
    cache: Literal["memory", "disk", "none"] = Field("memory", description="where latents are kept")


class Adapter(Section):
    """What is trained."""

    kind: Literal["lora", "loha", "lokr", "oft"] = Field(
        "lora", description="of update: product, Hadamard product, Kronecker product, rotation of the outputs"
    )
    rank: int = Field(
        8, ge=1, le=1024, description="inner dimension of the update; of OFT the largest size of a block"
    )
    ranks: dict[str, Annotated[int, Field(ge=0, le=1024)]] = Field(
        {},
        description="of some layers: 'mid', 'up.1', 'convolutions', '*.to_k'; the last one counts, 0 is none",
    )
    alpha: float | None = Field(None, gt=0, description="the update is scaled by alpha / rank; default: rank")
    alphas: dict[str, Annotated[float, Field(gt=0)]] = Field({}, description="of some layers, as `ranks`")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the input of the update")
    targets: list[TargetGroup] = Field(
        ["cross-attention"], min_length=1, description="layers that get an update"
    )
    dora: bool = Field(False, description="weight-decomposed update (DoRA)")
    rank_stabilized: bool = Field(False, description="scale by alpha / sqrt(rank)")
    factor: int = Field(
        -1, ge=-1, description="LoKr: size of the smaller factor; -1: as near to the larger one as can be"
    )
    decompose_both: bool = Field(False, description="LoKr: give the smaller factor a rank too")
    constraint: float = Field(
        0.0, ge=0, description="OFT: how far the blocks of a layer may turn together (peft's eps); 0: freely"
    )
    start_from: str | None = Field(None, description="a LoRA file to go on from")
    on: list[str] = Field(
        [], description="earlier LoRAs, FILE or FILE:0.8, that act, frozen, under the new one"
    )


class Train(Section):
    """How long, how fast, and with what."""

    steps: int = Field(1000, ge=1, description="optimizer steps")
    epochs: int | None = Field(None, ge=1, description="passes over the data; replaces `steps`")
    batch_size: int = Field(1, ge=1, description="pictures in one pass")
    gradient_accumulation: int = Field(1, ge=1, description="passes in one optimizer step")
    learning_rate: float = Field(1e-4, ge=0, description="of the UNet's update")
    text_encoder_learning_rate: float | None = Field(None, ge=0, description="default: learning_rate / 2")
    learning_rates: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {}, description="of some of the adapter's layers, named as in adapter.ranks"
    )
    optimizer: str = Field("adamw", description="adamw, adamw8bit, lion8bit, adafactor, prodigy, ...")
    optimizer_args: dict[str, Any] = Field({}, description="passed on to the optimizer")
    schedule: Literal["constant", "cosine", "linear"] = Field("cosine", description="of the learning rate")
    warmup: int = Field(0, ge=0, description="steps")
    max_grad_norm: float = Field(1.0, ge=0, description="0 clips nothing")
    gradient_checkpointing: bool = Field(False, description="less memory, a third more time")
    compile: Literal["no", "regional", "whole"] = Field(
        "no", description="torch.compile the UNet: each transformer block, or all at once; slow first steps"
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = Field("no", description="of the computation")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of an average of the update; saved instead"
    )
    noise_offset: float = Field(0.0, ge=0, description="strength of noise that is constant over a picture")
    seed: int = Field(0, ge=0, description="same seed, same machine: same LoRA")
    checkpoint_every: int = Field(0, ge=0, description="steps; 0: only at the end and on Ctrl-C")
    keep_checkpoints: int = Field(2, ge=1, description="older ones are removed")
    drift_every: int = Field(
        0, ge=0, description="steps between measurements of drift on fixed noise; 0: none"
    )
    drift_budget: float | None = Field(None, gt=0, description="drift that the best step may have at most")
    select: Literal["last", "budget"] = Field(
        "last", description="whose weights the LoRA holds: the last step's, or the best one's in drift_budget"
    )
    log_tensorboard: bool = Field(True, description="write TensorBoard events into the run folder")
    threads: int = Field(0, ge=0, description="CPU threads; 0 chooses by the model's size")


class Preview(Section):
    """Pictures drawn during the run, always from the same seeds."""

    every: int = Field(0, ge=0, description="steps; 0: none")
    prompts: list[str] = Field([], description="c_base prompts; default: of the data, or the embedded ones")
    count: int = Field(4, ge=1, le=32, description="how many prompts are drawn")
    seed: int = Field(1000, ge=0, description="seed of the first picture")
    steps: int = Field(25, ge=1, le=MAX_SAMPLER_STEPS, description="sampler steps")
    cfg: float = Field(5.0, ge=0, description="classifier-free guidance scale")
    phrases: bool = Field(False, description="under the masks, also the base's attention to each phrase")


class Calibrate(Section):
    """After the training: the smallest strength that shows what was learnt becomes the file's 1."""

    enabled: bool = Field(False, description="try strengths; needs a CLIP pair")
    strengths: list[Annotated[float, Field(gt=0, le=4)]] = Field(
        [0.6, 0.8, 1.0, 1.2, 1.4], min_length=2, description="to try"
    )
    keep: float = Field(
        0.9, gt=0, le=1, description="share of the most that CLIP sees at any of them, to be reached"
    )
    prompts: list[str] = Field([], description="c_base prompts; default: the embedded ones, or the captions")
    count: int = Field(32, ge=1, description="prompts")
    seed: int = Field(3000, ge=0, description="seed of the first prompt's picture")
    steps: int = Field(10, ge=1, le=MAX_SAMPLER_STEPS, description="sampler steps")
    cfg: float = Field(5.0, ge=0, description="classifier-free guidance scale")


class Evaluate(Section):
    """The measurement after the training."""

    enabled: bool = Field(True, description="false: train only")
    prompts: list[str] = Field([], description="c_base prompts; default: the embedded ones, or the captions")
    count: int = Field(64, ge=1, description="prompts")
    seed: int = Field(5000, ge=0, description="seed of the first prompt's picture")
    steps: int = Field(20, ge=1, le=MAX_SAMPLER_STEPS, description="sampler steps")
    cfg: float = Field(5.0, ge=0, description="classifier-free guidance scale")
    batch_size: int = Field(
        16, ge=1, description="pictures drawn at once, in previews, prior pictures and calibration too"
    )


class Output(Section):
    """The LoRA file."""

    dtype: Precision = Field("float16", description="of the saved tensors")
    format: Literal["kohya", "diffusers", "peft"] = Field(
        "kohya", description="key names; kohya's load everywhere"
    )


class LossEntry(BaseModel):
    """One `[[loss]]`: which plugin, under which id; all other keys belong to the plugin."""

    model_config = ConfigDict(extra="allow")
    plugin: str
    id: str = ""

    @model_validator(mode="after")
    def _default_id(self) -> LossEntry:
        self.id = self.id or self.plugin
        return self


class Config(Section):
    """One run, fully resolved."""

    attribute: Attribute
    base: Base = Base()
    clip: Clip = Clip()
    data: Data = Data()
    adapter: Adapter = Adapter()
    train: Train = Train()
    preview: Preview = Preview()
    calibrate: Calibrate = Calibrate()
    evaluate: Evaluate = Evaluate()
    output: Output = Output()
    loss: list[LossEntry] = Field([], description="losses and masks, in order")
