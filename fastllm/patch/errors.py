"""What `optimize` refuses, and why. Every refusal happens before anything is changed."""

from torch import nn

from ..progress import size
from .plan import Plan


class CoverageError(ValueError):
    """Too few of the bytes that a token reads would be quantized: the model would hardly get faster."""


class NotSupportedError(ValueError):
    """The model is in a state that cannot be patched; the message says what to do."""


def refuse_state(model: nn.Module, quantizes: bool = True) -> None:
    """Raise NotSupportedError for a model that trains, is quantized by another library, or is not (all) in memory.

    quantizes: whether weights are to be quantized; then adapters, which are linear layers too, are refused as well.
    """
    if model.training:
        raise NotSupportedError(
            "the model is in training mode; call model.eval() first (quantized weights do not learn)"
        )
    method = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    method = getattr(method, "quant_method", None)
    method = getattr(method, "value", method)
    if method not in (None, "gguf"):  # transformers dequantizes GGUF files while loading
        raise NotSupportedError(
            f"the model is already quantized by {method!r}; load the dense checkpoint, or dequantize it first"
        )
    for name, module in model.named_modules():
        origin = type(module).__module__.partition(".")[0]
        if origin in ("bitsandbytes", "gptqmodel", "auto_gptq", "awq", "hqq", "optimum", "compressed_tensors"):
            raise NotSupportedError(f"{name} is already quantized by {origin}; load the dense checkpoint instead")
        if quantizes and origin == "peft" and hasattr(module, "base_layer"):
            raise NotSupportedError(
                f"{name} has adapters, which would be quantized too; merge_and_unload() them first, or quantize first "
                "and put them on packed layers (fastllm.lora_config)"
            )
        for part, p in module.named_parameters(recurse=False):
            where = f"{name}.{part}" if name else part
            if p.is_meta:
                if getattr(getattr(module, "_hf_hook", None), "offload", False):
                    remedy = (
                        "is offloaded by accelerate; load the model with device_map={'': device} to have it in memory"
                    )
                else:
                    remedy = "is on the meta device, without values; load the weights first"
                raise NotSupportedError(f"{where} {remedy}")
            if type(p) is not nn.Parameter:
                raise NotSupportedError(
                    f"{where} is a {type(p).__name__}, not a plain parameter: already quantized (torchao, "
                    "bitsandbytes) or sharded; load the dense checkpoint on one device instead"
                )


def refuse_coverage(plan: Plan, min_coverage: float, model: nn.Module, what: str = "quantized") -> None:
    """Raise CoverageError if the plan reaches less than `min_coverage` of the bytes read per token. what: it does."""
    if plan.coverage >= min_coverage:
        return
    left = sorted((d for d in plan.decisions if d.format is None and d.before), key=lambda d: -d.before)[:3]
    rest = "; ".join(f"{d.name} ({', '.join(filter(None, (size(d.before), d.reason, d.remedy)))})" for d in left)
    raise CoverageError(
        f"only {plan.coverage:.1%} of the {size(plan.before)} that {type(model).__name__} reads per token would be "
        f"{what}, below min_coverage={min_coverage:.0%}. Largest left: {rest or 'nothing'}. "
        "Pass min_coverage=0 to patch the rest anyway."
    )
