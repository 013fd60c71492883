"""The grouped product of a mixture of experts: its kernels against the definition, and whole layers."""

import copy

import pytest
import torch
from close import assert_close, assert_equal
from families import build, outputs
from test_kernel_quant_matmul import Case, exact

import fastllm
from fastllm.kernels import expert_matmul as kernels
from fastllm.kernels.quant_config import ROWS, SMALL
from fastllm.nn.experts import QuantExperts
from fastllm.ops.experts import expert_matmul, plan_experts


@pytest.mark.parametrize("S, count, BLOCK_M", [(1, 1, 16), (64, 64, 16), (300, 5, 32), (7, 60, 16), (130, 3, 64)])
def test_the_plan_holds_every_slot_once(S: int, count: int, BLOCK_M: int, device: str) -> None:
    index = torch.randint(0, count + 1, (S,), device=device)
    slots, experts = kernels.plan_experts(index, count, BLOCK_M)
    tiles = slots.view(len(experts), BLOCK_M)
    assert (experts[:-1][experts[1:] >= 0] <= experts[1:][experts[1:] >= 0]).all()
    seen = []
    for tile, expert in zip(tiles, experts.tolist(), strict=True):
        if expert >= 0:
            own = tile[tile >= 0]
            assert len(own) and (tile[: len(own)] >= 0).all() and (index[own.long()] == expert).all()
            seen += own.tolist()
    assert sorted(seen) == torch.where(index < count)[0].tolist()
    want_slots, want_experts = plan_experts(index.cpu(), count, BLOCK_M)
    assert_equal(experts.cpu(), want_experts)
    used = want_experts >= 0
    assert_equal(tiles.cpu()[used], want_slots.view(-1, BLOCK_M)[used])


def test_a_slot_without_an_expert_is_in_no_tile(device: str) -> None:
    slots, experts = kernels.plan_experts(torch.tensor([2, 3, 3, 0], device=device), 3, 16)
    assert experts.tolist() == [0, 2, -1]
    assert slots[:32].tolist() == [3] + [-1] * 15 + [0] + [-1] * 15


@pytest.mark.parametrize("tile", [SMALL.tile, ROWS[90][0].tile, ROWS[90][3].tile, ROWS[80][0].tile], ids=str)
@pytest.mark.parametrize("bits, group", [(4, 32), (4, 128), (8, None)])
@pytest.mark.parametrize("per_token", [1, 3])
def test_exact(tile, bits, group, per_token, device):
    E, N, K, T = 5, 37, 272, 9
    p = exact(Case(bits, group, bits == 8, torch.float16, T, E * N, K, True, torch.float16), device)
    index = torch.randint(0, E, (T * per_token,), device=device)
    index[0] = 1
    slots, experts = kernels.plan_experts(index, E, tile.BLOCK_M)
    operands = (p.words(), p.scale, p.zero, p.bias, N, bits, p.group, per_token)
    y = kernels.expert_matmul(p.x, slots, experts, *operands, tile)
    every = p.want().view(T, E, N)
    rows = torch.arange(T * per_token, device=device) // per_token
    assert_equal(y, every[rows, index].to(torch.float16))
    if device == "cpu":
        assert_equal(expert_matmul(p.x, slots, experts, *operands), y)
    with pytest.raises(AssertionError, match="not equal"):
        assert_equal(y, every[rows, (index + 1) % E].to(torch.float16))


def test_close_in_bfloat16(device):
    E, N, K, T = 3, 40, 256, 4
    p = exact(Case(4, 64, False, torch.bfloat16, T, E * N, K, False, torch.bfloat16), device)
    p = p._replace(x=torch.randn_like(p.x))
    index = torch.tensor([0, 2, 2, 1], device=device)
    plan = kernels.plan_experts(index, E, 16)
    y = kernels.expert_matmul(p.x, *plan, p.words(), p.scale, p.zero, None, N, 4, 64, 1, ROWS[90][0].tile)
    assert_close(y, p.want().view(T, E, N)[torch.arange(T), index.cpu()], dtype=torch.bfloat16)


def test_operands_that_do_not_fit_are_refused(device):
    p = exact(Case(4, 64, False, torch.float16, 4, 120, 256, False, torch.float16), device)
    plan = kernels.plan_experts(torch.zeros(4, dtype=torch.long, device=device), 3, 16)
    with pytest.raises(ValueError, match="tiles of 32"):
        kernels.expert_matmul(p.x, *plan, p.words(), p.scale, p.zero, None, 40, 4, 64, 1, ROWS[90][2].tile)
    with pytest.raises(ValueError, match="scale must be"):
        kernels.expert_matmul(p.x, *plan, p.words(), p.scale[:, 1:], p.zero, None, 40, 4, 64, 1)


def test_the_tile_follows_the_plan():
    cpu = torch.device("cpu")
    for rows in (1, 16, 17, 64, 100, 5000):
        BLOCK_M = kernels.block_m(rows, cpu)
        assert kernels.expert_tile(BLOCK_M, 256, 4, torch.float16, cpu).BLOCK_M == BLOCK_M
        assert kernels.expert_tile(BLOCK_M, 255, 4, torch.float16, cpu) == SMALL.tile._replace(BLOCK_M=BLOCK_M)
    assert kernels.block_m(1, cpu) == 16 < kernels.block_m(100, cpu)


def test_opcheck(device):
    p = exact(Case(4, 64, False, torch.float16, 4, 120, 256, True, torch.float16), device)
    index = torch.tensor([0, 2, 2, 1], device=device)
    torch.library.opcheck(torch.ops.fastllm.plan_experts, (index, 3, 16))
    operands = (p.x, *plan_experts(index, 3, 16), p.words(), p.scale, p.zero, p.bias, 40, 4, 64, 1)
    torch.library.opcheck(torch.ops.fastllm.expert_matmul, operands)


@pytest.fixture
def planar(monkeypatch):
    """Layers take the layout of a GPU, and experts its path; on the CPU the ops are then their definitions."""
    monkeypatch.setattr("fastllm.ops.gpu.Planar.reasons", lambda *_: [])
    grouped = QuantExperts.forward

    def forward(self, hidden, index, weights):
        up, down = self._stack("up"), self._stack("down")
        assert up is not None and down is not None
        return self._grouped(up, down, hidden, index, weights)

    monkeypatch.setattr(QuantExperts, "forward", forward)
    return grouped


MOES = ["mixtral", "qwen3-moe", "gpt-oss"]


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, QuantExperts)]


@pytest.mark.parametrize("weights", ["int4-g32", "int8"])
@pytest.mark.parametrize("family", MOES)
def test_grouped_is_the_loop(family, weights, planar):
    model = build(family, torch.float32)
    fastllm.optimize(model, weights, quiet=True)
    for module in experts_of(model):
        up = module.up[0]
        hidden = torch.randn(7, up.in_features)
        index = torch.stack([torch.randperm(module.num_experts)[:2] for _ in range(7)])
        index[3, 1] = module.num_experts  # a slot without an expert
        routes = torch.rand(7, 2)
        want = planar(module, hidden, index, routes)
        assert_close(module(hidden, index, routes), want.double(), dtype=torch.float32)
        with pytest.raises(AssertionError, match="worst"):
            assert_close(module(hidden, (index + 1) % module.num_experts, routes), want.double(), dtype=torch.float32)


@pytest.mark.parametrize("family", MOES)
def test_grouped_experts_are_saved_copied_and_restored(family, planar, tmp_path):
    model = build(family)
    before, logits = copy.deepcopy(model.state_dict()), outputs(model)
    fastllm.optimize(model, "int4-g32", quiet=True)
    packed = {name: t.clone() for name, t in model.state_dict().items()}
    got = outputs(model)  # stacks the weights
    stacks = [stack for module in experts_of(model) for stack in module._stacks.values()]
    assert stacks and all(s.w.data_ptr() == s.held[0][0].data_ptr() for s in stacks)
    assert packed.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert_equal(tensor, packed[name])
    other = copy.deepcopy(model)
    assert not any(module._stacks for module in experts_of(other))
    assert_equal(outputs(other), got)
    model.load_state_dict({name: t * 0 if "weight_scale" in name else t for name, t in packed.items()})
    assert not torch.equal(outputs(model), got)
    model.load_state_dict(packed)
    assert_equal(outputs(model), got)
    assert_equal(outputs(model._apply(torch.clone)), got)  # as moving it does
    if family != "gpt-oss":  # whose experts have no names in a checkpoint that packed ones could go by
        model.save_pretrained(tmp_path)
        assert_equal(outputs(fastllm.load(tmp_path)), got)
    fastllm.restore(model)
    assert_equal(outputs(model), logits)
    assert before.keys() == model.state_dict().keys()


def test_experts_that_differ_are_not_stacked(planar):
    model = build("mixtral", torch.float32)
    fastllm.optimize(model, "int4-g32", quiet=True)
    module = experts_of(model)[0]
    module.up[1].to_rest()
    assert module._stack("up") is None and module._stack("down") is not None
