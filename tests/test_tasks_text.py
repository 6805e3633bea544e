"""Text: reading, vocabulary, split, lanes, and the corpora (real data where it lies at hand)."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jtrunc.experiments import parts
from jtrunc.tasks import corpora, text

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no folder shared/data beside the repository")


def write(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_txt", ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8"))
    return folder


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    folder = write(tmp_path, b_txt="2", a__z_txt="1", c_txt="3", B_txt="0", empty_txt="")
    write(folder / ".hidden", x_txt="no")
    assert text.read_text(folder) == "0123"
    assert text.read_text(folder, pattern="c*") == "3"
    assert text.read_text(folder / "b.txt") == "2"


def test_line_ends_and_unicode_are_kept(tmp_path: Path) -> None:
    content = "Zürich\r\nλₜ 𝔼\n"
    assert text.read_text(write(tmp_path, a_txt=content)) == content


@given(st.text(min_size=1), st.text())
def test_encode_and_decode(train: str, other: str) -> None:
    vocabulary = text.build_vocabulary(train, unknown=text.UNKNOWN)
    tokens = vocabulary.encode(train)
    assert tokens.dtype == np.int32 and vocabulary.decode(tokens) == train
    expected = "".join(c if c in train else text.UNKNOWN for c in other)
    assert vocabulary.decode(vocabulary.encode(other)) == expected
    assert vocabulary.count_unknown(other) == sum(c not in vocabulary.symbols for c in other)
    assert vocabulary.size == len(set(train) | {text.UNKNOWN})


def test_decode_takes_lists_and_nothing() -> None:
    vocabulary = text.build_vocabulary("abc")
    assert vocabulary.decode([2, 0]) == "ca" and vocabulary.decode([]) == ""
    assert vocabulary.encode("").shape == (0,)


@given(st.integers(2, 200), st.integers(1, 20))
def test_lanes_use_every_token_once(num_tokens: int, num_streams: int) -> None:
    tokens = np.arange(num_tokens)
    if num_tokens <= num_streams:
        with pytest.raises(ValueError, match="num_streams"):
            text.lanes(tokens, num_streams)
        return
    inputs, targets = text.lanes(tokens, num_streams)
    assert inputs.shape == targets.shape and inputs.dtype == targets.dtype == np.int32
    left_over = text.num_left_over(num_tokens, num_streams)
    assert 0 <= left_over < num_streams
    np.testing.assert_array_equal(inputs.T.ravel(), tokens[: num_tokens - 1 - left_over])
    np.testing.assert_array_equal(targets, inputs + 1)


@given(st.integers(60, 500), st.integers(1, 8), st.integers(1, 8))
def test_split_keeps_every_character(num_characters: int, first: int, second: int) -> None:
    whole = "".join(chr(97 + i % 26) for i in range(num_characters))
    parts = text.split(whole, (first / 20, second / 20, 1 - (first + second) / 20))
    assert "".join(parts) == whole
    assert abs(len(parts.train) - num_characters * first / 20) <= 0.5


def test_characters_of_a_file(tmp_path: Path) -> None:
    content = "abab" * 20 + "abc" * 6 + "d!"
    path = write(tmp_path, a_txt=content) / "a.txt"
    corpus = corpora.characters(path, fractions=(0.8, 0.18, 0.02))
    assert corpus.vocabulary == text.Vocabulary("ab" + text.UNKNOWN, text.UNKNOWN)
    assert corpus.num_unknown == (6, 2)
    assert corpus.vocabulary.decode(corpus.valid) == ("ab" + text.UNKNOWN) * 6
    assert corpus.source == corpora.Source("a.txt", 1, 100, hashlib.sha256(content.encode()).hexdigest())
    assert json.loads(json.dumps(corpus.source._asdict()))["num_characters"] == 100


def test_max_characters_takes_the_beginning(tmp_path: Path) -> None:
    folder = write(tmp_path, a_txt="ab" * 50, b_txt="c" * 900)
    corpus = corpora.characters(folder, max_characters=100)
    assert corpus.source.num_characters == 100 and corpus.source.num_files == 2
    assert corpus.vocabulary.symbols == "ab" + text.UNKNOWN


def test_standard_library() -> None:
    corpus = corpora.python_standard_library(200_000)
    again = corpora.python_standard_library(200_000)
    assert corpus.source == again.source and corpus.source.num_characters == 200_000
    parts = (corpus.train, corpus.valid, corpus.test)
    assert [len(part) for part in parts] == [180_000, 10_000, 10_000]
    whole = "".join(corpus.vocabulary.decode(part) for part in parts)
    if corpus.num_unknown == (0, 0):
        assert hashlib.sha256(whole.encode()).hexdigest() == corpus.source.sha256
    assert "def __init__(self" in whole
    assert corpus.source.num_files > 100


def test_standard_library_holds_nothing_but_itself(tmp_path: Path) -> None:
    names = ["zipfile.py", "ast.py", "site-packages.py", "_sysconfigdata__linux_.py", "my_module.py"]
    for name in names:
        (tmp_path / name).write_text("pass\n", encoding="utf-8")
    files = corpora._standard_library_files(tmp_path)
    assert [file.name for file in files] == ["ast.py", "zipfile.py"]
    assert "ast" in sys.stdlib_module_names


def test_penn_treebank_rule(tmp_path: Path) -> None:
    folder = write(tmp_path, **{"ptb.train_txt": " aer <unk> 's N \n the vilds\n",
                                "ptb.valid_txt": " the \n", "ptb.test_txt": " a\n\n"})  # fmt: skip
    corpus = corpora.penn_treebank(folder, verify=False)
    assert corpus.vocabulary.decode(corpus.train) == "aer_<unk>_'s_N\nthe_vilds\n"
    assert corpus.vocabulary.decode(corpus.valid) == "the\n"
    assert corpus.vocabulary.decode(corpus.test) == "a\n\n"
    assert corpus.vocabulary.unknown is None and corpus.num_unknown == (0, 0)


@needs_data
def test_penn_treebank_is_the_published_one() -> None:
    corpus = corpora.penn_treebank(DATA / "ptb")
    assert [len(part) for part in (corpus.train, corpus.valid, corpus.test)] == [5_017_482, 393_042, 442_423]
    assert corpus.vocabulary.size == 50
    assert corpus.vocabulary.decode(corpus.valid[:33]) == "consumers_may_want_to_move_their_"
    assert int((corpus.valid == corpus.vocabulary.symbols.index("\n")).sum()) == 3370


def test_any_shakespeare_is_read_and_its_hash_told(tmp_path: Path) -> None:
    folder = write(tmp_path, hamlet_txt="To be, or not to be" * 9, macbeth_txt="Tomorrow", notes_md="no")
    corpus = corpora.shakespeare(folder)
    content = "To be, or not to be" * 9 + "Tomorrow"
    assert corpus.source.num_files == 2 and corpus.source.num_characters == len(content)
    assert f"2 files, {len(content)} characters" in parts.TASKS["shakespeare"](folder).summary
    assert corpus.source.sha256 == hashlib.sha256(content.encode()).hexdigest()
    assert corpora.shakespeare(folder / "hamlet.txt", max_characters=100).source.num_characters == 100


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "tinyshakespeare/input.txt"])
def test_tinyshakespeare_must_be_the_one(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("To be, or not to be" * 9)
    for place in (path, tmp_path):
        with pytest.raises(ValueError, match=r"is not tinyshakespeare: .*86c4e6aa.*verify=False"):
            corpora.shakespeare(place)
    assert corpora.shakespeare(path, verify=False).source.num_files == 1
    path.rename(path.with_name("sonnets.txt"))
    assert name.count("/") or corpora.shakespeare(tmp_path).source.num_files == 1


def test_no_shakespeare(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.txt does not exist; .*gutenberg.*char-rnn"):
        corpora.shakespeare(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="task 'shakespeare' needs --data"):
        parts.TASKS["shakespeare"](None)
    with pytest.raises(ValueError, match=r"no file that matches '\*.txt'"):
        corpora.shakespeare(tmp_path)


@needs_data
def test_tinyshakespeare() -> None:
    corpus = corpora.shakespeare(DATA / "shakespeare")
    assert corpus.source.num_characters == 1_115_394
    assert corpus.source.sha256.startswith("86c4e6aa")
    assert corpus.vocabulary.size == 65 + 1
    inputs, targets = text.lanes(corpus.train, 64)
    assert inputs.size + text.num_left_over(len(corpus.train), 64) == len(corpus.train) - 1
    assert corpus.vocabulary.decode(inputs[:5, 0]) == "First"
    assert corpus.vocabulary.decode(targets[:5, 0]) == "irst "
