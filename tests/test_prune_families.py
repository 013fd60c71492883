"""`fastllm.prune` on models of many families: what is left is what stock transformers makes of its configuration."""

import json

import families
import pytest
import tiny
import torch
from pruning_cases import LAYERS, build, cached_and_not, data, state
from transformers import AutoConfig, Gemma3Config, Gemma3ForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

import fastllm
from fastllm.compress.prune_config import skeleton
from fastllm.compress.prune_layers import predicts

MOST = {"layers": 0.5, "ffn": 0.3, "heads": 0.5}
MERGED = ("gpt2", "phi3", "olmo2")  # one projection for queries, keys and values, or a norm of them all
MIXTURES = ("mixtral", "qwen3-moe", "gpt-oss")
EVERY = [*families.FAMILIES, *families.MORE_FAMILIES]
FAST = ("llama-tied", "gemma3", "qwen3", "gpt2", "bert", "mixtral", "gpt-oss", "phi3", "phi")


def prune(model, **asked):
    return fastllm.prune(model, calib=data(), quiet=True, **asked)


def asked(family: str) -> dict[str, float]:
    """As much as can be removed."""
    without = {"ffn"} if family in MIXTURES else {"heads"} if family in (*MERGED, "bert") else set()
    return {name: share for name, share in MOST.items() if name not in without}


CASES = [(name, torch.float32) for name in EVERY] + [(name, torch.bfloat16) for name in EVERY]
QUICK = [(name, torch.float32) for name in FAST] + [(name, torch.bfloat16) for name in ("gemma3", "gpt2", "phi")]


@pytest.mark.parametrize(
    "family, dtype", [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_stock_transformers_loads_what_is_left(family: str, dtype: torch.dtype, tmp_path) -> None:
    model = build(family, dtype)
    tied = [
        name for name, p in model.named_parameters(remove_duplicate=False) if "head" in name or "embed_tokens" in name
    ]
    pointers = len({model.get_parameter(name).data_ptr() for name in tied})
    report = prune(model, **asked(family))
    assert report.after.parameters < 0.9 * report.before.parameters and len(report.layers) == LAYERS // 2
    assert {p.dtype for p in model.parameters()} == {dtype} and not model.training
    assert len({model.get_parameter(name).data_ptr() for name in tied}) == pointers
    model.save_pretrained(tmp_path)
    loaded = tiny.load(families.FAMILIES.get(family, families.MORE_FAMILIES.get(family))[0], tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict().keys() == loaded.config.to_dict().keys()
    got, want = families.outputs(loaded).float(), families.outputs(model).float()
    assert not want.isnan().any()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    built = skeleton(model, model.config)
    for name, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if type(v) is int}
        assert own == {k: v for k, v in built.values[name].items() if type(v) is int}, name
    if predicts(model):
        cached, whole = cached_and_not(model, families.ids(length=12))
        slack = 1e-4 if dtype == torch.float32 else 0.2 * float(whole.float().abs().max())
        torch.testing.assert_close(cached, whole, rtol=0, atol=slack)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bert", "phi3", "gpt-oss"])
def test_all_kept_units_do_what_they_did(family: str) -> None:
    """With a repair that is not wanted, the pruned model is the whole one with units silenced."""
    model, whole = build(family), build(family)
    share = {name: value for name, value in asked(family).items() if name != "layers"}
    report = prune(model, repair=False, **share)
    handles = []
    for found, kind in ((report.ffn, "ffn"), (report.heads, "heads")):
        for narrowed in found:
            layer = whole.base_model.get_submodule({"gpt2": "h", "bert": "encoder.layer"}.get(family, "layers"))[
                narrowed.layer
            ]
            name = {"gpt2": "mlp.c_proj", "bert": "output.dense"}.get(family, "mlp.down_proj")
            handles.append(
                layer.get_submodule(name if kind == "ffn" else "self_attn.o_proj").register_forward_pre_hook(
                    silence(narrowed)
                )
            )
    want = families.outputs(whole)
    torch.testing.assert_close(families.outputs(model), want, rtol=0, atol=1e-4 * float(want.abs().max()))
    assert handles and (families.outputs(build(family)) - want).abs().max() > 1e-3 * float(want.abs().max())


def silence(narrowed):
    """A hook that makes the channels of removed units 0."""

    def hook(module, args):
        x = args[0].clone().unflatten(-1, (len(narrowed.scores), -1))
        x[..., narrowed.removed, :] = 0
        return (x.flatten(-2),)

    return hook


def test_attention_wider_than_the_neurons_is_not_taken_for_them() -> None:
    """Values feed the output of attention channel by channel, as neurons do, but cannot be cut like these."""
    model = build("llama", num_key_value_heads=4, head_dim=96)
    report = prune(model, ffn=0.5)
    assert report.settings == {"intermediate_size": (256, 128)}
    assert model.model.layers[0].self_attn.o_proj.in_features == 4 * 96 > 256


def test_lists_of_one_a_layer_follow_the_layers() -> None:
    model = build("gemma3")
    report = prune(model, layers=[0, 2])
    assert model.config.layer_types == ["full_attention"] * 2 and model.config.num_hidden_layers == 2
    assert [removed.layer for removed in report.layers] == [0, 2] and report.settings == {"num_hidden_layers": (4, 2)}
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    assert not any(layer.self_attn.is_sliding for layer in model.model.layers)
    cached, whole = cached_and_not(model, families.ids(length=20))  # beyond the window of the layers that went
    torch.testing.assert_close(cached, whole, rtol=0, atol=1e-4)


def test_heads_that_share_one_head_of_keys_go_alone(tmp_path) -> None:
    """As in Gemma 3 270M: four heads on one of keys and values."""
    model = build("gemma3", num_key_value_heads=1)
    report = prune(model, heads=0.5)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.out_features == attention.o_proj.in_features == 64 and attention.k_proj.out_features == 32
    assert attention.num_key_value_groups == 2 and report.settings == {"num_attention_heads": (4, 2)}
    assert "removed 2 of 4 heads in each of 4 layers" in str(report)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(families.outputs(tiny.load("gemma3_text", tmp_path)), families.outputs(model))
    cached, whole = cached_and_not(model, families.ids(length=12))
    torch.testing.assert_close(cached, whole, rtol=0, atol=1e-4)


def test_groups_of_heads_go_together() -> None:
    model = build("qwen3")
    report = prune(model, heads=0.5)
    attention = model.model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features, attention.v_proj.out_features) == (
        64,
        32,
        32,
    )
    assert attention.num_key_value_groups == 2 and len(attention.q_norm.weight) == 32
    assert "removed 1 of 2 groups of heads" in str(report) and model.config.head_dim == 32


def test_a_head_size_that_follows_from_their_number_is_written_down(tmp_path) -> None:
    sizes = {name: value for name, value in tiny.SIZES.items() if name != "head_dim"}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes | families.COMMON)).eval()
    assert not hasattr(model.config, "head_dim")
    prune(model, heads=0.5)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["head_dim"] == 32 and stored["num_attention_heads"] == 2 and stored["num_key_value_heads"] == 1
    torch.testing.assert_close(families.outputs(tiny.load("qwen2", tmp_path)), families.outputs(model))


@pytest.mark.parametrize("multiple, kept", [(128, 192), (64, 192), (48, 192), (10, 180), (1, 180), (1000, 186)])
def test_what_is_left_is_a_multiple(multiple: int, kept: int) -> None:
    """Of 256 less 30 %, which are 180: never fewer, and a smaller multiple where too many would stay."""
    model = build("llama")
    assert prune(model, ffn=0.3, multiple=multiple).settings == {"intermediate_size": (256, kept)}
    assert model.model.layers[3].mlp.gate_proj.out_features == model.model.layers[0].mlp.down_proj.in_features == kept


def test_a_model_that_predicts_nothing_is_judged_by_its_states() -> None:
    model, whole = build("bert"), build("bert")
    report = prune(model, layers=1)
    assert report.before.loss == 0 and not report.predicts and "last hidden states" in str(report)
    with torch.no_grad():
        a, b = (m(data())[0].double() for m in (model, whole))
    assert report.after.loss == pytest.approx(float((a - b).square().sum() / b.square().sum()), rel=1e-4)
    assert report.after.loss == pytest.approx(report.layers[0].loss, rel=1e-4)
    others = report.layers[0].others
    assert others and report.layers[0].loss <= min(loss for _, loss in others.values())


def test_padding_does_not_count() -> None:
    """A sample with padding in front says what it says without."""
    ids, pad = data(3, 20), torch.zeros(3, 7, dtype=torch.long)
    mask = torch.cat((pad, torch.ones_like(ids)), 1)
    padded = [{"input_ids": torch.cat((pad, ids), 1)[i], "attention_mask": mask[i]} for i in range(3)]
    reports = [fastllm.prune(build("llama"), calib=calib, quiet=True, **MOST) for calib in (ids, padded)]
    a, b = reports
    assert a.tokens == b.tokens == 60 and [r.layer for r in a.layers] == [r.layer for r in b.layers]
    assert a.before.loss == pytest.approx(b.before.loss, rel=1e-4) and a.after.loss == pytest.approx(
        b.after.loss, rel=1e-3
    )
    for one, other in zip(a.ffn + a.heads, b.ffn + b.heads, strict=True):
        assert one.removed == other.removed and one.error == pytest.approx(other.error, rel=1e-2)


def test_the_language_part_of_a_larger_model() -> None:
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8, "vocab_size": families.VOCABULARY}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    ).eval()
    before = state(model)
    prune(model, **MOST)
    after = state(model)
    assert model.config.text_config.num_hidden_layers == 2 and model.config.text_config.intermediate_size == 192
    for part in ("vision_tower", "embed_tokens"):
        own = {k: v for k, v in before["parameters"].items() if part in k}
        assert own and all(after["parameters"][name][0] == was for name, (was, _) in own.items())
    cached, whole = cached_and_not(model, families.ids(length=12))
    torch.testing.assert_close(cached, whole, rtol=0, atol=1e-4)
