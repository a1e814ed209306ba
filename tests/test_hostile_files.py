"""Broken and hostile files at every command that reads them: one sentence, exit code 2, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save, save_file
from torch import Tensor

from spf_kit import cli, cli_about, families
from spf_kit.adapters.inspect import inspect
from spf_kit.adapters.merge_plan import open_target
from spf_kit.embedded import base_path
from spf_kit.errors import UserError
from spf_kit.schema import Base

# a layer of the embedded base, 96 to 96
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
FLAT = "lora_unet_" + LAYER.replace(".", "_")
DOTTED = f"base_model.model.{LAYER}"
UP, ALPHA = f"{FLAT}.lora_up.weight", f"{FLAT}.alpha"
SDXL = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
HALF = "\\ud800"  # JSON's spelling of half a UTF-16 pair
NAN, INFINITE = float("nan"), float("inf")
PEFT = {"peft_type": "LORA", "lora_alpha": 2, "r": 2}
Builder = Callable[[Path], Path]  # from an empty folder to the file or folder that a command is given


def kohya(**parts: Tensor) -> dict[str, Tensor]:
    """A layer's tensors; `down`, `up` and `alpha` make a good LoRA if they are not given."""
    names = {"down": "lora_down.weight", "up": "lora_up.weight"}
    return {f"{FLAT}.{names.get(part, part)}": tensor for part, tensor in parts.items()}


def good() -> dict[str, Tensor]:
    return kohya(down=torch.ones(2, 96), up=torch.ones(96, 2), alpha=torch.tensor(2.0))


def tensors(changes: Mapping[str, Tensor] | None = None, **metadata: str) -> Builder:
    def build(folder: Path) -> Path:
        save_file({**good(), **(changes or {})}, folder / "a.safetensors", metadata)
        return folder / "a.safetensors"

    return build


def only(found: Mapping[str, Tensor]) -> Builder:
    def build(folder: Path) -> Path:
        save_file(dict(found), folder / "a.safetensors")
        return folder / "a.safetensors"

    return build


def content(make: bytes | Callable[[bytes], bytes]) -> Builder:
    """A file with these bytes, or with what they make of a good LoRA's."""

    def build(folder: Path) -> Path:
        made = make if isinstance(make, bytes) else make(save(good()))
        (folder / "a.safetensors").write_bytes(made)
        return folder / "a.safetensors"

    return build


def header(make: Callable[[dict[str, Any]], Any]) -> Builder:
    """A good LoRA's bytes under a header that was changed; a text takes its place as it is."""

    def change(data: bytes) -> bytes:
        start = 8 + int.from_bytes(data[:8], "little")
        made = make(json.loads(data[8:start]))
        text = made if isinstance(made, bytes) else json.dumps(made).encode()
        return struct.pack("<Q", len(text)) + text + data[start:]

    return content(change)


def entry(name: str, **changes: Any) -> Builder:
    return header(lambda found: {**found, name: {**found.get(name, {}), **changes}})


def sparse(start: bytes, size: int) -> Builder:
    """A file of `size` bytes that takes no place on the disk."""

    def build(folder: Path) -> Path:
        with open(folder / "a.safetensors", "wb") as file:
            file.write(start)
            file.truncate(size)
        return folder / "a.safetensors"

    return build


def twice(found: dict[str, Any]) -> bytes:
    """A header that names a tensor twice, which JSON's parsers let pass."""
    text = json.dumps(found)
    return f'{text[:-1]}, "{ALPHA}": {json.dumps(found[ALPHA])}}}'.encode()


def peft(config: object = PEFT, found: Mapping[str, Tensor] | bytes | None = None) -> Builder:
    """A peft folder; a config in bytes is written as it is."""
    if found is None:
        found = {f"{DOTTED}.lora_A.weight": torch.ones(2, 96), f"{DOTTED}.lora_B.weight": torch.ones(96, 2)}

    def build(folder: Path) -> Path:
        place = folder / "lora"
        place.mkdir()
        data = found if isinstance(found, bytes) else save(dict(found))
        (place / "adapter_model.safetensors").write_bytes(data)
        text = config if isinstance(config, bytes) else json.dumps(config).encode()
        (place / "adapter_config.json").write_bytes(text)
        return place

    return build


def without(name: str) -> Builder:
    """A good peft folder without one of its files."""

    def build(folder: Path) -> Path:
        place = peft(PEFT)(folder)
        (place / name).unlink()
        return place

    return build


def a_folder(folder: Path) -> Path:
    (folder / "a.safetensors").mkdir()
    return folder / "a.safetensors"


def a_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "a.safetensors")
    return folder / "a.safetensors"


def a_pickle(folder: Path) -> Path:
    torch.save(good(), folder / "a.safetensors")
    return folder / "a.safetensors"


# a file, and the words that its sentence must have beside its name
DAMAGED: dict[str, tuple[Builder, str]] = {
    "missing": (lambda folder: folder / "a.safetensors", "does not exist"),
    "empty": (content(b""), "is empty"),
    "seven bytes": (content(bytes(7)), "is not a .safetensors file"),
    "a folder": (a_folder, "the folder"),
    "a pipe": (a_pipe, "is a pipe or a device"),
    "a pickle": (a_pickle, "is a pickle"),
    "an old pickle": (content(b"\x80\x02}q\x00."), "is a pickle"),
    "a text": (content(b"hello, this is a text file\n"), "is not a .safetensors file"),
    "the end is missing": (content(lambda data: data[:-10]), "ends 10 bytes too early"),
    "the header's end is missing": (content(lambda data: data[:100]), "ends within its header"),
    "bytes behind the end": (content(lambda data: data + b"xx"), "2 bytes too many"),
    "a header of 2^60 bytes": (
        content(lambda data: struct.pack("<Q", 2**60) + data[8:]), "its header claims 1152921504606846976"
    ),
    "a header longer than the file": (
        content(lambda data: struct.pack("<Q", len(data)) + data[8:]), "ends within its header"
    ),
    "a header cut short": (content(lambda data: struct.pack("<Q", 30) + data[8:]), "header is not JSON"),
    "100 MB of metadata": (
        sparse(struct.pack("<Q", 100 * 2**20) + b'{"__metadata__":{"a":"', 101 * 2**20), "claims 104857600"
    ),
    "a header of 4 GB": (sparse(struct.pack("<Q", 2**32 - 99) + b"{", 2**32), "claims 4294967197"),
    "brackets": (header(lambda found: b'{"a":' + b"[" * 10**6), "header is not JSON"),
    "half a pair in a name": (
        header(lambda found: json.dumps(found).replace(ALPHA, HALF).encode()), "is no text"
    ),
    "half a pair in metadata": (
        header(lambda found: {**found, "__metadata__": {"a": "\ud800"}}), "is no text"
    ),
    "overlapping tensors": (entry(UP, data_offsets=[0, 768]), f"{UP!r} overlaps another"),
    "a negative position": (entry(UP, data_offsets=[-8, 760]), f"{UP!r} has an impossible shape or position"),
    "a position beyond the file": (entry(UP, data_offsets=[2**50, 2**50 + 768]), f"{UP!r} overlaps another"),
    "a shape of 2^80": (entry(UP, shape=[2**40, 2**40]), "768 bytes, its shape and type need"),
    "a name twice": (header(twice), "names a tensor twice"),
    "metadata of numbers": (header(lambda found: {**found, "__metadata__": {"a": 1}}), "table of texts"),
    "an alpha that is none": (tensors(kohya(alpha=torch.tensor(NAN))), "has the alpha nan"),
    "four alphas": (tensors(kohya(alpha=torch.ones(4))), "should hold one number"),
    "an unknown tensor": (tensors({"something.else": torch.ones(1)}), "'something.else'"),
    "an unknown part": (tensors({f"{FLAT}.lora_sideways.weight": torch.ones(1)}), "lora_sideways"),
    "half a pair": (only({name: tensor for name, tensor in good().items() if name != UP}), "has no lora_up"),
    "an alpha alone": (only({ALPHA: torch.ones(())}), "has no lora_down and no lora_up"),
    "two ranks": (tensors(kohya(up=torch.ones(96, 3))), "down [2, 96], up [96, 3]"),
    "vectors": (tensors(kohya(up=torch.ones(96), down=torch.ones(96))), "do not fit each other"),
    "whole numbers": (tensors(kohya(up=torch.ones(96, 2, dtype=torch.int32))), "not a floating one"),
    "half a LoHa": (only(kohya(hada_w1_a=torch.ones(96, 2))), "has no hada_w1_b and no hada_w2_a"),
    "a LoKr of nothing": (only(kohya(lokr_w1=torch.ones(0, 7), lokr_w2=torch.ones(2, 2))), "lokr_w1 [0, 7]"),
    "an OFT of one number": (only(kohya(oft_blocks=torch.ones(()))), "oft_blocks []"),
    "DoRA for other outputs": (tensors(kohya(dora_scale=torch.ones(7, 1))), "magnitudes of shape [7, 1]"),
    "diffusers' configuration": (tensors(lora_adapter_metadata="[]"), "not a JSON object"),
    "peft: a list": (peft([]), "adapter_config.json' holds a peft configuration that is not a JSON object"),
    "peft: nothing": (peft(b""), "not a JSON object"),
    "peft: not text": (peft(b"\xff\xfe\x00"), "not a JSON object"),
    "peft: brackets": (peft(b"[" * 10**5), "not a JSON object"),
    "peft: 17 MB": (peft(b" " * (17 * 2**20)), "is longer than 16777216 bytes"),
    "peft: no kind": (peft({"lora_alpha": 2}), "has peft_type = None"),
    "peft: two kinds": (peft({**PEFT, "peft_type": ["LORA"]}), "has peft_type = ['LORA']"),
    "peft: another kind": (peft({**PEFT, "peft_type": "IA3"}), "has peft_type = 'IA3'"),
    "peft: not its tensors' kind": (
        peft({"peft_type": "LOHA", "alpha": 2}), "is a LoRA, but 'in/lora/adapter_config.json' says"
    ),
    "peft: no alpha": (peft({"peft_type": "LORA"}), "has no lora_alpha"),
    "peft: an alpha in words": (peft({**PEFT, "lora_alpha": "2"}), "lora_alpha = '2', which is no number"),
    "peft: alpha null": (peft({**PEFT, "lora_alpha": None}), "lora_alpha = None, which is no number"),
    "peft: alpha NaN": (peft(b'{"peft_type": "LORA", "lora_alpha": NaN}'), "lora_alpha = nan"),
    "peft: alpha of 400 digits": (
        peft(b'{"peft_type": "LORA", "lora_alpha": 1' + b"0" * 400 + b"}"), "which is no number"
    ),
    "peft: a pattern's list": (peft({**PEFT, "alpha_pattern": [1]}), "alpha_pattern = [1]"),
    "peft: an expression": (peft({**PEFT, "alpha_pattern": {"(a+)+$": 2}}), "alpha_pattern '(a+)+$'"),
    "peft: a pattern's value": (peft({**PEFT, "alpha_pattern": {"to_q": "x"}}), "lora_alpha = 'x'"),
    "peft: biases": (peft({**PEFT, "bias": "all"}), "(bias = 'all')"),
    "peft: modules": (peft({**PEFT, "modules_to_save": ["conv_in"]}), "(modules_to_save = ['conv_in'])"),
    "peft: PiSSA": (peft({**PEFT, "init_lora_weights": "pissa_niter_4"}), "changes the base too"),
    "peft: rank-stabilised?": (peft({**PEFT, "use_rslora": "no"}), "use_rslora = 'no'"),
    "peft: no weights": (without("adapter_model.safetensors"), "adapter_model.safetensors' does not exist"),
    "peft: no configuration": (without("adapter_config.json"), "holds no LoRA"),
    "peft: a short file": (peft(PEFT, b"\x10"), "is not a .safetensors file"),
    "peft: unknown": (peft(PEFT, {"base_model.model.nothing.weight": torch.ones(1)}), "'base_model.model.n"),
}  # fmt: skip

# what headers do not tell: `inspect` describes these, everything that loads tensors refuses them
WRONG_VALUES: dict[str, tuple[Builder, str]] = {
    "NaN": (tensors(kohya(up=torch.full((96, 2), NAN))), f"{UP!r} holds NaN or infinite values"),
    "infinity": (tensors(kohya(down=torch.full((2, 96), INFINITE))), "holds NaN or infinite values"),
    "NaN in a LoHa": (
        only(kohya(
            hada_w1_a=torch.ones(96, 2), hada_w1_b=torch.ones(2, 96), hada_w2_a=torch.full((96, 2), NAN),
            hada_w2_b=torch.ones(2, 96),
        )),
        "hada_w2_a' holds NaN",
    ),
    "NaN in magnitudes": (tensors(kohya(dora_scale=torch.full((96, 1), NAN))), "dora_scale' holds NaN"),
    "another width": (tensors(kohya(up=torch.ones(95, 2))), "95x96, the base's is 96x96"),
    "another layer": (
        only({name.replace("mid_block", "mid_blocks"): tensor for name, tensor in good().items()}),
        "does not fit the base",
    ),
    "another family": (
        only({f"{SDXL}.lora_down.weight": torch.ones(2, 2048), f"{SDXL}.lora_up.weight": torch.ones(640, 2)}),
        "was made for Stable Diffusion XL and does not fit the base",
    ),
}  # fmt: skip

COMMANDS: dict[str, Callable[[Path], None]] = {
    "inspect": lambda path: cli_about.inspect(path, json=True),
    "merge into": lambda path: cli.merge([str(path)], Path("out.safetensors"), into="embedded", json=True),
    "merge": lambda path: cli.merge([str(path), str(path)], Path("out.safetensors"), json=True),
    "sample": lambda path: cli.sample([str(path)], prompt=["a portrait"], output=Path("out"), json=True),
    "evaluate": lambda path: cli.evaluate([path], target="x", output=Path("out.png"), json=True),
}

# the others are told apart by what all commands read a file with
EVERYWHERE = {"missing", "a folder", "a pipe", "a header of 2^60 bytes", "two ranks", "peft: no alpha"}


@pytest.fixture
def refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, Builder], str]:
    """Run a command on what a builder makes, see that it is refused properly, and return the sentence."""
    monkeypatch.chdir(tmp_path)

    def refuse(command: str, build: Builder) -> str:
        shutil.rmtree("in", ignore_errors=True)
        Path("in").mkdir()
        path = build(Path("in"))
        with pytest.raises(typer.Exit) as ended:
            COMMANDS[command](path)
        printed = capsys.readouterr()
        sentence = json.loads(printed.out)["error"]
        assert ended.value.exit_code == 2, printed.err
        assert "Traceback" not in printed.err
        assert "\n" not in sentence
        assert str(path) in sentence
        assert os.listdir() == ["in"]  # no output, no temporary
        return str(sentence)

    return refuse


def test_the_good_files_are_good(tmp_path: Path) -> None:
    """Else every refusal here could have another reason."""
    for number, build in enumerate((tensors(), peft())):
        (tmp_path / f"{number}").mkdir()
        assert inspect(build(tmp_path / f"{number}"))["kind"] == "lora"


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_by_every_command(
    name: str, refusal: Callable[[str, Builder], str]
) -> None:
    build, words = DAMAGED[name]
    tracemalloc.start()
    commands = COMMANDS if name in EVERYWHERE else ("inspect", "merge into")
    sentences = [refusal(command, build) for command in commands]
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert words in sentences[1]
    assert most < 60 * 2**20, "a damaged file makes no large allocation"
    # to inspect a folder may be many things
    assert len(set(sentences[1 if "the folder" in sentences[0] else 0 :])) == 1


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_wrong_values_are_refused_where_they_are_used(
    name: str, refusal: Callable[[str, Builder], str]
) -> None:
    build, words = WRONG_VALUES[name]
    assert words in refusal("merge into", build)
    if "NaN" in words:
        assert words in refusal("sample", build)
        assert words in refusal("evaluate", build)


@pytest.mark.parametrize(
    "metadata",
    [
        {"spf_kit.measured": '{"response": NaN}', "spf_kit.merged": "1e999"},
        {"ss_tag_frequency": '{"a": {"b": 1e999, "c": "d"}, "e": 3}', "spf_kit.on": '{"\\ud800": 1}'},
        {
            "ss_tag_frequency": "[" * 10**5,
            "modelspec.title": "\x1b[2Jcleared [bold]\x07",
            "spf_kit.config": "a",
        },
    ],
)
def test_hostile_metadata_is_told_and_does_nothing(
    metadata: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tensors(**metadata)(tmp_path)
    cli_about.inspect(path, json=True)
    json.loads(capsys.readouterr().out)
    cli_about.inspect(path)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\x07" not in printed
    assert ("[bold]" in printed) == ("modelspec.title" in metadata)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("[base]\nmodel = 'embedded'\nprediction_type = 'x'", "'prediction_type': 'x'}"),
        ("a = " + "[" * 5000, ""),
    ],
)
def test_a_hostile_preset_in_a_file_is_a_sentence(config: str, words: str) -> None:
    from spf_kit.workflow import load_base

    if words:
        with pytest.raises(UserError, match=words):
            load_base(None, metadata={"spf_kit.config": config})
    else:
        assert load_base(None, metadata={"spf_kit.config": config}).name == "embedded"


# --- base models ------------------------------------------------------------------------------------------


def config(component: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / component / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def replaced(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def shards(content: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = folder / "unet/diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_name("part.safetensors"))
        weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(content))

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (config("unet", block_out_channels=5), "block_out_channels = 5"),
        (config("unet", block_out_channels=[]), r"block_out_channels = \[\]"),
        (config("unet", block_out_channels=["a"]), r"block_out_channels = \['a'\]"),
        (config("unet", in_channels=[4]), r"in_channels = \[4\]"),
        (config("unet", _class_name=["x"]), "is a .* model"),
        (config("unet", cross_attention_dim="x"), "several text widths"),
        (config("unet", block_out_channels=[2**40] * 4), "cannot be used"),
        (config("text_encoder", hidden_size="x"), "cannot be used"),
        (replaced("unet/config.json", b"[]"), "not a JSON object"),
        (replaced("unet/config.json", b""), "not JSON"),
        (replaced("unet/config.json", b"\xff\xfe"), "not JSON"),
        (replaced("unet/config.json", b"[" * 10**5), "not JSON"),
        (replaced("unet/diffusion_pytorch_model.safetensors", b""), "is empty"),
        (shards([]), "not a JSON object"),
        (shards({}), "weight_map is no table of file names"),
        (shards({"weight_map": ["part.safetensors"]}), "weight_map is no table of file names"),
        (shards({"weight_map": {"a": 1}}), "weight_map is no table of file names"),
        (shards({"weight_map": {"a": "../../../../etc/passwd"}}), "unet/passwd' does not exist"),
    ],
)
def test_broken_model_folders_are_sentences(
    change: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base_path(), folder, ignore=shutil.ignore_patterns("clip", "judge"))
    change(folder)
    with pytest.raises(UserError, match=words) as caught:
        families.load(Base(model=str(folder)))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["the end is missing", "a header of 2^60 bytes", "a pipe", "a pickle", "empty"]
)
def test_damaged_checkpoints_are_sentences(name: str, tmp_path: Path) -> None:
    build, words = DAMAGED[name]
    path = build(tmp_path)
    for use in (lambda: families.load(Base(model=str(path))), lambda: open_target(path)):
        with pytest.raises(UserError) as caught:
            use()
        assert words in str(caught.value)
        assert str(path) in str(caught.value)
