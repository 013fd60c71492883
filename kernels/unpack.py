"""How packed integers become floats in registers, for every kernel that reads quantized weights.

Weights are planar: a row is cut into int16 halves, and halves into planes of BITS bits, so that one mask of a register
gives two neighbours of a plane, which is what the tensor cores take. An integer or-ed into the mantissa of 2^m reads
2^m + q: two weights for one instruction, where a conversion takes several for each. What is then subtracted is
2^m + zero, so the result is exact.
"""

import triton
import triton.language as tl

# PTX because the compiler does not find these forms: it takes two instructions for one `lop3` of & and |.
# 4 bits: (halves >> 4p) & 0x000f000f | 2^m, with m = 10 for float16 and 7 for bfloat16.
_FOUR = """{{ .reg .b32 t;
lop3.b32 $0, $4, 0x000f000f, {magic}, 0xea; shr.u32 t, $4, 4;
lop3.b32 $1, t, 0x000f000f, {magic}, 0xea; shr.u32 t, $4, 8;
lop3.b32 $2, t, 0x000f000f, {magic}, 0xea; shr.u32 t, $4, 12;
lop3.b32 $3, t, 0x000f000f, {magic}, 0xea; }}"""
FOUR_FP16 = tl.constexpr(_FOUR.format(magic="0x64006400"))
FOUR_BF16 = tl.constexpr(_FOUR.format(magic="0x43004300"))
# 8 bits, float16: every other byte under the byte of 2^10.
EIGHT_FP16 = tl.constexpr("prmt.b32 $0, $2, 0x64646464, 0x4240; prmt.b32 $1, $2, 0x64646464, 0x4341;")
# bfloat16 has 7 bits of mantissa: 128 + (low 7 bits), minus 128 or 256 as the high bit is set or not, is q - 128.
EIGHT_BF16 = tl.constexpr("""{ .reg .b32 t, low, high, one;
mov.b32 one, 0x3f803f80; shr.u32 t, $2, 8;
lop3.b32 low, $2, 0x007f007f, 0x43004300, 0xea; lop3.b32 high, $2, 0x00800080, 0xc300c300, 0xae;
fma.rn.bf16x2 $0, low, one, high;
lop3.b32 low, t, 0x007f007f, 0x43004300, 0xea; lop3.b32 high, t, 0x00800080, 0xc300c300, 0xae;
fma.rn.bf16x2 $1, low, one, high; }""")


@triton.jit
def _plane(halves, p: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    q = (halves >> (BITS * p)) & ((1 << BITS) - 1)
    if dtype == tl.float16:
        return (q | 0x6400).to(dtype, bitcast=True)
    elif dtype == tl.bfloat16 and BITS == 4:
        return (q | 0x4300).to(dtype, bitcast=True)
    else:
        return (q - (128 if dtype == tl.bfloat16 else 0)).to(dtype)


@triton.jit
def unpack4(halves, dtype: tl.constexpr, PTX: tl.constexpr):
    """int16 [R, C] of 4-bit values -> planes 0 to 3, [R, C] of `dtype` each, still to be reduced by `excess`.

    PTX: whether PTX can be used; if not, the same is said in Triton's own words.
    """
    if PTX and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            FOUR_FP16, "=r,=r,=r,=r,r", [halves], (tl.float16, tl.float16, tl.float16, tl.float16), True, 2
        )
    elif PTX and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            FOUR_BF16, "=r,=r,=r,=r,r", [halves], (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2
        )
    else:
        return (
            _plane(halves, 0, 4, dtype),
            _plane(halves, 1, 4, dtype),
            _plane(halves, 2, 4, dtype),
            _plane(halves, 3, 4, dtype),
        )


@triton.jit
def unpack8(halves, dtype: tl.constexpr, PTX: tl.constexpr):
    """int16 [R, C] of 8-bit values -> planes 0 and 1, as `unpack4`."""
    if PTX and dtype == tl.float16:
        return tl.inline_asm_elementwise(EIGHT_FP16, "=r,=r,r", [halves], (tl.float16, tl.float16), True, 2)
    elif PTX and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(EIGHT_BF16, "=r,=r,r", [halves], (tl.bfloat16, tl.bfloat16), True, 2)
    else:
        return _plane(halves, 0, 8, dtype), _plane(halves, 1, 8, dtype)


@triton.jit
def unpack_block(w_ptrs, BITS: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr):
    """A block of 128 values a row, from pointers to its first 32 halves [R, 32] -> four planes of 32, [R, 32] each."""
    if BITS == 4:
        return unpack4(tl.load(w_ptrs, eviction_policy="evict_first"), dtype, PTX)
    else:
        p0, p1 = unpack8(tl.load(w_ptrs, eviction_policy="evict_first"), dtype, PTX)
        p2, p3 = unpack8(tl.load(w_ptrs + 32, eviction_policy="evict_first"), dtype, PTX)
        return p0, p1, p2, p3


@triton.jit
def subtract(q, zero, BITS: tl.constexpr, dtype: tl.constexpr):
    """Unpacked values [R, C] less what they exceed q - zero by. zero: uint8 [R, 1], or None for 2**(BITS - 1).

    A scalar for None: a tensor of one value would send the weights through shared memory. Half an instruction for a
    weight; correcting the product by sums of x instead takes more, a second product that finds them (2.95 instructions
    for a weight where this takes 2.67, compiled for sm_90).
    """
    shift: tl.constexpr = (-128 if BITS == 8 else 128) if dtype == tl.bfloat16 else 1024 if dtype == tl.float16 else 0
    if zero is None:
        if shift == -128:
            return q
        else:
            return q - tl.cast(shift + 2 ** (BITS - 1), dtype)
    elif dtype == tl.float16:
        return q - (zero.to(tl.int16) | 0x6400).to(dtype, bitcast=True)
    elif shift == 128:
        return q - (zero.to(tl.int16) | 0x4300).to(dtype, bitcast=True)
    else:
        return q - (zero.to(tl.int32) + shift).to(dtype)
