"""The base's own way out of noise: against diffusers' DDIM, and in real steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from spf_kit import families, schema
from spf_kit.adapters.inject import AdapterHandle
from spf_kit.data.dataset import Batch, Dataset
from spf_kit.discovery import available
from spf_kit.families.base import Family
from spf_kit.families.noise import NoiseProcess
from spf_kit.training.step import Draws, Model, Noised, noised, run_step
from spf_kit.training.walks import POOL, Walks

SHIPPED = available()
SIZE = (4, 8, 4)


def batch_of(*timesteps: float, size: tuple[int, ...] = SIZE, seed: int = 0, flow: bool = False) -> Noised:
    g = torch.Generator().manual_seed(seed)
    latents, noise, noisy, target = (torch.randn(len(timesteps), *size, generator=g) for _ in range(4))
    t = torch.tensor(timesteps, dtype=torch.float32 if flow else torch.int64)
    return Noised(latents, noise, noisy, t, target, torch.zeros(len(timesteps)))


def epsilon(prediction_type: str = "epsilon") -> NoiseProcess:
    return NoiseProcess(prediction_type, torch.linspace(0.999, 0.005, 1000).double())  # type: ignore[arg-type]


def predicted(noisy: Tensor, t: Tensor) -> Tensor:
    """Something that depends on what a model is given."""
    return torch.tanh(noisy * (1 + t.view(-1, 1, 1, 1) / 1000)) + 0.1


# --- the steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_walk_takes_the_steps_of_ddim(prediction_type: str) -> None:
    """With every stride 100, beside diffusers' scheduler on the same timesteps."""
    process = epsilon(prediction_type)
    scheduler = DDIMScheduler(
        trained_betas=_betas(process.alphas_cumprod), prediction_type=prediction_type, clip_sample=False,
        set_alpha_to_one=False, timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(10)
    walks, expected = Walks(process), batch_of(0).noise[0]
    first = batch_of(499)  # twice (499 + 1) / 10 is a stride of 100
    for t in scheduler.timesteps:
        placed, texts = walks.place(first, ["a man"], steps=10)
        assert texts == ["a man"]
        assert placed.timesteps.tolist() == [int(t)]
        torch.testing.assert_close(placed.noisy_latents[0], expected, rtol=1e-4, atol=1e-5)
        prediction = predicted(placed.noisy_latents, placed.timesteps)
        expected = scheduler.step(prediction[0], t, expected).prev_sample
        walks.advance(prediction)
        for walk in walks.waiting[:]:  # at once, without waiting for the pool to fill
            assert len(walks.waiting) == 1
            walks._next = lambda size, walk=walk: walks.waiting.pop()  # type: ignore[method-assign]
    assert not walks.waiting, "below 0 a walk has ended"


def _betas(alphas_cumprod: Tensor) -> Tensor:
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    return 1 - alphas_cumprod / before


def test_a_flow_walks_straight() -> None:
    """z_t' = z_t + (sigma' - sigma) v, Euler's step."""
    walks = Walks(NoiseProcess("flow"))
    batch = batch_of(124.0, flow=True)
    placed, _ = walks.place(batch, ["x"], steps=10)
    t = float(placed.timesteps)
    velocity = torch.full_like(placed.noisy_latents, 0.3)
    walks.advance(velocity)
    expected = batch.noise + (float(walks.waiting[0].timestep) - t) / 1000 * 0.3
    assert float(walks.waiting[0].timestep) == pytest.approx(t - 25, abs=1e-3)
    torch.testing.assert_close(walks.waiting[0].noisy[None], expected, rtol=1e-4, atol=1e-5)


def test_strides_cover_the_schedule_evenly() -> None:
    """Walks of 10 steps on average, and every noise level visited about as often."""
    walks, visited, starts = Walks(epsilon()), [], 0
    g = torch.Generator().manual_seed(0)
    for number in range(1500):
        drawn = torch.randint(0, 1000, (2,), generator=g).tolist()
        placed, _ = walks.place(batch_of(*drawn, seed=number), ["a", "b"], steps=10)
        starts += sum(t == 999 for t in placed.timesteps.tolist())
        visited += placed.timesteps.tolist()
        walks.advance(torch.zeros_like(placed.noisy_latents))
    assert len(visited) / starts == pytest.approx(10.5, rel=0.1)
    inner = torch.histc(torch.tensor([float(t) for t in visited if t < 999]), 5, 0, 999) / len(visited)
    assert inner.min() > 0.7 * inner.max()


# --- the pool ---------------------------------------------------------------------------------------------


def test_only_plain_samples_are_replaced() -> None:
    walks, batch = Walks(epsilon()), batch_of(10, 200, 700)
    placed, texts = walks.place(batch, [None, "a man", None], steps=10)
    for row in (0, 2):
        assert torch.equal(placed.noisy_latents[row], batch.noisy_latents[row])
        assert placed.timesteps[row] == batch.timesteps[row]
    assert torch.equal(placed.noisy_latents[1], batch.noise[1])
    assert texts == [None, "a man", None]
    assert placed.timesteps[1] == 999


def test_a_full_pool_takes_turns_and_keeps_its_texts() -> None:
    walks = Walks(epsilon())
    for number in range(POOL):
        placed, _ = walks.place(batch_of(0, seed=number), [f"text {number}"], steps=10)
        walks.advance(torch.zeros_like(placed.noisy_latents))
    told = []
    for _ in range(2 * POOL):
        placed, texts = walks.place(batch_of(0), ["another"], steps=10)
        told += texts
        walks.advance(torch.zeros_like(placed.noisy_latents))
    assert told == [f"text {number}" for number in range(POOL)] * 2


def test_a_walk_goes_on_at_its_own_size() -> None:
    walks, other = Walks(epsilon()), (4, 4, 8)
    for number in range(3 * POOL):
        size = other if number % 3 else SIZE
        placed, _ = walks.place(batch_of(5, size=size, seed=number), ["x"], steps=10)
        assert placed.noisy_latents.shape[1:] == size
        walks.advance(torch.zeros_like(placed.noisy_latents))
        assert len(walks.waiting) <= POOL


def test_a_checkpoint_holds_the_walks() -> None:
    one, two = Walks(epsilon()), Walks(epsilon())
    for number in range(2 * POOL):
        placed, _ = one.place(batch_of(300, 20, seed=number), ["a", ""], steps=10)
        one.advance(predicted(placed.noisy_latents, placed.timesteps))
    two.load_state_dict(one.state_dict())
    for number in range(POOL):
        batch = batch_of(300, 20, seed=100 + number)
        (left, a), (right, b) = (w.place(batch, ["c", "d"], steps=10) for w in (one, two))
        assert torch.equal(left.noisy_latents, right.noisy_latents)
        assert torch.equal(left.timesteps, right.timesteps)
        assert a == b
        for walks, placed in ((one, left), (two, right)):
            walks.advance(predicted(placed.noisy_latents, placed.timesteps))


# --- in a step --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family() -> Family:
    return families.load(schema.Base(model="embedded"))


@pytest.fixture(scope="module")
def batch(family: Family, pictures: Path) -> Batch:
    data = schema.Data(path=str(pictures), resolution=32, buckets=False)
    return Dataset.prepare(data, "wearing glasses", family).batch(0, 0, 2)


@pytest.fixture
def handle(family: Family) -> Iterator[AdapterHandle]:
    found = AdapterHandle.inject(family, schema.Adapter(rank=3), name="walking", seed=1)
    yield found
    found.remove()


def test_the_base_walks_and_the_adapter_is_held_there(
    family: Family, handle: AdapterHandle, batch: Batch
) -> None:
    """Exactly nothing for an adapter without effect; z_T at first, and the base's own DDIM step after it."""
    seen: list[tuple[bool, Tensor, Tensor]] = []
    hook = family.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((handle.enabled, args[0].clone(), args[1].clone())),
        with_kwargs=True,
    )
    model, walks = Model(family, handle, family.encode_text), Walks(family.noise)
    plugins = [SHIPPED["denoising"](), SHIPPED["output_preservation"](share=0.5, walk=4)]
    draws = Draws.keyed(batch.mean.shape, 0, "noise", batch.indices)
    rows = replace(
        noised(family.noise, batch, draws, 0.0, torch.device("cpu")), path=torch.tensor([0.9, 0.1])
    )
    outcome = run_step(
        model, rows, batch.captions, batch.sample_ids, plugins, number=1, progress=0.0, walks=walks
    )
    hook.remove()
    assert outcome.terms["output_preservation"].tolist() == [0.0]
    (off, base_z, base_t), (on, z, t) = seen
    assert (off, on) == (False, True)
    assert torch.equal(base_z, z)
    assert torch.equal(base_t, t)
    assert t.tolist() == [int(rows.timesteps[0]), family.noise.num_train_timesteps - 1]
    assert torch.equal(z[0], rows.noisy_latents[0])
    assert torch.equal(z[1], rows.noise[1])

    with torch.no_grad(), handle.disabled():
        eps = family.predict(z, t, family.encode_text([batch.captions[0].base, batch.captions[1].base]))[1:]
    walk = walks.waiting[0]
    scheduler = DDIMScheduler.from_config(family.pipeline().scheduler.config, set_alpha_to_one=False)
    abar, following = scheduler.alphas_cumprod[t[1]], scheduler.alphas_cumprod[walk.timestep]
    x0 = (z[1] - (1 - abar).sqrt() * eps[0]) / abar.sqrt()
    torch.testing.assert_close(
        walk.noisy, following.sqrt() * x0 + (1 - following).sqrt() * eps[0], rtol=1e-3, atol=1e-3
    )
