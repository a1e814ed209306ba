"""One point of a recipe's curve in bench/pollution.py: pictures beside the base's, and numbers of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DRIFT_COUNT = 24
SURE = 0.8  # probability, for `pollution_sure`
OF_PLAIN = ("leakage", "leaked", "drift_plain", "drift_target", "ssim_plain", "mae_plain")


class Measured:
    """The pictures of one point, beside the base's."""

    def __init__(self, family: Any, handle: Any, evaluate: Any, attribute: Any, kept: KeptBase) -> None:
        from spf_kit.measure.evaluate import setup_of

        self.setup, self.handle = setup_of(family, evaluate, attribute), handle
        with handle.disabled():
            self.base = kept.pictures or self.setup.draw(None)
        kept.keep(self.base)

    def row(self, whole: bool) -> dict[str, Any]:
        """Numbers by name; what is not `whole` has no plain pictures, so neither leakage nor drift."""
        from spf_kit.measure.judges import Pictures
        from spf_kit.measure.rows import row_of, summary

        setup, count = self.setup, len(self.setup.seeds)
        of_base = row_of(setup, self.base, self.base, ([0.0] * count,) * 2)
        drift = self._drift() if whole else (0.0, 0.0)
        self.lora = setup.draw(None) if whole else Pictures(setup.asked(None), self.base.plain)
        row = row_of(setup, self.lora, self.base, tuple([value] * count for value in drift))
        numbers = {key: value for key, value in summary(row).items() if isinstance(value, int | float)}
        found = {
            **numbers,
            "pollution": of_base["preservation"] - row["preservation"],
            "pollution_sure": surely_changed(setup, self.lora, self.base)
            - surely_changed(setup, self.base, self.base),
            "base": {key: of_base[key] for key in ("response", "preservation", "leakage", "response_clip")},
            "changed": row["changed"],
            "leaked": row["leaked"],
        }
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


def surely_changed(setup: Any, model: Any, base: Any) -> float:
    """Mean share of the other attributes that were one thing and are another, the judge sure of both."""
    from spf_kit.measure.judges import compared

    judge, rest = setup.judge.judge, setup.judge.rest
    before, after = judge.probabilities(base.plain), judge.probabilities(model.asked)
    seen = list(zip(judge.read(base.plain), judge.read(model.asked), judge.told(base.plain), strict=True))
    shares = []
    for n, (was, now, told) in enumerate(seen):
        visible, changed = compared(was, now, rest, told)
        sure = [name for name in changed if min(before[name][n].max(), after[name][n].max()) >= SURE]
        shares.append(len(sure) / max(1, len(visible)))
    return sum(shares) / len(shares)


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


def keep_pictures(found: Any, file: Path, count: int = 8) -> None:
    """The first pictures of a cell and of its base, for the contact sheets."""
    from safetensors.torch import save_file

    from spf_kit.files import atomic

    drawn = {"base": found.base, "lora": found.lora}
    tensors = {
        f"{name}.{kind}": (getattr(pictures, kind)[:count] * 255).round().byte().contiguous()
        for name, pictures in drawn.items()
        for kind in ("asked", "plain")
    }
    with atomic(file) as path:
        save_file(tensors, path, {"prompts": json.dumps([c.base for c in found.setup.captions[:count]])})
