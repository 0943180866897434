from pathlib import Path

import numpy as np
import pytest

from data_pipeline import file_source
from data_pipeline.config import DataConfig
from data_pipeline.corpus import Corpus, open_corpus
from data_pipeline.errors import DataError
from tests.data_pipeline.corpora import write_jsonl


def _documents(corpus: Corpus) -> dict[str, str]:
    documents = [corpus.read(index) for index in range(len(corpus.document_hashes()))]
    return {document.name: document.text for document in documents}


def _text(path: Path, **settings: object) -> Corpus:
    return open_corpus(DataConfig(source="text", path=str(path), **settings))


def _jsonl(path: Path, **settings: object) -> Corpus:
    return open_corpus(DataConfig(source="jsonl", path=str(path), **settings))


def test_text_folder_and_pattern(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a.txt", "c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() + b"\r\n\xe2\x98\x83")
    assert _documents(_text(tmp_path)) == {"a.txt": "a.txt\r\n☃", "b/2.txt": "b/2.txt\r\n☃"}
    assert list(_documents(_text(tmp_path, file_pattern="*.md"))) == ["c.md"]
    assert list(_documents(_text(tmp_path / "a.txt"))) == ["a.txt"]


def test_text_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such file or folder: correct data\.path"):
        _text(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no file matches '\*\*/\*\.txt': correct data\.path or data\.file_pattern"):
        _text(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match=r"bad\.txt: byte 3 is not utf-8: convert the file"):
        _documents(_text(tmp_path))


def test_fingerprint_follows_content_and_relative_path_only(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("x")
    first, second = _text(tmp_path / "one"), _text(tmp_path / "two")
    assert first.fingerprint() == second.fingerprint()
    assert first.stamp() != second.stamp()
    before = (second.stamp(), second.fingerprint())
    (tmp_path / "two" / "a.txt").write_text("y")
    assert second.stamp() != before[0]
    assert second.fingerprint() != before[1]
    (tmp_path / "one" / "a.txt").rename(tmp_path / "one" / "b.txt")
    assert _text(tmp_path / "one").fingerprint() != before[1]


def test_stdlib_is_python_sources_without_tests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ["os.py", "json/decoder.py", "test/test_os.py", "json/tests/test_x.py", "site-packages/numpy/a.py", "x.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n")
    monkeypatch.setattr(file_source.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert _documents(open_corpus(DataConfig())) == {
        "json/decoder.py": "json/decoder.py",
        "latin.py": "# -*- coding: latin-1 -*-\n# é\n",
        "os.py": "os.py",
    }


def test_stdlib_can_be_narrowed_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("a.py", "json/b.py", "json/tests/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("pass")
    monkeypatch.setattr(file_source.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    corpus = open_corpus(DataConfig(file_pattern="json/**/*.py"))
    assert [corpus.read(index).name for index in range(len(corpus.document_hashes()))] == ["json/b.py"]
    with pytest.raises(DataError, match="no source matches 'xml/"):
        open_corpus(DataConfig(file_pattern="xml/*.py"))


def test_stdlib_of_this_interpreter_is_there() -> None:
    names = open_corpus(DataConfig()).document_hashes()
    assert len(names) > 300
    assert len(np.unique(names)) == len(names)


def test_stdlib_errors_name_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(file_source.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match=r"has no \.py sources of its standard library: set data\.source"):
        open_corpus(DataConfig())
    (tmp_path / "a.py").write_bytes(b"# coding: klingon\n")
    with pytest.raises(DataError, match=r"a\.py: unknown encoding: klingon.*damaged"):
        _documents(open_corpus(DataConfig()))
    (tmp_path / "a.py").write_bytes(b"# fine\n\n\n\xff\n")
    with pytest.raises(DataError, match=r"a\.py: byte 9 is not utf-8"):
        _documents(open_corpus(DataConfig()))


def test_jsonl_reads_lines_in_any_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["first", "zweites ☃"])
    (tmp_path / "b.jsonl").write_text('\n{"body": "no", "text": "third"}\r\n  \n{"text": "fourth"}')
    assert _documents(_jsonl(tmp_path)) == {
        "a.jsonl:1": "first",
        "a.jsonl:2": "zweites ☃",
        "b.jsonl:2": "third",
        "b.jsonl:4": "fourth",
    }


def test_jsonl_identity_is_the_text(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["one", "two", "one"])
    write_jsonl(tmp_path / "b.jsonl", ["new", "two", "one"])
    first = _jsonl(tmp_path / "a.jsonl").document_hashes()
    second = _jsonl(tmp_path / "b.jsonl").document_hashes()
    assert first[0] == first[2] == second[2]
    assert first[1] == second[1] != first[0]


def test_jsonl_fingerprint_follows_the_field(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["one"])
    first, second = _jsonl(tmp_path), _jsonl(tmp_path, text_field="body")
    assert first.fingerprint() != second.fingerprint()
    assert first.stamp() != second.stamp()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', r"a\.jsonl:2: not JSON \(.*\): correct or remove this line"),
        (b"[1]", r"a\.jsonl:2: a JSON object is needed, this is list"),
        (b'{"body": "x"}', r"a\.jsonl:2: no field 'text', only \['body'\]: set data\.text_field"),
        (b'{"text": 5}', r"a\.jsonl:2: field 'text' is no text but int: set data\.text_field"),
        (b'{"text": "\xff"}', r"a\.jsonl:2: byte 10 is not utf-8"),
        (rb'{"text": "\ud800"}', r"a\.jsonl:2: the text holds half a surrogate pair"),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        _jsonl(tmp_path).document_hashes()
