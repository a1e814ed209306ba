"""The doctor tries things and says in one sentence what is off; nothing stops it."""

from __future__ import annotations

import collections
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from spf_kit import doctor


def test_what_works_here() -> None:
    found = json.loads(json.dumps(doctor.examine(), allow_nan=False))
    assert found["packages"]["torch"] == torch.__version__
    assert found["cores"] >= 1
    assert found["threads"] == torch.get_num_threads()
    assert found["memory"]["total_gib"] > 0
    assert found["bfloat16"].startswith(("works", "emulated"))
    assert found["bitsandbytes"].startswith("8-bit AdamW works")
    assert found["quantized base"].startswith("fp8, 8bit, nf4 work")
    assert found["devices"]
    assert found["disk"]["working folder"]["writable"]
    for problem in found["problems"]:
        assert problem == problem.strip()
        assert "\n" not in problem


class Wrong32Bit:
    """An "8-bit" optimizer that quietly keeps float32."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float) -> None:
        self.state = {p: {"state1": torch.zeros_like(p)} for p in parameters}

    def step(self) -> None:
        pass


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (None, "bitsandbytes' 8-bit optimizers do not work here"),
        (types.SimpleNamespace(optim=types.SimpleNamespace(AdamW8bit=Wrong32Bit)), "float32, not uint8"),
    ],
)
def test_a_library_that_does_not_work_is_found(
    broken: Any, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", broken)
    found = doctor.examine()
    assert found["bitsandbytes"] == found["quantized base"] == "no"
    assert any(sentence in problem for problem in found["problems"])


def fake_xformers(monkeypatch: pytest.MonkeyPatch, attention: Any) -> dict[str, Any]:
    version = doctor.importlib.metadata.version
    monkeypatch.setattr(
        doctor.importlib.metadata, "version", lambda name: "1.0" if name == "xformers" else version(name)
    )
    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return doctor.examine()


def test_xformers_is_compared_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def right(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)

    found = fake_xformers(monkeypatch, right)
    assert found["xformers"].startswith("works on")
    found = fake_xformers(monkeypatch, lambda q, k, v: torch.zeros_like(q))
    assert found["xformers"] == "no"
    assert any("xformers' attention kernels do not work here" in problem for problem in found["problems"])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-thing"))
    found = doctor.examine()
    assert found["packages"]["no-such-thing"] is None
    assert "the package no-such-thing is not installed: pip install no-such-thing" in found["problems"]


def test_a_full_disk_and_a_closed_folder_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "not" / "there" / "yet"))
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**29))
    found = doctor.examine()
    assert found["disk"]["cache"]["free_gib"] == 0.5
    assert any("has only 0.5 GiB left" in problem for problem in found["problems"])
    assert not (tmp_path / "not").exists(), "looking must not make folders"
    monkeypatch.setattr(doctor, "_writable", lambda folder: folder != Path.cwd())
    problems = doctor.examine()["problems"]
    assert any("the working folder" in problem and "cannot be written to" in problem for problem in problems)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which nobody can write")
def test_writing_is_really_tried(tmp_path: Path) -> None:
    assert doctor._writable(tmp_path)
    assert not doctor._writable(Path("/proc/self"))
