"""Sentences stay short; the counting itself is right."""

import pytest

from tools import prose

LONG = "One " + "word " * 44 + "ends."  # 46 words


def test_few_sentences_are_long(capsys):
    assert prose.main([]) == 0
    assert "2% may" in capsys.readouterr().out


def test_a_text_of_long_sentences_is_seen(monkeypatch, capsys):
    monkeypatch.setattr(prose, "everything", lambda: [prose.counted("a page", f"{LONG}\n\nShort.")])
    assert prose.main(["--list"]) == 1
    assert f"46: {LONG}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("One two. Three four five.", [2, 3]),
        ("See Fig. 3 and [a page](x.md). The rate $\\eta=M$ is `right here`.", [6, 5]),
        ("```\ncode here. More.\n```\n\nOne.", [1]),
        ("| a | b |\n|---|---|\n\nTwo words.", [2]),
        ("- first item\n- second one here", [2, 3]),
        ("By {cite:t}`someone` in e.g. Paris.", [5]),
    ],
)
def test_sentences_and_their_words(text, lengths):
    found = prose.counted("x", text)
    assert [n for n, _ in found.sentences] == lengths
