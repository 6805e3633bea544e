"""Downloads against a server on this machine that misbehaves, and tokens that are mapped from a file."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jtrunc.cli import main
from jtrunc.experiments import parts
from jtrunc.tasks import corpora, downloads, text, words
from jtrunc.tasks.downloads import CORPORA, DownloadError, File, fetch
from jtrunc.tasks.memory_map import memory_mapped
from tests.test_tasks_text import DATA, needs_data

CONTENT = b"to be or not to be,\nthat is the question.\n" * 2000


class Server:
    """What it serves, how it fails, and the ranges that it was asked for.

    Attributes:
      content: by path.
      cut_after: a connection ends after so many bytes, as often as the list is long.
      knows_ranges: whether it sends the rest of a file.
      statuses: refusals before anything is sent.
      asked: the Range header of each request.
    """

    def __init__(self) -> None:
        self.content = {"/book.txt": CONTENT}
        self.cut_after: list[int] = []
        self.knows_ranges = True
        self.statuses: list[int] = []
        self.asked: list[str | None] = []
        handler = type("Handler", (_Handler,), {"server_state": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http.server_port}{path}"

    def stop(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_state: Server

    def do_GET(self) -> None:
        state, wanted = self.server_state, self.headers.get("Range")
        state.asked.append(wanted)
        content = state.content.get(self.path)
        status = state.statuses.pop(0) if state.statuses else 200 if content is not None else 404
        if status != 200:
            self.send_error(status)
            return
        assert content is not None
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and state.knows_ranges else 0
        if start >= len(content) > 0 and start:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = start + state.cut_after.pop(0) if state.cut_after else len(content)
        self.wfile.write(content[start:end])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state = Server()
    row = File(state.url("/book.txt"), hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), "book.txt")
    monkeypatch.setitem(CORPORA, "book", (row,))
    yield state
    if state.thread.is_alive():
        state.stop()


def parts_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_file_is_fetched_once(server: Server, tmp_path: Path) -> None:
    assert fetch("book", tmp_path) == tmp_path / "book"
    assert (tmp_path / "book" / "book.txt").read_bytes() == CONTENT
    fetch("book", tmp_path)
    assert server.asked == [None] and parts_of(tmp_path) == ["book.txt"]


def test_a_cut_connection_is_resumed_where_it_ended(server: Server, tmp_path: Path) -> None:
    server.cut_after = [1000, 30_000]
    fetch("book", tmp_path, wait=0.0)
    assert server.asked == [None, "bytes=1000-", "bytes=31000-"]
    assert (tmp_path / "book" / "book.txt").read_bytes() == CONTENT


def test_a_later_call_resumes_too(server: Server, tmp_path: Path) -> None:
    server.cut_after = [5000]
    with pytest.raises(DownloadError, match=r"connection was cut after 5,000 of 84,000 bytes"):
        fetch("book", tmp_path, attempts=1)
    assert not (tmp_path / "book" / "book.txt").exists() and parts_of(tmp_path) == [".book.txt.part"]
    fetch("book", tmp_path, attempts=1)
    assert server.asked[1:] == ["bytes=5000-"] and parts_of(tmp_path) == ["book.txt"]


def test_a_server_without_ranges_begins_again(server: Server, tmp_path: Path) -> None:
    server.cut_after, server.knows_ranges = [1000], False
    fetch("book", tmp_path, wait=0.0)
    assert len(server.asked) == 2 and (tmp_path / "book" / "book.txt").read_bytes() == CONTENT


def test_a_part_that_was_whole_already(server: Server, tmp_path: Path) -> None:
    """A kill between the last byte and the rename."""
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / ".book.txt.part").write_bytes(CONTENT)
    fetch("book", tmp_path, attempts=1)
    assert server.asked == ["bytes=84000-"] and parts_of(tmp_path) == ["book.txt"]


def test_the_rest_of_another_file_is_thrown_away_and_all_of_it_fetched(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / ".book.txt.part").write_bytes(b"x" * 1000)
    fetch("book", tmp_path, wait=0.0)
    assert server.asked == ["bytes=1000-", None]
    assert (tmp_path / "book" / "book.txt").read_bytes() == CONTENT


def test_a_wrong_hash_is_rejected_and_nothing_is_kept(server: Server, tmp_path: Path) -> None:
    server.content["/book.txt"] = CONTENT[:-1] + b"!"
    with pytest.raises(DownloadError, match="does not match the known hash") as caught:
        fetch("book", tmp_path, wait=0.0)
    row = CORPORA["book"][0]
    for part in (row.url, str(tmp_path / "book" / "book.txt"), row.sha256, "0.1 MB"):
        assert part in str(caught.value)
    assert len(server.asked) == 1 and parts_of(tmp_path) == []


def test_a_server_that_is_down_with_and_without_the_file(server: Server, tmp_path: Path) -> None:
    fetch("book", tmp_path / "kept")
    server.stop()
    assert fetch("book", tmp_path / "kept") == tmp_path / "kept" / "book"
    with pytest.raises(DownloadError, match="Connection refused") as caught:
        fetch("book", tmp_path / "new", wait=0.0)
    row = CORPORA["book"][0]
    for part in (row.url, str(tmp_path / "new" / "book" / "book.txt"), row.sha256):
        assert part in str(caught.value)
    (tmp_path / "kept" / "book" / "book.txt").write_bytes(CONTENT[:-1])
    with pytest.raises(DownloadError, match="the file that is there has another hash"):
        fetch("book", tmp_path / "kept", wait=0.0)


def test_a_damaged_file_is_fetched_again(server: Server, tmp_path: Path) -> None:
    fetch("book", tmp_path)
    (tmp_path / "book" / "book.txt").write_bytes(CONTENT.replace(b"be", b"bE", 1))
    fetch("book", tmp_path)
    assert (tmp_path / "book" / "book.txt").read_bytes() == CONTENT and len(server.asked) == 2


def test_a_server_in_trouble_is_asked_again_and_a_refusal_is_not(server: Server, tmp_path: Path) -> None:
    server.statuses = [503, 429]
    fetch("book", tmp_path, wait=0.0)
    assert len(server.asked) == 3
    del server.content["/book.txt"]
    with pytest.raises(DownloadError, match="404"):
        fetch("book", tmp_path / "new", wait=0.0)
    assert len(server.asked) == 4


def test_an_archive_is_unpacked_and_its_members_are_checked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("inside/book", CONTENT)
    packed = server.content["/book.zip"] = buffer.getvalue()
    row = File(server.url("/book.zip"), hashlib.sha256(packed).hexdigest(), 1, "book.zip", ("inside/book",))
    monkeypatch.setitem(CORPORA, "packed", (row,))
    member = fetch("packed", tmp_path) / "book"
    assert member.read_bytes() == CONTENT and parts_of(tmp_path) == ["book", "book.zip"]
    member.write_bytes(CONTENT[:-5])
    fetch("packed", tmp_path)
    assert member.read_bytes() == CONTENT and len(server.asked) == 1


def test_unknown_corpora_and_a_missing_pooch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown corpus 'text9'; known: penn-treebank, "):
        fetch("text9")
    with pytest.raises(ValueError, match="attempts must be at least 1, got 0"):
        fetch("text8", tmp_path, attempts=0)
    with pytest.raises(ValueError, match="`wait` must not be negative, not -1"):
        fetch("text8", tmp_path, wait=-1)
    monkeypatch.setitem(__import__("sys").modules, "pooch", None)
    with pytest.raises(ImportError, match=r"pip install 'jtrunc\[experiments\]'"):
        fetch("text8", tmp_path)


@needs_data
def test_hashes_and_sizes_of_the_table() -> None:
    files = {path.name: path for path in DATA.rglob("*.txt")}
    for row in (*CORPORA["penn-treebank"], *CORPORA["shakespeare"]):
        content = files[row.name].read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (row.size, row.sha256)


def test_the_command_line_downloads(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(CORPORA, "shakespeare", CORPORA["book"])
    cache = tmp_path / "cache"
    tokens = parts.TASKS["shakespeare"](cache, download=True)
    assert (cache / "shakespeare" / "book.txt").read_bytes() == CONTENT
    assert len(list((cache / "tokens").iterdir())) == 1
    assert isinstance(tokens.train(2).inputs.base.base, np.memmap)
    server.stop()
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
    command = ["train", "--task", "shakespeare:download=true", "--data", str(tmp_path / "elsewhere")]
    assert main([*command, "--output", str(tmp_path / "run")]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown[-1].startswith("jtrunc: error: could not download http://127.0.0.1")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_bytes(CONTENT[:6000])
    return path


def count_calls(load: Any) -> tuple[Any, list[int]]:
    """A loader of the same name, options and results, and how often it was called."""
    calls: list[int] = []

    def counted(path: Any, *, max_characters: int | None = None) -> Any:
        calls.append(1)
        return load(path, max_characters=max_characters)

    return counted, calls


@pytest.mark.parametrize("load", [corpora.characters, words.words])
def test_mapped_tokens_are_those_of_the_loader(load: Any, book: Path, tmp_path: Path) -> None:
    with book.open("a") as file:
        file.write("\nὕστερον\n" * 3)
    plain = load(book)
    for _ in range(2):
        mapped = memory_mapped(load, book, tmp_path / "tokens")
        assert type(mapped) is type(plain) and mapped[3:] == plain[3:]
        for found, expected in zip(mapped[:3], plain[:3], strict=True):
            assert isinstance(found.base, np.memmap) and found.dtype == np.int32
            np.testing.assert_array_equal(found, expected)


def test_a_text_is_encoded_once_for_its_content_and_options(book: Path, tmp_path: Path) -> None:
    load, calls = count_calls(corpora.characters)
    first = memory_mapped(load, book, tmp_path / "tokens")
    memory_mapped(load, book, tmp_path / "tokens", max_characters=None)
    assert len(calls) == 1
    assert len(memory_mapped(load, book, tmp_path / "tokens", max_characters=4000).train) == 3600
    assert len(calls) == 2
    book.write_bytes(CONTENT[:6000].replace(b"that", b"thaT", 1))
    assert memory_mapped(load, book, tmp_path / "tokens").source != first.source
    assert len(calls) == 3 and len(list((tmp_path / "tokens").iterdir())) == 3


def test_tokens_may_lie_beside_their_text(book: Path, tmp_path: Path) -> None:
    folder = book.parent / "tokens"
    for _ in range(2):
        memory_mapped(corpora.characters, book.parent, folder)
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("load", [corpora.text8, corpora.penn_treebank, words.wikitext2])
def test_a_text_that_is_missing_is_what_the_loader_says(load: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist; give the .* tasks\.downloads\.fetch"):
        memory_mapped(load, tmp_path / "nowhere", tmp_path / "tokens")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["train.npy", "test.npy", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damaged_tokens_are_noticed_and_made_anew(book: Path, tmp_path: Path, name: str, damage: str) -> None:
    load, calls = count_calls(corpora.characters)
    expected = np.array(memory_mapped(load, book, tmp_path / "tokens").test)
    (file,) = (tmp_path / "tokens").rglob(name)
    content = bytearray(file.read_bytes())
    if damage == "delete":
        file.unlink()
    else:
        content[-9] ^= 1
        file.write_bytes(content if damage == "flip" else content[:-9])
    with pytest.warns(RuntimeWarning, match=r"tokens in .* are damaged .*made anew"):
        np.testing.assert_array_equal(memory_mapped(load, book, tmp_path / "tokens").test, expected)
    assert len(calls) == 2
    memory_mapped(load, book, tmp_path / "tokens")
    assert len(calls) == 2 and len(list((tmp_path / "tokens").iterdir())) == 1


def test_tokens_that_cannot_be_written_leave_nothing(
    book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        memory_mapped(corpora.characters, book, tmp_path / "tokens")
    assert list((tmp_path / "tokens").iterdir()) == []


def test_lanes_of_mapped_tokens_copy_nothing(book: Path, tmp_path: Path) -> None:
    tokens = memory_mapped(corpora.characters, book, tmp_path / "tokens").train
    inputs, targets = text.lanes(tokens, 8)
    assert np.shares_memory(inputs, tokens) and np.shares_memory(targets, tokens)
    assert not inputs.flags.writeable
    copied = text.lanes(tokens.astype(np.int64), 8)
    np.testing.assert_array_equal(inputs, copied.inputs)
    np.testing.assert_array_equal(targets, copied.targets)
    assert copied.inputs.dtype == np.int32
