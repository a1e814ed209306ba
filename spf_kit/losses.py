"""The plugin API: what a loss or a mask declares, what it is given, and where it is registered.

A plugin is a pydantic model: its fields are its preset keys, so that a misspelt key is refused before any
weight is loaded. A loss returns one value for each sample, a mask one picture of weights for each sample:

    from spf_kit.losses import Loss, Step, Tensor, per_sample, register

    @register("l1")
    class L1(Loss):
        \"\"\"Mean absolute error of the prediction, |target - prediction|.\"\"\"

        def __call__(self, step: Step) -> Tensor:
            return per_sample((step.target - step.response.prediction).abs(), step.mask)

Shapes: B samples, C latent channels, h x w latent size, L tokens, Q pixels of a layer, d features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from spf_kit.errors import UserError
from spf_kit.needs import PASSES, Clip, Decoder, Needs, PassName, Prior, Tools
from spf_kit.probes import LayerProbe, Spans, at_least_float32, matches, select, token_mask
from spf_kit.remembered import Remembered

if TYPE_CHECKING:
    from spf_kit.data.captions import Caption
    from spf_kit.families.noise import NoiseProcess

__all__ = [
    "PASSES", "Decoder", "Field", "LayerProbe", "Literal", "Loss", "Mask", "ModelPass", "Needs", "PassName",
    "Plugin", "Prior", "PriorBatch", "Remembered", "Spans", "Step", "Tensor", "Tools", "at_least_float32",
    "clean_weight", "model_validator", "per_sample", "register", "registered", "token_mask", "x0_weight",
]  # fmt: skip


@dataclass(frozen=True)
class ModelPass:
    """One run of the model over the noisy latents: its prediction, (B, C, h, w), in the base's own kind
    (epsilon, v or flow). Without gradient when the adapter was off."""

    prediction: Tensor
    attention: Mapping[str, LayerProbe] = field(default_factory=dict)  # of the tapped layers, by name

    def layers(self, patterns: Iterable[str]) -> list[LayerProbe]:
        """The tapped cross-attention layers that the patterns mean, in the model's order."""
        return select(self.attention, patterns)

    def rows(self, index: Tensor) -> ModelPass:
        return ModelPass(
            self.prediction[index], {name: layer.rows(index) for name, layer in self.attention.items()}
        )


@dataclass(frozen=True)
class PriorBatch:
    """Prior pictures at this step: the prediction with the adapter on, and what it should have been."""

    prediction: Tensor
    target: Tensor
    timesteps: Tensor


@dataclass(frozen=True)
class Step:
    """Everything that a plugin may look at in one training step."""

    latents: Tensor  # (B, C, h, w) clean, scaled as the model wants them
    noise: Tensor  # (B, C, h, w)
    noisy_latents: Tensor  # (B, C, h, w) z_t
    timesteps: Tensor  # (B,) int64; flow models: float in [0, 1000]
    target: Tensor  # (B, C, h, w) what `prediction` should be: noise, velocity or flow
    process: NoiseProcess  # snr(), clean(): see families/noise.py
    captions: Sequence[Caption]  # B captions with .base, .target, .full and .phrases
    sample_ids: Sequence[str]  # B stable names, for state kept for each picture
    number: int = 0  # counts from 1
    progress: float = 0.0  # share of the run that is done, [0, 1)
    passes: Mapping[str, ModelPass] = field(default_factory=dict)
    prior_batch: PriorBatch | None = None
    masks: Mapping[str, Tensor] = field(default_factory=dict)  # by id, each (B, 1, h, w) in [0, 1]
    mask: Tensor | None = None  # the one that the reading loss asked for with `mask = "id"`
    token_spans: Sequence[Spans] = ()  # B, or none
    given_masks: Tensor | None = None  # (B, 1, h, w) in [0, 1], of mask pictures
    tools: Tools = field(default_factory=Tools)
    reader: str = "this plugin"

    @property
    def reference(self) -> ModelPass:
        """Adapter off, c_base: what the frozen base says."""
        return self.run("reference")

    @property
    def response(self) -> ModelPass:
        """Adapter on, c_full: what is being trained."""
        return self.run("response")

    @property
    def plain(self) -> ModelPass:
        """Adapter on, c_base: what the adapter does where it was not asked for."""
        return self.run("plain")

    @property
    def prior(self) -> PriorBatch:
        """The own batch of prior pictures. Raises RuntimeError if not declared in `needs`."""
        return self._declared("prior", self.prior_batch)

    @property
    def spans(self) -> Sequence[Spans]:
        """Token positions of each caption's parts. Raises RuntimeError if not declared (`phrases`)."""
        return self._declared("spans", self.token_spans or None)

    @property
    def picture_mask(self) -> Tensor:
        """(B, 1, h, w) from the mask pictures. Raises RuntimeError if not declared (`picture_masks`)."""
        return self._declared("picture_mask", self.given_masks)

    @property
    def clip(self) -> Clip:
        """The CLIP pair. Raises RuntimeError if not declared in `needs`."""
        return self._declared("clip", self.tools.clip)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Pooled text-encoder embeddings of N phrases, (N, D), L2-normalised, no gradient (`phrases`)."""
        return self._declared("embed", self.tools.embed)(texts)

    def decode(self, latents: Tensor, decoder: Decoder) -> Tensor:
        """Latents to pictures (B, 3, H, W) in [0, 1]: by the VAE, or by the linear map that comes nearest to
        it at the size of the latents."""
        return self._declared("decode", self.tools.decode)(latents, decoder)

    def update_norms(self) -> Tensor:
        """|W' - W|_F^2 of each adapted layer, (layers,), differentiable (`weights`)."""
        return self._declared("update_norms", self.tools.update_norms)()

    def run(self, name: PassName) -> ModelPass:
        """One of the model's passes, by name. Raises RuntimeError if not declared in `needs`."""
        return self._declared(name, self.passes.get(name))

    def _declared(self, name: str, value: Any) -> Any:
        return self._undeclared(name) if value is None else value

    def _undeclared(self, name: str) -> NoReturn:
        raise RuntimeError(f"{self.reader} reads {name!r}, which its needs do not declare")

    def seen_by(self, plugin: Plugin) -> Step:
        """This step with only what `plugin` declared, so that an undeclared read fails at once."""
        needs, tools = plugin.needs, self.tools
        mask_id = getattr(plugin, "mask", None)
        return replace(
            self,
            passes={
                name: _seen(name, run, needs)
                for name, run in self.passes.items()
                if name in needs.passes or (name == "plain" and needs.plain_share is not None)
            },
            prior_batch=self.prior_batch if needs.prior else None,
            mask=self.masks[mask_id] if mask_id else None,
            token_spans=self.token_spans if needs.phrases else (),
            given_masks=self.given_masks if needs.picture_masks is not None else None,
            tools=Tools(
                tools.embed if needs.phrases else None,
                tools.decode if needs.decode else None,
                tools.clip if needs.clip else None,
                tools.update_norms if needs.weights else None,
            ),
            reader=f"the plugin {plugin.name!r}",
        )

    def rows(self, numbers: list[int]) -> Step:
        """This step for some of its samples. It has no masks: those are of the samples that made them."""
        index = torch.tensor(numbers, dtype=torch.int64, device=self.latents.device)
        tensors = ("latents", "noise", "noisy_latents", "timesteps", "target")
        return replace(
            self,
            **{name: getattr(self, name)[index] for name in tensors},
            captions=[self.captions[i] for i in numbers],
            sample_ids=[self.sample_ids[i] for i in numbers],
            passes={name: run.rows(index) for name, run in self.passes.items()},
            token_spans=[self.token_spans[i] for i in numbers] if self.token_spans else (),
            given_masks=None if self.given_masks is None else self.given_masks[index],
        )


def _seen(name: str, run: ModelPass, needs: Needs) -> ModelPass:
    """A pass with the attention that was declared for it."""
    patterns = [pattern for of, pattern in needs.attention if of == name]
    kept = {key: x for key, x in run.attention.items() if matches(x.name, x.factor, patterns)}
    return ModelPass(run.prediction, kept)


class Plugin(BaseModel):
    """What losses and masks share. `start` and `end` are shares of the run; outside them it costs nothing."""

    model_config = ConfigDict(extra="forbid", validate_default=True)
    name: ClassVar[str] = ""

    id: str = Field("", description="name in this preset; default: the plugin's name")
    enabled: bool = Field(True, description="false: leave it out, where a recipe brings it")
    start: float = Field(0.0, ge=0, le=1, description="share of the run after which it acts (a stage)")
    end: float = Field(1.0, ge=0, le=1, description="share of the run after which it no longer acts")

    @model_validator(mode="after")
    def _common(self) -> Plugin:
        if self.start >= self.end:
            raise ValueError(f"start = {self.start} must be less than end = {self.end}")
        self.id = self.id or self.name
        return self

    @property
    def needs(self) -> Needs:
        """What `__call__` reads; may depend on the fields."""
        return Needs()

    def active(self, progress: float) -> bool:
        return self.start <= progress < self.end

    def remembered_of_pictures(self) -> list[Remembered]:
        """The attributes that several processes exchange, in order."""
        private = self.__pydantic_private__ or {}
        return [value for value in private.values() if isinstance(value, Remembered)]

    def state_dict(self) -> dict[str, Any]:
        """What must survive an interruption (an EMA of maps); tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"the plugin {self.name!r} keeps no state but was given {sorted(state)}")


class Loss(Plugin):
    """A term of the sum that is minimised: weight x mean over samples of `__call__(step)`, which is (B,)."""

    weight: float = Field(1.0, description="factor of this term in the sum")
    mask: str | None = Field(None, description='id of a mask plugin before this entry; "": none')

    @field_validator("mask", mode="after")
    @classmethod
    def _empty_is_none(cls, mask: str | None) -> str | None:
        return mask or None

    def __call__(self, step: Step) -> Tensor:
        raise TypeError(f"the loss {self.name!r} defines no __call__")


class Mask(Plugin):
    """A picture of weights in [0, 1] for each sample, (B, 1, h, w), without gradient; losses name it."""

    def __call__(self, step: Step) -> Tensor:
        raise TypeError(f"the mask {self.name!r} defines no __call__")

    def of_plain(self, step: Step) -> Tensor:
        """The same for samples on the plain path (see `Needs.of`), of which no pass on c_full tells where the
        target acts. All 1 where the mask knows nothing of a sample; override it to tell what it knows."""
        return step.noisy_latents.new_ones(len(step.captions), 1, *step.noisy_latents.shape[2:])


def per_sample(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over all but the first dimension: (B, ...) to (B,). With a mask, (B, 1, h, w), each value counts
    times its mask; the divisor stays the number of values."""
    return (values if mask is None else values * mask).flatten(1).mean(dim=1)


def x0_weight(step: Step, most: float | None) -> Tensor | float:
    """(B,) weights for |p - p'|^2 of two predictions, at most `most`; 1 where that is None.

    min(most, max(SNR, 1) f(t)) with |x0 - x0'|^2 = f(t) |p - p'|^2: at high noise a difference counts as that
    of the clean pictures, at low noise as that of the noise. The first steps of a sampler decide what a
    picture is of, and in epsilon prediction differences there are small numbers.

        f(t) = 1 / SNR                  epsilon
             = 1 / (SNR + 1)            v
             = 1 / (1 + sqrt(SNR))^2    flow
    """
    if most is None:
        return 1.0
    return clean_weight(step.process.snr(step.timesteps), step.process.prediction_type, most)


def clean_weight(snr: Tensor, prediction_type: str, most: float, gamma: float = math.inf) -> Tensor:
    """(B,) min(most, min(max(SNR, 1), gamma) f(t)) of signal-to-noise ratios, with f of `x0_weight`."""
    snr = snr.clamp(1e-8, 1e8)  # 0 and infinite at the ends
    over = {"epsilon": snr, "v_prediction": snr + 1, "flow": (1 + snr.sqrt()) ** 2}
    return (snr.clamp(1, gamma) / over[prediction_type]).clamp(max=most)


# --- the registry -----------------------------------------------------------------------------------------

_registry: dict[str, type[Plugin]] = {}
P = TypeVar("P", bound=Plugin)


def register(name: str) -> Callable[[type[P]], type[P]]:
    """Make a plugin known by `name`, the value of `plugin = "..."` in presets.

    Raises UserError if another module took the name, naming both modules.
    """

    def decorate(cls: type[P]) -> type[P]:
        other = _registry.get(name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise UserError(
                f"two loss plugins are called {name!r}: {other.__module__}.{other.__qualname__} and "
                f"{cls.__module__}.{cls.__qualname__}; rename one"
            )
        if not issubclass(cls, (Loss, Mask)):
            raise TypeError(f"{cls.__qualname__} must derive from Loss or Mask to be registered as {name!r}")
        cls.name = name
        _registry[name] = cls
        return cls

    return decorate


def registered() -> Mapping[str, type[Plugin]]:
    """What has been registered so far; `spf_kit.discovery.available()` loads the plugins first."""
    return _registry
