"""Calibration data in all the forms that it comes in."""

import pytest
import torch

from fastllm.compress.samples import BATCH, batches
from fastllm.data import calibration_text, sample_text


class Words:
    """A tokenizer whose tokens are the numbers in a text."""

    def __init__(self, bos=None):
        self.bos_token_id = bos

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}


TEXT = " ".join(map(str, range(1, 31)))  # thirty tokens


def rows(calib, tokenizer=None, samples=100, length=8):
    return [row.tolist() for batch in batches(calib, tokenizer, 64, samples, length) for row in batch.ids]


def test_long_texts_are_cut_and_short_ones_kept():
    assert rows(TEXT, Words()) == [list(range(1 + 8 * i, 9 + 8 * i)) for i in range(3)]
    assert rows([TEXT, "5 6 7"], Words(), samples=2) == rows(TEXT, Words(), samples=2)
    assert rows(["5 6 7"], Words()) == [[5, 6, 7]]
    assert rows(TEXT, Words(bos=0)) == [[0, *range(1 + 7 * i, 8 + 7 * i)] for i in range(4)]


def test_files_and_ids(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    want = rows(TEXT, Words())
    assert rows(file, Words()) == rows(str(file), Words()) == want
    ids = torch.arange(1, 31)
    assert rows(ids) == rows([ids]) == want
    assert rows([ids.tolist()]) == want
    assert rows(ids[:24].view(3, 8)) == want and rows(ids[:24].view(3, 8), samples=2) == want[:2]
    assert rows([{"input_ids": ids}]) == want
    with pytest.raises(FileNotFoundError):
        rows(tmp_path / "absent.txt", Words())


def test_padding_is_marked():
    ids, mask = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    found = batches([{"input_ids": ids, "attention_mask": mask}], None, 64, 10, 8)
    assert sorted(batch.tokens for batch in found) == [2, 3]
    (padded,) = [batch for batch in found if batch.seen is not None]
    assert padded.ids.tolist() == [[4, 5, 0]] and padded.seen.tolist() == [[True, True, False]]


def test_equal_lengths_go_together():
    found = batches(torch.ones(10, 512, dtype=torch.int64), None, 64, 10, 512)
    assert [len(batch.ids) for batch in found] == [BATCH // 512, BATCH // 512, 2]


def test_the_text_that_comes_along_is_not_the_one_to_evaluate_on():
    text, other = calibration_text(), sample_text()
    assert len(text) > 250_000 and not any(line in text for line in other.split("\n") if len(line) > 80)
