"""Device functions of the attention kernels: tiles of operands, scores, one step of the online softmax.

A head's D columns are taken as D0 + D1, powers of two of which the second may be 0; columns from D on read as 0.
Scores are in units of log 2, so that exp2 makes weights of them.
"""

import triton
import triton.language as tl


@triton.jit
def load_columns(base, first, offs, last, stride, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr):
    """Columns FROM to below FROM + WIDTH of the rows first + offs: [len(offs), WIDTH].

    Rows past `last` repeat it: cheaper than a mask, and what they hold, perhaps NaN, never gets near a product.
    """
    cols = FROM + tl.arange(0, WIDTH)
    rows = tl.minimum(offs, last - first)  # in 32 bits: the launcher sees to it that a tile does not span more
    ptrs = base + first.to(tl.int64) * stride + (rows[:, None] * stride + cols[None, :])
    if FROM + WIDTH > D:
        return tl.load(ptrs, mask=(cols < D)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_columns(rows, x, mask, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr):
    """Columns FROM to below FROM + WIDTH of the rows [BLOCK_M, 1] that `mask` has."""
    cols = FROM + tl.arange(0, WIDTH)
    tl.store(rows + cols[None, :], x.to(rows.dtype.element_ty), mask=mask[:, None] & (cols < D)[None, :])


@triton.jit
def keys_times(q0, q1, acc, k, first, offs, last, stride, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """acc + q @ k.T for the keys first + offs: float32 [BLOCK_M, BLOCK_N]."""
    s = tl.dot(q0, tl.trans(load_columns(k, first, offs, last, stride, D, 0, D0)), acc, input_precision="ieee")
    if D1:
        k1 = load_columns(k, first, offs, last, stride, D, D0, D1)
        s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
    return s


@triton.jit
def add_values(
    acc0, acc1, p, v, first, offs, last, stride, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr
):  # fmt: skip
    """acc + p @ v for the values first + offs; p is rounded to v's dtype."""
    v0 = load_columns(v, first, offs, last, stride, DV, 0, V0)
    weights = p.to(v0.dtype)
    acc0 = tl.dot(weights, v0, acc0, input_precision="ieee")
    if V1:
        v1 = load_columns(v, first, offs, last, stride, DV, V0, V1)
        acc1 = tl.dot(weights, v1, acc1, input_precision="ieee")
    return acc0, acc1


@triton.jit
def rescale(acc0, acc1, alpha, V1: tl.constexpr):
    """The sums, each row times its alpha."""
    acc0 = acc0 * alpha[:, None]
    if V1:
        acc1 = acc1 * alpha[:, None]
    return acc0, acc1


@triton.jit
def load_mask(bias, cols, end, stride, factor, LOWEST: tl.constexpr):
    """What the mask adds to scores, times `factor`, and -inf where it hides a key: float32 [BLOCK_M, BLOCK_N].

    bias: pointers to the first column, [BLOCK_M, 1]. LOWEST: the number that hides when added; None for a mask of
    bytes, which hide where they are 0.
    """
    b = tl.load(bias + cols.to(tl.int64)[None, :] * stride, mask=(cols < end)[None, :], other=0.0)
    if LOWEST is None:
        return tl.where(b != 0, 0.0, float("-inf"))
    else:
        added = b.to(tl.float32)
        return tl.where(added > LOWEST, added * factor, float("-inf"))


@triton.jit
def change_scores(s, cols, rows, scale, softcap, slope):
    """Products of keys `cols` and queries at positions `rows` -> scores, for what a plain scale does not do."""
    if softcap is None:
        s = s * scale
    else:
        # softcap * tanh(x) = softcap - 2 softcap / (exp(2 x) + 1), right at both ends; `scale` has the 2 / softcap
        s = softcap - 2.0 * softcap / (tl.exp2(s * scale) + 1.0)
    if slope is not None:
        s += slope * (cols.to(tl.float32)[None, :] - rows.to(tl.float32)[:, None])
    return s


@triton.jit
def hide(s, cols, rows, end, window, CAUSAL: tl.constexpr):
    """Scores, -inf where the query at position rows[i] does not see key cols[j]."""
    if CAUSAL:
        s = tl.where(cols[None, :] <= tl.minimum(rows, end - 1)[:, None], s, float("-inf"))
    elif window is not None:
        s = tl.where(cols[None, :] < tl.minimum(rows + window, end)[:, None], s, float("-inf"))
    else:
        s = tl.where((cols < end)[None, :], s, float("-inf"))
    if window is not None:
        s = tl.where(cols[None, :] > (rows - window)[:, None], s, float("-inf"))
    return s


@triton.jit
def weigh(s, m, total, scale, PLAIN: tl.constexpr):
    """One step of the online softmax: p, the maxima m, the sums, and alpha, by which what was summed before shrinks.

    PLAIN: s are products, of which the scale makes scores in the same instruction that subtracts the maximum.
    """
    largest = tl.max(s, 1)
    largest = tl.maximum(m, largest * scale if PLAIN else largest)
    safe = tl.where(largest == float("-inf"), 0.0, largest)  # of rows that have not seen a key
    p = tl.exp2((s * scale if PLAIN else s) - safe[:, None])
    alpha = tl.exp2(m - safe)
    return p, largest, total * alpha + tl.sum(p, 1), alpha


@triton.jit
def attend(
    acc0, acc1, m, total, p, alpha, q0, q1, k, v, bias, slope,
    first, until, low, steps, end, all_low, all_high, rows, scale, softcap, window, stride_kn, stride_vn, stride_bn,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    CAUSAL: tl.constexpr, LOWEST: tl.constexpr, OVERLAP: tl.constexpr, HIDE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Steps `first` to below `until` of `steps`, each one tile of keys to the left, the last of which begins at `low`.

    HIDE: whether keys of a tile may be hidden from some query: "all", "none", or "some", who are asked one by one.
    OVERLAP: p and alpha are those of the step before, whose values are added in this one. Else they mean nothing.
    """
    offs_n = tl.arange(0, BLOCK_N)
    PLAIN: tl.constexpr = softcap is None and slope is None
    for step in range(first, until):
        j = low + (steps - 1 - step) * BLOCK_N
        cols = j + offs_n
        s = tl.zeros((rows.shape[0], BLOCK_N), tl.float32)
        if bias is not None and softcap is None:  # sums that begin with the mask cost less than adding it
            s = load_mask(bias, cols, end, stride_bn, 1.4426950408889634 / scale, LOWEST)
        s = keys_times(q0, q1, s, k, j, offs_n, end - 1, stride_kn, D, D0, D1)
        if OVERLAP:  # the tile to the right; there is none at first, where p is 0
            acc0, acc1 = rescale(acc0, acc1, alpha, V1)
            acc0, acc1 = add_values(acc0, acc1, p, v, j + BLOCK_N, offs_n, end - 1, stride_vn, DV, V0, V1)
        if not PLAIN:
            s = change_scores(s, cols, rows, scale, softcap, slope)
        if bias is not None and softcap is not None:
            s += load_mask(bias, cols, end, stride_bn, 1.4426950408889634, LOWEST)
        if HIDE == "all":
            s = hide(s, cols, rows, end, window, CAUSAL)
        elif HIDE == "some":
            if (j < all_low) | (j + BLOCK_N > all_high):
                s = hide(s, cols, rows, end, window, CAUSAL)
        p, m, total, alpha = weigh(s, m, total, scale, PLAIN)
        if not OVERLAP:
            acc0, acc1 = rescale(acc0, acc1, alpha, V1)
            acc0, acc1 = add_values(acc0, acc1, p, v, j, offs_n, end - 1, stride_vn, DV, V0, V1)
    return acc0, acc1, m, total, p, alpha


@triton.jit
def own_tile(tiles, pairs, section, GROUP: tl.constexpr):
    """Which head of which sequence this program works for, counted from 0, and on which tile of its queries.

    A pair is a sequence and a head of its keys. Programs are in sections of pairs whose keys stay in the cache. In a
    section the last tiles come first, whose queries see most, and heads that share keys are neighbours.
    """
    pid, in_section = tl.program_id(0), section * GROUP * tiles
    first = pid // in_section * section
    heads = tl.minimum(section, pairs - first) * GROUP
    rank = pid % in_section
    return first * GROUP + rank % heads, tiles - 1 - rank // heads


@triton.jit
def key_ranges(start, end, first_row, last_row, window, CAUSAL: tl.constexpr):
    """For queries at positions first_row to last_row: keys that some of them see, and keys that all of them see."""
    low, high, all_low, all_high = start, end, start, end
    if CAUSAL:
        high, all_high = tl.minimum(end, last_row + 1), tl.minimum(end, first_row + 1)
    if window is not None:
        low, all_low = tl.maximum(start, first_row - window + 1), tl.maximum(start, last_row - window + 1)
        if not CAUSAL:
            high, all_high = tl.minimum(end, last_row + window), tl.minimum(end, first_row + window)
    return low, high, all_low, all_high


@triton.jit
def masked_steps(low, high, all_low, all_high, BLOCK_N: tl.constexpr):
    """Steps from right to left over keys low to below high, and after how many the masks end, and begin again."""
    steps = tl.cdiv(tl.maximum(high - low, 0), BLOCK_N)
    right = tl.maximum(steps - tl.maximum(all_high - low, 0) // BLOCK_N, 0)
    left = steps - tl.cdiv(all_low - low, BLOCK_N)
    return steps, right, tl.maximum(right, left)


@triton.jit
def finish(m, total, sink):
    """What the sums are to be multiplied by, 0 for a row that saw no key, and the logarithm of the denominator."""
    if sink is not None:
        largest = tl.maximum(m, sink)
        safe = tl.where(largest == float("-inf"), 0.0, largest)
        factor = tl.exp2(m - safe)
        total = total * factor + tl.exp2(sink - safe)
        m = largest
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    inverse = tl.where(empty, 0.0, 1.0 / total)
    if sink is not None:
        inverse = inverse * factor
    return inverse, tl.where(empty, float("-inf"), (m + tl.log2(total)) * 0.6931471805599453)
