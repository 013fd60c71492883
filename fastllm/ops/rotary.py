"""The op `fastllm::rotary`: rotary position embedding of queries and keys."""

from functools import cache

import torch
from torch import Tensor

from .library import define_fused, is_traced, is_watched
from .norm import FAST


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The definition, for x [B, H, S, D]: x cos + partner sin, in float32, rounded once; float64 stays float64.

    partner: (-x2, x1) for the halves x1, x2 of the numbers that turn; interleaved: of each pair of neighbours.
    """
    R, wide = cos.shape[-1], torch.promote_types(x.dtype, torch.float32)
    head = x[..., :R].to(wide)
    if interleaved:
        partner = torch.stack((-head[..., 1::2], head[..., ::2]), -1).flatten(-2)
    else:
        partner = torch.cat((-head[..., R // 2 :], head[..., : R // 2]), -1)
    y = head * cos.to(wide).unsqueeze(1) + partner * sin.to(wide).unsqueeze(1)
    return torch.cat((y.to(x.dtype), x[..., R:]), -1)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """(q, k) [B, H, S, D] with their first R numbers turned by an angle for each position; the others pass.

    q, k: floating point, any strides; they may have different numbers of heads
    cos, sin: [B or 1, S, R], one entry for every number that turns, as transformers computes them: each angle stands
        in both halves, or with `interleaved` twice in a row. GPT-J, which keeps R / 2 entries, repeats them itself.
    interleaved: number d turns with its neighbour d ^ 1 (GPT-J, Cohere), not with the one R / 2 away (Llama, NeoX)

    float32 arithmetic, rounded once; on the CPU each of two sums is rounded, which is less often than transformers
    does. Differentiable. ValueError for operands that do not fit. Source: Su et al., RoFormer (2021).
    """
    if is_traced(q):
        return turn(q, cos, sin, interleaved), turn(k, cos, sin, interleaved)
    if is_watched(q, k, cos, sin):
        return torch.ops.fastllm.rotary(q, k, cos, sin, interleaved)
    return _forward(q, k, cos, sin, interleaved)


def check_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise ValueError where torch would broadcast, or complain about something else."""
    if q.ndim == k.ndim == 4 and cos.ndim == 3 and q.dtype == k.dtype:
        (B, _, S, D), (Bk, _, Sk, Dk), (Bc, Sc, R) = q.shape, k.shape, cos.shape
        fit = Bk == B and Sk == S == Sc and Dk == D and (Bc == 1 or Bc == B) and cos.shape == sin.shape
        if fit and 0 < R <= D and R % 2 == D % 2 == 0:
            return
    raise ValueError(
        "q and k must be [B, H, S, D] of one dtype, alike but for H, and cos and sin [B or 1, S, R] with an entry for "
        "each of the R numbers that turn; D and R must be even, as numbers turn in pairs, and R at most D; got q "
        f"{q.dtype} {list(q.shape)}, k {k.dtype} {list(k.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}"
    )


def _forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    check_rotary(q, k, cos, sin)
    if q.is_cuda and q.dtype in FAST:
        from ..kernels.rotary import rotary  # Triton is imported on first use

        return rotary(q, k, cos, sin, interleaved)
    return cpu_rotary(q, k, cos, sin, interleaved)


def cpu_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """In few operators: q and k at once where they lie side by side, as those of a merged projection do."""
    if cos.dtype != q.dtype or sin.dtype != q.dtype or q.dtype not in FAST or not q.numel():
        return turn(q, cos, sin, interleaved), turn(k, cos, sin, interleaved)
    both, angles = one_tensor(q, k), _angles(cos, sin, interleaved)
    if both is None:
        return _cpu_turn(q, *angles, interleaved), _cpu_turn(k, *angles, interleaved)
    q, k = _cpu_turn(both, *angles, interleaved).split_with_sizes((q.shape[1], k.shape[1]), 1)
    return q, k


def cpu_turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [B, H, S, D], a dtype of FAST that cos and sin have as well."""
    return _cpu_turn(x, *_angles(cos, sin, interleaved), interleaved)


def _angles(cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """As they broadcast to heads; sin with the signs of the partners."""
    sin = sin * _signs(cos.shape[-1], interleaved, sin.dtype)
    if cos.shape[0] > 1:
        return cos.unsqueeze(1), sin.unsqueeze(1)
    return cos, sin  # one for all sequences broadcasts as it is


def one_tensor(q: Tensor, k: Tensor) -> Tensor | None:
    """q and k as one [B, Hq + Hk, S, D], if the heads of k follow those of q in memory."""
    (B, Hq, S, D), Hk = q.shape, k.shape[1]
    (qb, qh, qs, qd), (kb, kh, ks, kd) = q.stride(), k.stride()
    step = int(k.storage_offset() - q.storage_offset())
    if Hq == 1:
        qh = step
    # strides of dimensions of 1 say nothing; the same distance in the storage and in memory means the same storage
    if step <= 0 or step != Hq * qh or k.data_ptr() - q.data_ptr() != step * q.itemsize or qd != kd:
        return None
    if Hk > 1 and kh != qh or B > 1 and kb != qb or S > 1 and ks != qs:
        return None
    return q.as_strided((B, Hq + Hk, S, D), (qb, qh, qs, qd))


def _cpu_turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    R = cos.shape[-1]
    if R < x.shape[-1]:
        return torch.cat((_cpu_turn(x.narrow(-1, 0, R), cos, sin, interleaved), x[..., R:]), -1)
    partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else x.roll(R // 2, -1)
    return x.mul(cos).addcmul_(partner, sin)


@cache
def _signs(R: int, interleaved: bool, dtype: torch.dtype) -> Tensor:
    """-1 for the numbers whose partner counts negative, 1 for the others: [R], on the CPU."""
    minus = torch.arange(R, device="cpu") % 2 == 0 if interleaved else torch.arange(R, device="cpu") < R // 2
    return torch.where(minus, -1.0, 1.0).to(dtype)


def _define(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    check_rotary(q, k, cos, sin)
    return turn(q, cos, sin, interleaved), turn(k, cos, sin, interleaved)


def _like(q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return torch.empty_like(q, memory_format=contiguous), torch.empty_like(k, memory_format=contiguous)


_SCHEMA = "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)"
define_fused(_SCHEMA, _forward, _define, _like)
