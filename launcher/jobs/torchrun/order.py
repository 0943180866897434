"""What an agent asks torchrun for, and how."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TorchrunOrder:
    """The ranks of one node."""

    num_nodes: int
    node_rank: int
    ranks_per_node: int
    address: str
    """Of the first node."""
    port: int
    """Free there."""
    name: str
    """Of the attempt."""
    command: tuple[str, ...]
    """Of a rank."""
    outputs: tuple[int, ...]
    """An open file for what each local rank prints."""
    reports: int
    """An open file for what is told of the ranks."""
    directory: str
    """Takes the ranks' failure records."""

    def as_text(self) -> str:
        """For `from_text`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> TorchrunOrder:
        """What `as_text` gave."""
        data: dict[str, Any] = json.loads(text)
        return cls(**{**data, "command": tuple(data["command"]), "outputs": tuple(data["outputs"])})

    def as_arguments(self, *, timeout_s: int) -> list[str]:
        """Those of torchrun; `timeout_s` is for the nodes to meet.

        Its static rendezvous, unlike c10d, gives the ranks that it is told to, in the order of the job's hosts.
        """
        host = f"[{self.address}]" if ":" in self.address else self.address
        options = {
            "--nnodes": self.num_nodes,
            "--nproc-per-node": self.ranks_per_node,
            "--node-rank": self.node_rank,
            "--rdzv-backend": "static",
            "--rdzv-endpoint": f"{host}:{self.port}",
            "--rdzv-id": self.name,
            "--rdzv-conf": f"timeout={timeout_s}",
            "--max-restarts": 0,
        }
        return [*(str(word) for option in options.items() for word in option), "--no-python", *self.command]


def without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Without the variables by which others set torchrun's options: the job has them all."""
    return {name: value for name, value in environ.items() if not name.startswith("PET_")}
