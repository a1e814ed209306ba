"""Probes of cross-attention: maps and queries by the model's own formula, and where words stand."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from transformers import CLIPTokenizer

from spf_kit import families, schema
from spf_kit.adapters.inject import AdapterHandle
from spf_kit.families import taps, text
from spf_kit.families.base import Family
from spf_kit.probes import LayerProbe, matches, token_mask

SDXL_LIKE = {
    "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 12,
    "transformer_layers_per_block": (1, 2), "attention_head_dim": (2, 4), "use_linear_projection": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def family() -> Family:
    return families.load(schema.Base(model="embedded"))


@pytest.fixture
def inputs(family: Family) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    source = torch.Generator().manual_seed(2)
    latents = torch.randn((2, 4, 16, 12), generator=source)  # not square
    condition = family.encode_text(["a portrait, red afro", "smiling, wearing glasses"])
    return latents, torch.tensor([40, 700]), condition


def plain_maps(attention: torch.nn.Module, hidden: torch.Tensor, text_: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) for each head, in float64, the slow way: (B, Q, L)."""
    wide = torch.float64
    q = hidden.to(wide) @ attention.to_q.weight.to(wide).T
    k = text_.to(wide) @ attention.to_k.weight.to(wide).T
    heads = []
    for part_q, part_k in zip(q.chunk(attention.heads, -1), k.chunk(attention.heads, -1)):
        heads.append(torch.softmax(part_q @ part_k.mT / part_q.shape[-1] ** 0.5, dim=-1))
    return sum(heads) / len(heads)


def test_maps_are_those_of_the_formula_and_the_prediction_keeps_its_bits(family: Family, inputs) -> None:
    latents, timesteps, condition = inputs
    names = list(family.attention_layers())
    hidden: dict[str, torch.Tensor] = {}
    hooks = [
        family.unet.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: hidden.__setitem__(name, args[0])
        )
        for name in names
    ]
    with torch.no_grad():
        plain = family.predict(latents, timesteps, condition)
        prediction, seen = family.probe(latents, timesteps, condition, names)
    for hook in hooks:
        hook.remove()
    assert torch.equal(plain, prediction)
    assert list(seen) == names
    for name, layer in seen.items():
        attention = family.unet.get_submodule(name)
        expected = plain_maps(attention, hidden[name], condition["encoder_hidden_states"])
        torch.testing.assert_close(layer.maps.double(), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.queries, hidden[name] @ attention.to_q.weight.T)
        assert layer.size[0] * layer.size[1] == layer.queries.shape[1]
        assert layer.size == (16 // layer.factor, 12 // layer.factor)


def test_taps_leave_nothing_behind(family: Family, inputs) -> None:
    family.probe(*inputs, list(family.attention_layers()))
    assert not any(module._forward_hooks for module in family.unet.modules())
    with (
        pytest.raises(ValueError, match="broken"),
        taps.recording(family.unet, list(family.attention_layers())),
    ):
        raise ValueError("broken")
    assert not any(module._forward_hooks for module in family.unet.modules())


@pytest.mark.parametrize("processor", [AttnProcessor, lambda: SlicedAttnProcessor(1)])
def test_any_attention_backend_gives_the_same_maps(family: Family, inputs, processor) -> None:
    before = family.unet.attn_processors
    with torch.no_grad():
        _, expected = family.probe(*inputs, list(family.attention_layers()))
        family.unet.set_attn_processor(processor())
        try:
            plain = family.predict(*inputs)
            prediction, found = family.probe(*inputs, list(family.attention_layers()))
        finally:
            family.unet.set_attn_processor(before)
    assert torch.equal(plain, prediction)
    for name, layer in found.items():
        torch.testing.assert_close(layer.maps, expected[name].maps, rtol=1e-3, atol=1e-5)


def test_gradients_through_taps_survive_checkpointing(family: Family, inputs) -> None:
    """The recomputation in the backward pass is seen by no hook and changes no gradient."""
    handle = AdapterHandle.inject(family, schema.Adapter(rank=2), name="tapped", seed=1)
    for parameter in handle.parameters():  # `up` starts at zero, where `down` has no gradient
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    family.unet.train()

    def gradients() -> list[torch.Tensor]:
        prediction, seen = family.probe(*inputs, list(family.attention_layers()))
        loss = prediction.square().mean() + sum(
            layer.maps.square().mean() + layer.queries.square().mean() for layer in seen.values()
        )
        return list(torch.autograd.grad(loss, handle.parameters()))

    try:
        expected = gradients()
        family.unet.enable_gradient_checkpointing()
        found = gradients()
    finally:
        family.unet.disable_gradient_checkpointing()
        family.unet.eval()
        handle.remove()
    assert any(float(gradient.abs().max()) > 0 for gradient in expected)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_the_adapter_is_part_of_what_is_tapped(family: Family, inputs) -> None:
    names = list(family.attention_layers())
    with torch.no_grad():
        _, without = family.probe(*inputs, names)
        handle = AdapterHandle.inject(family, schema.Adapter(rank=2), name="tapped", seed=1)
        for parameter in handle.parameters():
            parameter.data += 0.1
        _, on = family.probe(*inputs, names)
        with handle.disabled():
            _, off = family.probe(*inputs, names)
        handle.remove()
    last = names[-1]
    assert not torch.equal(on[last].queries, without[last].queries)
    assert not torch.equal(on[last].keys, without[last].keys)
    assert torch.equal(off[last].maps, without[last].maps)


def test_sdxl_shapes_are_tapped_too() -> None:
    """Blocks without attention, several transformer layers in one block, other head counts."""
    unet = UNet2DConditionModel(**SDXL_LIKE).eval()
    layers = taps.attention_layers(unet)
    assert len(layers) == 2 + 4 + 2
    assert set(layers.values()) == {2}
    with torch.no_grad(), taps.recording(unet, list(layers)) as seen:
        unet(torch.randn(1, 4, 10, 6), torch.tensor([5]), encoder_hidden_states=torch.randn(1, 77, 12))
    for layer in taps.probes(unet, seen, layers, (10, 6)).values():
        assert (layer.size, layer.heads) == ((5, 3), 4)
        assert layer.maps.shape == (1, 15, 77)
        torch.testing.assert_close(layer.maps.sum(-1), torch.ones(1, 15))


def test_odd_sizes_round_up_as_the_model_does() -> None:
    unet = UNet2DConditionModel(**{**SDXL_LIKE, "sample_size": 9}).eval()
    layers = taps.attention_layers(unet)
    with torch.no_grad(), taps.recording(unet, list(layers)) as seen:
        unet(torch.randn(1, 4, 9, 7), torch.tensor([5]), encoder_hidden_states=torch.randn(1, 77, 12))
    assert {layer.size for layer in taps.probes(unet, seen, layers, (9, 7)).values()} == {(5, 4)}


def test_layers_are_chosen_by_place_size_and_name() -> None:
    name = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
    assert all(matches(name, 2, [p]) for p in ("all", "up", "1/2", name, "up_blocks.1.*", "*attn2"))
    assert not any(matches(name, 2, [p]) for p in ("down", "mid", "1/1", "1/4", "up_blocks.2.*", "attn2"))
    assert matches(name, 2, ["mid", "1/2"])


def test_a_mask_is_averaged_to_a_layer_and_values_are_drawn_at_the_latents_size() -> None:
    layer = LayerProbe("x", 2, (2, 3), torch.zeros(1, 6, 4), torch.zeros(1, 5, 4), 2, 1.0)
    mask = torch.arange(24.0).reshape(1, 1, 4, 6)
    expected = [mask[0, 0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean() for i in range(2) for j in range(3)]
    assert torch.equal(layer.resize(mask).flatten(), torch.stack(expected))
    assert torch.equal(layer.picture(torch.full((1, 6), 3.0), (4, 6)), torch.full((1, 1, 4, 6), 3.0))


# --- where words stand ------------------------------------------------------------------------------------


def tokens_at(family: Family, caption: str, positions: tuple[int, ...], chunks: int = 1) -> list[str]:
    """The tokens that the text encoder reads at these positions."""
    ids = text.windows(family.tokenizer, [caption], chunks=chunks, length=77).flatten()
    return [
        token.removesuffix("</w>") for token in family.tokenizer.convert_ids_to_tokens(ids[list(positions)])
    ]


CAPTIONS = [
    (("a portrait", "red afro"), "wearing glasses"),
    (("smiling", "smiling", "smiling face"), "wearing glasses"),  # repeated
    (("a photo of miku (vocaloid)", "1girl!?", "x-y"), "with a beard"),  # punctuation merges with the comma
    (("an extraordinarily counterrevolutionary moustache", "ÄÖÜ über 猫"), "wearing an eyepatch"),
    ((), "wearing glasses"),
]


@pytest.mark.parametrize(("phrases", "target"), CAPTIONS)
def test_spans_hold_the_words_of_their_phrase(family: Family, phrases: tuple[str, ...], target: str) -> None:
    spans = family.spans(phrases, target)
    caption = ", ".join([*phrases, target])
    for phrase, positions in zip(phrases, spans.phrases, strict=True):
        said = "".join(tokens_at(family, caption, positions)).rstrip(",")
        alone = "".join(tokens_at(family, phrase, family.spans((), phrase).target))
        assert said == alone, phrase
    assert "".join(tokens_at(family, caption, spans.target)) == target.replace(" ", "")
    everything = [position for positions in spans.phrases for position in positions]
    assert len(set(everything)) == len(everything)
    assert set(everything) <= set(spans.base)
    assert not set(spans.base) & set(spans.target)
    if phrases and "1girl!?" not in phrases:  # the base's tokens stand alike in c_base alone
        base = ", ".join(phrases)
        assert tokens_at(family, base, spans.base) == tokens_at(family, caption, spans.base)


def test_spans_beyond_the_window_are_cut_or_go_on_in_the_next(family: Family) -> None:
    phrases = tuple(f"red {word}" for word in ["hair"] * 40)
    one, two = family.spans(phrases, "wearing glasses"), family.spans(phrases, "wearing glasses", chunks=2)
    assert max(one.base) == 75
    assert one.target == ()
    assert not {76, 77} & set(two.base)  # end and begin of the windows
    assert tokens_at(family, ", ".join([*phrases, "wearing glasses"]), two.target, 2) == [
        "wearing",
        "glasses",
    ]
    assert [len(part) for part in two.phrases] == [2] * 40


def test_the_true_vocabulary_of_sd15_and_sdxl() -> None:
    """Both encoders of SDXL read CLIP's vocabulary; the second pads with "!", which no span may touch."""
    from spf_kit.families import tokenizer as shipped

    first = shipped.clip_tokenizer()
    second = CLIPTokenizer(vocab=first.get_vocab(), merges=_merges(first), pad_token="!")
    found = [
        text.spans(t, ("a photo", "extraordinary cat"), "wearing glasses", chunks=1, length=77)
        for t in (first, second)
    ]
    assert found[0] == found[1]
    assert found[0].target == (7, 8)


def _merges(tokenizer: CLIPTokenizer) -> list[tuple[str, str]]:
    import json

    return [tuple(pair) for pair in json.loads(tokenizer._tokenizer.to_str())["model"]["merges"]]


def test_token_mask_marks_positions() -> None:
    assert token_mask([(1, 3), ()], 5).tolist() == [[0, 1, 0, 1, 0], [0] * 5]


def test_embeddings_of_phrases_are_the_encoders_pooled_ones(family: Family) -> None:
    texts = ["wearing glasses", "blue background"]
    tokens = family.tokenizer(texts, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        states = family.text_encoder(tokens.input_ids).last_hidden_state
    end = (tokens.input_ids == family.tokenizer.eos_token_id).int().argmax(dim=1)
    pooled = states[torch.arange(2), end].double()
    expected = pooled / pooled.norm(dim=1, keepdim=True)
    torch.testing.assert_close(family.embed_text(texts).double(), expected, rtol=1e-5, atol=1e-6)
