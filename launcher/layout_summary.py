"""How a run is laid out, for those who ask before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megamodel.train.layout import run_plan

if TYPE_CHECKING:
    from launcher.config import RunConfig


def layout_summary(config: RunConfig, num_ranks: int) -> dict[str, Any]:
    """The axes with their degrees (experts' ones where there are experts), micro batches, and what a pipeline adds."""
    plan = run_plan(config.model, config.train, config.parallel, seq_len=config.data.seq_len, world_size=num_ranks)
    degrees = plan.layout.axis_sizes
    if config.model.moe is None:
        degrees = {axis: size for axis, size in degrees.items() if axis not in ("edp_shard", "ep", "expert_tp")}
    summary: dict[str, Any] = {
        "layout": degrees,
        "micro_batch_size": plan.micro_batch_size,
        "micro_batches": plan.num_micro_batches,
    }
    if plan.layout.pp > 1:
        summary |= {
            "pipeline_schedule": config.parallel.pipeline_schedule,
            "layers_per_stage": list(plan.layers_of_stages),
            "expected_bubble": plan.expected_bubble,
        }
    return summary


def in_words(summary: dict[str, Any]) -> dict[str, str]:
    """A summary as lines of a table; axes of one rank are left out, and edp_shard where experts fold nothing."""
    degrees = summary["layout"]
    folded = degrees.get("ep", 1) * degrees.get("expert_tp", 1) > 1
    split = [f"{axis} {size}" for axis, size in degrees.items() if size > 1 and (folded or axis != "edp_shard")]
    words = {key: str(value) for key, value in summary.items()} | {"layout": ", ".join(split) or "one rank"}
    if "layers_per_stage" in summary:
        words["layers_per_stage"] = ", ".join(map(str, summary["layers_per_stage"]))
        words["expected_bubble"] = f"{summary['expected_bubble']:.1%} of a step"
    return words
