import sys
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.corpus import open_corpus
from data_pipeline.errors import DataError
from data_pipeline.prepare import prepare
from tests.data_pipeline.corpora import texts_of, tiny, write_jsonl
from tests.requirements import require

TEXTS = [f"row {number}" for number in range(20)]


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'needs the package `datasets`: pip install "mega\[hf\]"'):
        open_corpus(DataConfig(source="huggingface", path="x"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A data set as `save_to_disk` leaves it."""
    require("datasets")
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(20))}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_saved_data_set(saved: Path, tmp_path: Path) -> None:
    config = tiny(saved, tmp_path / "cache", source="huggingface")
    prepared = prepare(config)
    held_out = texts_of(prepared, "held_out")
    assert sorted(texts_of(prepared, "train") + held_out) == sorted(TEXTS)
    assert prepared.held_out_documents == [f"{saved}:{TEXTS.index(text)}" for text in held_out]
    assert prepare(config).directory == prepared.directory


def test_saved_splits(tmp_path: Path) -> None:
    require("datasets")
    import datasets

    rows = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": rows, "extra": rows.select([3])}).save_to_disk(tmp_path / "saved")
    corpus = open_corpus(DataConfig(source="huggingface", path=str(tmp_path / "saved"), split="extra"))
    assert corpus.read(0).text == "row 3"
    with pytest.raises(DataError, match=r"cannot load split 'none' .*correct data\.path, data\.subset or data\.split"):
        open_corpus(DataConfig(source="huggingface", path=str(tmp_path / "saved"), split="none"))


def test_local_files(tmp_path: Path) -> None:
    require("datasets")
    write_jsonl(tmp_path / "rows" / "a.jsonl", TEXTS)
    cache = str(tmp_path / "cache")
    config = DataConfig(source="huggingface", path=str(tmp_path / "rows"), cache_directory=cache)
    corpus = open_corpus(config)
    assert [corpus.read(index).text for index in range(20)] == TEXTS
    assert len(set(corpus.document_hashes().tolist())) == 20
    assert corpus.fingerprint() == open_corpus(config).fingerprint()
    assert corpus.stamp() == open_corpus(config).stamp()


def test_errors_name_the_column(saved: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'body', only \['n', 'text'\]: set data\.text_field"):
        open_corpus(DataConfig(source="huggingface", path=str(saved), text_field="body"))
    corpus = open_corpus(DataConfig(source="huggingface", path=str(saved), text_field="n"))
    with pytest.raises(DataError, match=r"saved:0: column 'n' is no text but int: set data\.text_field"):
        corpus.document_hashes()
