"""Layer shapes (N = out_features, K = in_features) of models that people run. One place for every benchmark."""

SHAPES = {
    "gemma-3-270m": [(1024, 640), (2048, 640), (640, 2048), (262144, 640)],
    "llama-3.1-8b": [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336)],
}
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 512]
