"""A small corpus and its prepared data set, made once a session."""

from pathlib import Path

import pytest

from data_pipeline.config import DataConfig, TokenizerConfig
from data_pipeline.prepare import prepare
from data_pipeline.prepared import PreparedData
from tests.data_pipeline.corpora import NUM_FILES, tiny, write_text_folder


@pytest.fixture(scope="session")
def small_config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Text files, a small vocabulary, and shards so short that documents and rows cross them."""
    root = tmp_path_factory.mktemp("small")
    write_text_folder(root / "corpus", NUM_FILES)
    return DataConfig(
        source="text",
        path=str(root / "corpus"),
        held_out_fraction=0.2,
        cache_directory=str(root / "cache"),
        seq_len=16,
        shard_tokens=50,
        tokenizer=TokenizerConfig(vocab_size=300),
    )


@pytest.fixture(scope="session")
def small_data(small_config: DataConfig) -> PreparedData:
    """Shared by tests that only read."""
    return prepare(small_config)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Ten files, to be prepared by the test itself."""
    write_text_folder(tmp_path / "corpus", 10)
    return tiny(tmp_path / "corpus", tmp_path / "cache")
