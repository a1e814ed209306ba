"""Response, preservation, leakage and drift of LoRAs beside their base, as JSON-able data.

    {"base": row, "loras": {name: row, ...}, "settings": {...}}

Every model draws every prompt twice from the same seed, once as c_base and once as c_full; the base's
pictures are drawn once. A row has, in [0, 1]:

    response      share of c_full pictures that show the target
    preservation  mean share of the rest that equals the base's picture of the same seed on c_base
    leakage       share of c_base pictures in which anything judged changed

and `drift_plain`, `drift_target` (drift.py), `prompts`, `seeds`, `per_prompt`, the settings and the judge.
The base's own row is the ceiling: adding the words changes its pictures too. `pollution` is the base's
preservation minus the LoRA's. Where `clip_used_by_a_loss`, a loss of this LoRA or of one under it used the
very CLIP pair: `response_clip` and `clip_margin` are then no independent measure, and the pair judges nothing
in the whole evaluation. Where `clip_chose_strength`, it chose the LoRA's strength (strength.py) on pictures
of other seeds: it still judges. "Base" is what the LoRAs are compared with: the model, and under it the
earlier LoRAs that the row's `on` lists as {"path", "weight"}.

Shapes: N prompts, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf_kit.adapters.earlier import attached
from spf_kit.adapters.index import index
from spf_kit.adapters.metadata import STRENGTH_KEY, parse_json
from spf_kit.adapters.weights import parse
from spf_kit.data.captions import Caption, derive, fit
from spf_kit.errors import UserError
from spf_kit.measure.clip import CLIP_KEY, ClipPair, watching
from spf_kit.measure.judges import ByAttributes, ByPixels, Judge, Pictures
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
    on: Sequence[str] = (),
    drawn: Pictures | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure LoRAs beside their base, all on the same prompts and seeds.

    Args:
        handles: name -> an adapter on the family, or a LoRA file that is attached for the while.
        config: prompts, count, seeds, sampler steps, guidance, batch size.
        attribute: its `target` is what is asked for.
        clip: folder of a CLIP pair; the embedded base brings its own. LoRA files tell whether a loss used
            it, handles do not.
        captions: of the training data; give the prompts where neither `config` nor the base has any.
        strength: of every LoRA.
        curve: strengths at which drift is measured too.
        clip_skip, chunks, scheduler: as `generate` takes them.
        on: earlier LoRAs, `FILE[:WEIGHT]`, that act in everything: the base's row is base + these.
        drawn: the base's pictures, where the same prompts and settings drew them before.
        progress: called as (pictures done, pictures, what).

    Returns:
        numbers and pictures. Adapters given as handles are on, at `strength`, when it returns.

    Raises:
        UserError: no prompts, or a LoRA file (of `on` too) that cannot be read or does not fit the base.
    """
    used = _clip_used(handles, on)
    setup = _prepare(
        family, config, attribute, clip, captions, clip_skip, chunks, scheduler, set().union(*used.values())
    )
    share = _shares(progress, 1 + len(handles))
    rows: dict[str, Row] = {}
    pictures: dict[str, Pictures] = {}
    live = [handle for handle in handles.values() if not isinstance(handle, str | Path)]
    _check_files(family, handles)
    with attached(family, on) as earlier, _off(live):
        base = drawn or setup.draw(share(0, "base"))
        probes = setup.probes(base)
        base_row = row_of(setup, base, base, drift=([0.0] * len(setup.seeds),) * 2)
        base_row |= {"base": family.base_id, "base_hash": family.base_hash(), "on": earlier.rows}
        # the hash is of the weights as their files hold them
        base_row |= {"quantize": family.quantize, "dtype": str(family.dtype).removeprefix("torch.")}
        base_row["clip_used_by_a_loss"] = _among(setup.clip, used[None])
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
            row["clip_used_by_a_loss"] = _among(setup.clip, used[name])
            row["clip_chose_strength"] = _among(setup.clip, _clip_chose(handle))
            rows[name] = row
    settings = setup.described() | {"width": base.plain.shape[-1], "height": base.plain.shape[-2]}
    return Evaluation({"base": base_row, "loras": rows, "settings": settings}, setup.captions, pictures, base)


# --- prompts ----------------------------------------------------------------------------------------------


def setup_of(family: Family, config: schema.Evaluate, attribute: schema.Attribute) -> Setup:
    """What the models of one base are measured with, for measurements that `measure` does not make."""
    return _prepare(family, config, attribute, None, (), 1, 1, SAMPLER, ())


def prompts_of(
    family: Family,
    prompts: Sequence[str],
    captions: Sequence[str],
    split: str = "evaluate",
    *,
    key: str = "evaluate.prompts",
) -> list[str]:
    """The prompts to draw with: the user's, the embedded base's of a split, or the captions of the data, each
    once.

    Raises UserError, naming the `key` that would give some, if there are none.
    """
    if prompts:
        found: Sequence[str] = prompts
    elif family.name == "embedded":
        from spf_kit import embedded

        found = embedded.prompts(split)
    else:
        found = captions
    unique = list(dict.fromkeys(text for text in found if text.strip()))
    if not unique:
        raise UserError(
            f"there are no prompts to draw: set {key} (captions without the target)"
            + ", or give --prompts FILE" * (key == "evaluate.prompts")
        )
    return unique


def captions_of(family: Family, texts: Sequence[str], target: str, count: int, chunks: int) -> list[Caption]:
    """`count` captions of these prompts, cut to the text window; fewer prompts are used again."""
    unique = [fit(derive(text, target), family.count_tokens, WINDOW * chunks) for text in texts]
    return [unique[n % len(unique)] for n in range(count)]


def _prepare(
    family: Family,
    config: schema.Evaluate,
    attribute: schema.Attribute,
    clip: str | Path | None,
    captions: Sequence[str],
    clip_skip: int,
    chunks: int,
    scheduler: str,
    used: Collection[str],
) -> Setup:
    """Captions, seeds and judges. Fewer prompts than `count` are used again with other seeds.

    Args:
        used: fingerprints of the CLIP pairs that may not judge.
    """
    family.reload_encoders()
    texts = prompts_of(family, config.prompts, captions)
    cases = captions_of(family, texts, attribute.target, config.count, chunks)
    seeds = [config.seed + n for n in range(config.count)]
    pair = watching(family, clip)
    independent = None if _among(pair, used) else pair
    embedded = family.name == "embedded"
    judge: Judge = ByAttributes(attribute.target, independent) if embedded else ByPixels(independent)
    return Setup(family, cases, seeds, config, judge, pair, clip_skip, chunks, scheduler)


def _clip_used(
    handles: Mapping[str, AdapterHandle | Path | str], on: Sequence[str]
) -> dict[str | None, set[str]]:
    """Fingerprints of the CLIP pairs that losses used: None -> of the LoRAs `on`, name -> of its own too."""

    def of(path: Path | str) -> set[str]:
        return {index(Path(path)).metadata.get(CLIP_KEY, "")} - {""}

    under = set().union(*(of(path) for path, _ in map(parse, on)))
    mine = {name: of(x) if isinstance(x, str | Path) else set() for name, x in handles.items()}
    return {None: under} | {name: under | own for name, own in mine.items()}


def _clip_chose(handle: AdapterHandle | Path | str) -> set[str]:
    """The fingerprint of the CLIP pair that chose a LoRA's strength, if one did."""
    if not isinstance(handle, str | Path):
        return set()
    told = parse_json(index(Path(handle)).metadata, STRENGTH_KEY)
    return {str(told.get("clip"))} if isinstance(told, dict) and told.get("chosen") else set()


def _among(pair: ClipPair | None, used: Collection[str]) -> bool:
    return pair is not None and bool(used) and pair.fingerprint in used


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


def _check_files(family: Family, handles: Mapping[str, AdapterHandle | Path | str]) -> None:
    """Raises UserError before the first picture is drawn, rather than between them."""
    from spf_kit.adapters import files
    from spf_kit.adapters.fit import fit

    for handle in handles.values():
        if isinstance(handle, str | Path):
            lora = files.read(handle)
            files.check_family(lora, family)
            fit(lora, family)


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
