"""The house budgets: small files, short functions, no hidden switches, no swallowed errors, and tests to match."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE, FUNCTION, KERNEL = 300, 60, 90  # lines at most; a kernel is a function under @triton.jit
TESTS = 0.8  # lines of tests for a line of the package, at least
PACKAGE, SCRIPTS = ("fastllm", "kernels"), ("fastllm/cli", "bench")  # only scripts print


def sources(*folders: str) -> list[Path]:
    """Python files, relative to the root. The link `fastllm/kernels` is not followed: each file counts once."""
    paths = [path.relative_to(ROOT) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in paths if path.parts[:2] != ("fastllm", "kernels")]


def lines(*folders: str) -> int:
    return sum(len((ROOT / path).read_text().splitlines()) for path in sources(*folders))


def too_long(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    jit = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    return (node.end_lineno or 0) - node.lineno + 1 > (KERNEL if jit else FUNCTION)


def catches_all(handler: ast.ExceptHandler) -> bool:
    caught = ast.walk(handler.type) if handler.type else []
    return not handler.type or any(getattr(name, "id", "") in {"Exception", "BaseException"} for name in caught)


def offences(path: Path, source: str) -> Iterator[str]:
    inside, script = path.parts[0] in PACKAGE, any(path.is_relative_to(folder) for folder in SCRIPTS)
    if len(source.splitlines()) > FILE:
        yield f"{path}: {len(source.splitlines())} lines"
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() if too_long(node):
                yield f"{path}:{node.lineno}: {node.name} is too long"
            case ast.Call(func=ast.Name(id="print")) if inside and not script:
                yield f"{path}:{node.lineno}: print"
            case ast.Attribute(attr="environ" | "getenv") | ast.alias(name="environ" | "getenv") if inside:
                yield f"{path}:{node.lineno}: reads the environment"
            case ast.ExceptHandler() if catches_all(node):
                yield f"{path}:{node.lineno}: catches everything"
            case ast.Global():
                yield f"{path}:{node.lineno}: global"


def test_every_file_keeps_the_budgets() -> None:
    paths = sources(*PACKAGE, "tests", "bench")
    assert len(paths) > 3
    found = [line for path in paths for line in offences(path, (ROOT / path).read_text())]
    assert not found, "\n".join(found)


def test_there_are_enough_tests() -> None:
    tested, package = lines("tests"), lines(*PACKAGE)
    assert tested >= TESTS * package, f"{tested} lines of tests for {package} of the package"


BODY = "    x = 1\n"
BAD = {
    "long file": "x = 1\n" * (FILE + 1),
    "long function": "def f():\n" + BODY * FUNCTION,
    "long kernel": "@triton.jit\ndef f():\n" + BODY * KERNEL,
    "print": "def f():\n    print(1)\n",
    "environ": "import os\nos.environ['A']\n",
    "getenv": "from os import getenv\n",
    "bare except": "try:\n    pass\nexcept:\n    pass\n",
    "except Exception": "try:\n    pass\nexcept Exception as e:\n    pass\n",
    "except among others": "try:\n    pass\nexcept (ValueError, BaseException):\n    pass\n",
    "global": "def f():\n    global x\n",
}
GOOD = {
    "fastllm/nn/a.py": "try:\n    pass\nexcept (ValueError, OSError):\n    pass\n",
    "fastllm/ops/a.py": "def f():\n" + BODY * (FUNCTION - 1) + "y = 1\n" * (FILE - FUNCTION),
    "kernels/a.py": "@triton.jit\ndef f():\n" + BODY * (KERNEL - 1),
    "fastllm/cli/a.py": "print(1)",
    "bench/a.py": "import os\nprint(os.environ)",
}


@pytest.mark.parametrize("source", BAD.values(), ids=BAD)
def test_an_offence_is_found(source: str) -> None:
    assert len(list(offences(Path("fastllm/ops/a.py"), source))) == 1


@pytest.mark.parametrize("path", GOOD)
def test_what_is_allowed_passes(path: str) -> None:
    assert not list(offences(Path(path), GOOD[path]))
