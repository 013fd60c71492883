"""`SaveHook`: `save_pretrained` of a model with packed layers writes a compressed-tensors checkpoint.

transformers asks `model.hf_quantizer` for the tensors to write. What the format can hold is stored packed, to the bit;
what it cannot is stored dense, with one warning.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers import HfQuantizer

from ..formats import Nf4Format
from ..nn import BlockSparseLinear, QuantExperts, QuantLinear, SparseLinear
from . import sparse
from .compressed_tensors import build_config
from .names import Names, expert_weights, without
from .scheme import Scheme
from .store import store, store_experts

MISSING = object()
CacheScales = Mapping[str, tuple[Tensor, Tensor]]  # by attention: the scales of keys and values, [1] each
FP8_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


class Storage:
    """How each packed layer of a model is to be stored."""

    def __init__(self, model: PreTrainedModel, cache_scales: CacheScales | None = None):
        there = dict(model.named_modules())  # of the whole, or of the part that is saved
        self.cache_scales = {name: scales for name, scales in (cache_scales or {}).items() if name in there}
        self.names = Names(model)
        self.prefix, self.is_base = model.base_model_prefix, model.base_model is model
        self.linears: dict[str, tuple[QuantLinear, Scheme | None]] = {}
        self.sparse: dict[str, sparse.SparseLayer] = {}
        self.experts: dict[str, QuantExperts] = {}
        self.dense: list[str] = []  # linear layers, and matrices that a reader may take for one
        self.why: dict[str, str] = {}  # reasons to store a packed layer dense
        self.fused: list[str] = []  # 3-D weights of experts that are stored as they are in memory
        inside: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if inside and name.startswith(inside):
                continue
            if isinstance(module, QuantExperts):
                self.experts[name] = module
                inside += (f"{name}.",)
            elif isinstance(module, (SparseLinear, BlockSparseLinear)):
                self.sparse[name] = module
                self._refuse_name(name, module)
            elif isinstance(module, QuantLinear):
                self.linears[name] = module, self._scheme(name, module)
            elif _is_matrix(module):
                self.dense.append(name)
            else:
                self.fused += expert_weights(name, module)
        self.experts_scheme = self._experts_scheme()
        self.fused += [
            w for name in self.experts if name in self.why for w in expert_weights(name, self.experts[name])
        ]
        self.dense += [name for name, (_, scheme) in self.linears.items() if scheme is None]
        self.dense += list(self.sparse)

    def _refuse_name(self, name: str, layer: Any) -> None:
        if layer.transposed:
            self.why[name] = "its weight is [in, out], which the format does not know"
        elif self.names.converted(f"{name}.weight"):
            self.why[name] = "its checkpoint name belongs to several weights"

    def _scheme(self, name: str, layer: QuantLinear) -> Scheme | None:
        scheme = Scheme.storing(layer.format, layer.in_features)
        self._refuse_name(name, layer)
        if scheme is None:
            self.why.setdefault(name, _unstorable(layer))
        return None if name in self.why else scheme

    def _experts_scheme(self) -> Scheme | None:
        if not self.experts:
            return None
        layers = [layer for module in self.experts.values() for layer in _layers(module)]
        formats = {layer.format for layer in layers}
        for name, module in self.experts.items():
            if any(self.names.experts(*weight.rsplit(".", 1)) is None for weight in expert_weights(name, module)):
                self.why[name] = "its experts have no checkpoint names of their own"
        scheme = Scheme.storing(next(iter(formats)), *(layer.in_features for layer in layers))
        if scheme is None:
            self.why |= dict.fromkeys(self.experts, _unstorable(layers[0]))
        return scheme

    def config(self) -> dict[str, Any] | None:
        """The `quantization_config` of the checkpoint, None if nothing in it is packed."""
        base = f"{self.prefix}." if self.is_base and self.prefix else ""
        layers = {base + name: scheme for name, (_, scheme) in self.linears.items() if scheme is not None}
        experts = self.experts_scheme if any(name not in self.why for name in self.experts) else None
        config = build_config(layers, experts, [base + name for name in self.dense], self.prefix)
        if config is not None and self.cache_scales:
            config["kv_cache_scheme"] = dict(FP8_CACHE)
        kept = {base + name: layer for name, layer in self.sparse.items() if name not in self.why}
        return sparse.build_config(kept, self.prefix, config) if kept else config

    def refuse(self) -> None:
        """Raise ValueError for what readers of the format would misread or refuse."""
        schemes = {scheme for _, scheme in self.linears.values() if scheme is not None}
        formats = {layer.format for m in self.experts.values() for layer in _layers(m)}
        if len(formats) > 1:
            found = ", ".join(sorted(f.name for f in formats))
            raise ValueError(
                f"the experts have several formats ({found}), but a compressed-tensors checkpoint holds one "
                "for all of them; give every experts module the same format in weights={...}"
            )
        if not all(f.symmetric and not f.activations for f in formats):
            raise ValueError(
                "experts with zero points or rounded activations cannot be stored: no reader of the format loads "
                'them; use a symmetric, weight-only format for them, such as "int4-g64"'
            )
        schemes |= set() if self.experts_scheme is None else {self.experts_scheme}
        if len(schemes) > 1 and not all(s.symmetric for s in schemes):
            raise ValueError(
                f"zero points next to a second scheme ({'; '.join(sorted(map(str, schemes)))}) cannot be stored: "
                "stock transformers would misread them; use symmetric formats, or the same asymmetric one for every "
                "layer and lm_head=False"
            )

    def warn(self) -> None:
        """Warn once of all packed layers that are stored dense."""
        size = 0
        for name in self.why:
            module = self.linears[name][0] if name in self.linears else self.sparse.get(name)
            layers = _layers(self.experts[name]) if module is None else [module]
            size += sum(n.out_features * n.in_features * n.weight.element_size() for n in layers)
        names = list(self.why)
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        reasons = "; ".join(sorted(set(self.why.values())))
        warnings.warn(
            f"{len(names)} packed layers are stored dense ({size / 1e6:.1f} MB): {shown}: {reasons}", stacklevel=4
        )

    def tensors(self, model: PreTrainedModel, untied: bool) -> dict[str, Tensor]:
        """Every tensor to be written; no two of them share memory if `untied`."""
        state = model.state_dict()
        for name, (layer, scheme) in self.linears.items():
            store(state, name, layer, scheme)
        for name, sparse_layer in self.sparse.items():
            sparse.store_sparse(state, name, sparse_layer, name in self.why)
        for name, module in self.experts.items():
            store_experts(state, name, module, None if name in self.why else self.experts_scheme, self.names)
        for name, scales in self.cache_scales.items():
            parts = zip(("k_scale", "v_scale"), scales, strict=True)
            state.update({f"{name}.{part}": scale.to(model.dtype) for part, scale in parts})
        if untied:
            seen: set[int] = set()
            for name, tensor in state.items():
                if tensor.data_ptr() in seen:
                    state[name] = tensor.clone()
                seen.add(tensor.data_ptr())
        return state


def _unstorable(layer: QuantLinear) -> str:
    if isinstance(layer.format, Nf4Format):
        return "compressed-tensors has no nf4"
    return f"{layer.in_features} inputs do not divide into groups of {layer.format.group}"


def _layers(experts: QuantExperts) -> list[QuantLinear]:
    return [*experts.up, *experts.down]


def _is_matrix(module: nn.Module) -> bool:
    """A linear layer, or what may look like one to a reader (a router): never to be taken for a packed layer."""
    if isinstance(module, nn.Linear):
        return True
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)


class SaveHook(HfQuantizer):
    """What `save_pretrained` asks for tensors. `attach` puts it on a model, `detach` takes it away without a trace."""

    storage: type[Storage] = Storage

    def __init__(self, model: PreTrainedModel):
        self.quantization_config: Any = None
        self.pre_quantized = True
        self._model = model
        self._undo: list[tuple[Any, str, Any]] = []
        self._untied = False
        self._cache_scales: CacheScales | None = None

    @classmethod
    def attach(cls, model: PreTrainedModel, cache_scales: CacheScales | None = None) -> "SaveHook":
        """Let `model` be saved with its packed layers. Its config tells their formats; a packed head is not tied.

        cache_scales: for servers' caches of keys and values in fp8, saved as compressed-tensors has them.
        """
        hook = cls(model)
        hook._cache_scales = cache_scales
        if not isinstance(model, PreTrainedModel):
            return hook
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                hook._set(module, "hf_quantizer", hook)
        hook._untie()
        hook._describe(model, cls.storage(model, cache_scales))
        return hook

    def detach(self) -> None:
        """Put every attribute back as it was."""
        while self._undo:
            _put_back(*self._undo.pop())

    def _set(self, owner: Any, name: str, value: Any) -> None:
        if not any(o is owner and n == name for o, n, _ in self._undo):
            self._undo.append((owner, name, owner.__dict__.get(name, MISSING)))
        setattr(owner, name, value)

    def _describe(self, model: PreTrainedModel, storage: Storage) -> None:
        config = storage.config()
        self._set(model.config, "quantization_config", config)
        if config is None:
            del model.config.quantization_config

    def _untie(self) -> None:
        """A packed head shares nothing with the embedding: whoever reads the checkpoint must not tie them."""
        head = self._model.get_output_embeddings()
        if not isinstance(head, QuantLinear):
            return
        for config in (self._model.config, self._model.config.get_text_config()):
            if getattr(config, "tie_word_embeddings", False):
                self._set(config, "tie_word_embeddings", False)
                self._untied = True
        for module in self._model.modules():
            if self._untied and getattr(module, "all_tied_weights_keys", None):
                self._set(module, "all_tied_weights_keys", {})

    # what transformers calls

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(the tensors to write for `model`, which may be a part of the whole; no metadata). Updates its config."""
        storage = self.storage(model, self._cache_scales)
        storage.refuse()
        for owner, name, old in self._undo:  # a part that was saved before is no checkpoint of its own any more
            if name == "quantization_config" and owner is not model.config and owner is not self._model.config:
                _put_back(owner, name, old)
        self._describe(model, storage)
        if storage.fused:
            conversions = model.__dict__.get("_weight_conversions") or get_model_conversion_mapping(
                model, add_legacy=False
            )
            self._set(model, "_weight_conversions", without(conversions, storage.fused))
        if storage.why:
            storage.warn()
        return storage.tensors(model, self._untied), {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        raise NotImplementedError("fastllm.restore(model) gives the original weights back")


def _put_back(owner: Any, name: str, old: Any) -> None:
    if old is MISSING:
        owner.__dict__.pop(name, None)
    else:
        setattr(owner, name, old)
