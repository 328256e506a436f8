"""Observations in the forms that they come in, as rows of bytes or as records.

A row is bytes, or numbers of one dtype where all fields share one (``single``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tcg_flatpolicy import fields
from tcg_flatpolicy.fields import STORED


def as_bytes(observations: Tensor, dtype: np.dtype[Any], single: np.dtype[Any] | None) -> Tensor:
    """(B, nbytes) uint8, contiguous, of (B, nbytes) uint8 or (B, numbers) of any dtype.

    Raises:
        TypeError: observations of a dtype that does not fit.
        ValueError: another number of columns, or a value that ``single`` does not hold exactly,
            naming row and field.
    """
    size = dtype.itemsize
    if not isinstance(observations, Tensor):
        raise TypeError(
            f"observations must be a tensor, got {type(observations).__name__}; "
            "torch.as_tensor(observations) shares an array's memory"
        )
    if observations.ndim != 2:
        raise ValueError(f"observations must be (B, columns), got {tuple(observations.shape)}")
    columns, given = observations.shape[1], observations.dtype
    if given == torch.uint8 and columns == size:
        return fields.as_bytes(observations)
    if single is None or columns * single.itemsize != size:
        # PufferLib emulates a Discrete as int32 and may call the whole int64 all the same, so
        # here the bytes count, not the dtype.
        if columns * observations.itemsize == size:
            return fields.as_bytes(observations)
        if single is None and given != torch.uint8:
            raise TypeError(
                f"observations are {given}, but fields of several dtypes are read from bytes: "
                f"pass (B, {size}) uint8"
            )
        if single is None:
            raise ValueError(f"observations have {columns} bytes, the layout {size}")
        numbers = size // single.itemsize
        raise ValueError(f"observations have {columns} columns, the layout {numbers}")
    cast = observations.to(STORED[single])
    if cast.dtype != given:
        for row, column in _changed(observations, cast).nonzero()[:1].tolist():
            name = fields.name_at(dtype, column * single.itemsize)
            raise ValueError(
                f"row {row}: {name} is {observations[row, column].item()}, which is no {single}, "
                "the dtype of this layout; give the layout a dtype that holds it, or cast the "
                f"observations to {cast.dtype} yourself, as you see fit"
            )
    return fields.as_bytes(cast)


def _changed(values: Tensor, cast: Tensor) -> Tensor:
    """Which values a cast does not hold exactly; NaN stays NaN."""
    changed = cast.to(values.dtype) != values
    changed |= _negative(cast) != _negative(values)  # -1 and 255 are the same byte
    if not cast.is_floating_point() or values.dtype == torch.bool:
        return changed
    if values.is_floating_point():
        return changed & ~values.isnan()
    # Rounded up beyond the largest: what the cast back makes of it is the machine's choice.
    return changed | (cast >= float(torch.iinfo(values.dtype).max + 1))


def _negative(numbers: Tensor) -> Tensor:
    if numbers.dtype.is_signed:
        return numbers < 0
    return torch.zeros_like(numbers, dtype=torch.bool)  # torch compares not all unsigned integers


def as_records(
    observations: npt.NDArray[Any], dtype: np.dtype[Any], single: np.dtype[Any] | None
) -> npt.NDArray[Any]:
    """(B,) records that share the memory of (B, nbytes) uint8, (B, numbers), or are these.

    Raises:
        TypeError: observations of a dtype that does not fit.
        ValueError: another number of bytes, or rows that are not contiguous.
    """
    if not isinstance(observations, np.ndarray):
        raise TypeError(f"write takes a NumPy array, got {type(observations).__name__}")
    if observations.dtype == dtype and observations.ndim == 1:
        return observations
    if observations.ndim != 2 or (observations.dtype != np.uint8 and observations.dtype != single):
        raise TypeError(
            f"observations must be (B, {dtype.itemsize}) uint8 or (B,) records, "
            f"got {observations.shape} {observations.dtype}"
        )
    if observations.shape[1] * observations.itemsize != dtype.itemsize:
        raise ValueError(
            f"an observation has {observations.shape[1] * observations.itemsize} bytes, the "
            f"layout {dtype.itemsize}"
        )
    if not len(observations):
        return np.empty(0, dtype)
    if observations.shape[1] > 1 and observations.strides[1] != observations.itemsize:
        raise ValueError(
            "the numbers of an observation do not follow one another in memory (strides "
            f"{observations.strides}): pass rows that do, such as "
            "np.ascontiguousarray(observations)"
        )
    return observations.view(dtype)[:, 0]
