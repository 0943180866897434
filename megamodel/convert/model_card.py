"""README.md of an export: what the model is, how it was trained by its run's own record, and how to use it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megamodel.convert.families import Family
from megamodel.model.config import ModelConfig


def model_card(
    config: ModelConfig,
    family: Family,
    record: Mapping[str, Any],
    *,
    title: str,
    num_parameters: int,
    max_difference: float,
) -> str:
    """Markdown. record: figures of the run, shown as they are given; nested mappings become dotted names.
    max_difference: largest absolute difference of logits found when the export was checked."""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- {family.model_type}
---

# {title}

A decoder-only language model with {num_parameters:,} parameters, trained with mega and written in the format of
`{family.architecture}`.

## Shape

{_table(_shape(config))}

## Training

{_table(_flatten(record)) if record else "The run left no record."}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")  # this folder
model = AutoModelForCausalLM.from_pretrained(".")
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```

## Checked

When it was written, this folder was loaded with transformers in fp32 and its logits on random tokens compared with those
of the trained model: the largest absolute difference was {max_difference:.2e}.

## Limits

The model continues text like its training data; it was not tuned to follow instructions or to refuse anything.
"""


def _shape(config: ModelConfig) -> Iterator[tuple[str, str]]:
    for name, value in _flatten(config.model_dump(exclude_none=True)):
        if name not in ("preset", "init_std") and name.rpartition(".")[2] not in (
            "balance",
            "aux_loss_weight",
            "bias_update_rate",
            "z_loss_weight",
        ):
            yield name, value


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def _table(rows: Iterator[tuple[str, str]]) -> str:
    def cell(text: str) -> str:
        return " ".join(text.replace("|", "\\|").split())

    return "\n".join(["| | |", "|---|---|", *(f"| {cell(name)} | {cell(value)} |" for name, value in rows)])
