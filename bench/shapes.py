"""Layer shapes (N = out_features, K = in_features) of models that people run. One place for every benchmark."""

SHAPES = {
    "gemma-3-270m": [(1024, 640), (2048, 640), (640, 2048), (262144, 640)],
    # q, k and v as one weight of 6144 rows; gate and up as one of 28672
    "llama-3.1-8b": [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336)],
    "llama-3.1-70b": [(8192, 8192), (10240, 8192), (57344, 8192), (8192, 28672)],
    "qwen3-8b": [(4096, 4096), (6144, 4096), (24576, 4096), (4096, 12288)],
    "square": [(4096, 4096), (8192, 8192), (16384, 16384)],
}
CPU_MODELS = ("gemma-3-270m", "llama-3.1-8b")  # the others would take a CPU hours
ROWS = {
    "cpu": [1, 2, 4, 8, 16, 32, 64, 128, 512],
    "cuda": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096],
}
# What one token reads in a model of the shape of Llama 3.1 8B, head and embeddings aside: 32 layers of four products.
LLAMA_8B_LAYERS = dict.fromkeys(SHAPES["llama-3.1-8b"], 32)


def shapes_of(model: str, device: str) -> list[tuple[int, int]]:
    """The shapes of `model`, or of every model that `device` is up to ("all"), each once, in the order above."""
    models = [model] if model != "all" else CPU_MODELS if device == "cpu" else SHAPES
    return list(dict.fromkeys(shape for name in models for shape in SHAPES[name]))
