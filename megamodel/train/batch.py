"""What one forward pass is given, and the part of it that is this rank's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.context_order import zigzag_cut, zigzag_positions
from parallel.mesh import Axis


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Some samples on the device: ids, labels (negative: none), and document ids (None: one document a row).

    Of rows that are spread over ranks, this rank's tokens: `positions_S` says which, and `row_weight_B` has the valid
    labels of the whole rows (None: the rows are whole).
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    document_ids_BS: Tensor | None
    positions_S: Tensor | None = None
    row_weight_B: Tensor | None = None

    def rows(self, rows: slice) -> TokenBatch:
        """Some of the samples."""
        documents, weight = self.document_ids_BS, self.row_weight_B
        return TokenBatch(
            tokens_BS=self.tokens_BS[rows],
            labels_BS=self.labels_BS[rows],
            document_ids_BS=None if documents is None else documents[rows],
            positions_S=self.positions_S,
            row_weight_B=None if weight is None else weight[rows],
        )

    def share(self, cp: Axis) -> TokenBatch:
        """This rank's tokens of rows that the ranks of `cp` share. No communication: each of them has whole rows."""
        if not cp.is_split:
            return self
        documents = self.document_ids_BS
        positions_S = zigzag_positions(self.tokens_BS.shape[1], cp)
        return TokenBatch(
            tokens_BS=zigzag_cut(self.tokens_BS, cp, 1),
            labels_BS=zigzag_cut(self.labels_BS, cp, 1),
            document_ids_BS=None if documents is None else zigzag_cut(documents, cp, 1),
            positions_S=positions_S.to(self.tokens_BS.device),
            row_weight_B=(self.labels_BS >= 0).sum(dim=1).float(),
        )


def positions_of(batch: TokenBatch) -> Tensor:
    """Where each token of the batch stands in its row; a pipeline's later stages cannot tell from hidden states."""
    if batch.positions_S is not None:
        return batch.positions_S
    return torch.arange(batch.tokens_BS.shape[1], device=batch.tokens_BS.device)
