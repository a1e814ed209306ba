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


@pytest.fixture(autouse=True)
def drawing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """render.py, which the scripts read caches with, draws with packages that only the build needs."""
    for name in ("python_avatars", "resvg_py"):
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name, type(sys)(name)))


def test_a_number_of_steps_makes_the_same_unet(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_noise_weighed_is_the_error_of_v_prediction() -> None:
    """v = sqrt(a) eps - sqrt(1 - a) x0, from two noise predictions for the same noisy latents, in float64."""
    from diffusers import DDPMScheduler

    from spf_kit.embedded.build.unet import noise_weights

    scheduler = DDPMScheduler.from_pretrained(embedded.base_path() / "scheduler")
    weights = noise_weights(scheduler)
    assert weights.mean().item() == pytest.approx(1.0, rel=1e-5)
    source = torch.Generator().manual_seed(0)
    noisy, one, two = torch.randn(3, 4, 16, 16, dtype=torch.float64, generator=source)
    ratios = []
    for t in (0, 300, 800, 999):
        a = scheduler.alphas_cumprod[t].double()

        def velocity(eps: torch.Tensor, a: torch.Tensor = a) -> torch.Tensor:
            x0 = (noisy - (1 - a).sqrt() * eps) / a.sqrt()
            return a.sqrt() * eps - (1 - a).sqrt() * x0

        error = (velocity(one) - velocity(two)).square().mean()
        ratios.append((error / (weights[t].double() * (one - two).square().mean())).item())
    assert ratios == pytest.approx([ratios[0]] * 4, rel=1e-4)


def test_exchanged_colours_are_captions_of_the_other_portrait() -> None:
    rng, seen = random.Random(0), 0
    for _ in range(300):
        portrait = at.draw_uniform(rng)
        other = at.swapped(portrait, at.GROUPS)
        assert at.swapped(portrait, ["skin", "hair", "mouth"]) is None  # the clothes are not named
        hair, clothes = portrait["hair_color"], portrait["clothing_color"]
        if other is None:
            hidden = portrait["headwear"] != "none"
            assert hidden or hair == clothes or hair in ("blonde", "gray") or clothes in ("green", "yellow")
            continue
        seen += 1
        assert {key for key in portrait if other[key] != portrait[key]} == {"hair_color", "clothing_color"}
        assert (other["hair_color"], other["clothing_color"]) == (clothes, hair)
    assert seen > 30


def test_each_phrase_is_read_off_its_own_last_token() -> None:
    """A reader that is right at these tokens, and at no other, has no loss."""
    from transformers import CLIPTokenizer

    from spf_kit.embedded.build import clip

    tokenizer = CLIPTokenizer.from_pretrained(embedded.base_path() / "tokenizer")
    rng = random.Random(1)
    portraits = [at.draw_uniform(rng) for _ in range(20)]
    texts, _, order = clip.captions(portraits, rng)
    ids = tokenizer(texts[:20], padding=True, return_tensors="pt").input_ids
    ends = clip.phrase_ends(ids, tokenizer.convert_tokens_to_ids(",</w>"), tokenizer.eos_token_id)
    label = clip.labels(portraits)
    states = torch.zeros(20, ids.shape[1], len(clip.CLASSES))
    for row, (text, positions, groups) in enumerate(zip(texts[:20], ends, order, strict=True)):
        phrases = text.split(", ")[1:]
        assert len(phrases) == len(positions) == len(groups)
        for phrase, position, group in zip(phrases, positions, groups, strict=True):
            assert phrase.endswith(tokenizer.decode(ids[row, position]).strip())
            for number, (attribute, value) in enumerate(clip.CLASSES):
                named = at.GROUP_OF.get(attribute, attribute) == group
                states[row, position, number] = 50.0 if named and portraits[row][attribute] == value else 0.0
    reader = torch.nn.Identity()
    assert clip.phrase_loss(states, reader, ends, order, label).item() < 1e-6
    shifted = [[position - 1 for position in positions] for positions in ends]
    assert clip.phrase_loss(states, reader, shifted, order, label).item() > 1


# --- what makes the judge steady --------------------------------------------------------------------------


def test_twins_differ_in_one_preset_attribute() -> None:
    rng, seen = random.Random(0), set()
    for _ in range(200):
        one, other = at.draw_twins(rng)
        (name,) = [name for name in one if one[name] != other[name]]
        seen.add(name)
    assert seen == set(at.PRESET)


def test_twins_are_held_together_where_both_can_be_seen() -> None:
    from spf_kit.embedded.build import judge

    one = dict.fromkeys(at.ATTRIBUTES, "none") | {name: values[0] for name, values in at.COMMON.items()}
    twins = [one, {**one, "headwear": "winter hat"}]
    label, mask = judge.labels(twins), judge.mask_of(twins)
    logits = torch.randn(2, sum(judge.SIZES), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected, first = [], 0
    for name, size in zip(at.ATTRIBUTES, judge.SIZES, strict=True):
        p, q = (row[first : first + size].exp() / row[first : first + size].exp().sum() for row in logits)
        first += size
        if name not in ("headwear", "hair_style", "hair_color"):  # the hat itself, and what it hides
            expected.append(((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2)
    found = judge.apart(logits, label, mask)
    assert found.item() == pytest.approx(sum(map(float, expected)) / len(expected), rel=1e-6)
    assert judge.apart(logits[:1].repeat(2, 1), label, mask) == 0


def test_twins_get_the_same_faults() -> None:
    from spf_kit.embedded.build import judge

    torch.manual_seed(0)
    pictures = torch.rand(4, 3, 64, 64) * 2 - 1
    x = judge.twice(pictures.repeat_interleave(2, 0), None)
    assert torch.equal(x[::2], x[1::2])
    assert not torch.equal(x[::2], pictures)


def test_prompts_of_drawn_pictures_leave_open_what_the_base_may_not_draw() -> None:
    from spf_kit.embedded.build.drawn import prompts
    from spf_kit.embedded.judge import COVERED

    reported = {frozenset(p.split(", ")) for name in ("tune", "evaluate") for p in embedded.prompts(name)}
    asked = 0
    for text, portrait in prompts(100, random.Random(0)):
        named = at.parse(text)
        target = next((target for target in at.TARGETS if text.endswith(target)), None)
        asked += target is not None
        unknown = {at.TARGETS[target][0], *COVERED[target]} if target else set()
        assert set(portrait) == set(at.ATTRIBUTES) - unknown
        assert all(portrait[name] == named.get(name, "none") for name in portrait)
        assert frozenset(text.split(", ")) - {target} not in reported
    assert asked == 50
