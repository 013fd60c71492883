"""The folder `kernels/` shares its name with a package that transformers imports, and must never be taken for it.

Also here: what `import fastllm` may load, and which way the imports inside the package point.
"""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINK = ROOT / "fastllm/kernels"

# A part imports itself and parts of earlier rows, nothing else.
LAYERS = [
    {"nf4_format"},
    {"kernels", "formats", "kv_formats", "probe", "progress", "data", "bsr_format"},
    {"sparse_formats"},
    {"quantizers"},
    {"ops"},
    {"nn"},
    {"checkpoints", "decode"},
    {"perplexity"},
    {"patch"},
    {"diagnose", "compress", "distributed", "distill"},
    {"cli"},
    {"__main__"},
]

HUGGING_FACE_KERNELS = """
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *args, **kwargs: lambda decorated: decorated
"""
LLAMA = "from transformers import LlamaForCausalLM"
BOTH = f"""
{LLAMA}
from transformers.utils.import_utils import is_kernels_available
import fastllm.kernels.quant_matmul as ours
print(is_kernels_available(), ours.__file__)
if is_kernels_available():
    import kernels
    print(kernels.__file__)
"""


def python(code: str, cwd: Path, *path: Path, executable: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """Run `code` in `cwd`, which leads `sys.path` as in `python -c`; `path` follows."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)


def output(run: subprocess.CompletedProcess[str]) -> list[str]:
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.fixture(scope="session")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a stand-in for Hugging Face's `kernels`, with the metadata that transformers looks up."""
    site = tmp_path_factory.mktemp("hugging_face")
    info = site / "kernels-0.16.0.dist-info"
    for path, text in {
        site / "kernels/__init__.py": HUGGING_FACE_KERNELS,
        info / "METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 0.16.0\n",
        info / "RECORD": "kernels/__init__.py,,\nkernels-0.16.0.dist-info/METADATA,,\n",
    }.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return site


def test_kernels_is_a_plain_folder_behind_a_link() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()
    assert LINK.is_symlink() and LINK.readlink() == Path("../kernels")
    assert LINK.resolve() == ROOT / "kernels" and list(LINK.glob("*.py"))


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_git_stores_the_link_as_a_link() -> None:
    git = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "--stage"]
    entry = subprocess.run([*git, "fastllm/kernels"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert entry.startswith("120000 "), entry or "fastllm/kernels is not tracked"


def test_importing_fastllm_is_light() -> None:
    loaded = output(python("import sys, fastllm; print(*sys.modules)", ROOT))
    assert "fastllm" in loaded and not {"triton", "transformers"} & set(loaded)


@pytest.mark.parametrize("present", [False, True], ids=["without", "with"])
def test_transformers_imports_from_the_checkout(present: bool, hugging_face: Path) -> None:
    """With and without Hugging Face's `kernels`: transformers finds theirs, or none, and we find ours."""
    seen = output(python(BOTH, ROOT, *[hugging_face] * present))
    assert Path(seen[1]).resolve() == ROOT / "kernels/quant_matmul.py"
    if present:
        assert seen[0] == "True" and Path(seen[2]) == hugging_face / "kernels/__init__.py"


def test_a_kernels_package_would_break_transformers(tmp_path: Path, hugging_face: Path) -> None:
    """Why the tests above exist: with an `__init__.py` in the folder they fail."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").touch()
    run = python(LLAMA, tmp_path, hugging_face)
    assert run.returncode and "from 'kernels'" in run.stderr


def parts(path: Path, source: str) -> Iterator[str]:
    """The parts of fastllm that the module at `path` (from the root) imports: `ops` for `from ..ops import x`."""
    package = path.parts[:-1] if path.parts[0] == "fastllm" else ("fastllm", *path.parts[:-1])
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else ()
            stem = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("fastllm."))


def wrong_way(path: Path, source: str) -> list[str]:
    """Imports that point back."""
    part = path.parts[0] if path.parts[0] == "kernels" else path.with_suffix("").parts[1]
    rank = next((i for i, layer in enumerate(LAYERS) if part in layer), None)
    if rank is None:
        return [f"{path}: {part} has no row in LAYERS"]
    public = {"__version__", "load", "optimize", "restore"} if part == "cli" else set()  # a user like any other
    below = {part}.union(public, *LAYERS[:rank])
    return [f"{path} imports fastllm.{name}" for name in parts(path, source) if name not in below]


def test_imports_point_one_way() -> None:
    modules = [path.relative_to(ROOT) for top in ("fastllm", "kernels") for path in (ROOT / top).rglob("*.py")]
    assert len(modules) > 3
    modules = [path for path in modules if path.parts[:2] not in {("fastllm", "__init__.py"), ("fastllm", "kernels")}]
    assert not [line for path in modules for line in wrong_way(path, (ROOT / path).read_text())]


@pytest.mark.parametrize(
    "path, source, count",
    [
        ("fastllm/ops/a.py", "from ..nn.linear import QuantLinear", 1),
        ("fastllm/ops/a.py", "def f():\n    from fastllm.patch import walk", 1),
        ("fastllm/nn/a.py", "import fastllm.cli.main", 1),
        ("fastllm/nn/a.py", "from .. import formats, patch", 1),
        ("fastllm/formats.py", "from .ops import x", 1),
        ("fastllm/patch/a.py", "from fastllm import optimize", 1),
        ("kernels/a.py", "import fastllm.formats", 1),
        ("fastllm/surprise/a.py", "", 1),
        ("fastllm/nn/a.py", "import torch\nfrom .b import c\nfrom ..ops import x\nfrom ..formats import y", 0),
        ("kernels/a.py", "from .tile import unpack", 0),
    ],
)
def test_an_import_that_points_back_is_found(path: str, source: str, count: int) -> None:
    assert len(wrong_way(Path(path), source)) == count


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, to build in."""
    copy = tmp_path_factory.mktemp("checkout") / "fastllm-kernels"
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "results")
    return shutil.copytree(ROOT, copy, symlinks=True, ignore=ignore)


def pip(*arguments: str | Path) -> None:
    run = subprocess.run([sys.executable, "-m", "pip", *map(str, arguments)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    out = checkout.parent / "wheels"
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, checkout)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request: pytest.FixtureRequest, checkout: Path, wheel: Path) -> tuple[str, Path]:
    """(interpreter with fastllm installed, where its kernels must be). It borrows everything else from this one."""
    home = checkout.parent / request.param
    venv.create(home, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    what = [wheel] if request.param == "wheel" else ["--editable", checkout]
    options = ["--no-deps", "--no-build-isolation", "--ignore-installed"]
    pip("--python", home / "bin/python", "install", *options, *what)
    return str(home / "bin/python"), (site if request.param == "wheel" else checkout) / "fastllm/kernels"


@pytest.mark.slow
def test_the_wheel_holds_fastllm_and_nothing_else(wheel: Path) -> None:
    files = {info.filename: info for info in zipfile.ZipFile(wheel).infolist()}
    assert {name.split("/")[0].split("-")[0] for name in files} == {"fastllm", "fastllm_kernels"}
    assert (LINK / "quant_matmul.py").read_bytes() == zipfile.ZipFile(wheel).read("fastllm/kernels/quant_matmul.py")
    folders = (ROOT / "fastllm").rglob("*"), (ROOT / "kernels").glob("*")
    ours = {path.relative_to(ROOT) for folder in folders for path in folder if path.is_file()}
    wanted = {f"fastllm/{path}" if path.parts[0] == "kernels" else str(path) for path in ours if path.suffix != ".pyc"}
    assert {name for name in files if name.startswith("fastllm/")} == wanted


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True], ids=["elsewhere", "in the checkout"])
@pytest.mark.parametrize("present", [False, True], ids=["without", "with"])
def test_it_works_installed(
    installed: tuple[str, Path], inside: bool, present: bool, checkout: Path, hugging_face: Path, tmp_path: Path
) -> None:
    interpreter, ours = installed
    cwd = checkout if inside else tmp_path
    seen = output(python(BOTH, cwd, *[hugging_face] * present, executable=interpreter))
    assert Path(seen[1]) == (checkout / "fastllm/kernels" if inside else ours) / "quant_matmul.py"
    if present:
        assert seen[0] == "True" and Path(seen[2]) == hugging_face / "kernels/__init__.py"
