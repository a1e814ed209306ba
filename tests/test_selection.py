"""Selection by budget: the measurement against plain formulas, the choice, and what a run keeps of it."""

from __future__ import annotations

import json
import random
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from spf_kit import config, embedded, families, schema
from spf_kit.adapters.inject import AdapterHandle
from spf_kit.config import Resolved
from spf_kit.data.dataset import Dataset
from spf_kit.data.random import randn
from spf_kit.errors import TrainingDiverged, UserError
from spf_kit.families.base import Family
from spf_kit.families.noise import NoiseProcess
from spf_kit.families.sd15 import SD15Family
from spf_kit.measure.drift import LEVELS as EVALUATED
from spf_kit.training import checkpoint, trainer
from spf_kit.training.drift import LEVELS, ROWS, Probe
from spf_kit.training.selection import Measurement, Selected, Selection, best, merit
from spf_kit.training.step import Model
from spf_kit.training.text import TextCache

STEPS = 12
SMALL = [
    "data.resolution=32", "data.buckets=false", f"train.steps={STEPS}", "train.batch_size=2",
    "preview.every=0", "train.checkpoint_every=0", "train.log_tensorboard=false", "adapter.rank=2",
    "train.threads=1", 'output.dtype="float32"', "adapter.dropout=0.2", "train.schedule=constant",
    "train.learning_rate=0.01",
]  # fmt: skip


@pytest.fixture(scope="module")
def resolve(pictures: Path) -> Callable[..., Resolved]:
    def load(*sets: str, recipe: str = "naive") -> Resolved:
        return config.load("glasses", data=pictures, recipe=recipe, sets=[*SMALL, *sets])

    return load


@pytest.fixture(scope="module")
def family() -> Family:
    torch.set_num_threads(1)
    return families.load(schema.Base(model="embedded"))


@pytest.fixture(scope="module")
def dataset(family: Family, pictures: Path) -> Dataset:
    return Dataset.prepare(
        schema.Data(path=str(pictures), resolution=32, buckets=False), "wearing glasses", family
    )


@pytest.fixture
def handle(family: Family) -> Iterator[AdapterHandle]:
    """A new adapter, with dropout, in training mode; on the text encoder too."""
    adapter = schema.Adapter(rank=2, dropout=0.5, targets=["cross-attention", "text-encoder"])
    handle = AdapterHandle.inject(family, adapter, seed=1)
    family.unet.train()
    family.text_encoder.train()
    yield handle
    handle.remove()
    family.freeze()


def trained(handle: AdapterHandle) -> None:
    g = torch.Generator().manual_seed(0)
    for name, parameter in handle.named_parameters():
        if name.endswith(".up"):
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=g))


# --- the measurement --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_new_adapter_scores_exactly_zero(
    family: Family, handle: AdapterHandle, dataset: Dataset, batch_size: int
) -> None:
    probe = Probe(Model(family, handle, family.encode_text), dataset, batch_size)
    assert probe.measure() == (0, 0, 0)
    trained(handle)
    assert all(value != 0 for value in probe.measure())


def by_hand(family: Family, handle: AdapterHandle, dataset: Dataset) -> tuple[float, float, float]:
    """The three numbers in float64, one row at a time, from diffusers' UNet and transformers' encoder."""

    def predict(z: Tensor, t: int, text: str) -> Tensor:
        tokens = family.tokenizer([text], padding="max_length", max_length=77, return_tensors="pt")
        states = family.text_encoder(tokens.input_ids).last_hidden_state
        return family.unet(z, torch.tensor([t]), states).sample.double()

    drifts: dict[str, list[float]] = {"plain": [], "full": []}
    errors: dict[int, list[tuple[float, float]]] = {}
    for i, number in enumerate([0, 0, 0, 1, 1, 1, 2, 2]):  # eight rows over three pictures
        entry = dataset.entries[number]
        t = (125, 375, 625, 875)[i % 4]
        latents = dataset._cache._kept[_only_key(dataset, number)].mean[None]
        eps = randn(latents.shape[1:], 0, "selection", entry.picture.sample_id, i)[None]
        abar = family.noise.alphas_cumprod[t]
        z = abar.sqrt() * latents + (1 - abar).sqrt() * eps
        texts = {"plain": entry.caption.base, "full": f"{entry.caption.base}, wearing glasses"}
        for kind, text in texts.items():
            handle.on()
            on = predict(z, t, text)
            handle.off()
            off = predict(z, t, text)
            handle.on()
            drifts[kind].append(float(((on - off) ** 2).sum() / (off**2).sum()))
        errors.setdefault(t, []).append((float(((eps - on) ** 2).sum()), float(((eps - off) ** 2).sum())))
    learnt = [1 - sum(a for a, _ in rows) / sum(b for _, b in rows) for rows in errors.values()]
    return sum(drifts["plain"]) / 8, sum(drifts["full"]) / 8, sum(learnt) / 4


def _only_key(dataset: Dataset, number: int) -> str:
    return list(dataset._cache._kept)[number]


def test_the_numbers_equal_their_formulas(family: Family, handle: AdapterHandle, dataset: Dataset) -> None:
    assert len(dataset._cache._kept) == 3
    probe = Probe(Model(family, handle, family.encode_text), dataset, 3)
    trained(handle)
    found = probe.measure()
    assert family.unet.training
    assert family.text_encoder.training
    assert handle.enabled
    family.unet.eval()
    family.text_encoder.eval()
    with torch.no_grad():
        expected = by_hand(family, handle, dataset)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[0] != pytest.approx(found[1], rel=1e-3)  # c_base and c_full are told apart
    assert probe.measure() == found  # dropout is off, nothing is drawn


def test_learnt_is_one_where_the_prediction_is_perfect(
    family: Family, handle: AdapterHandle, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = Probe(Model(family, handle, family.encode_text), dataset, ROWS)
    rows = probe.batches[0]
    answers = iter([rows.base_plain, rows.target])
    monkeypatch.setattr(Model, "predict", lambda *_: next(answers))
    drift_plain, drift_target, learnt = probe.measure()
    assert (drift_plain, learnt) == (0, 1)
    assert drift_target > 0


def test_learnt_is_the_same_for_eps_and_v(family: Family, handle: AdapterHandle, dataset: Dataset) -> None:
    """A model that says v where this one says eps predicts the same pictures."""
    trained(handle)
    eps = Probe(Model(family, handle, family.encode_text), dataset, 4).measure()
    abar = family.noise.alphas_cumprod
    as_v = NoiseProcess("v_prediction", abar)

    class Velocity:
        """v = (eps - s z) / a, from z = a x + s eps and v = a eps - s x."""

        noise, device = as_v, family.device
        components = family.components

        def predict(self, z: Tensor, t: Tensor, condition: Any) -> Tensor:
            a = abar[t].sqrt().view(-1, 1, 1, 1)
            s = (1 - abar[t]).sqrt().view(-1, 1, 1, 1)
            return (family.predict(z, t, condition) - s * z) / a

    v = Probe(Model(Velocity(), handle, family.encode_text), dataset, 4).measure()  # type: ignore[arg-type]
    assert v[2] == pytest.approx(eps[2], rel=1e-3)
    assert v[1] != pytest.approx(eps[1], rel=1e-2)


def test_rows_cover_every_level_and_size(family: Family, handle: AdapterHandle, tmp_path: Path) -> None:
    """Eight rows, two a level, spread over the pictures; no batch mixes sizes or is larger than asked."""
    assert LEVELS == EVALUATED
    for number, picture in enumerate(sorted(embedded.data_path("glasses").glob("*.png"))[:16]):
        from PIL import Image

        size = (80, 48) if number >= 8 else (64, 64)
        Image.open(picture).resize(size).save(tmp_path / picture.name)
        (tmp_path / picture.name).with_suffix(".txt").write_text(f"portrait {number:02}")
    data = Dataset.prepare(
        schema.Data(path=str(tmp_path), resolution=64, bucket_step=16), "wearing glasses", family
    )
    probe = Probe(Model(family, handle, family.encode_text), data, 3)
    assert [len(rows.plain) for rows in probe.batches] == [3, 1, 3, 1]
    assert [text for rows in probe.batches for text in rows.plain] == [
        f"portrait {i:02}" for i in range(0, 16, 2)
    ]
    assert len({tuple(rows.noisy_latents.shape[2:]) for rows in probe.batches}) == 2
    levels = torch.cat([rows.levels for rows in probe.batches]).tolist()
    assert sorted(levels) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert probe.measure() == (0, 0, 0)


def test_no_encoder_is_asked(family: Family, handle: AdapterHandle, dataset: Dataset) -> None:
    """With kept latents and embeddings the encoders may be gone."""
    cache = TextCache(family.encode_text, dataset.texts() or set(), family.device)
    bare = types.SimpleNamespace(
        noise=family.noise, device=family.device, predict=family.predict,
        components=lambda: {"unet": family.unet},
    )  # fmt: skip
    probe = Probe(Model(bare, handle, cache), dataset, 4)  # type: ignore[arg-type]
    assert probe.measure() == (0, 0, 0)


# --- the choice -------------------------------------------------------------------------------------------


def curve(*rows: tuple[int, float, float, float]) -> list[Measurement]:
    return [Measurement(*row) for row in rows]


CURVES = [
    # more learnt within the budget wins; what drifted further does not count
    (curve((10, 0.01, 0.02, 0.1), (20, 0.02, 0.03, 0.2), (30, 0.03, 0.06, 0.3)), 0.05, 20),
    # either drift alone is bounded
    (curve((10, 0.01, 0.02, 0.1), (20, 0.09, 0.03, 0.2), (30, 0.01, 0.09, 0.3)), 0.05, 10),
    # a drift of just the budget is within it
    (curve((10, 0.01, 0.02, 0.1), (20, 0.05, 0.05, 0.2)), 0.05, 20),
    # back within the budget late
    (curve((10, 0.01, 0.02, 0.1), (20, 0.06, 0.06, 0.3), (30, 0.03, 0.04, 0.2)), 0.05, 30),
    # equal: less drift, then the earlier
    (curve((10, 0.03, 0.03, 0.2), (20, 0.02, 0.02, 0.2), (30, 0.01, 0.04, 0.2)), 0.05, 20),
    (curve((20, 0.02, 0.02, 0.2), (10, 0.02, 0.02, 0.2), (30, 0.02, 0.02, 0.2)), 0.05, 10),
    # none within: the least drift, whatever was learnt; of equals more learnt, then the earlier
    (curve((10, 0.2, 0.1, 0.1), (20, 0.1, 0.15, 0.05), (30, 0.3, 0.1, 0.9)), 0.05, 20),
    (curve((10, 0.1, 0.1, 0.1), (20, 0.1, 0.1, 0.3), (30, 0.1, 0.1, 0.3)), 0.05, 20),
    # worse than the base is still the best there is
    (curve((10, 0.01, 0.01, -0.2), (20, 0.01, 0.01, -0.1), (30, 0.9, 0.9, 0.5)), 0.05, 20),
    (curve((7, 1.0, 1.0, 0.0)), 0.05, 7),
]


@pytest.mark.parametrize(("measured", "budget", "step"), CURVES)
def test_the_choice(measured: list[Measurement], budget: float, step: int) -> None:
    assert best(measured, budget).step == step


def test_the_choice_does_not_depend_on_the_order() -> None:
    """So that remembering the best so far, as a run does, is as good as the whole curve."""
    source = random.Random(0)
    for _ in range(200):
        steps = source.sample(range(100), 6)
        rows = [Measurement(n, *(source.choice([0.0, 0.1, 0.2, 0.3]) for _ in range(3))) for n in steps]
        budget = source.choice([0.05, 0.1, 0.25])
        so_far = rows[0]
        for row in rows[1:]:
            so_far = best([so_far, row], budget)
        assert so_far == best(rows, budget) == best(rows[::-1], budget)
        assert len({merit(row, budget) for row in rows}) == len(rows)


def test_the_choice_is_told() -> None:
    near, far = Measurement(4, 0.01, 0.02, 0.1), Measurement(8, 0.3, 0.4, 0.5)
    chosen = Selected("budget", 0.05, near, far)
    assert chosen.within
    assert chosen.as_dict() == {
        "select": "budget", "step": 4, "drift_budget": 0.05, "within_budget": True,
        "best": {"step": 4, "drift_plain": 0.01, "drift_target": 0.02, "learnt": 0.1},
        "last": {"step": 8, "drift_plain": 0.3, "drift_target": 0.4, "learnt": 0.5},
    }  # fmt: skip
    assert "step 4 (learnt 0.1000, drift 0.0100 plain and 0.0200 with the target)" in chosen.sentence()
    assert "the LoRA holds step 4" in chosen.sentence()
    only_told = Selected("last", 0.05, near, far)
    assert only_told.as_dict()["step"] == 8
    assert "best within train.drift_budget = 0.05: step 4" in only_told.sentence()
    assert "the LoRA holds step 8" in only_told.sentence()
    none = Selected("budget", 0.001, near, far)
    assert not none.within
    assert none.as_dict()["within_budget"] is False
    assert (
        "no measured step stayed within train.drift_budget = 0.001; step 4 drifted least" in none.sentence()
    )
    assert Selected("last", None, None, far).as_dict()["within_budget"] is None


# --- the preset -------------------------------------------------------------------------------------------


def test_a_budget_needs_measurements_and_a_number(resolve: Callable[..., Resolved]) -> None:
    with pytest.raises(UserError) as caught:
        resolve("train.select=budget")
    assert 'train.select = "budget" needs train.drift_budget' in str(caught.value)
    assert 'train.select = "budget" needs train.drift_every' in str(caught.value)
    with pytest.raises(UserError, match=r"needs train\.drift_every") as caught:
        resolve("train.select=budget", "train.drift_budget=0.1")
    assert "needs train.drift_budget" not in str(caught.value)
    with pytest.raises(UserError, match="drift_budget"):
        resolve("train.select=budget", "train.drift_every=2", "train.drift_budget=0")
    assert not resolve("train.select=budget", "train.drift_every=2", "train.drift_budget=0.1").warnings
    (idle,) = resolve("train.drift_budget=0.1").warnings
    assert "train.drift_budget has no effect while train.drift_every = 0" in idle
    (late,) = resolve("train.select=budget", "train.drift_every=12", "train.drift_budget=0.1").warnings
    assert "train.select has no effect because train.drift_every = 12 leaves only the last step" in late


# --- runs -------------------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every pass through the UNet."""
    calls: list[int] = []
    predict = SD15Family.predict
    monkeypatch.setattr(
        SD15Family, "predict", lambda self, z, *rest: calls.append(len(z)) or predict(self, z, *rest)
    )
    return calls


def lines(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def measured(run: Path) -> list[Measurement]:
    return [
        Measurement(row["step"], row["drift_plain"], row["drift_target"], row["learnt"])
        for row in lines(run)
        if "learnt" in row
    ]


def selection_of(lora: Path) -> dict[str, Any]:
    with safe_open(lora, "pt") as file:
        return json.loads(file.metadata()["spf_kit.selection"])


def as_kohya(adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's names, `unet.<module>.down`, as a LoRA file spells them."""
    parts = {"down": "lora_down.weight", "up": "lora_up.weight"}
    named = {}
    for name, value in adapter.items():
        module, part = name.removeprefix("unet.").rsplit(".", 1)
        named[f"lora_unet_{module.replace('.', '_')}.{parts[part]}"] = value
    return named


def holds(lora: Path, adapter: dict[str, Tensor]) -> bool:
    found = {name: value for name, value in load_file(lora).items() if not name.endswith(".alpha")}
    wanted = as_kohya(adapter)
    assert found.keys() == wanted.keys()
    return all(torch.equal(found[name], wanted[name]) for name in wanted)


@dataclass(frozen=True)
class Whole:
    """A run that is measured at every third step, with the average that it would save after each step."""

    path: Path
    averages: dict[int, dict[str, Tensor]]
    rows: list[Measurement]


@pytest.fixture(scope="module")
def straight(resolve: Callable[..., Resolved], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    run = tmp_path_factory.mktemp("runs") / "straight"
    every = ["train.drift_every=3", "train.checkpoint_every=1", "train.keep_checkpoints=99"]
    result = trainer.train(resolve(*every, "train.ema=0.5"), run)
    names = [name for name, _ in result.handle.named_parameters()]
    averages = {}
    for step in checkpoint.steps(run / "checkpoints"):
        saved = checkpoint.load(checkpoint.path_of(run / "checkpoints", step))
        averages[step] = dict(zip(names, saved.updater["ema"]["values"], strict=True))
    assert list(averages) == list(range(1, STEPS + 1))
    return Whole(run, averages, measured(run))


@pytest.fixture(scope="module")
def budget(straight: Whole) -> float:
    """Within which the second of four measured steps is the best."""
    assert [row.step for row in straight.rows] == [3, 6, 9, 12]
    found = straight.rows[1].drift
    assert best(straight.rows, found).step == 6
    return found


CHOOSE = ["train.drift_every=3", "train.ema=0.5", "train.select=budget"]


def test_off_by_default_costs_nothing(
    resolve: Callable[..., Resolved], tmp_path: Path, passes: list[int]
) -> None:
    result = trainer.train(resolve("train.steps=4"), tmp_path / "off")
    assert sorted(passes) == [1, 1, 2, 2]  # three pictures, two in a batch
    assert result.selected is None
    assert not measured(tmp_path / "off")
    with safe_open(result.lora, "pt") as file:
        assert "spf_kit.selection" not in file.metadata()
    passes.clear()
    resolved = resolve("train.steps=4", "train.drift_every=3")
    trainer.train(resolved, tmp_path / "on")
    measuring = 2 * (ROWS // 2)  # two prompts, batches of the training's size
    assert len(passes) == measuring + 4 + 2 * measuring  # the base once; after steps 3 and 4
    assert set(passes) <= {1, 2}


def test_measuring_changes_nothing(straight: Whole, resolve: Callable[..., Resolved], tmp_path: Path) -> None:
    result = trainer.train(resolve("train.ema=0.5"), tmp_path / "run")
    assert holds(straight.path / "glasses.safetensors", result.handle.state_dict())
    assert [{**row, "drift_plain": 0, "drift_target": 0, "learnt": 0} for row in lines(tmp_path / "run")] == [
        {**row, "drift_plain": 0, "drift_target": 0, "learnt": 0} for row in lines(straight.path)
    ]


def test_the_file_holds_the_weights_of_the_reported_step(
    straight: Whole, budget: float, resolve: Callable[..., Resolved], tmp_path: Path
) -> None:
    result = trainer.train(resolve(*CHOOSE, f"train.drift_budget={budget!r}"), tmp_path / "run")
    rows = measured(tmp_path / "run")
    assert rows == straight.rows
    wanted = best(rows, budget)
    assert result.selected is not None
    assert (result.selected.best, result.selected.last) == (wanted, rows[-1])
    assert result.steps == STEPS
    assert holds(result.lora, straight.averages[wanted.step])
    assert holds(result.lora, result.handle.state_dict())
    assert not holds(result.lora, straight.averages[STEPS])
    told = selection_of(result.lora)
    assert (told["select"], told["step"], told["within_budget"]) == ("budget", wanted.step, True)
    assert told["best"]["learnt"] == wanted.learnt
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [STEPS]  # none of the chosen step


def test_the_numbers_are_of_the_weights_that_are_saved(
    straight: Whole, family: Family, dataset: Dataset
) -> None:
    """The average, not the weights in training."""
    adapter = schema.Adapter(rank=2, targets=config.load("glasses").config.adapter.targets)
    fresh = AdapterHandle.inject(family, adapter, name="fresh")
    probe = Probe(Model(family, fresh, family.encode_text), dataset, 2)
    saved = checkpoint.load(checkpoint.path_of(straight.path / "checkpoints", 6))
    found = []
    for weights in (straight.averages[6], saved.adapter):
        fresh.load_state_dict(weights)
        found.append(probe.measure())
    fresh.remove()
    (row,) = [row for row in straight.rows if row.step == 6]
    numbers = (row.drift_plain, row.drift_target, row.learnt)
    assert found[0] == pytest.approx(numbers, rel=1e-4)
    assert found[1] != pytest.approx(numbers, rel=1e-2)


def test_without_select_the_best_step_is_only_told(
    straight: Whole, budget: float, resolve: Callable[..., Resolved], tmp_path: Path
) -> None:
    sets = ["train.drift_every=3", "train.ema=0.5", f"train.drift_budget={budget!r}"]
    result = trainer.train(resolve(*sets), tmp_path / "run")
    assert holds(result.lora, straight.averages[STEPS])
    told = selection_of(result.lora)
    assert told["step"] == STEPS
    assert told["best"]["step"] == best(straight.rows, budget).step
    saved = checkpoint.load(tmp_path / "run" / "checkpoints" / f"step-{STEPS:06d}")
    assert saved.selection["weights"] == {}


def test_none_within_the_budget_keeps_the_least_drift(
    straight: Whole, spf_kit: Callable[..., Any], pictures: Path
) -> None:
    """By the command: the result as JSON, the warning as one line."""
    sets = [*SMALL, *CHOOSE, "train.drift_budget=1e-12", "evaluate.enabled=false"]
    options = [part for text in sets for part in ("--set", text)]
    result = spf_kit(
        "train", "glasses", "--recipe", "naive", "--data", pictures, "--output", "run", "--json", *options
    )
    assert result.code == 0
    least = min(straight.rows, key=lambda row: row.drift)
    told = result.json["selection"]
    assert (told["step"], told["within_budget"]) == (least.step, False)
    assert holds(Path(result.json["lora"]), straight.averages[least.step])
    (warning,) = [line for line in result.err.splitlines() if line.startswith("warning:")]
    assert f"drifted least (learnt {least.learnt:.4f}" in warning
    inspected = spf_kit("inspect", result.json["lora"], "--json").json
    assert inspected["selection"] == told


class Killed(BaseException):
    """Ends a run like a power cut: nothing is saved on the way out."""


def test_a_resumed_run_chooses_the_same(
    straight: Whole, budget: float, resolve: Callable[..., Resolved], tmp_path: Path
) -> None:
    """The best step, 6, lies before the cut and at no checkpoint's step."""
    resolved = resolve(*CHOOSE, f"train.drift_budget={budget!r}", "train.checkpoint_every=7")
    place = tmp_path / "run"

    def cut(done: int, total: int, values: Any) -> None:
        if values["phase"] == "training" and done == 10:
            raise Killed

    with pytest.raises(Killed):
        trainer.train(resolved, place, report=cut)
    assert checkpoint.steps(place / "checkpoints")[-1] == 7
    saved = checkpoint.load(checkpoint.path_of(place / "checkpoints", 7))
    assert saved.selection["best"]["step"] == 6
    result = trainer.train(resolved, place, resume=True)
    assert result.selected is not None
    assert result.selected.kept.step == 6
    assert holds(result.lora, straight.averages[6])
    assert measured(place) == straight.rows
    assert lines(place) == lines(straight.path)

    again = trainer.train(resolved, place, resume=True)  # nothing left to do
    assert again.selected == result.selected
    assert holds(again.lora, straight.averages[6])
    other = resolve(*CHOOSE, f"train.drift_budget={2 * budget!r}", "train.checkpoint_every=7")
    with pytest.raises(UserError, match=r"train\.drift_budget was"):  # the kept weights are of the old one
        trainer.train(other, place, resume=True)


def test_a_measurement_that_is_no_number_stops_the_run() -> None:
    train = schema.Train(drift_every=1, drift_budget=0.1, select="budget")
    probe: Any = types.SimpleNamespace(measure=lambda: (0.1, float("nan"), 0.0))
    updater: Any = types.SimpleNamespace(averaged=lambda: torch.no_grad())
    with pytest.raises(TrainingDiverged, match=r"drift_target.* became nan at step 7: lower train"):
        Selection(train, 10, probe, updater).measure(7)
