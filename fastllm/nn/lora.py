"""LoRA on packed layers, by PEFT: `lora_config`, and the layer that PEFT then puts around a `QuantLinear`.

PEFT chooses that layer by the class of the one it wraps, from a list of its own to which nothing outside can add but
the configuration: `LoraConfig._register_custom_module`, which its guide to custom models describes. `lora_config`
makes that call, on a copy. The other ways are worse. A replaced dispatcher changes PEFT for every model in the
process, in an order of imports that decides whether it works. A `QuantLinear` that passes for an `nn.Linear` is taken
for a dense one, and merging, DoRA and initialisations from the weight then compute with values that are not there.

What is registered is not saved, so a configuration that was read from a file goes through `lora_config` as well. The
adapter's files are PEFT's own, and can be loaded onto the dense model: that is how an adapter is merged.
"""

import copy
from os import PathLike, fspath
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .block_sparse import BlockSparseLinear
from .experts import QuantExperts, up_name
from .linear import QuantLinear

try:
    from peft import LoraConfig, PeftConfig, PeftModel, TaskType
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora.variants import DoraLinearVariant
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
except ImportError as error:  # an extra: `lora_config` complains
    WHY_NOT = str(error)
    LoraLinear = DoraLinearVariant = nn.Module
else:
    WHY_NOT = ""

# What lora_A and lora_B may start as: what does not depend on the weight, nor changes it.
STARTS = (True, False, "gaussian", "orthogonal", "eva")
ALL = "all-linear"


def lora_config(config: Any, model: Any, **settings: Any) -> Any:
    """A copy of `config`, a `peft.LoraConfig`, with which PEFT adapts the packed layers of `model` too.

        peft_model = get_peft_model(model, fastllm.lora_config(LoraConfig(...), model))
        peft_model = PeftModel.from_pretrained(model, path, config=fastllm.lora_config(path, model))

    y = x @ W.T + bias + scaling * dropout(x) @ A.T @ B.T, of which W stays packed, and only A and B learn.

    config:   the configuration; or the folder, or the name on the Hub, of an adapter that was saved
    model:    the model to be adapted; `target_modules="all-linear"` means all its packed and dense linear layers but
              the output head and those inside experts
    settings: of an adapter's name on the Hub, such as `revision`, as `peft.PeftConfig.from_pretrained` takes them

    DoRA, rank-stabilised LoRA and several adapters work as on dense layers; DoRA dequantizes the weight in every call.
    Merging raises NotImplementedError, as do initialisations that need the dense weight, when PEFT comes to it.
    Raises ImportError without PEFT, TypeError for what is no LoRA, ValueError for adapters of packed experts.
    Source: Hu et al., LoRA, arXiv:2106.09685; Liu et al., DoRA, arXiv:2402.09353.
    """
    if WHY_NOT:
        raise ImportError(f"lora_config needs PEFT, as of 0.21 ({WHY_NOT}): pip install -U peft")
    if isinstance(config, (str, PathLike)):
        config = PeftConfig.from_pretrained(fspath(config), **settings)
    elif settings:
        raise TypeError(f"{', '.join(settings)}: only for an adapter that is read from a folder or the Hub")
    if not isinstance(config, LoraConfig):
        raise TypeError(f"packed layers take adapters of the kind peft.LoraConfig, got {type(config).__name__}")
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    config = copy.copy(config)
    config._custom_modules = dict(config._custom_modules or {})
    config._register_custom_module(dict.fromkeys((QuantLinear, BlockSparseLinear), QuantLoraLinear))
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL:
        config.target_modules = _all_linear(model, config)
    _refuse_experts(model, config)
    return config


def _all_linear(model: Any, config: Any) -> set[str]:
    """Names of the linear layers, packed or dense or adapted, but the head's and those inside experts."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    heads = [head] if head is not None else []
    if not heads and config.task_type == TaskType.SEQ_CLS:
        heads = [getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES]
    found: set[str] = set()
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        adapted = isinstance(module, BaseTunerLayer)
        if adapted or isinstance(module, QuantExperts):
            inside += (f"{name}.",)
        plain = isinstance(module, (nn.Linear, Conv1D, QuantLinear, BlockSparseLinear))
        linear = plain or adapted and "Linear" in type(module).__name__
        if linear and not any(module is head for head in heads):
            found.add(name)
    return found


def _refuse_experts(model: Any, config: Any) -> None:
    """PEFT skips without a word what it does not find, such as 3-D weights of experts that have been packed."""
    experts = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantExperts)]
    if not experts:
        return
    config = copy.deepcopy(config)
    convert_peft_config_for_transformers(config, model, None)  # names of their projections in older checkpoints
    packed = [f"{name}.{weight}" for name, module in experts for weight in (up_name(module.shell), "down_proj")]
    wanted = [t for t in config.target_parameters or () if any(f".{name}".endswith(f".{t}") for name in packed)]
    if wanted:
        raise ValueError(
            f"{', '.join(sorted(wanted))}: experts that are packed take no adapters; leave them dense, with "
            'exclude="*.experts" in fastllm.optimize, or leave them out of the adapter'
        )


class QuantLoraLinear(LoraLinear):
    """PEFT's LoRA for linear layers, around a packed one. Made by PEFT, for configurations of `lora_config`."""

    def __init__(self, base_layer: Any, adapter_name: str, config: Any, **kwargs: Any):
        config = copy.copy(config)
        config.fan_in_fan_out = False  # a packed weight is [out, in], whatever it was packed from
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Variants that PEFT may use, by the settings that ask for them; it refuses all others."""
        return {(): None, ("use_dora",): _Dora}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        start = config.init_lora_weights
        if start not in STARTS:
            raise NotImplementedError(
                f"init_lora_weights={start!r} needs the dense weight of a layer, or changes it, but "
                f"{self.get_base_layer().format.name} weights stay as they are; use one of "
                f"{', '.join(map(repr, STARTS))}, or train on the dense model"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises NotImplementedError if there is something to merge."""
        wanted = [name for name in adapter_names or self.active_adapters if name in self.lora_A]
        if wanted:
            raise NotImplementedError(
                f"adapter {', '.join(wanted)} cannot be merged into {self.get_base_layer().format.name} weights: "
                "rounded again, they would lose what was learnt. Save the adapter (save_pretrained), load it onto the "
                "dense model with PeftModel.from_pretrained, merge_and_unload() there, then fastllm.optimize; "
                "or go on with the adapter as it is, or unload() to be without it"
            )


class _Dora(DoraLinearVariant):
    """DoRA asks for the norms of the rows of W + scaling * B @ A: the weight is dequantized, in every call."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        DoraLinearVariant.init(_WithDense(module), adapter_name, **kwargs)

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Any, result: Any, **kwargs: Any) -> Any:
        return DoraLinearVariant.forward(_WithDense(module), active_adapter, x, result, **kwargs)


class _WithDense:
    """An adapted layer, as it is but for a dense base layer."""

    def __init__(self, module: Any):
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def get_base_layer(self) -> Any:
        layer = self.module.get_base_layer()
        return SimpleNamespace(weight=layer.dequantize(), bias=layer.bias, parameters=layer.parameters)
