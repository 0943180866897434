"""Linear, RMSNorm and SwiGLU. Master weights may be float32 while activations are bfloat16: weights are cast where used."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear map without bias, computed in the dtype of its input."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last dim (Zhang and Sennrich 2019, eq. 4), computed in float32."""

    def __init__(self, d: int, eps: float) -> None:
        super().__init__(d, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d) in the dtype of x."""
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, eq. 6)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = Linear(d_model, d_ff)
        self.up_proj = Linear(d_model, d_ff)
        self.down_proj = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) -> (..., d_model)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
