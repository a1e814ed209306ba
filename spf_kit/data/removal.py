"""Take a phrase out of a caption so that what is left reads as if it had never been there.

    "a man wearing glasses and a hat"  without "wearing glasses"  ->  "a man wearing a hat"
    "a man with a beard, red hoodie"   without "beard"            ->  "a man, red hoodie"

Rules over the neighbouring words, not a parser: only the words at the two edges of a cut are ever changed.
"""

from __future__ import annotations

import re

CONJUNCTIONS = frozenset({"and", "or", "but", "plus", "&", "+"})
CARRIERS = frozenset(
    {"wearing", "wears", "with", "in", "having", "has", "had", "have", "sporting", "featuring"}
)
DETERMINERS = frozenset({"a", "an", "the", "his", "her", "their", "its", "some", "also"})
VERBS = frozenset({"is", "are", "was", "were", "who", "that", "which", "be", "being"})
PREPOSITIONS = frozenset(
    {"on", "at", "under", "by", "near", "from", "of", "to", "for", "against", "behind", "before", "while"}
    | {"as", "over", "beside", "between", "inside", "outside", "without"}
)
LEFT_OVER = CONJUNCTIONS | CARRIERS | DETERMINERS | VERBS  # says nothing once the phrase after it is gone
NOUNS_IN_ING = frozenset({"ring", "earring", "king", "string", "clothing", "wing", "legging", "stocking"})
STOPS, OPENING, CLOSING = ",.;:!?", "([{", ")]}"
LAST_WORD = re.compile(rf"[^\s{re.escape(STOPS + OPENING + CLOSING)}]+$")
FIRST_WORD = re.compile(rf"[^\s{re.escape(STOPS + OPENING + CLOSING)}]+")
LEFT_BRACKET, RIGHT_BRACKET = re.compile(r"\\?[(\[{]$"), re.compile(r"(?::\s*[\d.]*)?\s*\\?[)\]}]")


def contains(text: str, phrase: str) -> bool:
    """Whether `phrase` stands in `text` as words, in any case: "hat" is not in "what"."""
    return bool(phrase.split()) and bool(_pattern(phrase).search(text))


def places(text: str, phrase: str) -> list[tuple[int, int]]:
    """Where `phrase` stands in `text`: the first letter of each occurrence, and the one after its last."""
    return [found.span() for found in _pattern(phrase).finditer(text)] if phrase.split() else []


def without(text: str, phrase: str) -> str:
    """`text` without every occurrence of `phrase` (any case; spaces and underscores are alike)."""
    if not contains(text, phrase):
        return text
    pattern = _pattern(phrase)
    while found := pattern.search(text):
        text = _joined(text[: found.start()].rstrip(), text[found.end() :].lstrip(), phrase)
    return text


def _pattern(phrase: str) -> re.Pattern[str]:
    words = re.split(r"[\s_]+", phrase.strip())
    body = r"[\s_]+".join(re.escape(word).replace(",", r"\s*,") for word in words)
    # A hyphen or an apostrophe goes on with the word: neither "half-beard" nor "beard's" is a beard.
    before = r"(?<![^\W_])(?<!\w[-'\u2019])" if words[0][:1].isalnum() else ""
    after = r"(?![^\W_])(?![-'\u2019]\w)" if words[-1][-1:].isalnum() else ""
    return re.compile(before + body + after, re.IGNORECASE)


def _joined(left: str, right: str, phrase: str) -> str:
    """The two sides of a cut as one text."""
    while (opened := LEFT_BRACKET.search(left)) and (closed := RIGHT_BRACKET.match(right)):
        # "(wearing glasses:1.2)" leaves "(:1.2)", brackets and a weight of nothing
        left, right = left[: opened.start()].rstrip(), right[closed.end() :].lstrip()
    at_start = not left or left[-1] in STOPS + OPENING
    if not right or right[0] in STOPS + CLOSING:
        return _met(_stripped(left), right)
    if _first(right) in CONJUNCTIONS:
        return _before_conjunction(left, right, phrase, at_start)
    return _met(left if at_start or _opens_noun(right) else _stripped(left), right)


def _before_conjunction(left: str, right: str, phrase: str, at_start: bool) -> str:
    """`right` begins with "and": whether the "and", and the phrase's own "wearing" or "with", must stay."""
    rest = right[len(_first(right)) :].lstrip()
    noun = _opens_noun(rest)
    head = re.split(r"[\s_]+", phrase.strip())[0].lower()
    if noun and head in CARRIERS:
        return _met(left, f"{head} {rest}")
    bare = _stripped(left, DETERMINERS)
    if at_start or not bare or bare[-1] in STOPS + OPENING:
        return _met(bare, rest)
    if _last(bare) in CARRIERS | CONJUNCTIONS:  # "with [glasses and] a hat", "a hat and [glasses and] gloves"
        return _met(bare if noun else _stripped(left), rest)
    return _met(left, right) if noun else _met(_stripped(left), rest)


def _met(left: str, right: str) -> str:
    """`left` and `right` with one stop between them where both had one, and none at the start."""
    if not left:
        right = right.lstrip(STOPS + " ")
        return right[len(_first(right)) :].lstrip() if _first(right) in CONJUNCTIONS else right
    if left[-1] in STOPS and right[:1] in tuple(STOPS):
        if left[-1] == ",":
            left = left.rstrip(", ")  # the other may be the end of a sentence
        else:
            right = right.lstrip(STOPS + " ")
    return left + ("" if right[:1] in tuple(STOPS + CLOSING) or left[-1] in OPENING else " ") + right


def _stripped(left: str, words: frozenset[str] = LEFT_OVER) -> str:
    """`left` without the words at its end that need something after them."""
    while _last(left) in words:
        left = left[: -len(_last(left))].rstrip()
    return left


def _opens_noun(text: str) -> bool:
    """Whether `text` begins like a thing ("a hat", "red hoodie") and not like a doing or a place."""
    first = _first(text)
    gerund = first.endswith("ing") and first not in NOUNS_IN_ING
    return bool(first) and not gerund and first not in PREPOSITIONS | CARRIERS | VERBS | CONJUNCTIONS


def _first(text: str) -> str:
    """The word that `text` begins with, in lower case; "" where it begins with punctuation."""
    found = FIRST_WORD.match(text)
    return found.group().lower() if found else ""


def _last(text: str) -> str:
    """The word that `text` ends in, in lower case; "" where punctuation stands after it."""
    found = LAST_WORD.search(text)
    return found.group().lower() if found else ""


def content_words(phrase: str) -> list[str]:
    """The words of a phrase that carry its meaning: of "wearing a winter hat", "winter" and "hat"."""
    words = [word.lower() for word in re.split(r"[\s_,]+", phrase.strip())]
    return [word for word in words if word not in LEFT_OVER | PREPOSITIONS and word.isalnum()]
