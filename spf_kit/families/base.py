"""What a family is: everything that differs between kinds of models, behind one interface.

A family owns loading, the encoding of text and pictures, the prediction, the noise process, the layers
that adapters sit on, and the names of its parameters in files. Nothing outside `families/` asks which family
it has.

Shapes: B samples, C latent channels, h x w latent size, H x W picture size, L tokens of a window, n chunks,
D features of the text encoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spf_kit.families import taps
from spf_kit.families.noise import NoiseProcess
from spf_kit.probes import LayerProbe, Spans

Condition = dict[str, Tensor]
"""What steers a prediction, batch first: `encoder_hidden_states` (B, n L, D); other families add more.

Where it is known, `framing` says how the pictures were cut, (B, 6) in pixels: the original's height and
width, top and left of the part that is shown, in the picture once it has been scaled, and the part's height
and width. A family whose models are not told it leaves it alone.
"""


class Family(ABC):
    """A loaded base model. All its weights are frozen; there is one copy of them.

    `unet`, `vae`, `text_encoder` and `tokenizer` are diffusers' and transformers' own objects; so are those
    of further text encoders, named by `text_components`. The VAE and the text encoders are None between
    `free_encoders` and `reload_encoders`.
    """

    text_components: tuple[str, ...] = ("text_encoder",)
    kohya_unet_names: Literal["diffusers", "sai"] = "diffusers"  # of the UNet's layers in kohya's LoRA files

    name: str  # "sd15", "sd2", "sdxl", "embedded"
    base_id: str  # the path or id that it was loaded from, as given
    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    noise: NoiseProcess
    device: torch.device
    dtype: torch.dtype
    vae_tiling: bool = False  # whether large pictures are encoded in tiles, which changes latents a little
    quantize: str | None = None  # how the UNet's linear layers are kept, see `quantized`; None: as they are
    offload: bool = False  # whether modules take turns on the device, see `offload`
    latent_factor: int  # pixels of one latent's side
    latent_channels: int  # C
    resolution: int  # pixels; the side of the square pictures that it was made for

    # --- text ---

    @abstractmethod
    def encode_text(self, captions: Sequence[str], *, clip_skip: int = 1, chunks: int = 1) -> Condition:
        """Captions to the condition of `predict`. Differentiable unless under `torch.no_grad`.

        Args:
            clip_skip: which layer of the text encoder, counted from the end; 1 is the one that the family
                reads by itself.
            chunks: windows of L - 2 tokens; what exceeds them is cut.
        """

    def negative(self, text: str, condition: Condition) -> Condition:
        """What guidance's other half is told for a negative prompt with this encoding."""
        return condition

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """Tokens of a text, without the begin and end tokens."""

    @abstractmethod
    def cut_words(self, text: str, chunks: int = 1) -> list[str]:
        """The words that `encode_text` would cut off, from the first that does not fit whole."""

    @abstractmethod
    def spans(self, phrases: Sequence[str], target: str, chunks: int = 1) -> Spans:
        """Token positions of the caption ", ".join([*phrases, target]) and of its parts, as `encode_text`
        places them; the positions of c_base are the same in the caption without the target."""

    @abstractmethod
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Pooled text-encoder embeddings of N texts, (N, D) float32, L2-normalised, without gradient."""

    # --- pictures ---

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) in [-1, 1] to mean and standard deviation of the latent distribution, each
        (B, C, h, w) float32 and scaled as `predict` wants latents. `latent_factor` divides H and W."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pictures (B, 3, H, W) in [0, 1], float32. Differentiable within (0, 1)."""

    # --- the model ---

    @abstractmethod
    def predict(self, noisy_latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """z_t (B, C, h, w), t (B,) and a condition to the model's own kind of prediction (B, C, h, w), in the
        dtype of z_t."""

    def attention_layers(self) -> dict[str, int]:
        """The cross-attention layers that `probe` taps: name to how many latents make one pixel's side."""
        known = self.__dict__.get("_attention_layers")
        if known is None or known[0] is not self.unet:  # a walk over all modules, and steps ask twice
            self._attention_layers = known = self.unet, taps.attention_layers(self.unet)
        return known[1]

    def probe(
        self, noisy_latents: Tensor, timesteps: Tensor, condition: Condition, layers: Sequence[str]
    ) -> tuple[Tensor, dict[str, LayerProbe]]:
        """`predict`, bit for bit, and what these cross-attention layers did in it."""
        with taps.recording(self.unet, layers) as seen:
            prediction = self.predict(noisy_latents, timesteps, condition)
        factors = {name: factor for name, factor in self.attention_layers().items() if name in layers}
        return prediction, taps.probes(self.unet, seen, factors, noisy_latents.shape[2:])

    @abstractmethod
    def pipeline(self, scheduler: str = "ddim") -> Any:
        """A diffusers pipeline over these very modules, with a fresh scheduler of that name."""

    def prompt_arguments(self, condition: Condition, negative: Condition | None) -> dict[str, Tensor | None]:
        """What the pipeline is called with in place of texts; `negative` is None without guidance."""
        return {
            "prompt_embeds": condition["encoder_hidden_states"],
            "negative_prompt_embeds": None if negative is None else negative["encoder_hidden_states"],
        }

    # --- adapters and names ---

    @abstractmethod
    def adapter_modules(self, groups: Iterable[str]) -> dict[str, list[str]]:
        """The layers of the target groups: component to module names as `named_modules()` has them."""

    @abstractmethod
    def file_module_name(self, component: str, module: str) -> str:
        """A runtime module name as adapter files spell it (text encoders: with `text_model.`)."""

    @abstractmethod
    def runtime_module_name(self, component: str, module: str) -> str:
        """The inverse of `file_module_name`."""

    @abstractmethod
    def base_hash(self) -> str:
        """A hash of the weights' content, for cache keys; the same model hashes the same in any container."""

    @abstractmethod
    def latents_key(self) -> str:
        """All that `encode_image` depends on beside the pixels: the VAE's weights, precision and scale."""

    @abstractmethod
    def text_keys(self, captions: Sequence[str], *, clip_skip: int = 1, chunks: int = 1) -> list[str]:
        """All that `encode_text` depends on for each caption: its tokens, the text encoders' weights as they
        were loaded, their precision and the settings; 64 hexadecimal digits."""

    # --- memory ---

    @abstractmethod
    def load_unet(self) -> None:
        """Read the UNet's weights, where `families.load` has put that off; it is a new object then."""

    @property
    def freed(self) -> list[str]:
        """The encoders that are not loaded now, by component name."""
        return [name for name in ("vae", *self.text_components) if getattr(self, name) is None]

    def free_encoders(self, names: Iterable[str] | None = None) -> None:
        """Drop the VAE and the text encoders, or those named. Whoever trains a text encoder keeps it."""
        for name in ("vae", *self.text_components) if names is None else names:
            setattr(self, name, None)

    @abstractmethod
    def reload_encoders(self) -> None:
        """Load what `free_encoders` dropped, from where it came from."""

    def text_encoders(self) -> dict[str, Any]:
        """The text encoders that are loaded now, by component name."""
        return {name: getattr(self, name) for name in self.text_components if name not in self.freed}

    def components(self) -> dict[str, nn.Module]:
        """The modules that adapters can sit on, by component name; freed text encoders are not among them."""
        return {"unet": self.unet, **self.text_encoders()}

    def modules(self) -> list[nn.Module]:
        """All modules that are loaded now."""
        vae = [] if self.vae is None else [self.vae]
        return [self.unet, *vae, *self.text_encoders().values()]

    def freeze(self) -> None:
        """No gradient for any weight, evaluation mode. True after loading."""
        for module in self.modules():
            module.requires_grad_(False).eval()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Family:
        """Move and convert everything that is loaded; later reloads follow."""
        self.device = torch.device(device) if device is not None else self.device
        self.dtype = dtype or self.dtype
        for module in self.modules():
            module.to(device=self.device, dtype=self.dtype)
        return self
