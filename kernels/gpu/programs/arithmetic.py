"""Rounding and products, on a GPU and in Triton's interpreter.

The interpreter (TRITON_INTERPRET=1, which has to be set before Triton is imported) holds bfloat16
as bit patterns: it truncates where a GPU rounds, and multiplies patterns where a GPU multiplies
numbers. Programs therefore round and multiply through these functions only.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def to_bfloat16(x):
    """Float32 to the nearest bfloat16, ties to even."""
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:  # noqa: RET505  a branch not taken must not be compiled
        return x.to(tl.bfloat16)


@triton.jit
def add_product(total, x, w):
    """Computes total + x @ w, both bfloat16, exact products summed in float32."""
    if INTERPRETED:
        return total + tl.dot(x.to(tl.float32), w.to(tl.float32), input_precision="ieee")
    else:  # noqa: RET505
        return tl.dot(x, w, total)
