"""Where the target may act: the Semantic-Aware Fine Control Map (SFCM) of SPF-Portrait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F

from spf_kit.losses import Field, Mask, Needs, Remembered, Step, Tensor, model_validator, register


@register("control_map")
class ControlMap(Mask):
    """M = clip(N - C, 0, 1), (B, 1, h, w), without gradient: 1 where the target responds, 0 elsewhere.

        N = rescale(mean over channels of |eps_res - eps_ref|)      what asking for the target changes
        C = max over phrases p of D(c_tar, p) * A_ref[p]            what belongs to the rest of the caption

    `rescale` is the min-max rescaling of each sample to [0, 1]; a constant picture becomes 0. A_ref[p] is the
    cross-attention of phrase p in the frozen base on c_base: the mean over its tokens and over `layers`,
    each resized to the latents, then rescaled. D is the cosine distance of the pooled text-encoder embeddings
    of target and phrase, so that a phrase far from the target is subtracted more.

    Source: SPF-Portrait (arXiv:2504.00396) for N, C and M. Our reading, where it is silent: D is rescaled
    over the phrases of one caption (`distances`; a lone phrase keeps its own), and phrases are combined by
    maximum. Ours altogether, off by default: what N is made of (`source`), `subtract`, `blur`, `ema`,
    `min_timestep` and `max_timestep`, `quantile`, `otsu`, `threshold`. As published the map is small (N is
    rescaled by its largest pixel), so that 1 - M is about 1 everywhere. Divided by a value of its own pixels,
    clipped at 1, it gets a size: `quantile` gives every picture the same, `otsu` (Otsu 1979,
    doi:10.1109/TSMC.1979.4310076) the one at which the pixels fall into two classes, a hat a larger one than
    glasses.

    Near pure noise N is what the data have in common (a collar as much as a beard), near the clean picture
    the base sees the target itself and N is edges. Inside [min_timestep, max_timestep], shares of the
    schedule, N is made and remembered (`ema`); at all other timesteps the picture's remembered N serves.

    Losses that keep the base's picture (text_consistency, fine_grained, inverted_mask) act where M is small;
    losses that teach (denoising) act where M is large.
    """

    layers: list[str] = Field(["all"], min_length=1, description='"all", "down", "mid", "up", "1/2" or names')
    combine: Literal["max", "sum"] = Field("max", description="how the phrases' maps make one")
    distances: Literal["rescaled", "raw"] = Field("rescaled", description="D over one caption's phrases")
    source: Literal["difference", "attention", "both"] = Field(
        "difference", description="N: changed prediction (paper), attention to the target, or their product"
    )
    subtract: float = Field(1.0, ge=0, description="factor of C; 0 leaves the phrases out")
    blur: float = Field(0.0, ge=0, description="standard deviation of a blur of N, in latent pixels")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of an average of N over a picture's visits")
    min_timestep: float = Field(0.0, ge=0, le=1, description="share of the schedule from which N is made")
    max_timestep: float = Field(1.0, ge=0, le=1, description="share of the schedule up to which N is made")
    quantile: float | None = Field(
        None, gt=0, le=1, description="M is divided by this quantile of its pixels; unset: not at all"
    )
    otsu: bool = Field(False, description="M is divided by Otsu's threshold of its pixels; not with quantile")
    threshold: float = Field(0.0, ge=0, lt=1, description="what is less becomes 0, what is left is stretched")

    _averages = Remembered()  # N of each picture, (h, w) on the CPU
    _maps = Remembered()  # M of each picture's last visit, the same

    @model_validator(mode="after")
    def _one_scale(self) -> ControlMap:
        if self.otsu and self.quantile is not None:
            raise ValueError(f"otsu and quantile = {self.quantile} both give the map its size: remove one")
        return self

    @model_validator(mode="after")
    def _range(self) -> ControlMap:
        if self.min_timestep >= self.max_timestep:
            raise ValueError(
                f"min_timestep = {self.min_timestep} must be less than max_timestep = {self.max_timestep}"
            )
        if (self.min_timestep, self.max_timestep) != (0.0, 1.0) and not self.ema:
            raise ValueError(
                f"min_timestep = {self.min_timestep} and max_timestep = {self.max_timestep} say which visits "
                "of a picture are remembered, and ema = 0 remembers none: set ema, as ema = 0.9"
            )
        return self

    @property
    def needs(self) -> Needs:
        passes = Needs.of("response", "reference", phrases=True)
        reference = Needs.of("reference", layers=self.layers)
        return passes | reference | (Needs.of("response", layers=self.layers) if self._attends else reference)

    @property
    def _attends(self) -> bool:
        return self.source != "difference"

    @torch.no_grad()
    def __call__(self, step: Step) -> Tensor:
        n = self.remembered(self.changed(step), step.sample_ids, self.telling(step))
        m = (n - self.subtract * self.claimed(step)).clamp(0, 1)
        if self.otsu:
            m = m / otsu(m).clamp(min=1e-6)[:, None, None]
        elif self.quantile is not None:
            m = m / torch.quantile(m.flatten(1).float(), self.quantile, dim=1).clamp(min=1e-6)[:, None, None]
        m = ((m - self.threshold) / (1 - self.threshold)).clamp(0, 1)
        self._maps.update((name, row.detach().cpu().clone()) for name, row in zip(step.sample_ids, m))
        return m.unsqueeze(1).to(step.noisy_latents.dtype)

    def of_plain(self, step: Step) -> Tensor:
        """M of the pictures' last visits with c_full; mirrored ones are not told apart."""
        mask = super().of_plain(step)
        for row, name in zip(mask[:, 0], step.sample_ids):
            last = self._maps.get(name)
            if last is not None and last.shape == row.shape:
                row.copy_(last)
        return mask

    def changed(self, step: Step) -> Tensor:
        """N, (B, h, w) in [0, 1]."""
        n = torch.ones_like(step.noisy_latents[:, 0])
        if self.source != "attention":
            difference = step.response.prediction - step.reference.prediction
            n = rescale(blurred(difference.abs().mean(dim=1), self.blur))
        if self._attends:
            targets = [(spans.target,) for spans in step.spans]
            attention = attended(step.response.layers(self.layers), targets, n.shape[1:])[:, 0]
            n = rescale(n * rescale(blurred(attention, self.blur)))
        return n

    def claimed(self, step: Step) -> Tensor:
        """C, (B, h, w): what attention gives to the phrases of c_base."""
        phrases = [spans.phrases for spans in step.spans]
        size = step.noisy_latents.shape[2:]
        maps = rescale(attended(step.reference.layers(self.layers), phrases, size))  # (B, n, h, w)
        weighted = maps * self.distance(step, maps.shape[1]).to(maps)[..., None, None]
        return weighted.sum(dim=1) if self.combine == "sum" else weighted.amax(dim=1)

    def distance(self, step: Step, count: int) -> Tensor:
        """D(c_tar, p) of each caption's phrases, (B, count), 0 where a caption has fewer."""
        rows = torch.zeros(len(step.captions), count)
        for row, caption, spans in zip(rows, step.captions, step.spans):
            if not spans.phrases:
                continue
            target, *phrases = step.embed([caption.target, *caption.phrases]).float().cpu()
            d = 1 - torch.stack(phrases) @ target
            if self.distances == "rescaled" and len(d) > 1:
                d = rescale(d[None, None])[0, 0]
            row[: len(d)] = d.clamp(min=0)
        return rows

    def telling(self, step: Step) -> list[bool]:
        """Of which samples N is made at their own timesteps."""
        share = step.timesteps / step.process.num_train_timesteps
        return ((share >= self.min_timestep) & (share <= self.max_timestep)).tolist()

    def remembered(self, n: Tensor, sample_ids: Any, telling: Sequence[bool]) -> Tensor:
        """N averaged with what earlier visits of the same pictures gave; mirrored ones are not told apart.
        A visit that tells nothing gives what is remembered; before there is anything, its own N."""
        if not self.ema:
            return n
        rows = []
        for name, now, tells in zip(sample_ids, n, telling):
            before = self._averages.get(name)
            if before is not None and before.shape == now.shape:
                now = torch.lerp(now, before.to(now), self.ema if tells else 1.0)
            if tells:
                self._averages[name] = now.detach().cpu()
            rows.append(now)
        return torch.stack(rows)

    def state_dict(self) -> dict[str, Any]:
        kept = {"averages": self._averages, "maps": self._maps}
        return {name: dict(of_pictures) for name, of_pictures in kept.items() if of_pictures}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._averages = Remembered(state.get("averages"))
        self._maps = Remembered(state.get("maps"))


def attended(layers: list[Any], positions: Any, size: Any) -> Tensor:
    """Attention to runs of tokens, mean over each run and over the layers: (B, n, h, w), n the most runs that
    a sample has; where it has fewer, 0."""
    count = max([len(runs) for runs in positions] + [1])
    tokens = layers[0].keys.shape[1]
    choose = torch.zeros(len(positions), tokens, count)
    for row, runs in zip(choose, positions):
        for number, run in enumerate(runs):
            row[list(run), number] = 1 / max(1, len(run))
    total = torch.zeros((), device=layers[0].keys.device)
    for layer in layers:
        total = total + layer.picture(layer.maps @ choose.to(layer.maps), size)
    return total / len(layers)


def rescale(values: Tensor) -> Tensor:
    """Each picture (..., h, w) min-max rescaled to [0, 1]; one that is constant but for rounding: 0."""
    low, high = values.amin(dim=(-2, -1), keepdim=True), values.amax(dim=(-2, -1), keepdim=True)
    span = high - low
    varies = span > 16 * torch.finfo(values.dtype).eps * high.abs()
    return torch.where(varies, (values - low) / span.where(varies, torch.ones_like(span)), 0.0)


def otsu(pictures: Tensor) -> Tensor:
    """The least pixel of the upper class, where pixels are split into two classes with the largest variance
    between their means (Otsu 1979): (B, h, w) to (B,). Of a constant picture its value."""
    pixels = pictures.flatten(1).sort(dim=1).values.double()
    n = torch.arange(1, pixels.shape[1], device=pixels.device)  # of the lower class
    lower = pixels.cumsum(dim=1)
    upper = (lower[:, -1:] - lower[:, :-1]) / (pixels.shape[1] - n)
    between = n * (pixels.shape[1] - n) * (upper - lower[:, :-1] / n).square()
    return pixels.gather(1, 1 + between.argmax(dim=1, keepdim=True))[:, 0].to(pictures.dtype)


def blurred(pictures: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of (B, h, w), edges repeated."""
    if not sigma:
        return pictures
    radius = max(1, round(3 * sigma))
    x = torch.arange(-radius, radius + 1, device=pictures.device, dtype=pictures.dtype)
    kernel = torch.softmax(-(x**2) / (2 * sigma**2), dim=0)
    padded = F.pad(pictures.unsqueeze(1), (radius,) * 4, mode="replicate")
    across = F.conv2d(padded, kernel.view(1, 1, 1, -1))
    return F.conv2d(across, kernel.view(1, 1, -1, 1)).squeeze(1)
