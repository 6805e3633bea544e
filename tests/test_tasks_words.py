"""Words: vocabulary, line ends, and the corpora (real data where they lie at hand)."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jtrunc.experiments import parts
from jtrunc.tasks import corpora, text, words

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no folder shared/data beside the repository")
WIKITEXT = os.environ.get("JTRUNC_WIKITEXT_2", "")


def write(folder: Path, pattern: str, train: str, valid: str, test: str) -> Path:
    for part, content in {"train": train, "valid": valid, "test": test}.items():
        (folder / pattern.format(part)).write_bytes(content.encode("utf-8"))
    return folder


PTB = ("ptb.{}.txt", " aer <unk> 's N \n the aer\n", " the \n", " N\n\n")
WIKI = ("wiki.{}.tokens", " \n = A = \n \n the <unk> the @-@ \n", " the\n", " B A \n")


def test_penn_treebank_by_hand(tmp_path: Path) -> None:
    corpus = words.penn_treebank_words(write(tmp_path, *PTB), verify=False)
    assert corpus.vocabulary.symbols == ("<eos>", "aer", "'s", "<unk>", "N", "the")
    assert corpus.train.tolist() == [1, 3, 2, 4, 0, 5, 1, 0] and corpus.train.dtype == np.int32
    assert corpus.valid.tolist() == [5, 0] and corpus.test.tolist() == [4, 0, 0]
    assert corpus.vocabulary.decode(corpus.train) == "aer <unk> 's N \nthe aer \n"
    assert corpus.num_unknown == (0, 0) and corpus.source.num_files == 3
    with pytest.raises(ValueError, match=r"ptb.train.txt is not the published file.*fcea919f.*verify=False"):
        words.penn_treebank_words(tmp_path)


def test_wikitext_by_hand(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"wiki.train.tokens does not exist; .*wikitext-2-v1.zip"):
        words.wikitext2(tmp_path)
    corpus = words.wikitext2(write(tmp_path, *WIKI), verify=False)
    assert corpus.vocabulary.decode(corpus.train) == "\n= A = \n\nthe <unk> the @-@ \n"
    assert corpus.vocabulary.decode(corpus.test) == "<unk> A \n" and corpus.num_unknown == (0, 1)
    with pytest.raises(ValueError, match=r"are not WikiText-2: they have {'train': 11, .*'words': 33278"):
        words.wikitext2(tmp_path)


def test_the_numbers_of_wikitext_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "WIKITEXT_2_NUM_TOKENS", {"train": 11, "valid": 2, "test": 3})
    monkeypatch.setattr(words, "WIKITEXT_2_NUM_WORDS", 6)
    assert words.wikitext2(write(tmp_path, *WIKI)).vocabulary.size == 6
    (tmp_path / "wiki.test.tokens").write_text(" A \n")
    with pytest.raises(ValueError, match="are not WikiText-2"):
        words.wikitext2(tmp_path)


TEXT8 = " the cat of zoom the hat of the cat a mat zoo a the mat of owl at"


def test_text8_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"text8 does not exist; .*http://mattmahoney.net/dc/text8.zip"):
        words.text8_words(tmp_path)
    (tmp_path / "text8").write_text(TEXT8)
    options: Any = {"fractions": (0.5, 0.25, 0.25), "verify": False}
    corpus = words.text8_words(tmp_path, min_count=2, **options)
    assert corpus.vocabulary.symbols == ("the", "of", "<unk>")
    assert corpus.vocabulary.decode(corpus.train) == "the <unk> of <unk> the <unk> of the "
    assert corpus.vocabulary.decode(corpus.valid) == "<unk> <unk> <unk> <unk> <unk> the "
    assert len(corpus.test) == 4 and corpus.num_unknown == (5, 3)
    assert words.text8_words(tmp_path, min_count=1, max_vocabulary=5, **options).vocabulary.size == 5
    with pytest.raises(ValueError, match="character 'w' at position 11 is not in the vocabulary"):
        corpora.text8(tmp_path, **options)
    letters = corpora.text8(tmp_path / "text8", fractions=(0.96, 0.02, 0.02), verify=False)
    assert letters.vocabulary.decode(np.concatenate(letters[:3])) == TEXT8
    for load in (corpora.text8, words.text8_words):
        with pytest.raises(ValueError, match=r"not the published text8: it has 65 .* 100,000,000 and 3b"):
            load(tmp_path)
    monkeypatch.setattr(corpora, "TEXT8_MD5", hashlib.md5(TEXT8.encode()).hexdigest())
    assert words.text8_words(tmp_path, fractions=options["fractions"]).vocabulary.size == 1
    monkeypatch.undo()
    assert parts.TASKS["text8-words"](tmp_path, min_count=1, verify=False).num_classes >= 8
    for name in ("text8", "text8-words"):
        with pytest.raises(ValueError, match=f"task '{name}' needs --data"):
            parts.TASKS[name](None)


@needs_data
def test_penn_treebank_is_the_published_one() -> None:
    corpus = words.penn_treebank_words(DATA / "ptb")
    assert [len(part) for part in (corpus.train, corpus.valid, corpus.test)] == [929_589, 73_760, 82_430]
    assert corpus.vocabulary.size == 10_000 and corpus.num_unknown == (0, 0)
    assert corpus.vocabulary.symbols[:3] == ("the", "<unk>", "<eos>")
    assert int((corpus.valid == corpus.vocabulary.symbols.index(words.END_OF_LINE)).sum()) == 3370
    assert corpus.vocabulary.decode(corpus.valid[:3]) == "consumers may want "
    small = words.penn_treebank_words(DATA / "ptb", max_vocabulary=1000)
    assert small.vocabulary.symbols == corpus.vocabulary.symbols[:1000]
    kept = corpus.valid < 1000
    np.testing.assert_array_equal(small.valid, np.where(kept, corpus.valid, 1))
    assert small.num_unknown[0] == (~kept).sum() > 10_000


@pytest.mark.skipif(not WIKITEXT, reason="JTRUNC_WIKITEXT_2 names no folder")
def test_wikitext_is_the_published_one() -> None:
    assert words.wikitext2(WIKITEXT).num_unknown == (0, 0)


def test_standard_library_by_words() -> None:
    corpus = words.words(max_characters=300_000, max_vocabulary=500)
    assert corpus.vocabulary.size == 500 and corpus.source.num_characters == 300_000
    assert {"<unk>", "<eos>", "self", "("} <= set(corpus.vocabulary.symbols)
    unknown = corpus.vocabulary.symbols.index(words.UNKNOWN)
    assert int((corpus.valid == unknown).sum()) == corpus.num_unknown[0] > 100
    whole = words.words(max_characters=300_000, max_vocabulary=None)
    assert whole.vocabulary.size > 2000 and whole.num_unknown[0] < corpus.num_unknown[0]
    inputs, targets = text.lanes(corpus.train, 8)
    assert inputs.size + text.num_left_over(len(corpus.train), 8) == len(corpus.train) - 1
    np.testing.assert_array_equal(inputs[1:], targets[:-1])


def test_parts_are_cut_at_line_ends_and_keep_every_word(tmp_path: Path) -> None:
    lines = [f"x{i} = <unk>({i}, äß)" for i in range(60)]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    corpus = words.words(tmp_path / "a.txt", fractions=(0.6, 0.2, 0.2), max_vocabulary=None)
    assert corpus.vocabulary.decode(corpus.train[:9]) == "x0 = <unk> ( 0 , äß ) \n"
    eos = corpus.vocabulary.symbols.index(words.END_OF_LINE)
    ends = [int((part == eos).sum()) for part in corpus[:3]]
    assert sum(ends) == 60 and all(part[-1] == eos for part in corpus[:3])
    assert [len(part) for part in corpus[:3]] == [9 * n for n in ends]
    assert abs(ends[0] - 36) <= 1 and abs(ends[1] - 12) <= 1
    assert corpus.num_unknown == (2 * ends[1], 2 * ends[2])  # the names and numbers of each line
    assert words.words(tmp_path, max_characters=400).source.num_characters == 400
    (tmp_path / "a.txt").write_text("one line and no other", encoding="utf-8")
    with pytest.raises(ValueError, match="lines of the text are too long"):
        words.words(tmp_path)


def test_vocabulary() -> None:
    counted = ["c", "a", "b", "a", "b", "c", "a", "<unk>"]
    assert words.build_vocabulary(counted).symbols == ("a", "b", "c", "<unk>")
    assert words.build_vocabulary(counted, 3).symbols == ("a", "b", "<unk>")
    assert words.build_vocabulary(counted[:3], 3).symbols == ("a", "b", "<unk>")
    assert words.build_vocabulary(counted[:3]).symbols == ("a", "b", "c", "<unk>")
    vocabulary = words.build_vocabulary(counted, 2)
    assert vocabulary.encode(iter(counted)).tolist() == [1, 0, 1, 0, 1, 1, 0, 1]
    assert vocabulary.count_unknown(counted) == 4 and vocabulary.decode([]) == ""
    assert vocabulary.encode([]).shape == (0,)
    with pytest.raises(ValueError, match="tokens must lie from 0 to 1, got 0 to 2"):
        vocabulary.decode([0, 2])
    with pytest.raises(ValueError, match="max_vocabulary must be at least 2, got 1"):
        words.build_vocabulary(counted, 1)
    with pytest.raises(ValueError, match="there are no words"):
        words.build_vocabulary([])


def test_the_command_line_knows_them(tmp_path: Path) -> None:
    folder = write(write(tmp_path, *PTB), *WIKI)
    penn = parts.TASKS["penn-treebank-words"](folder, verify=False)
    wiki = parts.TASKS["wikitext-2"](folder, verify=False)
    python = parts.TASKS["words"](None, max_characters=50_000, max_vocabulary=300)
    assert [tokens.num_classes for tokens in (penn, wiki, python)] == [6, 6, 300]
    for tokens in (penn, wiki, python):
        inputs, targets = tokens.train(2)
        assert inputs.shape == targets.shape and inputs.max() < tokens.num_classes
        assert tokens.vocabulary is not None and isinstance(tokens.vocabulary.decode(inputs[:, 0]), str)
        assert "words" in tokens.summary and "SHA-256" in tokens.summary
    for name in ("penn-treebank-words", "wikitext-2"):
        with pytest.raises(ValueError, match=f"task '{name}' needs --data"):
            parts.TASKS[name](None)
    characters = corpora.penn_treebank(folder, verify=False)
    assert characters.vocabulary.decode(characters.valid) == "the\n"
