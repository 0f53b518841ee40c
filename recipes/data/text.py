"""When two texts are the same: the normalisation behind whole-query sampling and the leakage check."""

from __future__ import annotations

import functools
import sys
import unicodedata


def normalise(text: str) -> str:
    r"""Reduce a query or title to the form that is compared, never the one that is stored.

    NFKC (full-width to half-width, ligatures), casefold, punctuation (Unicode P*) to a space, control and format
    characters (zero-width spaces, direction marks) gone, white space collapsed. Symbols stay: `c++` is not `c`, and an
    emoji says something. Accents stay: `año` is not `ano`. A text of punctuation alone keeps it, so the result is empty
    for blank texts only.

    >>> normalise("  Ｗomen's  T-Shirt，(RED)!"), normalise("C++ 入門"), normalise("?!"), normalise(" \u200b\u3000")
    ('women s t shirt red', 'c++ 入門', '?!', '')
    """
    invisible, punctuation = _translations()
    # Casefolding can undo NFKC ("ŉ", "ϔ"), hence twice.
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = " ".join(text.translate(invisible).split())
    return " ".join(text.translate(punctuation).split()) or text


@functools.cache
def _translations() -> tuple[dict[int, str | None], dict[int, str]]:
    """Return the tables for `str.translate`: invisible characters away, punctuation to a space."""
    category = {code: unicodedata.category(chr(code)) for code in range(sys.maxunicode + 1)}
    invisible: dict[int, str | None] = {code: None for code, name in category.items() if name == "Cf"}
    invisible.update({code: " " for code, name in category.items() if name == "Cc"})
    return invisible, {code: " " for code, name in category.items() if name.startswith("P")}
