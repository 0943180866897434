"""How the ranks of a run are spread over the axes of the mesh. Imports without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees along every axis; their product (without ep and expert_tp, which fold the others) is the world."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    expert_tp: int = 1

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return math.prod((self.pp, self.dp_replicate, self.dp_shard, self.cp, self.tp))

    @property
    def edp_shard(self) -> int:
        """Ranks that hold the same part of the same experts."""
        return self.dp_shard * self.cp * self.tp // (self.ep * self.expert_tp)

    @property
    def num_data_ranks(self) -> int:
        """Ranks that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Ranks along each axis, of the dense grid and of the experts' one."""
        return {
            "pp": self.pp,
            "dp_replicate": self.dp_replicate,
            "dp_shard": self.dp_shard,
            "cp": self.cp,
            "tp": self.tp,
            "edp_shard": self.edp_shard,
            "ep": self.ep,
            "expert_tp": self.expert_tp,
        }
