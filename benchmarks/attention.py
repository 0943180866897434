"""Explicit scores against torch's fused attention, forward and backward, compiled, for short rows on a CPU.

    python benchmarks/attention.py

The figure behind `train.attention = "auto"`: the ratio of the fused kernel's time to that of explicit scores, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from reporting import add_output_options, report

from megamodel.model.explicit_attention import ExplicitScores
from megamodel.model.seams import AttentionCore, ScaledDotProduct

HEADS, KV_HEADS, WIDTH = 4, 2, 64


def seconds(core: AttentionCore, tokens: int, seq: int) -> float:
    """One forward and backward of a packed bf16 batch of `tokens` tokens in rows of `seq`."""
    rows = tokens // seq
    q = torch.randn(rows, HEADS, seq, WIDTH).bfloat16().requires_grad_()
    k, v = (torch.randn(rows, KV_HEADS, seq, WIDTH).bfloat16().requires_grad_() for _ in range(2))
    documents = (torch.arange(seq) >= seq // 2).int().expand(rows, -1)
    prepared = core.prepare(documents, seq, seq, q.device)
    grad = torch.randn(rows, HEADS, seq, WIDTH).bfloat16()
    start = time.perf_counter()
    core(q, k, v, prepared).backward(grad)
    return time.perf_counter() - start


class Compiled:
    """A core whose call is compiled, as inside a compiled block."""

    def __init__(self, core: AttentionCore) -> None:
        self.prepare = core.prepare
        self._call = torch.compile(core.__call__, dynamic=False)

    def __call__(self, *args: object) -> torch.Tensor:
        return self._call(*args)


def in_words(case: dict[str, float]) -> str:
    return f"explicit {1e3 * case['explicit_s']:.1f} ms, sdpa {1e3 * case['sdpa_s']:.1f} ms, ratio {case['ratio']:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a batch")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    add_output_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = []
    for seq in options.seq_lens:
        cores: dict[str, AttentionCore] = {"explicit": Compiled(ExplicitScores()), "sdpa": Compiled(ScaledDotProduct())}
        taken: dict[str, list[float]] = {name: [] for name in cores}
        for repeat in range(options.repeats + 2):  # the first two compile and warm up
            for name, core in cores.items():
                spent = seconds(core, options.tokens, seq)
                if repeat >= 2:
                    taken[name].append(spent)
        medians = {name: statistics.median(values) for name, values in taken.items()}
        cases.append(
            {
                "seq_len": seq,
                **{f"{n}_s": m for n, m in medians.items()},
                "ratio": medians["sdpa"] / medians["explicit"],
            }
        )
    result = {
        "cases": cases,
        # Nothing is promised but that `auto` does not choose the slower one up to its limit.
        "met": all(case["ratio"] >= 1.0 for case in cases if case["seq_len"] <= 256),
        "summary": {f"rows of {case['seq_len']}": in_words(case) for case in cases},
    }
    return report("attention", result, options)


if __name__ == "__main__":
    sys.exit(main())
