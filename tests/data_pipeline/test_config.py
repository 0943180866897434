import subprocess
import sys

import pytest
from pydantic import ValidationError

from data_pipeline.config import DataConfig, TokenizerConfig


def test_defaults_are_the_quickstart_corpus() -> None:
    assert DataConfig().source == "stdlib"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "text"}, "needs path"),
        ({"source": "jsonl"}, "needs path"),
        ({"source": "huggingface"}, "needs path"),
        ({"source": "stdlib", "path": "x"}, "path has no meaning"),
        ({"source": "huggingface", "path": "x", "file_pattern": "*.py"}, "file_pattern has no meaning"),
        ({"source": "text", "path": "x", "file_pattern": "/etc/*"}, "must be relative"),
        ({"held_out_fraction": 1.0}, "less than 1"),
        ({"seq_len": 0}, "greater than or equal to 1"),
        ({"sequence_length": 5}, "Extra inputs"),
        ({"tokenizer": {"vocab_size": 100}}, "greater than or equal to 257"),
    ],
)
def test_bad_settings_say_why(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(**settings)


@pytest.mark.parametrize("section", [DataConfig, TokenizerConfig])
def test_every_field_is_documented(section: type[DataConfig]) -> None:
    assert all(field.description for field in section.model_fields.values())


def test_imports_without_numpy_tokenizers_and_torch() -> None:
    code = "import sys, data_pipeline.config; print([m for m in ('numpy', 'tokenizers', 'torch') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
