"""What `save_pretrained` writes is read to the bit by transformers alone, where fastllm cannot be imported."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import build, dense_twin, output, tokens

import fastllm

pytestmark = pytest.mark.peers

READER = """
import json, sys
sys.modules["fastllm"] = None
import torch, transformers
from safetensors.torch import save_file
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.use_deterministic_algorithms(True, warn_only=True)
tokens, cases, out = json.load(open(sys.argv[1])), {}, {}
for name, path, auto in tokens["cases"]:
    model, info = getattr(transformers, auto).from_pretrained(path, output_loading_info=True)
    with torch.no_grad():
        out[name] = model.eval()(torch.tensor(tokens["ids"]))[0].contiguous()
    cases[name] = {key: sorted(map(str, value)) for key, value in info.items()}
save_file(out, sys.argv[2])
json.dump(cases, open(sys.argv[3], "w"))
"""


@dataclass
class Case:
    family: str
    weights: Any
    settings: dict[str, Any] = field(default_factory=dict)
    lm_head: Any = False
    warns: str = ""
    auto: str = "AutoModelForCausalLM"


MIXED = {"lm_head": "int8", "*.up_proj": "int8", "*.0.*": "int4-g64", "*": "int4-g32"}
CASES = {
    "llama-g32": Case("llama", "int4-g32"),
    "llama-g64": Case("llama", "int4-g64", lm_head="int4-g64"),
    "llama-g128": Case("llama", "int4-g128", lm_head="int8"),
    "llama-int8": Case("llama", "int8", lm_head="int8"),
    "llama-channel": Case("llama", "int4-channel"),
    "llama-int8-groups": Case("llama", "int8-g64"),
    "llama-float16": Case("llama", "int4-g32", {"dtype": torch.float16}),
    "llama-float32": Case("llama", "int4-g32", {"dtype": torch.float32}, "int8"),
    "llama-tied": Case("llama", "int4-g32", {"tie_word_embeddings": True}),
    "llama-tied-head": Case("llama", "int4-g32", {"tie_word_embeddings": True}, "int8"),
    "llama-mixed": Case("llama", MIXED, lm_head=None),
    "llama-asym": Case("llama", "int4-g32-asym"),
    "llama-asym-tied-head": Case("llama", "int8-asym", {"tie_word_embeddings": True}, "int8-asym"),
    "llama-bias": Case("llama", "int4-g64", {"attention_bias": True, "mlp_bias": True}),
    "llama-ragged": Case("llama", "int4-g64", {"intermediate_size": 200}),
    "llama-ragged-asym": Case("llama", "int4-g64-asym", {"intermediate_size": 192}),
    "llama-ragged-dense": Case("llama", "int4-g64", {"intermediate_size": 204}, warns="2 packed layers .* 204 inputs"),
    "gemma3": Case("gemma3_text", "int4-g64", {"tie_word_embeddings": True}, "int8"),
    "qwen3": Case("qwen3", "int4-g32", lm_head="int8"),
    "mixtral": Case("mixtral", "int4-g32", lm_head="int8"),
    "mixtral-ragged": Case("mixtral", "int4-g32", {"intermediate_size": 72}),
    "mixtral-dense-experts": Case("mixtral", {"*attn*": "int4-g32"}),
    "mixtral-only-experts": Case("mixtral", {"*experts": "int8"}),
    "qwen3-moe": Case("qwen3_moe", {"*experts": "int4-g64", "*": "int8"}, lm_head="int8"),
    "bert": Case("bert", "int4-g32", auto="AutoModel"),
    "bert-mixed": Case("bert", {"*output*": "int8", "*": "int4-g32"}, auto="AutoModel"),
    "gpt2": Case("gpt2", "int8", lm_head="int8", warns="8 packed layers are stored dense .*c_attn"),
    "llama-as-base": Case("llama", MIXED, lm_head=None, auto="AutoModel"),
}


@pytest.fixture(scope="module")
def read(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[dict[str, list[str]], torch.Tensor, torch.Tensor]]:
    """For each case: (what transformers says of loading it, its output, the output of the dense twin)."""
    folder, want, cases = tmp_path_factory.mktemp("stock"), {}, []
    for name, case in CASES.items():
        model = build(case.family, **case.settings)
        fastllm.optimize(model, case.weights, method="rtn", lm_head=case.lm_head, min_coverage=0, quiet=True)
        if case.warns:
            with pytest.warns(UserWarning, match=case.warns):
                model.save_pretrained(folder / name)
        else:
            model.save_pretrained(folder / name)
        twin = dense_twin(model, build(case.family, seed=1, **case.settings))
        _copy_dense(model, twin)
        want[name] = output(twin.base_model if name.endswith("as-base") else twin)
        cases.append((name, str(folder / name), case.auto))
    (folder / "in.json").write_text(json.dumps({"ids": tokens().tolist(), "cases": cases}))
    paths = [str(folder / n) for n in ("in.json", "out.safetensors", "out.json")]
    subprocess.run([sys.executable, "-c", READER, *paths], check=True, cwd=folder)
    infos, got = json.loads(Path(paths[2]).read_text()), load_file(paths[1])
    return {name: (infos[name], got[name], want[name]) for name in CASES}


def _copy_dense(model: torch.nn.Module, twin: torch.nn.Module) -> None:
    """Give `twin`, built from another seed, the dense weights of `model`: none of its own may matter."""
    own = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        if name in own and own[name].shape == p.shape:
            own[name].data.copy_(p.data)


@pytest.mark.parametrize("name", CASES)
def test_stock_transformers_reads_it_to_the_bit(name: str, read: Any) -> None:
    info, got, want = read[name]
    expected = {"unexpected_keys": 3} if name == "llama-as-base" else {}  # the head's
    assert {key: len(value) for key, value in info.items() if value} == expected
    assert got.dtype == want.dtype and want.isfinite().all() and want.float().std() > 0.01
    assert torch.equal(got, want)
