"""`mega generate`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.output import Output, visible
from launcher.verb import Overrides

if TYPE_CHECKING:
    from launcher.finish import TrainedRun

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or its name in runs/.")]
Step = Annotated[int | None, typer.Option("--step", help="Weights of this step. Default: the newest good checkpoint.")]
Prompts = Annotated[
    list[str] | None, typer.Option("--prompt", help="Text to continue; may be given many times. `-` reads stdin.")
]
MaxNewTokens = Annotated[int | None, typer.Option("--max-new-tokens", help="Most tokens to add to each prompt.")]
Temperature = Annotated[float | None, typer.Option("--temperature", help="0 always takes the likeliest token.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="Sample from so many likeliest tokens only; 0: no limit.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Sample from the likeliest tokens up to this probability.")]
Greedy = Annotated[bool, typer.Option("--greedy", help="Same as --temperature 0.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="A further token that ends a text; many times.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the draws.")]


def generate(
    out: Output,
    run: Run,
    prompts: Prompts = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    greedy: Greedy = False,
    stop: Stop = None,
    seed: Seed = None,
    step: Step = None,
    overrides: Overrides = None,
) -> int:
    """Continue prompts with a run's model, while it trains too. What is not given comes from the run's configuration."""
    from launcher.config import load_run_config
    from launcher.finish import open_trained, sample
    from launcher.run_record import find_run
    from launcher.toml_writing import value_to_toml

    given = {
        "prompts": [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts] if prompts else None,
        "max_new_tokens": max_new_tokens,
        "temperature": 0.0 if greedy else temperature,
        "top_k": top_k,
        "top_p": top_p,
        "stop": stop,
        "seed": seed,
    }
    chosen = [f"generate.{key}={value_to_toml(value)}" for key, value in given.items() if value is not None]
    directory = find_run(run)
    config = load_run_config([directory.config], [*(overrides or ()), *chosen]).config
    opened = open_trained(directory, config, step=step)
    alone = len(config.generate.prompts) == 1

    def stream(row: int, piece: str) -> None:
        sys.stdout.write(visible(piece))
        sys.stdout.flush()

    tell_passed_over(out, opened)
    streams = alone and not out.as_json
    if streams:
        sys.stdout.write(visible(config.generate.prompts[0]))
    texts = sample(opened, config.generate, on_text=stream if streams else None)
    if streams:
        out.say()
    for text in () if streams else texts:
        out.say(f"--- prompt {text.prompt!r}\n{text.prompt}{text.text}\n")
    out.result(
        {"run_dir": str(directory.root), "step": opened.restored.step, "texts": [asdict(text) for text in texts]}
    )
    return 0


def tell_passed_over(out: Output, run: TrainedRun) -> None:
    """Says which newer checkpoints were corrupt, so that nobody wonders about the step."""
    for reason in run.restored.corrupt:
        out.warn(f"passed over: {reason}")
