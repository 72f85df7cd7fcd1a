"""What of a docstring is told, and where it is cut."""

from __future__ import annotations

import pytest

from launch.prose import first_paragraph, whole_sentences


@pytest.mark.parametrize(
    ("docstring", "said"),
    [
        ("Return it\n    in one line", "Return it in one line."),
        ("Title\n=====\n\nWhat it is for.\n\nMore.", "What it is for."),
        ("fold(x, n=(1, 2)) -> text\n\nFold the text.", "Fold the text."),
        ("x, y = fold(key)\nboth halves of the page", "Both halves of the page."),
        ("fold -- Fold the text.", "Fold the text."),
        ("fold(): Fold the text.", "Fold the text."),
        ("fold lines\nFold the lines given.", "Fold the lines given."),
        (">>> fold(1)\n2\n\nFold the number.", "Fold the number."),
        ("Fold it:\n\n>>> fold(1)", ""),
        ("Fold the text. It takes these:\n- a\n- b", "Fold the text."),
        ("Fold the text, for example::\n\n    fold(x)", "Fold the text."),
        ("Fold the text\n:param x: what", "Fold the text."),
        ("Fold the text.\nArgs:\n    x: what", "Fold the text."),
        ("Args:\n    x: what\n\nNot about it.", ""),
        ("Fold a :class:`~a.b.Page`, :func:`fold` or :ref:`more <label>` of ``x``.", "Fold a Page, fold or more of x."),
        ("Fold *text* as **one**, *args and **kw, `see <https://x.y>`_.", "Fold text as one, *args and **kw, see."),
        ("Fold L{Page} and [`Sheet`] of [it](http://x.y).", "Fold Page and [Sheet] of it."),
        ("Copyright (c) 2001 Somebody.\n\nFold the text.", "Fold the text."),
        ("pop(k) -> v, folds the value and\nreturns it.", ""),
        ("Half of a pair: \ud83d, dropped.", "Half of a pair: , dropped."),
        ("", ""),
    ],
)  # fmt: skip
def test_a_docstring_is_told_as_prose(docstring: str, said: str) -> None:
    assert first_paragraph(docstring, "paper.fold") == said


def test_answers_end_where_a_sentence_ends() -> None:
    text = "Fold it, e.g. once. Then (if you like.) Again, and v1.5 too! Done?"
    assert whole_sentences(text, 20) == "Fold it, e.g. once."
    assert whole_sentences(text, 45) == "Fold it, e.g. once. Then (if you like.)"
    assert whole_sentences(text, 60) == "Fold it, e.g. once. Then (if you like.) Again, and v1.5 too!"
    assert whole_sentences(text, 12) == ""
    assert whole_sentences(text, None) == text
