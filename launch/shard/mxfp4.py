"""MXFP4, the format in which gpt-oss comes: 4-bit floats, an 8-bit power of two for each 32 (OCP Microscaling Formats, v1.0)."""

from __future__ import annotations

import torch

BLOCK = 32
# E2M1 by its four bits: sign, two of exponent, one of mantissa.
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BIAS = 127  # of the exponent (E8M0)
_ROWS = 1 << 16  # blocks unpacked at a time: a few MB


def unpack(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One expert's matrix, [columns, rows]: transposed, as gpt-oss multiplies with it.

    Args:
        blocks: [rows, columns / 32, 16], two elements in each byte, the lower bits first.
        scales: [rows, columns / 32].
        dtype: of the result.
    """
    rows, count, _ = blocks.shape
    table = torch.tensor(VALUES, dtype=dtype, device=blocks.device)
    flat, exponents = blocks.reshape(rows * count, BLOCK // 2), scales.reshape(rows * count, 1).to(torch.int32) - _BIAS
    out = torch.empty(rows * count, BLOCK, dtype=dtype, device=blocks.device)
    for start in range(0, rows * count, _ROWS):
        piece = flat[start : start + _ROWS].to(torch.int64)
        part = out[start : start + _ROWS]
        part[:, 0::2] = table[piece & 0x0F]
        part[:, 1::2] = table[piece >> 4]
        torch.ldexp(part, exponents[start : start + _ROWS], out=part)
    return out.view(rows, count * BLOCK).t().contiguous()
