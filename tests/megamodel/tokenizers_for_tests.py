"""A small byte-level tokenizer, trained on the spot."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "import os\nimport sys\n",
    "class Node:\n    def __init__(self):\n        pass\n",
]


def write_small_tokenizer(file: Path, *, end_of_text: str = "<|endoftext|>", vocab_size: int = 300) -> Path:
    """A tokenizer.json with all bytes, some merges, and one special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_text],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.save(str(file))
    return file
