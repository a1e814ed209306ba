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
from spf_kit.adapters.blocks import assign
from spf_kit.adapters.chosen import chosen
from spf_kit.adapters.fit import fit
from spf_kit.adapters.index import LayerKey
from spf_kit.adapters.live.base import plain
from spf_kit.adapters.parts import NAMES
from spf_kit.adapters.spec import Spec
from spf_kit.adapters.tuners import attach_layers, forget, initialise
from spf_kit.adapters.update import Update
from spf_kit.errors import UserError

if TYPE_CHECKING:
    from spf_kit.adapters.files import LoraFile
    from spf_kit.families.base import Family
    from spf_kit.schema import Adapter


class AdapterHandle:
    """One adapter on a loaded base. Made by `inject` (new, trainable) or `attach` (from a file).

    Parameters are float32 whatever the frozen weights are. Their names are `<component>.<module>.<part>` with
    the modules' names in files, the same under every version of transformers; parts are down, up and
    magnitude of LoRA and DoRA, hada_w1_a, ..., lokr_w1, ..., oft_R of the others.
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
        specs = chosen(family, cfg)
        if start:
            _check_start(start, places, specs, cfg, family)
        handle = cls(family, name, specs, dropout=cfg.dropout)
        for key, layer in handle._layers.items():
            initialise(layer, handle._file_keys[key], seed)
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

        What no layer of peft can hold (LoHa or LoKr with DoRA, OFT on convolutions) acts as the difference of
        weights that it comes to.

        Raises UserError, naming both families, if a layer of the file has no place in the base.
        """
        places = fit(lora, family)
        layers = {places[key]: layer.live(_weight(family, places[key])) for key, layer in lora.layers.items()}
        handle = cls(family, name, {key: _spec_of(layer) for key, layer in layers.items()})
        handle._load(layers)
        handle.set_strength(strength)
        for parameter in handle.parameters():
            parameter.requires_grad_(trainable)
        return handle

    def _load(self, layers: Mapping[LayerKey, Update]) -> None:
        for key, source in layers.items():
            self._layers[key].load(source)

    # --- parameters ---

    def named_parameters(self, component: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        """Canonical name and parameter, always in the same order."""
        for key, layer in self._layers.items():
            if component in (None, key[0]):
                for part, parameter in layer.parts().items():
                    yield f"{self._file_keys[key]}.{part}", parameter

    def parameters(self, component: str | None = None) -> list[nn.Parameter]:
        """All parameters, or those on one component ("unet", "text_encoder")."""
        return [parameter for _, parameter in self.named_parameters(component)]

    def groups(self, patterns: Mapping[str, float]) -> dict[str, list[nn.Parameter]]:
        """The parameters by learning rate: those of each component, apart from those that a pattern means,
        which are called `<component> <pattern>`.

        Raises UserError for a pattern of `train.learning_rates` that means no layer.
        """
        layers = {(key[0], self._file_keys[key].partition(".")[2]): key for key in self._layers}
        own = assign(patterns, layers, "train.learning_rates")
        found: dict[str, list[nn.Parameter]] = {}
        for layer, key in layers.items():
            name = f"{key[0]} {own[layer][0]}" if layer in own else key[0]
            found.setdefault(name, []).extend(self._layers[key].parts().values())
        return found

    def update_norms(self) -> Tensor:
        """The squared Frobenius norm of each layer's difference of weights, (layers,). Gradients flow."""
        return torch.stack([layer.square_norm() for layer in self._layers.values()])

    def factors(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Of each LoRA layer: down (r, inputs), up (outputs, r), and alpha / r. Gradients flow."""
        for key, layer in self._layers.items():
            parts, spec = layer.parts(), self._specs[key]
            if "down" in parts:
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

        W + s * (W' - W) for every kind, where W' is the weight at strength 1: linear in s, as merging is.
        """
        if not math.isfinite(strength):
            raise ValueError(f"the strength {strength} is not a finite number")
        self._strength = float(strength)
        self._apply()

    def _apply(self) -> None:
        """Write strength and switch into the layers."""
        acts = self._enabled and self._strength != 0  # at 0 the layer is not even computed
        for layer in self._layers.values():
            layer.act(self._strength, acts)

    def remove(self) -> None:
        """Take the adapter off. A layer without any other gets its own plain module back, bit for bit."""
        for layer in self._layers.values():
            layer.detach()
        for component in self.components:
            forget(self._family.components().get(component), self._key)
        self._layers = {}

    # --- saving ---

    def to_lora_file(self, metadata: Mapping[str, str] | None = None) -> LoraFile:
        """Copies of the layers, for `files.write`; strength is not part of a file."""
        layers = {}
        for (component, module), layer in self._layers.items():
            layers[component, self._family.file_module_name(component, module)] = layer.update()
        return files.LoraFile(layers, dict(metadata or {}), unet_names=self._family.kohya_unet_names)


inject = AdapterHandle.inject
attach = AdapterHandle.attach


def _submodule_name(name: str) -> str:
    """peft names submodules by the adapter: no dots, and no name that nn.ModuleDict uses itself."""
    safe = re.sub(r"\W", "_", name)
    return f"spf_{safe}" if safe == name else f"spf_{safe}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _spec_of(layer: Update) -> Spec:
    return Spec(layer.rank or 1, layer.alpha, layer.dora_scale is not None, layer.kind)


def _check_start(
    start: LoraFile,
    places: Mapping[LayerKey, LayerKey],
    specs: Mapping[LayerKey, Spec],
    cfg: Adapter,
    family: Family,
) -> None:
    """Raises UserError if the file's layers cannot go on as this adapter."""
    source = f"adapter.start_from = {str(start.path)!r}"
    other = next((layer.kind for layer in start.layers.values() if layer.kind != cfg.kind), None)
    if other:
        raise UserError(f"{source} is a {NAMES[other]}: set adapter.kind = {other!r}")
    dora = any(layer.dora_scale is not None for layer in start.layers.values())
    if dora != cfg.dora and (cfg.kind == "lora" or dora):
        how, remedy = ("with", "true") if dora else ("without", "false")
        also = "" if cfg.kind == "lora" else f", which a {NAMES[cfg.kind]} cannot be trained with here"
        raise UserError(f"{source} was trained {how} DoRA{also or f': set adapter.dora = {remedy}'}")
    for key, place in places.items():
        if place in specs:
            _check_layer(source, key, start.layers[key], specs[place], _weight(family, place))
    beyond = [key for key, place in places.items() if place not in specs]
    if beyond:
        raise UserError(
            f"{source} also changes {len(beyond)} layers that adapter.targets does not name, the first "
            f"{beyond[0][1]!r} of {beyond[0][0]}: add their group to the targets"
        )


def _check_layer(source: str, key: LayerKey, layer: Update, spec: Spec, weight: Tensor) -> None:
    """The same factors as a new layer has."""
    if spec.kind == "lora" and layer.rank != spec.rank:
        raise UserError(f"{source} has rank {layer.rank}, not {spec.rank}: set adapter.rank = {layer.rank}")
    wanted = spec.parts(tuple(weight.shape))
    found = {part: tuple(tensor.shape) for part, tensor in layer.tensors().items()}
    if spec.kind == "oft":
        wanted, found = {"size": wanted["oft_R"][:1]}, {"size": (layer.shape[0] // layer.rank,)}
    if spec.kind != "lora" and wanted != found:
        raise UserError(
            f"{source}: its layer {key[1]!r} of {key[0]} has other factors than these settings give: train "
            "with the adapter.rank, factor and decompose_both that it was trained with"
        )


def _weight(family: Family, place: LayerKey) -> Tensor:
    """The base's own weight, adapters looked through."""
    component, module = place
    weight: Tensor = plain(family.components()[component].get_submodule(module)).weight
    return weight.detach()
