from pathlib import Path
from typing import Literal, Self

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from launcher.config_loading import Complaint, LoadedConfig, load_config
from launcher.errors import ConfigError

_SECTION = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Optimizer(BaseModel):
    model_config = _SECTION

    lr: float = Field(default=0.1, gt=0)
    """Step size."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decays."""


class Train(BaseModel):
    model_config = _SECTION

    steps: int = Field(default=10, gt=0)
    """Steps."""
    batch: int = Field(default=8, gt=0)
    """Samples in a step."""
    micro: int = Field(default=8, gt=0)
    """Samples at once."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format."""
    every: int | Literal["auto"] = "auto"
    """Steps between."""
    optimizer: Optimizer = Field(default_factory=Optimizer)
    """The optimizer."""

    @model_validator(mode="after")
    def _micro_fits(self) -> Self:
        if self.batch % self.micro:
            raise ValueError(f"batch ({self.batch}) must be a multiple of micro ({self.micro})")
        return self


class Data(BaseModel):
    model_config = _SECTION

    seq_len: int = Field(default=4, gt=0)
    """Tokens in a row."""
    path: str
    """Where the text is."""


class Root(BaseModel):
    model_config = _SECTION

    train: Train = Field(default_factory=Train)
    """Training."""
    data: Data
    """Data."""


def load(files: list[Path], *overrides: str) -> LoadedConfig[Root]:
    def check(config: Root) -> list[Complaint]:
        if config.data.seq_len <= config.train.steps:
            return []
        return [Complaint(keys=("data.seq_len", "train.steps"), message="data.seq_len: longer than the run")]

    return load_config(Root, files, overrides, cross_checks=check)


def problems(files: list[Path], *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(files, *overrides)
    assert caught.value.exit_code == 2
    for problem in caught.value.problems:
        assert problem in str(caught.value)
    return list(caught.value.problems)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_later_layers_win_key_by_key(tmp_path: Path) -> None:
    first = write(tmp_path / "a.toml", '[data]\npath = "a"\n[train]\nsteps = 1\noptimizer = { lr = 0.5 }\n')
    second = write(tmp_path / "b.toml", "[train]\nsteps = 2\n[train.optimizer]\nbetas = [0.1, 0.2]\n")
    loaded = load([first, second], "train.batch=16", "data.seq_len=1", "data.seq_len=2")
    assert loaded.config.train.steps == 2
    assert loaded.config.train.batch == 16
    assert loaded.config.train.optimizer == Optimizer(lr=0.5, betas=(0.1, 0.2))
    assert loaded.config.data == Data(path="a", seq_len=2)
    assert loaded.origins["train.steps"] == str(second)
    assert loaded.origins["train.optimizer.lr"] == str(first)
    assert loaded.origins["train.batch"] == "--set train.batch=16"
    assert "train.precision" not in loaded.origins


def test_a_set_value_is_toml_or_else_a_string() -> None:
    config = load([], "data.path=some where/x.txt", "train.optimizer.betas=[0.5, 0.6]", 'train.precision="bf16"').config
    assert config.data.path == "some where/x.txt"
    assert config.train.optimizer.betas == (0.5, 0.6)
    assert config.train.precision == "bf16"


@pytest.mark.parametrize("text", ["2024", "true", "1.5", "a=b", "1\nx = 2"])
def test_a_key_that_wants_a_string_gets_one_whatever_it_looks_like(text: str) -> None:
    assert load([], f"data.path={text}").config.data.path == text


def test_every_problem_is_in_one_report(tmp_path: Path) -> None:
    file = write(tmp_path / "a.toml", '[train]\nstepz = 3\nprecision = "bf15"\n[data]\nseq_len = 0\n[dta]\nx = 1\n')
    found = problems([file], "train.optimizer.lr=-1", "data.path=x")
    assert len(found) == 5
    unknown, precision, lr, seq_len, section = (
        next(problem for problem in found if key in problem)
        for key in ("train.stepz", "train.precision", "train.optimizer.lr", "data.seq_len", "dta")
    )
    assert unknown == (
        f"{file}: train.stepz = 3: unknown key; did you mean train.steps? "
        "(allowed here: steps, batch, micro, precision, every, optimizer)"
    )
    assert precision == f"{file}: train.precision = \"bf15\": must be 'fp32' or 'bf16'; did you mean \"bf16\"?"
    assert lr == "--set train.optimizer.lr=-1: train.optimizer.lr = -1: must be greater than 0"
    assert seq_len == f"{file}: data.seq_len = 0: must be greater than 0"
    assert section == f"{file}: dta: unknown key; did you mean data? (allowed here: train, data)"


def test_a_key_in_the_wrong_section_is_sent_to_its_own() -> None:
    (found,) = problems([], "data.path=x", "train.seq_len=3")
    assert "unknown key; did you mean data.seq_len?" in found
    (found,) = problems([], "data.path=x", "train.qqqqqq=3")
    assert "did you mean" not in found


def test_members_of_a_union_make_one_problem() -> None:
    (found,) = problems([], "data.path=x", "train.every=often")
    assert found.startswith('--set train.every=often: train.every = "often": must be a valid integer')
    assert found.endswith("or must be 'auto'")


def test_what_is_required_is_named_with_its_docstring(tmp_path: Path) -> None:
    file = write(tmp_path / "a.toml", "[data]\nseq_len = 2\n")
    assert problems([file]) == [f"{file}: data.path: must be set (string): Where the text is."]
    assert problems([]) == ["defaults: data: must be set"]


def test_a_value_where_a_table_belongs() -> None:
    assert problems([], "data=5") == ["--set data=5: data = 5: must be a table, [data]"]


def test_checks_of_a_section_name_what_set_it(tmp_path: Path) -> None:
    file = write(tmp_path / "a.toml", '[data]\npath = "x"\n[train]\nmicro = 3\n')
    assert problems([file]) == [f"{file}: train: batch (8) must be a multiple of micro (3)"]


def test_checks_across_sections_join_the_report() -> None:
    assert problems([], "data.path=x", "data.seq_len=99", "train.btch=2") == [
        "--set train.btch=2: train.btch = 2: unknown key; did you mean train.batch? "
        "(allowed here: steps, batch, micro, precision, every, optimizer)",
        "--set data.seq_len=99: data.seq_len: longer than the run",
    ]


def test_checks_across_sections_leave_out_what_is_wrong_anyway() -> None:
    # Judged by the default in its place, the bad key would bring a second, untrue complaint.
    (found,) = problems([], "data.path=x", "data.seq_len=99", "train.steps=-100")
    assert "train.steps = -100" in found
    (found,) = problems([], "data.path=x", "data.seq_len=99", "train.step=100")
    assert "did you mean train.steps" in found


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path / "quickstart.toml", "")
    broken = write(tmp_path / "broken.toml", "[train\n")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    found = problems([tmp_path / "quikstart.toml", broken, binary, tmp_path / "no" / "a.toml"], "data.path=x")
    assert found[0] == f"{tmp_path / 'quikstart.toml'}: no such file; did you mean {tmp_path / 'quickstart.toml'}?"
    write(tmp_path / "parity.toml", "")
    assert problems([tmp_path / "nothere.toml"], "data.path=x") == [f"{tmp_path / 'nothere.toml'}: no such file"]
    assert found[1].startswith(f"{broken}: not valid TOML: ")
    assert "line 1" in found[1]
    assert found[2].startswith(f"{binary}: cannot be read: ")
    assert found[3].endswith(f"no such file (there is no directory {tmp_path / 'no'} either)")


def test_nothing_is_called_missing_that_an_unreadable_file_may_hold(tmp_path: Path) -> None:
    assert problems([tmp_path / "a.toml"]) == [f"{tmp_path / 'a.toml'}: no such file"]


def test_a_malformed_set_argument() -> None:
    assert problems([], "data.path=x", "train.steps") == ["--set train.steps: must have the form section.key=value"]
    assert problems([], "data.path=x", ".=3") == ["--set .=3: must have the form section.key=value"]


def test_a_long_value_is_shortened(tmp_path: Path) -> None:
    file = write(tmp_path / "a.toml", f"[train.optimizer]\nlr = {list(range(99))}\n[data]\npath = 'x'\n")
    (found,) = problems([file])
    assert "lr = [0, 1, 2," in found
    assert "...: must be a valid number" in found
    assert "98" not in found
