"""README.md says what was measured, and its examples run."""

import re
import sys
from pathlib import Path

import pytest
from families import build, ids
from test_samples import Words

from fastllm import QuantLinear

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


class Tokenizer(Words):
    """One that can be saved."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer_config.json").write_text("{}")


def test_the_figures_are_those_of_the_result_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.delitem(sys.modules, "figures", raising=False)
    import figures

    found = figures.results()
    assert [path for path in found if figures.replaced(README, path) == README], "run python bench/figures.py"
    page = figures.DOCS.read_text(encoding="utf-8")
    assert [path for path in found if figures.sparsity(page, path.parent) == page], "run python bench/figures.py"
    changed = README.replace(" tokens read", " tokens", 1)
    assert figures.replaced(changed, found[0]) != changed


def test_what_it_links_to_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(links) > 3
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of the page, top to bottom, with a tiny model in place of the names."""
    monkeypatch.chdir(tmp_path)
    model = build("llama")
    model.save_pretrained("dense")
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    code = "\n".join(blocks)
    generate = "generate(ids, max_new_tokens=2)"
    for old, new in (("path/or/name", "dense"), ("dense/checkpoint", "dense"), ("generate(...)", generate)):
        assert old in code
        code = code.replace(old, new)
    Path("my_texts.txt").write_text(" ".join(str(i % 60) for i in range(8 * 512)))
    names = {"ids": ids(), "tokenizer": Tokenizer()}
    exec(compile(code, "README.md", "exec"), names)
    assert names["y"].shape == (2, 4096) and names["report"].coverage > 0.9
    assert isinstance(names["model"].lm_head, QuantLinear)
