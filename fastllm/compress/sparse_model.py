"""`sparsify`: a model whose layers keep few of their weights, and compute nearly what they did."""

import logging
from typing import Any

from torch import Tensor, nn

from ..bsr_format import BlockSparseWeight
from ..checkpoints.choice import Patterns
from ..formats import Format
from ..nn import SparseLinear, build_layer
from ..ops import what_runs
from ..ops.block_sparse import runs_on
from ..patch.apply import Patch, Put, carry_out, is_patched, unwrapped, without_data
from ..patch.errors import NotSupportedError, refuse_coverage, refuse_state
from ..patch.plan import Decision, Plan, Planner
from ..patch.report import Report
from ..patch.speedups import Speedups
from ..probe import probe
from .blocks import Blocks, find_blocks
from .calibrate import Layer, calibrate, find_groups, observe
from .patterns import Blocks as BlockPattern
from .patterns import Pattern, Unstructured, owl_kept, parse_pattern, reason
from .samples import LENGTH, SAMPLES, Batch, Calibration, batches
from .sparse_solver import METHODS, Pruning
from .task import tokenizer_of

logger = logging.getLogger("fastllm")

SPARSE = "sparse"
OUTLIER, SPREAD = 5.0, 0.08  # times the mean of scores; by how much sparsity may differ from layer to layer


def sparsify(
    model: Any,
    pattern: str | float | Pattern = "16:32",
    *,
    method: str = "sparsegpt",
    calib: Calibration = None,
    tokenizer: Any = None,
    samples: int = SAMPLES,
    length: int = LENGTH,
    values: str | None = None,
    repair: bool = True,
    ratios: str = "uniform",
    lm_head: str | Format | None = None,
    include: Patterns = "*",
    exclude: Patterns = (),
    min_coverage: float = 0.5,
    keep: bool = True,
    prompt: Tensor | None = None,
    quiet: bool = False,
) -> Report:
    """Make the linear layers of a Hugging Face model's blocks sparse, in place; `fastllm.restore` undoes it.

    At equal bytes a quantized model is the better one, and half of the weights in 16 bits are 9 bits for each: see
    "Sparsity" in the README before you choose it over `fastllm.quantize(model, "int8")`.

    pattern:   "16:32" or any k:32 (k of each 32 columns stay), "2:4", "block64@0.7" (blocks of 64 x 64, 70 % of them
               go; also 32 and 128), or "0.5" (half of each row goes: stored dense, and nothing gets faster)
    method:    "sparsegpt", "wanda" or "magnitude", see `fastllm.compress.sparse_solver`; or "zeros": the weights have
               their zeros already, from training, and stay as they are ("block64" then needs no share)
    calib, tokenizer, samples, length: as in `fastllm.quantize`; not needed for "zeros", and "magnitude" unrepaired
    values:    "int8" or "int4-g128": what stays is rounded to integers too (2:4 and k:32); None: floats as they are
    repair:    the weights that stay are adjusted by least squares to make up for those that went
    ratios:    "uniform", or "owl": blocks with more outliers keep more, as many in all (k:32 and shares such as 0.5)
    lm_head:   a format for the output head, such as "int8"; None: it stays as it is. It never gets sparse
    include, exclude, min_coverage, keep, prompt, quiet: as in `fastllm.optimize`

    Raises what `fastllm.optimize` does, ValueError for an unknown pattern, method or ratios, a model without blocks or
    without a layer that can have the pattern, and data without tokens; the model is then as it was.
    """
    model, chosen = unwrapped(model), parse_pattern(pattern, values)
    _refuse(chosen, method, ratios)
    if is_patched(model):
        raise NotSupportedError("the model is optimized already; fastllm.restore(model) first")
    refuse_state(model)
    solver = Pruning(method, repair, next(model.parameters()).dtype)
    looks = solver.products or method == "wanda" or ratios == "owl"
    planner = SparsePlanner(chosen, lm_head, include, exclude, find_blocks(model)[0] if looks else None)
    plan, data = _planned(model, planner, min_coverage), None
    if looks:
        vocabulary = model.config.get_text_config().vocab_size
        data = batches(calib, tokenizer or tokenizer_of(model, calib), vocabulary, samples, length)
    patch = Patch(Report(model, plan, keep), Speedups(model, False, False, None, False))
    patch.report.what = SPARSE if lm_head is None else f"{SPARSE} or quantized"
    job = _Job(model, patch, solver, chosen, data, ratios, quiet)
    ids = prompt if prompt is not None or data is None else data[0].ids[:1, :64]
    carry_out(model, patch, job.fill, probe(model, ids), ids is not None)
    patch.report.notes = job.notes()
    return patch.report


def _refuse(pattern: Pattern, method: str, ratios: str) -> None:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    if ratios not in ("uniform", "owl"):
        raise ValueError(f"unknown ratios {ratios!r}; known: uniform, owl")
    if ratios == "owl" and method == "zeros":
        raise ValueError('ratios="owl" chooses how many weights go, and with method="zeros" they are gone')
    if ratios == "owl":
        owl_kept([0.0, 1.0], [1, 1], pattern, SPREAD)
    if isinstance(pattern, BlockPattern) and pattern.sparsity is None and method != "zeros":
        raise ValueError(f'how many blocks go? pattern={pattern.name + "@0.7"!r}, or method="zeros"')
    if isinstance(pattern, BlockPattern) and method != "zeros":
        logger.warning(
            "blocks that are pruned in one shot ruin most models; %s is for weights trained with such zeros "
            '(method="zeros"), or to be trained on',
            pattern.name,
        )


def _planned(model: Any, planner: "SparsePlanner", min_coverage: float) -> Plan:
    """ValueError if no layer can have the pattern, CoverageError if too few of the bytes that a token reads can."""
    plan = planner.plan(model)
    if not any(d.format is planner.pattern for d in plan.chosen):
        reasons = sorted({(d.reason.startswith(("does not match", "matches")), d.reason) for d in plan.skipped})
        why = "; ".join(reason for _, reason in reasons[:4])
        raise ValueError(f"no layer can be {planner.pattern.name}: {why or 'there are none'}")
    refuse_coverage(plan, min_coverage, model, f"{SPARSE} or quantized")
    return plan


class SparsePlanner(Planner):
    """Layers of blocks get the pattern, the head a format if one is given; all else stays."""

    def __init__(
        self, pattern: Pattern, lm_head: str | Format | None, include: Patterns, exclude: Patterns, blocks: str | None
    ):
        """blocks: the name of their list, for layers that have to be seen at work."""
        super().__init__("int8", None, lm_head or False, include, exclude)
        self.pattern, self.blocks = pattern, blocks

    def _decide(self, name: str, module: Any, is_head: bool, model: Any) -> Decision:
        decision = super()._decide(name, module, is_head, model)
        if is_head and decision.reason == "lm_head=False":
            return self._leave(decision, "a head is not made sparse", 'lm_head="int8" quantizes it')
        if is_head or decision.format is None or decision.kind not in ("linear", "conv1d", "experts"):
            return decision
        decision.format, decision.runs, decision.after = None, "", decision.before
        if decision.kind == "experts":
            return self._leave(decision, "experts of a mixture are not made sparse", "fastllm.quantize takes them")
        if self.blocks is not None and not name.startswith(f"{self.blocks}."):
            return self._leave(decision, "it is outside of the blocks", "")
        N, K = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
        if why := reason(self.pattern, N, K):
            return self._leave(decision, why, "choose another pattern")
        weight = module.weight
        own: Any = self.pattern
        decision.format = own
        decision.runs = f"{own.name}, {_runs(own, N, K, weight)}"
        bias = N * weight.element_size() if getattr(module, "bias", None) is not None else 0
        decision.after = own.bytes(N, K, weight.element_size()) + bias
        return decision


def _runs(pattern: Pattern, N: int, K: int, weight: Tensor) -> str:
    if isinstance(pattern, Unstructured):
        return "dense matmul: zeros in no order make nothing faster"
    if isinstance(pattern, BlockPattern):
        return runs_on(N, K, pattern.size, pattern.kept_of(N, K), weight.dtype, weight.device)
    return what_runs(pattern, N, K, weight.dtype, weight.device)


class _Job:
    """One call of `sparsify`."""

    def __init__(
        self,
        model: Any,
        patch: Patch,
        solver: Pruning,
        pattern: Pattern,
        data: list[Batch] | None,
        ratios: str,
        quiet: bool,
    ):
        self.model, self.patch, self.solver, self.pattern = model, patch, solver, pattern
        self.data, self.ratios, self.quiet = data, ratios, quiet
        self.stored = self.dense = 0  # bytes, of what got sparse

    def fill(self, put: Put) -> None:
        """Prune, and put each layer in its place."""
        of = {d.name: d for d in self.patch.report.plan.chosen}
        sparse: dict[str, Any] = {
            d.name: Layer(self.model.get_submodule(d.name), d.format)  # type: ignore[arg-type]
            for d in of.values()
            if isinstance(d.format, type(self.pattern))
        }
        if self.data is None:
            for name, layer in sparse.items():
                found = self.solver.prune(layer.weight, layer.format, None, None)
                self._place(of.pop(name), layer, self.solver.stored(found, layer), put)
        else:
            if self.ratios == "owl":
                sparse = _owl(self.model, self.data, sparse, self.pattern)
            layers = dict(sparse)

            def ready(name: str, found: Any) -> None:
                self._place(of.pop(name), layers[name], found, put)

            calibrate(Blocks(self.model, self.data), sparse, self.solver, ready, self.quiet)
            for name in sparse:
                self._pass_over(of.pop(name))
        without_data(list(of.values()), None, self.quiet, put)

    def _pass_over(self, decision: Decision) -> None:
        """A layer that ran on no data stays as it is."""
        decision.format, decision.runs, decision.after = None, "", decision.before
        decision.reason, decision.remedy = "it did not run on the calibration data", 'method="magnitude" needs none'
        logger.warning("%s did not run on the calibration data, and stays dense", decision.name)

    def _place(self, decision: Decision, layer: Layer, found: Any, put: Put) -> None:
        pattern: Any = layer.format
        N, K = layer.shape
        decision.format = pattern
        self.dense += decision.before
        if isinstance(found, Tensor):
            module, dense = layer.module, found.t().contiguous() if layer.transposed else found
            self.patch.changes.append((module, "weight", module.weight))
            module.weight = nn.Parameter(dense, requires_grad=module.weight.requires_grad)
            self.stored += decision.before
            return
        new: Any = build_layer(found, (N, K), pattern, layer.module.bias)
        new.transposed = layer.transposed
        rest = found if isinstance(found, BlockSparseWeight) else new.at_rest()
        small = sum(t.nbytes for t in rest if t is not None)
        self.stored += decision.before if layer.transposed else small  # which is saved dense
        put(decision, lambda kind, original, format: new)

    def notes(self) -> list[str]:
        """Lines for the report."""
        name, share = self.pattern.name, self.stored / max(1, self.dense)
        repaired = ", repaired" if self.solver.repair else ""
        lines = [f"{name} by {self.solver.method}{repaired}: stored in {share:.1%} of the bytes that they had"]
        layers = [m for m in self.model.modules() if isinstance(m, SparseLinear)]
        if isinstance(self.pattern, Unstructured) or any(layer.is_expanded for layer in layers):
            where = "anywhere" if isinstance(self.pattern, Unstructured) else "here"
            lines.append(f"no kernel reads {name} weights {where}: as much memory as without zeros, and no less time")
            logger.warning("%s", lines[-1])
        return lines


def _owl(model: Any, data: list[Batch], layers: dict[str, Any], pattern: Pattern) -> dict[str, Any]:
    """The layers with the pattern of their block: Yin et al., "Outlier Weighed Layerwise Sparsity", 2023."""
    blocks, outliers, sizes = Blocks(model, data), [], []
    of: list[list[str]] = []
    for index in range(len(blocks)):
        own = {name: layer for name, layer in layers.items() if name.startswith(f"{blocks.name(index)}.")}
        of.append(list(own))
        count = size = 0
        groups = find_groups(blocks, index, own) if own else []
        for group, seen in zip(groups, observe(blocks, index, own, groups, False) if groups else [], strict=True):
            for name in group.names:
                scores = own[name].weight.abs() * seen.mean_square.sqrt()
                count += int((scores > OUTLIER * scores.mean()).sum())
                size += scores.numel()
        outliers.append(count / max(1, size))
        sizes.append(size)
        if index + 1 < len(blocks):
            blocks.advance(index)
    found = owl_kept(outliers, sizes, pattern, SPREAD)
    return {name: layers[name]._replace(format=one) for names, one in zip(of, found, strict=True) for name in names}
