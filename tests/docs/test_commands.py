"""Every command that README and docs show is run, in their order, in a copy of the checkout's surface; then their Python.

Training is cut short by settings that the test adds; nothing else is changed. `make test` and `.ci/run` are not run: this is
a part of them.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Its commands take minutes; tests/benchmarks runs each script at a toy size.
LINKED_ONLY = [ROOT / "benchmarks" / "README.md"]
# A few steps of the smallest model on the same data: what the command does, not how long it takes.
_SHORT = (
    "--set model.preset=moe-tiny --set model.vocab_size=4096 --set train.steps=4 --set train.global_batch_size=4 "
    "--set data.seq_len=64 --set train.compile=off --set train.validation.max_samples=8 --set train.checkpoint.every_steps=2 "
    "--set data.held_out_fraction=0.005 --set generate.max_new_tokens=8"
)
_INSIDE_THIS = ("make test", ".ci/run", "make setup", "make lint", "bash .ci/run")


def commands(document: Path) -> list[str]:
    """Lines of the fenced `sh` blocks, without comments; a trailing backslash joins lines."""
    text = document.read_text()
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                found.append(re.sub(r"\s+#.*$", "", line).strip())
    return found


def programs(document: Path) -> list[str]:
    """The fenced `python` blocks, each of which is a whole program."""
    return re.findall(r"^```python\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


def shortened(command: str) -> str:
    """The command as the test runs it."""
    if command.startswith("make train"):
        return f'make train ARGS="{_SHORT}"'
    if "train configs/quickstart.toml" in command or "launch configs/quickstart.toml" in command:
        return f"{command} {_SHORT}"
    return command


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the checkout, whose runs and caches are its own."""
    folder = tmp_path_factory.mktemp("checkout")
    for entry in ROOT.iterdir():
        if entry.name not in ("runs", ".cache", ".git"):
            (folder / entry.name).symlink_to(entry)
    return folder


def test_there_are_documents_with_commands() -> None:
    assert any("make train" in commands(document) for document in DOCUMENTS)
    assert sum(len(commands(document)) for document in DOCUMENTS) > 20
    assert any(programs(document) for document in DOCUMENTS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_every_command_and_program_works(checkout: Path, document: Path) -> None:
    environment = {**os.environ, "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    shown = [["bash", "-ec", shortened(command)] for command in commands(document) if command not in _INSIDE_THIS]
    shown += [[sys.executable, "-c", program] for program in programs(document)]
    for command in shown:
        done = subprocess.run(
            command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_every_link_leads_somewhere() -> None:
    for document in [*DOCUMENTS, *LINKED_ONLY]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.relative_to(ROOT)} links to {target}"
