"""One point of a recipe's curve in bench/pollution.py: pictures beside the base's, and numbers of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DRIFT_COUNT = 24
OF_PLAIN = ("leakage", "leaked", "drift_plain", "drift_target", "ssim_plain", "mae_plain")


class Measured:
    """The pictures of one point, beside the base's, in eight bits a channel as files hold them."""

    def __init__(self, family: Any, handle: Any, evaluate: Any, attribute: Any, kept: KeptBase) -> None:
        from spf_kit.measure.evaluate import setup_of

        self.setup, self.handle = setup_of(family, evaluate, attribute), handle
        with handle.disabled():
            self.base = kept.pictures or _rounded(self.setup.draw(None))
        kept.keep(self.base)

    def row(self, whole: bool) -> dict[str, Any]:
        """Numbers by name; what is not `whole` has no plain pictures, so neither leakage nor drift."""
        from spf_kit.measure.judges import Pictures

        setup = self.setup
        drift = self._drift() if whole else (0.0, 0.0)
        self.lora = setup.draw(None) if whole else Pictures(setup.asked(None), self.base.plain)
        self.lora = _rounded(self.lora)
        found = numbers(setup, self.lora, self.base, drift)
        return found if whole else {key: value for key, value in found.items() if key not in OF_PLAIN}

    def _drift(self) -> tuple[float, float]:
        """Without and with the target, of the first prompts."""
        from dataclasses import replace

        from spf_kit.measure.judges import Pictures

        captions, seeds = self.setup.captions[:DRIFT_COUNT], self.setup.seeds[:DRIFT_COUNT]
        few = replace(self.setup, captions=captions, seeds=seeds)
        with self.handle.disabled():
            plain, asked = few.probes(Pictures(self.base.asked[:DRIFT_COUNT], self.base.plain[:DRIFT_COUNT]))
        return float(plain.measure().mean()), float(asked.measure().mean())


def numbers(setup: Any, lora: Any, base: Any, drift: tuple[float, float]) -> dict[str, Any]:
    """What the judges say of pictures."""
    from spf_kit.measure.rows import row_of, summary

    count = len(setup.seeds)
    of_base = row_of(setup, base, base, ([0.0] * count,) * 2)
    row = row_of(setup, lora, base, ([drift[0]] * count, [drift[1]] * count))
    return {
        **{key: value for key, value in summary(row).items() if isinstance(value, int | float)},
        "pollution": of_base["preservation"] - row["preservation"],
        "base": {key: of_base[key] for key in ("response", "preservation", "leakage", "response_clip")},
        "changed": row["changed"],
        "leaked": row["leaked"],
    }


def judged_again(family: Any, cell: dict[str, Any], pictures: Path, evaluate: Any, attribute: Any) -> Any:
    """A cell whose last point the judges look at again, from the pictures that were kept of it."""
    from safetensors.torch import load_file

    from spf_kit.measure.evaluate import setup_of
    from spf_kit.measure.judges import Pictures

    setup = setup_of(family, evaluate, attribute)
    kept = {name: value.float() / 255 for name, value in load_file(pictures).items()}
    base, lora = (Pictures(kept[f"{name}.asked"], kept[f"{name}.plain"]) for name in ("base", "lora"))
    last = cell["points"][-1]
    found = numbers(setup, lora, base, (last["drift_plain"], last["drift_target"]))
    return {**cell, "points": [*cell["points"][:-1], {**last, **found}]}


@dataclass
class KeptBase:
    """The base's pictures of these prompts, drawn once for all cells of an attribute."""

    output: Path
    target: str
    evaluate: Any

    @property
    def file(self) -> Path:
        settings = f"{self.target}-{self.evaluate.count}-{self.evaluate.steps}-{len(self.evaluate.prompts)}"
        return self.output / "base" / f"{settings.replace(' ', '-')}.safetensors"

    @property
    def pictures(self) -> Any:
        from safetensors.torch import load_file

        from spf_kit.measure.judges import Pictures

        return Pictures(**load_file(self.file)) if self.file.is_file() else None

    def keep(self, drawn: Any) -> None:
        from safetensors.torch import save_file

        from spf_kit.files import atomic

        if not self.file.is_file():
            with atomic(self.file) as path:
                save_file({"asked": drawn.asked.contiguous(), "plain": drawn.plain.contiguous()}, path)


def keep_pictures(found: Measured, file: Path) -> None:
    """Those of a cell and of its base, for contact sheets and for other judges."""
    from safetensors.torch import save_file

    from spf_kit.files import atomic

    drawn = {"base": found.base, "lora": found.lora}
    tensors = {
        f"{name}.{kind}": (getattr(pictures, kind) * 255).round().byte().contiguous()
        for name, pictures in drawn.items()
        for kind in ("asked", "plain")
    }
    with atomic(file) as path:
        save_file(tensors, path, {"prompts": json.dumps([c.base for c in found.setup.captions])})


def _rounded(pictures: Any) -> Any:
    from spf_kit.measure.judges import Pictures

    return Pictures(*((drawn * 255).round() / 255 for drawn in (pictures.asked, pictures.plain)))
