"""Documents that are rows of a Hugging Face data set; the only module that imports `datasets` (the extra `hf`)."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import DataConfig
from data_pipeline.corpus import Document, document_hash
from data_pipeline.errors import DataError
from data_pipeline.files import sha256_of_json

_ROWS_AT_ONCE = 1000


class HuggingFaceCorpus:
    """One document a row; its identity is its text, so equal texts share a side of the split."""

    def __init__(self, config: DataConfig) -> None:
        assert config.path is not None, "the config requires a path for this source"
        self._name, self._field = config.path, config.text_field
        self._rows = _load(config)
        if self._field not in self._rows.column_names:
            raise DataError(
                f"{self._name}: no column {self._field!r}, only {sorted(self._rows.column_names)}: set data.text_field"
            )
        self._rows = self._rows.select_columns([self._field])

    def stamp(self) -> str:
        files = [Path(file["filename"]) for file in self._rows.cache_files]
        if not files:  # Held in memory (a setting of `datasets`): nothing but the content tells.
            return self.fingerprint()
        stats = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        return sha256_of_json([self._name, self._field, len(self._rows), stats])

    def fingerprint(self) -> str:
        return hashlib.sha256(self.document_hashes().astype("<u8").tobytes()).hexdigest()

    def document_hashes(self) -> NDArray[np.uint64]:
        hashes: list[int] = []
        for batch in self._rows.iter(batch_size=_ROWS_AT_ONCE):
            for text in batch[self._field]:
                name = self._document_name(len(hashes))
                hashes.append(document_hash(self._checked(text, name), name=name))
        return np.array(hashes, np.uint64)

    def read(self, index: int) -> Document:
        name = self._document_name(index)
        return Document(name=name, text=self._checked(self._rows[index][self._field], name))

    def _document_name(self, index: int) -> str:
        return f"{self._name}:{index}"

    def _checked(self, text: Any, name: str) -> str:
        if not isinstance(text, str):
            raise DataError(f"{name}: column {self._field!r} is no text but {type(text).__name__}: set data.text_field")
        return text


def _load(config: DataConfig) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError('source = "huggingface" needs the package `datasets`: pip install "mega[hf]"') from error
    assert config.path is not None, "the config requires a path for this source"
    path = Path(config.path).expanduser()
    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    try:
        if not saved:
            source = str(path) if path.exists() else config.path
            downloads = str(Path(config.cache_directory) / "huggingface")
            return datasets.load_dataset(source, config.subset, split=config.split, cache_dir=downloads)
        loaded = datasets.load_from_disk(str(path))
        return loaded[config.split] if isinstance(loaded, datasets.DatasetDict) else loaded
    # `datasets` raises whatever its readers, its hub client or the network raise: there is no common base class.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{config.path}: `datasets` cannot load split {config.split!r} ({reason}): correct data.path, data.subset "
            "or data.split; a name on the hub needs a network"
        ) from error
