"""Tags are whole, and what is not one of them stays as it was written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spf_kit.data.tags import add_tag, has_tag, remove_tag, replace_tag

WORDS = st.text("abc _", min_size=1, max_size=6).map(str.strip).filter(lambda word: word.strip("_ "))
CAPTIONS = st.lists(WORDS, max_size=5).map(", ".join)


@pytest.mark.parametrize(
    ("before", "tag", "after"),
    [
        ("a man, red hat,  smiling", "red hat", "a man,  smiling"),
        ("red hat, a man", "RED_HAT", "a man"),
        ("a man, red hat", "red hat", "a man"),
        ("a man\nred hat\noffice", "red hat", "a man\noffice"),
        ("hat, a hat, hat", "hat", "a hat"),
        ("a red hat", "hat", "a red hat"),
        ("hat", "hat", ""),
        (" odd ,,  spaces ", "tag", " odd ,,  spaces "),
        ("a man", "", "a man"),
    ],
)
def test_remove(before: str, tag: str, after: str) -> None:
    assert remove_tag(before, tag) == after


def test_add() -> None:
    assert add_tag("a man, ", "red hat") == "a man, red hat"
    assert add_tag("a man", "red hat", first=True) == "red hat, a man"
    assert add_tag("", " red hat ") == "red hat"
    assert add_tag("a man, Red_Hat", "red hat") == "a man, Red_Hat"


def test_replace() -> None:
    assert replace_tag("a man, red hat,  office", "red hat", "blue hat") == "a man, blue hat,  office"
    assert replace_tag("hat, a man, hat", "hat", "cap") == "cap, a man"
    assert replace_tag("a man, hat, cap", "hat", "cap") == "a man, cap"
    assert replace_tag("a man", "hat", "cap") == "a man"
    assert replace_tag("a man, hat", "hat", "HAT") == "a man, HAT"


@given(CAPTIONS, WORDS, WORDS)
def test_whatever_the_caption(caption: str, tag: str, other: str) -> None:
    assert has_tag(add_tag(caption, tag), tag)
    assert not has_tag(remove_tag(caption, tag), tag)
    if has_tag(caption, tag):
        assert has_tag(replace_tag(caption, tag, other), other)
    else:
        assert remove_tag(caption, tag) == replace_tag(caption, tag, other) == caption
        assert remove_tag(add_tag(caption, tag), tag) == caption
