"""The scripts that made the embedded base: the same weights from the same seed and number of steps."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spf_kit import embedded
from spf_kit.embedded.build import attributes as at
from spf_kit.embedded.build.common import Budget


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache as render.py writes it, of noise: what it shows does not matter here."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = random.Random(0)
    portraits = [at.draw_rare(rng) for _ in range(12)]
    (folder / "portraits.jsonl").write_text("".join(json.dumps(p) + "\n" for p in portraits))
    np.save(folder / "pictures.npy", np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3), np.uint8))
    return folder


def test_a_number_of_steps_makes_the_same_unet(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # render.py, which the script reads caches with, draws with packages that only the build needs
    for name in ("python_avatars", "resvg_py"):
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name, type(sys)(name)))
    from spf_kit.embedded.build import unet

    weights = []
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        arguments = ["--pictures", pictures, "--base", embedded.base_path(), "--output", tmp_path / name]
        arguments += ["--steps", 2, "--batch", 2, "--threads", 1, "--seed", seed, "--false-words"]
        monkeypatch.setattr(sys, "argv", ["unet", *map(str, arguments)])
        unet.main()
        weights.append(load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors"))
    one, two, other = weights
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_a_budget_of_steps_counts_and_cycles() -> None:
    budget, factors = Budget(minutes=0, steps=100), []
    while budget.share < 1:
        factors.append(budget.factor(warm_up=0.1))
        budget.advance()
    assert len(factors) == 100
    assert max(factors) == factors[10] == pytest.approx(1.0)
    assert factors[5] == pytest.approx(0.5)
    assert factors[55] == pytest.approx(0.505)
    assert factors[99] < 0.02


def test_a_budget_of_minutes_ends() -> None:
    budget = Budget(minutes=0.002)
    while budget.share < 1:
        sum(range(10000))
        budget.advance()
    assert budget.spent >= 0.12
