"""Adapters on a live model, through peft: new ones to train, files to apply, several at once.

Each adapter adds its own difference to a layer's output. Turning one on or off never touches another, nor
what is trainable. Removing the last one of a layer puts the very module back that was there before.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spf_kit.adapters import files
from spf_kit.adapters.fit import fit
from spf_kit.adapters.index import LayerKey
from spf_kit.adapters.layers import LoraLayer
from spf_kit.adapters.tuners import Spec, attach_layers, forget, initialise
from spf_kit.errors import UserError

if TYPE_CHECKING:
    from spf_kit.adapters.files import LoraFile
    from spf_kit.families.base import Family
    from spf_kit.schema import Adapter


class AdapterHandle:
    """One adapter on a loaded base. Made by `inject` (new, trainable) or `attach` (from a file).

    Parameters are float32 whatever the frozen weights are. Their names are `<component>.<module>.down`, `.up`
    and `.magnitude` with the modules' names in files, the same under every version of transformers.
    """

    def __init__(
        self, family: Family, name: str, specs: Mapping[LayerKey, Spec], *, dropout: float = 0.0
    ) -> None:
        """Puts empty layers on the base: zero effect, on, frozen. Raises ValueError if the name is taken."""
        self.name = name
        self._family = family
        self._key = _submodule_name(name)
        self._specs = dict(specs)
        self._strength, self._enabled = 1.0, True
        self._layers = attach_layers(family, self._key, self._specs, dropout)
        self._file_keys = {
            (component, module): f"{component}.{family.file_module_name(component, module)}"
            for component, module in self._layers
        }

    # --- making ---

    @classmethod
    def inject(cls, family: Family, cfg: Adapter, *, name: str = "default", seed: int = 0) -> AdapterHandle:
        """A new adapter with no effect yet, its parameters trainable, float32.

        The weights depend on the seed and on each layer's name, not on the order of layers, on threads or on
        torch's global generator, which is left as it was. With `start_from` they come from that file. Dropout
        acts while the component is in training mode (`family.unet.train()`).

        Raises UserError if `start_from` cannot be read, does not fit the base, or differs in rank or kind.
        """
        start = files.read(cfg.start_from) if cfg.start_from else None
        places = fit(start, family) if start else {}
        alpha = cfg.rank if cfg.alpha is None else cfg.alpha
        # rank-stabilised: alpha / sqrt(r) = (alpha * sqrt(r)) / r, so that files and loaders need no flag
        alpha = alpha * math.sqrt(cfg.rank) if cfg.rank_stabilized else alpha
        spec = Spec(cfg.rank, alpha, cfg.dora)
        chosen = family.adapter_modules(cfg.targets)
        specs = {(component, module): spec for component, modules in chosen.items() for module in modules}
        if start:
            _check_start(start, places, specs, cfg)
        handle = cls(family, name, specs, dropout=cfg.dropout)
        for key, layer in handle._layers.items():
            initialise(layer, handle._key, handle._file_keys[key], seed)
        if start:
            handle._load({places[key]: layer for key, layer in start.layers.items()})
        for parameter in handle.parameters():
            parameter.requires_grad_(True)
        return handle

    @classmethod
    def attach(
        cls, family: Family, lora: LoraFile, *, name: str, strength: float = 1.0, trainable: bool = False
    ) -> AdapterHandle:
        """A file's adapter on the base, frozen unless `trainable`.

        Raises UserError, naming both families, if a layer of the file has no place in the base.
        """
        places = fit(lora, family)
        specs = {
            places[key]: Spec(layer.rank, layer.alpha, layer.dora_scale is not None)
            for key, layer in lora.layers.items()
        }
        handle = cls(family, name, specs)
        handle._load({places[key]: layer for key, layer in lora.layers.items()})
        handle.set_strength(strength)
        for parameter in handle.parameters():
            parameter.requires_grad_(trainable)
        return handle

    def _load(self, layers: Mapping[LayerKey, LoraLayer]) -> None:
        for key, source in layers.items():
            tuner, spec = self._layers[key].tuner, self._specs[key]
            down, up = tuner.lora_A[self._key].weight, tuner.lora_B[self._key].weight
            down.data.copy_(source.down.reshape(down.shape))
            # where the scale here is another one than the file's, `up` keeps the update the same
            up.data.copy_(
                source.up.reshape(up.shape).to(torch.float32)
                * (source.alpha / spec.alpha if spec.alpha else 1)
            )
            if source.dora_scale is not None:
                axis = source.dora_axis or 0
                variant, magnitude = tuner.lora_variant[self._key], tuner.lora_magnitude_vector[self._key]
                variant.axis = axis
                values = source.dora_scale.to(magnitude.weight.device, torch.float32)
                shape = magnitude.weight.shape if axis == 0 else (-1,)
                magnitude.weight = nn.Parameter(values.reshape(shape).clone(), requires_grad=False)

    # --- parameters ---

    def named_parameters(self, component: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        """Canonical name and parameter, always in the same order."""
        for key, layer in self._layers.items():
            if component in (None, key[0]):
                for part, parameter in layer.parts(self._key).items():
                    yield f"{self._file_keys[key]}.{part}", parameter

    def parameters(self, component: str | None = None) -> list[nn.Parameter]:
        """All parameters, or those on one component ("unet", "text_encoder")."""
        return [parameter for _, parameter in self.named_parameters(component)]

    def factors(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Of each layer: down (r, inputs), up (outputs, r), and alpha / r. Gradients flow through them."""
        for key, layer in self._layers.items():
            parts, spec = layer.parts(self._key), self._specs[key]
            yield parts["down"].flatten(1), parts["up"].flatten(1), spec.alpha / spec.rank

    @property
    def components(self) -> list[str]:
        return list(dict.fromkeys(component for component, _ in self._layers))

    @property
    def modules(self) -> dict[str, list[str]]:
        """The adapted modules of each component, by their names at run time."""
        return {c: [module for component, module in self._layers if component == c] for c in self.components}

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all parameters on the CPU, by canonical name."""
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`. Raises UserError if names or shapes differ."""
        own = dict(self.named_parameters())
        different = own.keys() ^ state.keys() or {n for n in own if own[n].shape != state[n].shape}
        if different:
            raise UserError(
                f"the saved adapter has other layers or another rank ({len(different)} parameters differ, "
                f"the first {min(different)!r}): continue with the settings that it was trained with"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

    # --- on and off ---

    @property
    def enabled(self) -> bool:
        return self._enabled

    @property
    def strength(self) -> float:
        return self._strength

    def on(self) -> None:
        """Let the adapter act; others stay as they are."""
        self._enabled = True
        self._apply()

    def off(self) -> None:
        """Stop it from acting; others stay as they are, and so does what is trainable."""
        self._enabled = False
        self._apply()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Off within the block, then as before."""
        before = self._enabled
        self.off()
        try:
            yield
        finally:
            self._enabled = before
            self._apply()

    def set_strength(self, strength: float) -> None:
        """Multiply the adapter's effect: 0 is exactly none, 1 as trained, negative the opposite.

        LoRA: W + s * U. DoRA: W + s * (m * (W + U) / |W + U| - W), linear in s like LoRA.
        """
        if not math.isfinite(strength):
            raise ValueError(f"the strength {strength} is not a finite number")
        self._strength = float(strength)
        self._apply()

    def _apply(self) -> None:
        """Write strength and switch into the layers, as peft reads them."""
        acts = self._enabled and self._strength != 0  # at 0 the layer is not even computed
        for key, layer in self._layers.items():
            tuner, spec = layer.tuner, self._specs[key]
            variant = tuner.lora_variant.get(self._key)
            scale = spec.alpha / spec.rank
            if variant is None:
                scale *= self._strength
            else:
                variant.strength = self._strength
            tuner.scaling[self._key] = scale
            active = {*tuner.active_adapters, self._key} if acts else {*tuner.active_adapters} - {self._key}
            # not peft's set_adapter, which would also change what is trainable
            tuner._active_adapter = [name for name in tuner.lora_A if name in active]

    def remove(self) -> None:
        """Take the adapter off. A layer without any other gets its own plain module back, bit for bit."""
        for layer in self._layers.values():
            layer.detach(self._key)
        for component in self.components:
            forget(self._family.components().get(component), self._key)
        self._layers = {}

    # --- saving ---

    def to_lora_file(self, metadata: Mapping[str, str] | None = None) -> LoraFile:
        """Copies of the layers, for `files.write`; strength is not part of a file."""
        layers = {}
        for key, layer in self._layers.items():
            component, module = key
            parts = {part: p.detach().to("cpu", copy=True) for part, p in layer.parts(self._key).items()}
            magnitude = parts.get("magnitude")
            if magnitude is not None:
                shape = [1] * parts["down"].dim()
                shape[layer.tuner.lora_variant[self._key].axis] = -1
                magnitude = magnitude.reshape(shape)
            file_key = (component, self._family.file_module_name(component, module))
            layers[file_key] = LoraLayer(parts["down"], parts["up"], self._specs[key].alpha, magnitude)
        return files.LoraFile(layers, dict(metadata or {}), unet_names=self._family.kohya_unet_names)


inject = AdapterHandle.inject
attach = AdapterHandle.attach


def _submodule_name(name: str) -> str:
    """peft names submodules by the adapter: no dots, and no name that nn.ModuleDict uses itself."""
    safe = re.sub(r"\W", "_", name)
    return f"spf_{safe}" if safe == name else f"spf_{safe}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _check_start(
    start: LoraFile, places: Mapping[LayerKey, LayerKey], specs: Mapping[LayerKey, Spec], cfg: Adapter
) -> None:
    """Raises UserError if the file's layers cannot go on as this adapter."""
    source = f"adapter.start_from = {str(start.path)!r}"
    if start.ranks != {cfg.rank}:
        ranks = ", ".join(map(str, sorted(start.ranks)))
        raise UserError(f"{source} has rank {ranks}, not {cfg.rank}: set adapter.rank = {min(start.ranks)}")
    dora = any(layer.dora_scale is not None for layer in start.layers.values())
    if dora != cfg.dora:
        how, remedy = ("with", "true") if dora else ("without", "false")
        raise UserError(f"{source} was trained {how} DoRA: set adapter.dora = {remedy}")
    beyond = [key for key, place in places.items() if place not in specs]
    if beyond:
        raise UserError(
            f"{source} also changes {len(beyond)} layers that adapter.targets does not name, the first "
            f"{beyond[0][1]!r} of {beyond[0][0]}: add their group to the targets"
        )
