"""What `optimize` compares answers on."""

import tiny

import fastllm


def test_padded_rows_begin_as_the_full_one_does(monkeypatch):
    """Models that lean on their first token answer anything without it."""
    seen = []
    model = tiny.build("llama")
    run = type(model).forward
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, input_ids, **more: (
            seen.append((input_ids, more.get("attention_mask"))),
            run(self, input_ids=input_ids, **more),
        )[1],
    )
    fastllm.optimize(model, None, quiet=True)
    first = seen[0][0][0, 0]
    padded = [(ids, mask) for ids, mask in seen if mask is not None and mask.ndim == 2 and not mask.all()]
    assert padded
    for ids, mask in padded:
        assert all(row[keep.bool()][0] == first for row, keep in zip(ids, mask, strict=True))
