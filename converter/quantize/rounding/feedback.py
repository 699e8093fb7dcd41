"""Error feedback: rounding that keeps a weight's product with the adapter's own input directions. No data is needed.

A weight of a quantized base lies on code points. A delta that is small beside their distance is rounded away as a whole
if each sum goes to the nearest one. GPTQ (https://arxiv.org/abs/2210.17323) lets later columns of a row make up for the
errors of earlier ones, so that the product with what H = XᵀX stands for is kept. Here X is the adapter's A, (rank,
in_features): H = AᵀA + λI. Because H is low rank plus diagonal, no in × in matrix is made. With a_i the column i of A,
P the sum of (w_j − q_j) · a_j over the columns j that are done, and G that of a_j · a_jᵀ over those that are not, i
among them, the value to round is

    w_i + P · (λI + G)⁻¹ · a_i

by the push-through identity. The second factor doesn't depend on the row: it is made once, as `gains`.

Columns are rounded by the length of a_i, the longest last: a long a_i can correct the most error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

DAMPING = 0.3
"""λ, in means of the squares of A's columns' lengths. Measured: docs/quantized-bases.md."""


class Directions(NamedTuple):
    """What is kept of a weight of `columns` input features. All are in the order in which columns are taken."""

    order: np.ndarray[Any, Any]
    """The numbers of the columns, int64."""
    inputs: np.ndarray[Any, Any]
    """a_i: float32, (columns, rank)."""
    gains: np.ndarray[Any, Any]
    """(λI + G_i)⁻¹ · a_i: float32, (columns, rank)."""


def directions_of(a: Tensor, damping: float = DAMPING) -> Directions:
    """The directions of an adapter's A, (rank, columns). Computed in float64."""
    import numpy

    inputs = a.double().cpu().numpy().T
    lengths = (inputs * inputs).sum(axis=1)
    order = numpy.argsort(lengths, kind="stable")
    inputs = inputs[order] / (lengths.mean() ** 0.5 or 1.0)
    gains = numpy.empty_like(inputs)
    # From the last column on, so that G only grows: (λI + G)⁻¹ by the formula of Sherman and Morrison.
    inverse = numpy.eye(inputs.shape[1]) / damping
    for column in range(len(inputs) - 1, -1, -1):
        moved = inverse @ inputs[column]
        length = 1.0 + inputs[column] @ moved
        gains[column] = moved / length
        inverse -= numpy.outer(moved, gains[column])
    return Directions(order, inputs.astype(numpy.float32), gains.astype(numpy.float32))


class Grid(NamedTuple):
    """What a code may stand for, in units of its scale: 16 values, or all whole numbers up to `most`."""

    values: np.ndarray[Any, Any]
    """float32 [16], ascending."""
    bounds: np.ndarray[Any, Any]
    """float32 [15], between neighbouring values; one on a bound goes to the lower side."""
    most: int = 0
    """0: the values count, not whole numbers."""
    least: int = 0
    """The lowest whole number."""

    def nearest(self, scaled: Tensor) -> Tensor:
        """The codes nearest to values in units of their scales: indices of `values`, or whole numbers."""
        import torch

        if self.most:
            return scaled.round().clamp(self.least, self.most)
        return torch.bucketize(scaled, torch.from_numpy(self.bounds).to(scaled.device))

    def of(self, codes: Tensor) -> Tensor:
        """What codes stand for, in units of their scales: float32."""
        import torch

        return codes.float() if self.most else torch.from_numpy(self.values).to(codes.device)[codes.int()]


def whole_numbers(most: int, least: int | None = None) -> Grid:
    """The grid of all whole numbers from `least` to `most`; None: as many of both signs."""
    import numpy

    return Grid(numpy.zeros(16, numpy.float32), numpy.zeros(15, numpy.float32), most, -most if least is None else least)


def inverse_of(steps: Tensor) -> Tensor:
    """1 / steps; 0 where a step is 0, so that all of its block rounds to the code nearest to 0."""
    import torch

    return torch.where(steps > 0, 1 / steps.clamp(min=1e-38), 0.0)


def round_by_torch(target: Tensor, scales: Tensor, grid: Grid, directions: Directions) -> Tensor:
    """The kernel of `feedback_kernels`, bit for bit, on any device.

    `target` is (rows, columns) in float32, `scales` are those of each weight, of the same shape. Gives codes of that
    shape, int8: indices of grid values, or whole numbers.
    """
    import torch

    codes = torch.empty(target.shape, dtype=torch.int8, device=target.device)
    rank = directions.inputs.shape[1]
    carried = torch.zeros(rank, target.shape[0], device=target.device)
    for number, column in enumerate(directions.order.tolist()):
        wanted, scale = target[:, column], scales[:, column]
        aimed = wanted.clone()
        for k in range(rank):  # in this order, as the kernel adds them
            aimed += carried[k] * float(directions.gains[number, k])
        code = grid.nearest(aimed * inverse_of(scale))
        codes[:, column] = code.to(torch.int8)
        missed = wanted - grid.of(code) * scale
        for k in range(rank):
            carried[k] += missed * float(directions.inputs[number, k])
    return codes
