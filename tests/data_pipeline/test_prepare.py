import subprocess
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data_pipeline import files
from data_pipeline.config import DataConfig, TokenizerConfig
from data_pipeline.corpus import document_hash
from data_pipeline.dataset import PackedDataset
from data_pipeline.errors import DataError
from data_pipeline.file_source import FileCorpus
from data_pipeline.prepare import open_prepared, prepare
from data_pipeline.prepared import PreparedData, compression_baselines, load_prepared
from tests.data_pipeline.corpora import NUM_FILES, document_text, texts_of, tiny, write_jsonl, write_text_folder


def test_every_document_is_in_one_split(small_data: PreparedData, small_config: DataConfig) -> None:
    train, held_out = texts_of(small_data, "train"), texts_of(small_data, "held_out")
    assert sorted(train + held_out) == sorted(document_text(number) for number in range(NUM_FILES))
    folder = Path(small_config.path or "")
    assert [(folder / name).read_text() for name in small_data.held_out_documents] == held_out
    for split, texts in (("train", train), ("held_out", held_out)):
        manifest = small_data.manifest.splits[split]
        assert manifest.num_documents == len(texts) > 0
        assert manifest.num_bytes == sum(len(text.encode()) for text in texts)
        assert manifest.num_tokens == len(small_data.stream(split)) == sum(s.num_tokens for s in manifest.shards)
        assert len(manifest.shards) > 1
    assert small_data.manifest.vocab_size == len(small_data.token_bytes) <= 300


def test_documents_are_mixed(small_data: PreparedData) -> None:
    numbers = [int(text.split()[1].rstrip(":")) for text in texts_of(small_data, "train")]
    assert numbers != sorted(numbers)


def test_a_second_time_opens_what_is_there(config: DataConfig) -> None:
    first = prepare(config)
    times = {path: path.stat().st_mtime_ns for path in first.directory.iterdir()}
    stages: list[str] = []
    second = prepare(config, progress=lambda stage, fraction: stages.append(stage))
    assert stages == ["reading the corpus", "checking the shards", "ready"]
    assert second.directory == first.directory
    assert times == {path: path.stat().st_mtime_ns for path in first.directory.iterdir()}
    assert open_prepared(config).manifest == open_prepared(first.directory).manifest == first.manifest


def test_progress_is_told(config: DataConfig) -> None:
    told: list[tuple[str, float]] = []
    prepare(config, progress=lambda stage, fraction: told.append((stage, fraction)))
    assert [stage for stage, _ in told] == [
        "reading the corpus",
        "training the tokenizer",
        "tokenizing train documents",
        "tokenizing held-out documents",
        "compressing held-out text for comparison",
        "checking the shards",
        "ready",
    ]
    assert all(0 <= fraction <= 1 for _, fraction in told)


def test_the_same_content_gives_the_same_manifest_anywhere(config: DataConfig, tmp_path: Path) -> None:
    write_text_folder(tmp_path / "copy", 10)
    other = tiny(tmp_path / "copy", tmp_path / "other-cache")
    assert prepare(other).manifest_hash == prepare(config).manifest_hash


def test_settings_that_change_no_file_share_a_data_set(config: DataConfig) -> None:
    same = config.model_copy(update={"seq_len": 7, "document_mask": False})
    assert prepare(same).directory == prepare(config).directory
    for changes in ({"held_out_fraction": 0.5}, {"shard_tokens": 9}, {"tokenizer": TokenizerConfig(vocab_size=258)}):
        assert prepare(config.model_copy(update=changes)).directory != prepare(config).directory


def test_a_changed_corpus_is_prepared_anew_and_documents_keep_their_side(config: DataConfig) -> None:
    before = prepare(config)
    write_text_folder(Path(config.path or ""), 14)
    after = prepare(config)
    assert after.manifest_hash != before.manifest_hash
    assert set(before.held_out_documents) <= set(after.held_out_documents)
    old = {document_text(number) for number in range(10)}
    assert set(texts_of(before, "train")) == set(texts_of(after, "train")) & old


def test_an_unchanged_corpus_is_not_read_again(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(config)

    def read_it_all(self: FileCorpus) -> str:
        raise AssertionError("the corpus was read")

    monkeypatch.setattr(FileCorpus, "fingerprint", read_it_all)
    assert prepare(config).directory == open_prepared(config).directory == prepared.directory
    (Path(config.path or "") / "new.txt").write_text("new")
    with pytest.raises(AssertionError, match="the corpus was read"):
        prepare(config)


def test_equal_records_share_a_side(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [f"text {number % 5}" for number in range(50)])
    prepared = prepare(tiny(tmp_path, tmp_path / "cache", source="jsonl"))
    train, held_out = texts_of(prepared, "train"), texts_of(prepared, "held_out")
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 50


def test_at_least_one_document_is_held_out(config: DataConfig) -> None:
    assert len(prepare(config.model_copy(update={"held_out_fraction": 1e-9})).held_out_documents) == 1


def test_nothing_held_out_on_request(config: DataConfig) -> None:
    prepared = prepare(config.model_copy(update={"held_out_fraction": 0.0}))
    assert prepared.held_out_documents == []
    assert compression_baselines(prepared) == {}
    with pytest.raises(DataError, match=r"nothing is held out: raise data\.held_out_fraction"):
        PackedDataset(prepared, "held_out", 16)


def test_empty_documents_are_counted_and_left_out(config: DataConfig) -> None:
    (Path(config.path or "") / "empty.txt").touch()
    prepared = prepare(config.model_copy(update={"held_out_fraction": 0.0}))
    assert prepared.manifest.num_empty_documents == 1
    assert prepared.manifest.splits["train"].num_documents == 10
    assert sorted(texts_of(prepared, "train")) == sorted(document_text(number) for number in range(10))


@pytest.mark.parametrize(
    ("texts", "fraction", "message"),
    [
        ([], 0.1, r"no document in it: correct data\.path"),
        (["alone"], 0.1, r"all 1 documents would be held out .*set data\.held_out_fraction = 0"),
        ([""], 0.0, r"every training document is empty: correct data\.path"),
    ],
)
def test_a_corpus_without_text_says_so(tmp_path: Path, texts: list[str], fraction: float, message: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts)
    config = tiny(tmp_path, tmp_path / "cache", source="jsonl", held_out_fraction=fraction)
    with pytest.raises(DataError, match=message):
        prepare(config)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith("jsonl-") and path.is_dir()]


def test_held_out_documents_without_text_say_so(tmp_path: Path) -> None:
    texts = [str(number) for number in range(100)]
    kept = [text for text in texts if document_hash(text, name="x") > document_hash("", name="x")]
    write_jsonl(tmp_path / "a.jsonl", ["", *kept])
    config = tiny(tmp_path, tmp_path / "cache", source="jsonl", held_out_fraction=1e-9)
    with pytest.raises(DataError, match=r"every held-out document is empty: raise data\.held_out_fraction"):
        prepare(config)


def test_baselines_are_bits_per_byte_of_the_held_out_text(config: DataConfig) -> None:
    prepared = prepare(config)
    baselines = compression_baselines(prepared)
    assert baselines["num_bytes"] == prepared.manifest.splits["held_out"].num_bytes
    text = "".join(texts_of(prepared, "held_out")).encode()
    for tool in ("gzip", "xz"):
        size = len(subprocess.run([tool, "-9c"], input=text, capture_output=True, timeout=60, check=True).stdout)
        assert baselines[f"{tool}_bits_per_byte"] == pytest.approx(8 * size / len(text), rel=0.02)


def test_given_tokenizer(config: DataConfig, small_data: PreparedData) -> None:
    prepared = prepare(config.model_copy(update={"tokenizer": TokenizerConfig(path=str(small_data.tokenizer_path))}))
    assert prepared.manifest.tokenizer_sha256 == small_data.manifest.tokenizer_sha256
    assert prepared.tokenizer_path.read_bytes() == small_data.tokenizer_path.read_bytes()
    assert len(texts_of(prepared, "train")) + len(texts_of(prepared, "held_out")) == 10


def test_a_given_tokenizer_that_loses_text_is_refused(config: DataConfig, tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "fox": 1, "<|endoftext|>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "words.json"))
    given = TokenizerConfig(path=str(tmp_path / "words.json"))
    with pytest.raises(DataError, match=r"words\.json: this tokenizer keeps \d+ of \d+ bytes .*byte-level one"):
        prepare(config.model_copy(update={"tokenizer": given}))


def test_a_large_vocabulary_takes_wide_shards(config: DataConfig, tmp_path: Path) -> None:
    tokens = [*(f"unused {number}" for number in range(2**16)), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: id_ for id_, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(tmp_path / "large.json"))
    large = TokenizerConfig(path=str(tmp_path / "large.json"), end_of_text="<end>")
    prepared = prepare(config.model_copy(update={"tokenizer": large}))
    assert prepared.manifest.token_dtype == "uint32"
    assert prepared.manifest.eot_id == len(tokens)
    assert sorted(texts_of(prepared, "train") + texts_of(prepared, "held_out")) == sorted(
        document_text(number) for number in range(10)
    )


def test_a_corpus_that_changes_meanwhile_is_refused(config: DataConfig) -> None:
    def change(stage: str, fraction: float) -> None:
        if stage == "tokenizing held-out documents":
            write_text_folder(Path(config.path or "") / "a", 1)
            (Path(config.path or "") / "a" / "0.txt").write_text("changed")

    with pytest.raises(DataError, match="the corpus changed while it was read: run this again"):
        prepare(config, progress=change)
    assert texts_of(prepare(config), "train")


def test_a_corpus_that_changes_after_its_fingerprint_is_refused(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint = FileCorpus.fingerprint

    def then_change(self: FileCorpus) -> str:
        result = fingerprint(self)
        (Path(config.path or "") / "a" / "0.txt").write_text("changed")
        return result

    monkeypatch.setattr(FileCorpus, "fingerprint", then_change)
    with pytest.raises(DataError, match="the corpus changed while it was read: run this again"):
        prepare(config)


def test_damage_is_named_with_the_mend(config: DataConfig) -> None:
    directory = prepare(config).directory
    names = ["train-00000.bin", "held_out-00000.bin", "tokenizer.json", "token_bytes.npy", "held_out_documents.json"]
    for name in names:
        path = directory / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        for use in (prepare, open_prepared):
            with pytest.raises(DataError, match=rf"{name}: the content does not match .*: delete .*mega data prepare"):
                use(config)
        path.unlink()
        with pytest.raises(DataError, match=rf"{name}: this (file|shard) is missing: delete .*mega data prepare"):
            open_prepared(config, verify=False)
        path.write_bytes(content)
    assert load_prepared(directory).manifest == open_prepared(config).manifest


@pytest.mark.parametrize("content", [b"{", b'{"gzip_bits_per_byte": "many"}', b"[]", None])
def test_damaged_baselines_are_named_when_the_data_set_is_opened(config: DataConfig, content: bytes | None) -> None:
    baselines = prepare(config).directory / "baselines.json"
    baselines.unlink() if content is None else baselines.write_bytes(content)
    with pytest.raises(
        DataError, match=r"baselines\.json: (these are no figures|No such file).*: delete .*data prepare"
    ):
        open_prepared(config)


def test_a_folder_that_is_no_data_set(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json: No such file.*: this folder is no prepared data set"):
        open_prepared(tmp_path)
    directory = prepare(config).directory
    manifest = directory / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:50])
    with pytest.raises(DataError, match=r"manifest\.json: damaged or of another version .*: delete the folder"):
        open_prepared(directory)


def test_a_full_disk_is_told_in_one_line(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.Path, "write_bytes", full)
    with pytest.raises(DataError, match=r"cache: No space left on device: mend this, or set .*data\.cache_directory"):
        prepare(config)


def test_a_cache_that_cannot_be_made_is_named(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/fingerprints.*: Not a directory: mend this"):
        prepare(config.model_copy(update={"cache_directory": str(tmp_path / "file")}))


def test_errors_end_a_command_with_1() -> None:
    assert DataError.exit_code == 1


def test_token_bytes_are_of_the_vocabulary(small_data: PreparedData) -> None:
    assert small_data.token_bytes.dtype == np.int32
    assert small_data.token_bytes[small_data.manifest.eot_id] == 0
    assert (np.delete(small_data.token_bytes, small_data.manifest.eot_id) > 0).all()
