"""Captions: taking the target out, putting it last, shuffling, fitting the window."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spf_kit.data.captions import derive, fit, shuffled
from spf_kit.data.random import generator
from spf_kit.data.removal import contains, without
from spf_kit.errors import UserError

TARGET = "wearing glasses"
WORDS = [
    "a",
    "man",
    "Wearing",
    "glasses",
    "and",
    "with",
    "hat",
    "is",
    "smiling",
    ",",
    ".",
    "(",
    ")",
    "-",
    ":1.2",
]
TEXTS = st.lists(st.sampled_from([*WORDS, TARGET, "wearing_glasses", ", "]), max_size=12).map(" ".join)
ANY_TEXT = TEXTS | st.text(max_size=40)
TARGETS = st.sampled_from([TARGET, "glasses", "a hat", "hat, man", "with"])


def words(text: str) -> int:
    """A tokenizer for tests: one token a word and one a comma."""
    return len(text.replace(",", " , ").split())


@pytest.fixture(scope="module")
def clip() -> Any:
    """CLIP's own tokenizer, as a function from text to ids."""
    from spf_kit.families.tokenizer import clip_tokenizer

    tokenizer = clip_tokenizer()
    return lambda text: tokenizer(text, add_special_tokens=False, truncation=False).input_ids


@pytest.mark.parametrize(
    ("text", "target", "base"),
    [
        # the target as a tag of its own, anywhere, in any case and spelling
        ("a man, wearing glasses, red hoodie", TARGET, "a man, red hoodie"),
        ("Wearing Glasses, a man, smile", TARGET, "a man, smile"),
        ("a man, smile, WEARING  GLASSES", TARGET, "a man, smile"),
        ("1boy, wearing_glasses, smile", TARGET, "1boy, smile"),
        ("wearing glasses", TARGET, ""),
        ("wearing glasses and wearing glasses", TARGET, ""),
        # inside a tag, with what depends on it
        ("a man wearing glasses and a hat", TARGET, "a man wearing a hat"),
        ("a man wearing glasses and smiling", TARGET, "a man smiling"),
        ("a man wearing glasses in a red suit", TARGET, "a man in a red suit"),
        ("a man who is wearing glasses in a suit", TARGET, "a man in a suit"),
        ("a man wearing a hat and glasses", "glasses", "a man wearing a hat"),
        ("a man wearing glasses and a hat", "glasses", "a man wearing a hat"),
        ("a man with a beard, red hoodie", "beard", "a man, red hoodie"),
        ("a man with a beard and a hat", "beard", "a man with a hat"),
        ("a man with a beard in a suit", "a beard", "a man in a suit"),
        ("a boy with glasses standing in a field", "glasses", "a boy standing in a field"),
        ("a winter hat and a coat", "winter hat", "a coat"),
        ("a hat and glasses and a scarf", "glasses", "a hat and a scarf"),
        ("a man, with glasses, hat", "glasses", "a man, hat"),
        ("wearing glasses, and smiling", TARGET, "smiling"),
        ("wearing glasses and a hat, smile", TARGET, "wearing a hat, smile"),
        # sentences, brackets, weights
        ("A man wearing glasses. He smiles.", TARGET, "A man. He smiles"),
        ("a man, wearing glasses. Blue wall", TARGET, "a man. Blue wall"),
        ("a man (wearing glasses), red", TARGET, "a man, red"),
        ("a man, (wearing glasses:1.2), red", TARGET, "a man, red"),
        # a target with a comma
        ("a man, round glasses, gold rim, smile", "round glasses, gold rim", "a man, smile"),
        # words that only contain the target's letters are not the target
        ("sunglasses, what a view", "glasses", "sunglasses, what a view"),
        ("that chat", "hat", "that chat"),
        ("a half-beard, the beard's owner", "beard", "a half-beard, the beard's owner"),
        # captions without the target keep their words
        ("a man with a hat, and a scarf", TARGET, "a man with a hat, and a scarf"),
        ("smile ...  and,, more ,", TARGET, "smile ... and, more"),
        ("", TARGET, ""),
    ],
)
def test_the_target_is_taken_out_cleanly(text: str, target: str, base: str) -> None:
    caption = derive(text, target)
    assert caption.base == base
    assert caption.full == (f"{base}, {target}" if base else target)
    assert caption.text == text


def test_the_parts_of_a_caption() -> None:
    caption = derive("a man, red hoodie, wearing glasses, blue background.", TARGET)
    assert caption.phrases == ("a man", "red hoodie", "blue background")
    assert caption.target == TARGET
    assert caption.names_target
    assert not derive("a man with sunglasses", "glasses").names_target
    dropped = caption.dropped()
    assert (dropped.base, dropped.full, dropped.phrases, dropped.target) == ("", "", (), TARGET)


def test_a_line_break_separates_like_a_comma_but_does_not_double_punctuation() -> None:
    assert (
        derive("a man\r\nred hoodie,\nsmile.\n\nblue wall\n", TARGET).base
        == "a man, red hoodie, smile. blue wall"
    )


@pytest.mark.parametrize(
    ("text", "base"),
    [
        ("a man.", "a man"),
        ("a man!?, ", "a man"),
        ("miku (vocaloid)", "miku vocaloid"),
        (r"x, miku \(vocaloid\)", "x, miku vocaloid"),
        ('a sign that says "hello"', "a sign that says hello"),
        ("(a man), (red:1.2)", "(a man), red:1.2"),
        ("smile, ^_^", "smile"),
        ("café, दिल्ली", "café, दिल्ली"),  # a combining mark is part of its word
    ],
)
def test_base_ends_in_a_letter_or_digit(text: str, base: str) -> None:
    assert derive(text, TARGET).base == base


@pytest.mark.parametrize(
    "text",
    [
        "miku (vocaloid)",
        "a man.",
        "smile :)",
        'says "hi"',
        "100%",
        "c++",
        "the boy's",
        "tags, [x]",
        "a\u2019",
    ],
)
def test_base_tokens_stand_first_in_full(text: str, clip: Any) -> None:
    caption = derive(text, TARGET)
    base, full = clip(caption.base), clip(caption.full)
    assert base
    assert full[: len(base)] == base
    # and it is the cut-back ending that makes it so
    raw, joined = clip(text), clip(f"{text}, {TARGET}")
    assert joined[: len(raw)] != raw or caption.base == text


@given(ANY_TEXT, TARGETS)
@settings(max_examples=300, deadline=None)
def test_full_is_base_and_target_whatever_the_text(text: str, target: str) -> None:
    caption = derive(text, target)
    assert caption.full.startswith(caption.base)
    assert caption.full == (f"{caption.base}, {target}" if caption.base else target)
    assert not contains(caption.base, target)
    assert ", ".join(caption.phrases) == caption.base
    assert caption.base == " ".join(caption.base.split())


@given(ANY_TEXT, TARGETS)
@example("hat ,  ,  man", "hat, man")
@settings(max_examples=300, deadline=None)
def test_deriving_again_changes_nothing(text: str, target: str) -> None:
    caption = derive(text, target)
    assert derive(caption.full, target).base == caption.base
    assert derive(caption.base, target).base == caption.base


@given(TEXTS)
@settings(max_examples=200, deadline=None)
def test_taking_out_invents_no_words(text: str) -> None:
    def bag(of: str) -> set[str]:
        return set(re.findall(r"[a-z0-9]+", of.lower()))

    assert bag(without(text, TARGET)) <= bag(text) | bag(TARGET)


def test_a_text_without_the_target_is_returned_as_it_is() -> None:
    assert without("  odd ,, text ", TARGET) == "  odd ,, text "


# --- shuffling --------------------------------------------------------------------------------------------


def test_shuffling_keeps_the_first_tags_and_the_target() -> None:
    caption = derive("a, b, c, d, e, f, wearing glasses, g", TARGET)
    orders = set()
    for seed in range(20):
        mixed = shuffled(caption, 2, generator(seed))
        assert mixed.phrases[:2] == ("a", "b")
        assert sorted(mixed.phrases) == ["a", "b", "c", "d", "e", "f", "g"]
        assert mixed.full == f"{mixed.base}, {TARGET}"
        orders.add(mixed.phrases)
    assert len(orders) > 15
    assert shuffled(caption, 2, generator(3)) == shuffled(caption, 2, generator(3))
    assert shuffled(caption, 99, generator(3)) == caption


def test_shuffling_a_bracket_to_the_end_still_ends_in_a_letter() -> None:
    caption = derive("miku (vocaloid), smile", TARGET)
    bases = {shuffled(caption, 0, generator(seed)).base for seed in range(10)}
    assert bases == {"miku (vocaloid), smile", "smile, miku vocaloid"}


# --- the window -------------------------------------------------------------------------------------------


def test_what_fits_stays_as_it_is() -> None:
    caption = derive("a man, red hoodie", TARGET)
    assert fit(caption, words, words(caption.full)) is caption


def test_whole_tags_go_from_the_end_and_the_target_stays() -> None:
    caption = derive("one, two words, three more words, four", TARGET)
    assert words(caption.full) == 13
    fitted = fit(caption, words, 12)
    assert fitted.base == "one, two words, three more words"
    assert fitted.full == f"{fitted.base}, {TARGET}"
    assert fit(caption, words, 9).base == "one, two words"  # a cut tag would have fitted another word


def test_a_long_sentence_is_cut_between_words() -> None:
    caption = derive(" ".join(f"w{i}" for i in range(50)), TARGET)
    fitted = fit(caption, words, 20)
    assert fitted.base.split() == [f"w{i}" for i in range(17)]  # 17 + comma + 2
    mostly = fit(derive("portrait, " + " ".join(f"w{i}" for i in range(50)), TARGET), words, 20)
    assert words(mostly.full) == 20
    assert mostly.base.startswith("portrait, w0 w1")


def test_a_target_that_fills_the_window_leaves_no_base() -> None:
    assert fit(derive("a man", TARGET), words, 2).full == TARGET
    assert fit(derive("a man", TARGET), words, 2).base == ""


def test_a_target_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"attribute\.target.*2 tokens.*window has 1.*data\.chunks"):
        fit(derive("a man", TARGET), words, 1)


@given(TEXTS, st.integers(2, 12))
@settings(max_examples=200, deadline=None)
def test_a_fitted_caption_fits_and_is_as_regular_as_any(text: str, window: int) -> None:
    caption = derive(text, TARGET)
    fitted = fit(caption, words, window)
    assert words(fitted.full) <= window
    assert fitted.full == (f"{fitted.base}, {TARGET}" if fitted.base else TARGET)
    assert len(fitted.phrases) <= len(caption.phrases)


def test_the_window_is_counted_in_clips_tokens(clip: Any) -> None:
    text = ", ".join(f"a supercalifragilistic tag {i}" for i in range(30))
    caption = fit(derive(text, TARGET), lambda t: len(clip(t)), 75)
    assert 65 < len(clip(caption.full)) <= 75
    assert clip(caption.full)[: len(clip(caption.base))] == clip(caption.base)
    assert text.startswith(caption.base)
