"""`mega data prepare|info`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from launcher.output import Output
from launcher.verb import ConfigFiles, Overrides

if TYPE_CHECKING:
    from data_pipeline.prepared import PreparedData


def prepare(out: Output, files: ConfigFiles, overrides: Overrides = None) -> int:
    """Build the data set that a configuration names: corpus, tokenizer, token shards. `mega train` does it too."""
    from data_pipeline.prepare import prepare as prepare_data
    from launcher.config import load_run_config

    config = load_run_config(files, overrides or ()).config
    _describe(out, prepare_data(config.data, progress=out.progress))
    return 0


def info(out: Output, files: ConfigFiles, overrides: Overrides = None) -> int:
    """Describe the prepared data set of a configuration, after checking the hash of every shard."""
    from data_pipeline.prepare import open_prepared
    from launcher.config import load_run_config

    config = load_run_config(files, overrides or ()).config
    _describe(out, open_prepared(config.data))
    return 0


VERBS: dict[str, Callable[..., int]] = {"prepare": prepare, "info": info}


def _describe(out: Output, prepared: PreparedData) -> None:
    from data_pipeline.prepared import compression_baselines

    manifest, baselines = prepared.manifest, compression_baselines(prepared)
    out.say(f"{prepared.directory}: {manifest.source}, vocabulary {manifest.vocab_size:,}, key {manifest.key[:16]}")
    out.table(
        ("split", "documents", "bytes", "tokens", "shards"),
        [
            (name, f"{split.num_documents:,}", f"{split.num_bytes:,}", f"{split.num_tokens:,}", f"{len(split.shards)}")
            for name, split in manifest.splits.items()
        ],
    )
    for name, value in baselines.items():
        if name.endswith("_bits_per_byte"):
            out.say(f"held-out text, {name.replace('_', ' ')}: {value:.3f}")
    out.result(
        {
            "directory": str(prepared.directory),
            "manifest_hash": prepared.manifest_hash,
            "manifest": manifest.model_dump(mode="json"),
            "baselines": baselines,
        }
    )
