"""Tiles of keys and values out of a cache in 16 or 32 bits, in int8 or in int4, and products with them.

Codes are read as int16 and come apart in registers, where the tensor cores want them: an instruction gives two codes,
where Triton's conversion takes one or two for each, at a quarter of the rate. A tile gives several *parts*: numbers
that lie at the same place in each int16. Queries and results are cut into parts alike (`columns`).

int8: bytes or-ed into the mantissa of 2^10 (float16) or 2^7 (bfloat16), less what they exceed their code by. Codes are
exact, 5 instructions for 4 of them in float16 and 7 in bfloat16. The scale of a key joins its scores, that of a value
its probabilities: no scaled tile exists.

int4: a nibble at the bottom of a float16 is the subnormal code * 2^-24, one in the second place code * 2^-20, and the
tensor cores take both as they are: 5 instructions for 8 codes. Scales hold for 32 numbers of a row. To apply them to
the codes would take 4 more for 8 (less 2^10, times the scale, plus the zero), and as many to fetch them; instead
products are made group by group, and the scales of a group join its scores, or its probabilities, of which there are
an eighth of the codes. What the zeros add is a small product of its own: sums of the query over groups by zeros.
"""

import triton
import triton.language as tl

GROUP = 32  # numbers of a row that share a scale, at 4 bits
# int8, two's complement. float16: code + 128 under the byte of 2^10, less 1152.
_INT8_FP16 = tl.constexpr("""{ .reg .b32 t, u, v, less;
mov.b32 less, 0x64806480; xor.b32 t, $2, 0x80808080;
prmt.b32 u, t, 0x64646464, 0x4240; prmt.b32 v, t, 0x64646464, 0x4341;
sub.rn.f16x2 $0, u, less; sub.rn.f16x2 $1, v, less; }""")
# bfloat16 has 7 bits of mantissa: 128 + (low 7 bits), less 128, or 256 where the sign is set.
_INT8_BF16 = tl.constexpr("""{ .reg .b32 t, low, high, one;
mov.b32 one, 0x3f803f80; shr.u32 t, $2, 8;
lop3.b32 low, $2, 0x007f007f, 0x43004300, 0xea; lop3.b32 high, $2, 0x00800080, 0xc300c300, 0xea;
fma.rn.bf16x2 $0, low, one, high;
lop3.b32 low, t, 0x007f007f, 0x43004300, 0xea; lop3.b32 high, t, 0x00800080, 0xc300c300, 0xea;
fma.rn.bf16x2 $1, low, one, high; }""")
_INT4_FP16 = tl.constexpr("""{ .reg .b32 t;
and.b32 $0, $4, 0x000f000f; and.b32 $1, $4, 0x00f000f0; shr.u32 t, $4, 8;
and.b32 $2, t, 0x000f000f; and.b32 $3, t, 0x00f000f0; }""")
LOW, HIGH = tl.constexpr(2.0**24), tl.constexpr(2.0**20)  # what makes numbers of the nibbles that `codes4` returns


@triton.jit
def codes8(halves, dtype: tl.constexpr, PTX: tl.constexpr):
    """int16 tile of two int8 -> the codes of the low bytes and of the high bytes, in `dtype`."""
    if PTX and dtype == tl.float16:
        return tl.inline_asm_elementwise(_INT8_FP16, "=r,=r,r", [halves], (tl.float16, tl.float16), True, 2)
    elif PTX and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(_INT8_BF16, "=r,=r,r", [halves], (tl.bfloat16, tl.bfloat16), True, 2)
    else:
        return halves.to(tl.int8, bitcast=False).to(dtype), (halves >> 8).to(dtype)


@triton.jit
def codes4(halves, dtype: tl.constexpr, PTX: tl.constexpr):
    """int16 tile of four nibbles -> from the lowest, code / LOW, code / HIGH, code / LOW, code / HIGH in `dtype`."""
    if PTX and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            _INT4_FP16, "=r,=r,=r,=r,r", [halves], (tl.float16, tl.float16, tl.float16, tl.float16), True, 2
        )
    else:
        small: tl.constexpr = 2.0**-24
        return (
            ((halves & 0x0F).to(tl.float32) * small).to(dtype),
            ((halves & 0xF0).to(tl.float32) * small).to(dtype),
            ((halves >> 8 & 0x0F).to(tl.float32) * small).to(dtype),
            ((halves >> 8 & 0xF0).to(tl.float32) * small).to(dtype),
        )


@triton.constexpr_function
def parts_of(FORMAT, D):
    """How many parts a row of D numbers has."""
    return 1 if FORMAT == 0 else 2 if FORMAT == 8 else D // 16


@triton.constexpr_function
def groups_of(D):
    """How many groups a row has, at 4 bits."""
    return D // GROUP


@triton.constexpr_function
def group_of(part, D):
    """The group that a part of codes of 4 bits belongs to."""
    return part // 4 + part % 2 * (D // GROUP // 2)


@triton.constexpr_function
def part_of(group, D):
    """The first of the two parts that a group has; the other is the second after it."""
    half = D // GROUP // 2
    return group % half * 4 + group // half


@triton.constexpr_function
def zeros_width(D):
    """The scales and zeros of a row, of which there are D / 16, as the tensor cores take them."""
    return 16 if D <= 256 else triton.next_power_of_2(D // 16)


@triton.constexpr_function
def first_column(part, FORMAT, D):
    """The number of a row that a part begins with; those after it are STEP further each: 1, and 2 for codes."""
    if FORMAT != 4:
        return part
    return part // 4 * 32 + part % 4 // 2 + part % 2 * (D // 2)


@triton.constexpr_function
def width_of(FORMAT, D):
    """Numbers of a part, as the tensor cores take them."""
    return 16 if FORMAT == 4 else max(16, triton.next_power_of_2(D // parts_of(FORMAT, D)))


@triton.jit
def nothing():
    """A tuple for tiles to be added to."""
    return ()


@triton.jit
def columns(part: tl.constexpr, FORMAT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Which numbers of a row a part has; beyond D where there are none."""
    if FORMAT == 0:
        return tl.arange(0, BLOCK)
    else:
        return first_column(part, FORMAT, D) + 2 * tl.arange(0, BLOCK)


@triton.jit
def empty_sums(total, FORMAT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Where `weigh` begins; total: zeros [.., M]."""
    sums = nothing()
    for _ in tl.static_range(parts_of(FORMAT, D)):
        sums = sums + (rows(total) + tl.zeros((BLOCK,), tl.float32),)
    if FORMAT == 4:
        sums = sums + (rows(total) + tl.zeros((zeros_width(D),), tl.float32),)
    return sums


@triton.jit
def cols(x):
    """[..., n] -> [..., 1, n]"""
    return tl.expand_dims(x, -2)


@triton.jit
def rows(x):
    """[..., n] -> [..., n, 1]"""
    return tl.expand_dims(x, -1)


@triton.jit
def _half(word, which: tl.constexpr):
    """The low (0) or the high (1) float16 of an int32, in float32."""
    return (word >> 16 * which).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scale(scale, offs, mask, group: tl.constexpr):
    """The scale of one group, for each key; offs: where a key's scales begin. Read as words: a copy takes no less."""
    words = (scale + offs).to(tl.pointer_type(tl.int32), bitcast=True) + group // 2
    return _half(tl.load(words, mask=mask, other=0), group % 2)


@triton.jit
def load_queries(q, mask, dtype: tl.constexpr, FORMAT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of queries from pointers to their first numbers [.., M] -> (parts [.., M, BLOCK], unit [.., M], sums).

    With int4 they are divided by a power of two, `unit`, to be in float16; sums: over each group, where `WIDTH` scales
    and zeros of a key have its zero, as two addends [.., M, WIDTH].
    """
    unit = tl.full(mask.shape, 1.0, tl.float32)
    if FORMAT == 4:
        offs_d = tl.arange(0, triton.next_power_of_2(D))
        x = tl.load(rows(q) + offs_d, mask=rows(mask) & (offs_d < D), other=0.0).to(tl.float32)  # [.., M, D]
        # the bits of a positive float are in its order; its exponent alone is a power of two
        bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, len(x.shape) - 1) & 0x7F800000
        unit = tl.where(bits == 0, 1.0, bits.to(tl.float32, bitcast=True))
    parts = nothing()
    for part in tl.static_range(parts_of(FORMAT, D)):
        column = columns(part, FORMAT, D, BLOCK)
        x = tl.load(rows(q) + column, mask=rows(mask) & (column < D), other=0.0)  # [.., M, BLOCK]
        if FORMAT == 4:
            x = (x.to(tl.float32) / rows(unit)).to(dtype)
        parts = parts + (x,)
    high, low = unit, unit
    if FORMAT == 4:
        G: tl.constexpr = groups_of(D)
        offs_g = tl.arange(0, zeros_width(D))
        sums = rows(unit) * 0.0 + offs_g * 0.0
        for g in tl.static_range(G):
            near, far = parts[part_of(g, D)], parts[part_of(g, D) + 2]
            both = tl.sum(near.to(tl.float32) + far.to(tl.float32), len(near.shape) - 1)
            sums = tl.where(offs_g == G + g, rows(both), sums)
        high = sums.to(dtype)
        low = (sums - high.to(tl.float32)).to(dtype)
    return parts, unit, high, low


@triton.jit
def scores(
    queries, k, k_scale, offs, offs_s, mask,
    FORMAT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """q . k [.., M, keys] of rows `load_queries` gave, for keys at `offs`, their scales at `offs_s`, where `mask`."""
    parts, unit, high, low = queries
    dtype: tl.constexpr = parts[0].dtype
    offs_w = tl.arange(0, BLOCK)[:, None]
    if FORMAT == 0:
        ks = tl.load(k + cols(offs) + offs_w, mask=cols(mask) & (offs_w < D), other=0.0)  # [.., BLOCK, keys]
        s = tl.dot(parts[0], ks, input_precision="ieee")
    elif FORMAT == 8:
        codes = tl.load(k + cols(offs) + offs_w, mask=cols(mask) & (offs_w < D // 2), other=0)
        even, odd = codes8(codes, dtype, PTX)
        s = tl.dot(parts[1], odd, tl.dot(parts[0], even, input_precision="ieee"), input_precision="ieee")
        s *= cols(tl.load(k_scale + offs_s, mask=mask, other=0.0))
    else:
        G: tl.constexpr = groups_of(D)
        offs_g = tl.arange(0, zeros_width(D))[:, None]
        zeros = tl.load(k_scale + cols(offs_s) + offs_g, mask=cols(mask) & (offs_g < 2 * G), other=0.0).to(dtype)
        s = tl.dot(low, zeros, tl.dot(high, zeros, input_precision="ieee"), input_precision="ieee")
        for i in tl.static_range(G // 2):
            codes = tl.load(k + cols(offs) + offs_w + 16 * i, mask=cols(mask), other=0)  # [.., 16, keys]
            c0, c1, c2, c3 = codes4(codes, dtype, PTX)
            near = tl.dot(parts[4 * i], c0, input_precision="ieee")
            near = tl.dot(parts[4 * i + 2], c2, near, input_precision="ieee")
            far = tl.dot(parts[4 * i + 1], c1, input_precision="ieee")
            far = tl.dot(parts[4 * i + 3], c3, far, input_precision="ieee")
            s += near * cols(_scale(k_scale, offs_s, mask, i) * LOW)
            s += far * cols(_scale(k_scale, offs_s, mask, i + G // 2) * HIGH)
        s *= rows(unit)
    return s


@triton.jit
def weigh(
    sums, alpha, p, v, v_scale, offs, offs_s, mask,
    dtype: tl.constexpr, FORMAT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """sums * alpha + p @ v: the parts [.., M, BLOCK] of the sums of values; with int4 the sums of zeros follow."""
    a, new = rows(alpha), nothing()
    offs_w = tl.arange(0, BLOCK)[None, :]
    if FORMAT == 0:
        vs = tl.load(v + rows(offs) + offs_w, mask=rows(mask) & (offs_w < D), other=0.0)  # [.., keys, BLOCK]
        new = new + (tl.dot(p.to(dtype), vs, sums[0] * a, input_precision="ieee"),)
    elif FORMAT == 8:
        codes = tl.load(v + rows(offs) + offs_w, mask=rows(mask) & (offs_w < D // 2), other=0)
        even, odd = codes8(codes, dtype, PTX)
        # a scale is 1/127 of the largest value: in float16, which has no room below, 64 times that much
        pv = (p * cols(tl.load(v_scale + offs_s, mask=mask, other=0.0) * 64.0)).to(dtype)
        first = tl.dot(pv, even, sums[0] * a, input_precision="ieee")
        new = new + (first, tl.dot(pv, odd, sums[1] * a, input_precision="ieee"))
    else:
        G: tl.constexpr = groups_of(D)
        offs_g = tl.arange(0, zeros_width(D))[None, :]
        zeros = tl.load(v_scale + rows(offs_s) + offs_g, mask=rows(mask) & (offs_g < 2 * G), other=0.0).to(dtype)
        for i in tl.static_range(G // 2):
            codes = tl.load(v + rows(offs) + offs_w + 16 * i, mask=rows(mask), other=0)  # [.., keys, 16]
            c0, c1, c2, c3 = codes4(codes, dtype, PTX)
            near = (p * cols(_scale(v_scale, offs_s, mask, i))).to(dtype)
            far = (p * cols(_scale(v_scale, offs_s, mask, i + G // 2))).to(dtype)
            n0 = tl.dot(near, c0, sums[4 * i] * a, input_precision="ieee")
            n1 = tl.dot(far, c1, sums[4 * i + 1] * a, input_precision="ieee")
            n2 = tl.dot(near, c2, sums[4 * i + 2] * a, input_precision="ieee")
            n3 = tl.dot(far, c3, sums[4 * i + 3] * a, input_precision="ieee")
            new = new + (n0, n1, n2, n3)
        new = new + (tl.dot(p.to(dtype), zeros, sums[2 * G] * a, input_precision="ieee"),)
    return new


@triton.jit
def value_of(sums, part: tl.constexpr, FORMAT: tl.constexpr, D: tl.constexpr):
    """A part of the weighted values [M, BLOCK], of all sums as `weigh` leaves them."""
    value = sums[part]
    if FORMAT == 8:
        value *= 1 / 64
    elif FORMAT == 4:
        G: tl.constexpr = groups_of(D)
        offs_g = tl.arange(0, zeros_width(D))[None, :]
        zero = tl.sum(tl.where(offs_g == G + group_of(part, D), sums[2 * G], 0.0), 1)  # [M]
        value = value * (HIGH if part % 2 else LOW) + zero[:, None]
    return value
