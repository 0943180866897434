"""Expert parallelism: rows travel to the ranks that hold their experts, and back. None is dropped.

Written here since torch has the parts only: an all-to-all with uneven splits, and a product of grouped rows.

Shape suffixes: R routed rows of this rank, M rows that this rank works on, D width of a row, E experts of the layer, L experts
held here (E / ep), P ranks of the axis ep, T ranks of the axis expert_tp, N ranks of both (P * T).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.collectives import all_reduce, all_to_all
from parallel.mesh import Axis

# A rank that receives fewer works on rows of zeros besides. torch's grouped product of bfloat16 rows has no gradient of the
# weights without a row where it is compiled for CUDA, and torch.compile makes graphs apart for no row and for one.
_LEAST_ROWS = 2


class ExpertExchange:
    """Carries rows, sorted by expert, to the ranks that hold the experts, and the experts' results back.

    `ep` cuts the experts: its rank p holds experts p * L to (p + 1) * L - 1. `expert_tp` cuts each expert's hidden width, and
    its ranks have tokens of their own; so a row goes to all T ranks of its expert's coordinate on `ep`, and what they make
    of it, a part of the hidden width each, is summed where the row came from. `both` is the two together, `expert_tp` the
    fastest; all communication is on it. An expert's weights thus see the rows of all ranks of `both`, and their gradients
    need no sum over it.

    Every rank of `both` calls `dispatch` and `combine`, and runs their backward, even with no row to send or none received.

    Collectives on `both`, a rank and layer, as bytes that it hands over (its own share included; b bytes an element):

    - forward, three all-to-alls: counts 8 * E * T, then rows R * T * D * b, then results M * D * b;
    - backward, two: gradients of results R * T * D * b, then gradients of rows M * D * b.

    Over the axis, the sum of M is T times the sum of R. Activation checkpointing that repeats the layer's forward repeats
    the three. With one rank on `both` there are none. On CUDA each `dispatch` makes the host wait for the device once, since
    the number of rows to receive sizes the memory; `combine` and the backward never do.
    """

    def __init__(self, ep: Axis, expert_tp: Axis, both: Axis) -> None:
        assert both.size == ep.size * expert_tp.size, "both is not ep * expert_tp"
        assert both.rank == ep.rank * expert_tp.size + expert_tp.rank, "expert_tp is not the fastest axis of both"
        self.ep = ep
        self.expert_tp = expert_tp
        self.both = both

    @torch.compiler.disable
    def dispatch(self, x_RD: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, _Route | None]:
        """Sends each row to its expert: the rows for the experts held here, (M, D), sorted by expert; how many each of them
        gets, (L,); and a handle for `combine`.

        `x_RD` is sorted by expert, `counts_E` (int64, on the device of the rows) says how many each gets. Within an expert,
        rows lie in the order of the ranks that sent them. Where fewer than two rows come, rows of zeros fill up to two, and
        count to the last expert. The gradient of a row sums what its T copies return.
        """
        if not self.both.is_split:
            return x_RD, counts_E, None
        counts_PL = counts_E.view(self.ep.size, -1)
        counts_NL = self._exchange_counts(counts_PL)
        rows_P = counts_PL.sum(dim=1)
        host = torch.cat((rows_P, counts_NL.sum(dim=1))).tolist()  # the one wait for the device
        send = tuple(rows for rows in host[: self.ep.size] for _ in range(self.expert_tp.size))
        receive = tuple(host[self.ep.size :])
        copied = _copying(rows_P, x_RD.shape[0], self.expert_tp.size) if self.expert_tp.is_split else None
        grouped = _grouping(counts_NL, sum(receive))
        if copied is not None:
            x_RD = _Spread.apply(x_RD, copied.order, copied.places, copied.copies)
        x_MD = all_to_all(x_RD, self.both, send=send, receive=receive)
        x_MD = _Spread.apply(x_MD, grouped.order, grouped.places, grouped.copies)
        counts_L = counts_NL.sum(dim=0)
        if (missing := _LEAST_ROWS - x_MD.shape[0]) > 0:
            x_MD = F.pad(x_MD, (0, 0, 0, missing))
            counts_L[-1] += missing
        # Else what follows is compiled anew for each number of rows, and after eight of them no longer.
        torch._dynamo.maybe_mark_dynamic(x_MD, 0)
        return x_MD, counts_L, _Route(send=send, receive=receive, copied=copied, grouped=grouped)

    @torch.compiler.disable
    def combine(self, y_RD: Tensor, handle: _Route | None) -> Tensor:
        """Sends results, (M, D), to where their rows came from: (R, D), in the order in which `dispatch` was given the rows,
        each the sum over `expert_tp`. Backward: the gradient of a result goes to all T ranks that have a part in it."""
        if handle is None:
            return y_RD
        grouped, copied = handle.grouped, handle.copied
        if y_RD.shape[0] > (received := sum(handle.receive)):
            y_RD = y_RD[:received]
        y_RD = _Collect.apply(y_RD, grouped.order, grouped.places, grouped.copies)
        y_RD = all_to_all(y_RD, self.both, send=handle.receive, receive=handle.send)
        if copied is not None:
            y_RD = _Collect.apply(y_RD, copied.order, copied.places, copied.copies)
        return y_RD

    def _exchange_counts(self, counts_PL: Tensor) -> Tensor:
        """How many rows each rank of `both` sends to each expert held here."""
        copies_NL = counts_PL[:, None].expand(-1, self.expert_tp.size, -1).flatten(0, 1)
        one_each = (1,) * self.both.size
        return all_to_all(copies_NL, self.both, send=one_each, receive=one_each)


class SequenceShards:
    """The ranks that hold parts of the same sequences (context parallelism, sequence parallelism), and their sums.

    For statistics of whole sequences: the router's balance loss (DeepSeek-V3, eq. 17-20) is the product of a sequence's
    counts, which have no gradient, and its mean probabilities, of which each rank can add its own part.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    @property
    def size(self) -> int:
        """Parts in which a sequence is cut."""
        return self.axis.size

    def sum(self, counts: Tensor) -> Tensor:
        """Sums `counts` (any shape) over the parts: a new tensor without a gradient. One all-reduce of its bytes in the
        forward, none in the backward; every rank of the axis calls it. With one rank: the input."""
        return all_reduce(counts, self.axis)


class SideStream:
    """Lets the device do something beside what follows: a CUDA stream of its own; on a processor, just a call.

    `join(run(function, x))` is function(x). What is called between the two may overlap on the device: start it before
    what waits (the exchange of rows), join it after. The function should be local work: collectives of two groups on two
    streams run in no fixed order, and may wait for one another.

    The backward overlaps too, since autograd runs each operation on the stream of its forward and lets streams wait where
    a gradient passes from one to another. Whoever has waited for the gradient of x has waited for those of the weights.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    # Its own frame only: a compiled function stays compiled inside.
    @torch.compiler.disable(recursive=False)
    def run(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Starts function(x), after all that is queued so far. The result is a handle: nobody reads it before `join`."""
        if self._stream is None:
            return function(x)
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._stream):
            y = function(x)
        # Memory is reused in the order of the stream that it was taken on: the allocator must know of the other one.
        x.record_stream(self._stream)
        return y

    @torch.compiler.disable
    def join(self, handle: Tensor) -> Tensor:
        """What `run` has started, once the current stream may read it. The host does not wait."""
        if self._stream is not None:
            current = torch.cuda.current_stream(handle.device)
            current.wait_stream(self._stream)
            handle.record_stream(current)
        return handle


@dataclass(frozen=True, kw_only=True)
class _Rearrangement:
    """Row i of the result is row `order[i]`. Each row occurs `copies` times: row r at places[r * copies] and those after."""

    order: Tensor
    places: Tensor
    copies: int


@dataclass(frozen=True, kw_only=True)
class _Route:
    """What `combine` needs to undo a `dispatch`: rows sent to and received from each rank of both axes, and how they lay."""

    send: tuple[int, ...]
    receive: tuple[int, ...]
    copied: _Rearrangement | None
    grouped: _Rearrangement


def _copying(rows_P: Tensor, num_rows: int, copies: int) -> _Rearrangement:
    """Each of P blocks of rows `copies` times in a row: block 0, block 0, block 1, block 1, ..."""
    begin_P = rows_P.cumsum(0) - rows_P
    order = _ranges(
        begin_P[:, None].expand(-1, copies).flatten(),
        rows_P[:, None].expand(-1, copies).flatten(),
        num_rows * copies,
    )
    places = [_ranges(begin_P * copies + rows_P * copy, rows_P, num_rows) for copy in range(copies)]
    return _Rearrangement(order=order, places=torch.stack(places, dim=1).flatten(), copies=copies)


def _grouping(counts_NL: Tensor, num_rows: int) -> _Rearrangement:
    """From rows sorted by sender, then expert, to rows sorted by expert, then sender."""
    counts, counts_turned = counts_NL.flatten(), counts_NL.t().flatten()
    begin_NL = (counts.cumsum(0) - counts).view_as(counts_NL)
    begin_LN = (counts_turned.cumsum(0) - counts_turned).view_as(counts_NL.t())
    return _Rearrangement(
        order=_ranges(begin_NL.t().flatten(), counts_turned, num_rows),
        places=_ranges(begin_LN.t().flatten(), counts, num_rows),
        copies=1,
    )


def _ranges(begin: Tensor, length: Tensor, total: int) -> Tensor:
    """The numbers begin[i] to begin[i] + length[i] - 1 for each i, one range after another. `total`: sum of the lengths,
    given so that the host need not wait for it."""
    shift = begin - (length.cumsum(0) - length)
    return torch.arange(total, device=begin.device) + shift.repeat_interleave(length, output_size=total)


def _gather_sum(x: Tensor, places: Tensor, copies: int) -> Tensor:
    rows = x.index_select(0, places)
    return rows if copies == 1 else rows.unflatten(0, (-1, copies)).sum(dim=1)


class _Spread(torch.autograd.Function):
    """Rearranges rows. Both directions gather, where autograd's own backward would add atomically: exact, in fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.copies = copies
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        return _gather_sum(grads[0], places, ctx.copies), None, None, None


class _Collect(torch.autograd.Function):
    """Undoes a rearrangement, and sums the copies of each row (bfloat16 in float32, rounded once)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, places: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(order)
        return _gather_sum(y, places, copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return grads[0].index_select(0, order), None, None, None
