"""Response, preservation, leakage and drift of LoRAs beside their base: DESIGN.md's evaluation JSON.

    {"base": row, "loras": {name: row, ...}, "settings": {...}}

Every model draws every prompt twice from the same seed, once as c_base and once as c_full; the base's
pictures are drawn once. A row has, in [0, 1]:

    response      share of c_full pictures that show the target
    preservation  mean share of the rest that equals the base's picture of the same seed on c_base
    leakage       share of c_base pictures in which anything judged changed

and `drift_plain`, `drift_target` (drift.py), `prompts`, `seeds`, `per_prompt`, the settings and the judge.
The base's own row is the ceiling: adding the words changes its pictures too. `pollution` is the base's
preservation minus the LoRA's.

Shapes: N prompts, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf_kit.data.captions import Caption, derive, fit
from spf_kit.errors import UserError
from spf_kit.measure.judges import ByAttributes, ByPixels, ClipPair, Judge, Pictures
from spf_kit.measure.rows import Progress, Row, Setup, row_of

if TYPE_CHECKING:
    from spf_kit import schema
    from spf_kit.adapters.inject import AdapterHandle
    from spf_kit.families.base import Family

SAMPLER = "ddim"  # deterministic, and every base can be drawn with it
WINDOW = 75  # tokens of a text window beside its begin and end


@dataclass(frozen=True)
class Evaluation:
    """The numbers as JSON-able data, and the pictures that they were read off."""

    data: dict[str, Any]
    captions: list[Caption]
    pictures: dict[str, Pictures]  # "base" and each LoRA's name
    base: Pictures

    @property
    def names(self) -> list[str]:
        return list(self.data["loras"])


def evaluate(
    family: Family,
    handles: Mapping[str, AdapterHandle | Path | str],
    config: schema.Evaluate,
    attribute: schema.Attribute,
    **options: Any,
) -> dict[str, Any]:
    """The evaluation as JSON-able data; see `measure`, whose arguments it takes."""
    return measure(family, handles, config, attribute, **options).data


def measure(
    family: Family,
    handles: Mapping[str, AdapterHandle | Path | str],
    config: schema.Evaluate,
    attribute: schema.Attribute,
    *,
    clip: str | Path | None = None,
    captions: Sequence[str] = (),
    strength: float = 1.0,
    curve: Sequence[float] = (),
    clip_skip: int = 1,
    chunks: int = 1,
    scheduler: str = SAMPLER,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure LoRAs beside their base, all on the same prompts and seeds.

    Args:
        handles: name -> an adapter on the family, or a LoRA file that is attached for the while.
        config: prompts, count, seeds, sampler steps, guidance, batch size.
        attribute: its `target` is what is asked for.
        clip: folder of a CLIP pair that no loss used; the embedded base brings its own.
        captions: of the training data; give the prompts where neither `config` nor the base has any.
        strength: of every LoRA.
        curve: strengths at which drift is measured too.
        clip_skip, chunks, scheduler: as `generate` takes them.
        progress: called as (pictures done, pictures, what).

    Returns:
        numbers and pictures. Adapters given as handles are on, at `strength`, when it returns.

    Raises:
        UserError: no prompts, or a LoRA file that cannot be read or does not fit the base.
    """
    setup = _prepare(family, config, attribute, clip, captions, clip_skip, chunks, scheduler)
    share = _shares(progress, 1 + len(handles))
    rows: dict[str, Row] = {}
    pictures: dict[str, Pictures] = {}
    with _off([handle for handle in handles.values() if not isinstance(handle, str | Path)]):
        base = setup.draw(share(0, "base"))
        probes = setup.probes(base)
        base_row = row_of(setup, base, base, drift=([0.0] * len(setup.seeds),) * 2)
        base_row |= {"base": family.base_id, "base_hash": family.base_hash()}
        for number, (name, handle) in enumerate(handles.items(), start=1):
            with _attached(family, handle, strength) as adapter:
                pictures[name] = setup.draw(share(number, name))
                drift = (probes[0].measure().tolist(), probes[1].measure().tolist())
                row = row_of(setup, pictures[name], base, drift)
                if curve:
                    curves = [probe.curve(adapter, curve, restore=strength) for probe in probes]
                    keys = ("strength", "drift_plain", "drift_target")
                    row["curve"] = [
                        dict(zip(keys, at, strict=True)) for at in zip(curve, *curves, strict=True)
                    ]
            row |= {"strength": strength, "pollution": base_row["preservation"] - row["preservation"]}
            rows[name] = row
    settings = setup.described() | {"width": base.plain.shape[-1], "height": base.plain.shape[-2]}
    return Evaluation({"base": base_row, "loras": rows, "settings": settings}, setup.captions, pictures, base)


# --- prompts ----------------------------------------------------------------------------------------------


def prompts_of(family: Family, config: schema.Evaluate, captions: Sequence[str]) -> list[str]:
    """The prompts to judge with: the user's, the embedded base's, or the captions of the data, each once.

    Raises UserError if there are none.
    """
    if config.prompts:
        found: Sequence[str] = config.prompts
    elif family.name == "embedded":
        from spf_kit import embedded

        found = embedded.prompts("evaluate")
    else:
        found = captions
    unique = list(dict.fromkeys(text for text in found if text.strip()))
    if not unique:
        raise UserError(
            "there are no prompts to evaluate with: set evaluate.prompts (captions without the target), "
            "or give --prompts FILE"
        )
    return unique


def _prepare(
    family: Family,
    config: schema.Evaluate,
    attribute: schema.Attribute,
    clip: str | Path | None,
    captions: Sequence[str],
    clip_skip: int,
    chunks: int,
    scheduler: str,
) -> Setup:
    """Captions, seeds and judges. Fewer prompts than `count` are used again with other seeds."""
    if family.text_encoder is None or family.vae is None:
        family.reload_encoders()
    texts = prompts_of(family, config, captions)
    unique = [fit(derive(text, attribute.target), family.count_tokens, WINDOW * chunks) for text in texts]
    cases = [unique[n % len(unique)] for n in range(config.count)]
    seeds = [config.seed + n for n in range(config.count)]
    judge: Judge
    if family.name == "embedded":
        from spf_kit import embedded

        pair: ClipPair | None = ClipPair.load(clip or embedded.base_path() / "clip")
        judge = ByAttributes(attribute.target, pair)
    else:
        pair = ClipPair.load(clip, device=family.device) if clip else None
        judge = ByPixels(pair)
    return Setup(family, cases, seeds, config, judge, pair, clip_skip, chunks, scheduler)


@contextmanager
def _off(adapters: Sequence[AdapterHandle]) -> Iterator[None]:
    """All of them off, so that the base is the base; on again afterwards, whatever happens."""
    for adapter in adapters:
        adapter.off()
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.on()


@contextmanager
def _attached(family: Family, handle: AdapterHandle | Path | str, strength: float) -> Iterator[AdapterHandle]:
    """The adapter on, at `strength`; off again afterwards, and gone if it came from a file."""
    if isinstance(handle, str | Path):
        from spf_kit.adapters import files
        from spf_kit.adapters.inject import AdapterHandle

        lora = files.read(handle)
        files.check_family(lora, family)
        adapter = AdapterHandle.attach(family, lora, name="evaluated", strength=strength)
        try:
            adapter.on()
            yield adapter
        finally:
            adapter.remove()
    else:
        handle.set_strength(strength)
        handle.on()
        try:
            yield handle
        finally:
            handle.off()


def _shares(progress: Progress | None, models: int) -> Callable[[int, str], Progress | None]:
    """Progress of each model's pictures as progress of the whole evaluation."""

    def of(number: int, name: str) -> Progress | None:
        if progress is None:
            return None
        return lambda done, total, text: progress(number * total + done, models * total, name)

    return of
