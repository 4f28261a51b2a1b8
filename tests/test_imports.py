"""Which package may import which."""

import ast
import pathlib

import pytest

from tests.conftest import ROOT

# Later ones may import earlier ones of their list.
ALLOWED = {
    "pallas_kernels": {"jax", "numpy"},
    "sharding": {"jax", "numpy"},
    "v4jax": {
        *("jax", "numpy", "ml_dtypes", "flax", "optax", "orbax", "tokenizers"),
        *("pallas_kernels", "sharding"),
    },
    "scripts": {
        *("jax", "numpy", "flax", "tqdm", "matplotlib"),
        *("pallas_kernels", "sharding", "v4jax", "benchmarks"),
    },
}
# Inside v4jax: what a module may import, besides what comes before it.
LAYERS = [
    {"config", "encoding", "numerics", "sampling"},
    {"costs", "layers", "placement", "tokenizer"},
    {"cache", "hyper_connections"},
    {"compressor"},
    {"indexer", "moe"},
    {"attention"},
    {"model"},
    {"quantization"},
    {"summary", "checkpoint", "generate", "train"},
    {"batch", "plan", "scoring"},
    {"roofline"},
]
STANDARD = set(__import__("sys").stdlib_module_names)


def _imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _files(package: str) -> list[pathlib.Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return files


@pytest.mark.parametrize("package", list(ALLOWED))
def test_packages_import_only_what_they_may(package):
    for path in _files(package):
        top = {name.split(".")[0] for name in _imports(path)}
        extra = top - ALLOWED[package] - STANDARD - {package}
        assert not extra, f"{path.relative_to(ROOT)} imports {sorted(extra)}"


def test_modules_of_v4jax_import_only_downwards():
    rank = {name: i for i, names in enumerate(LAYERS) for name in names}
    for path in _files("v4jax"):
        name = path.relative_to(ROOT / "v4jax").with_suffix("").parts[0]
        if name == "__init__":
            continue
        for imported in _imports(path):
            parts = imported.split(".")
            if parts[0] == "v4jax" and len(parts) > 1 and parts[1] in rank and parts[1] != name:
                assert rank[parts[1]] < rank[name], f"{path.relative_to(ROOT)}: {imported}"


def test_every_module_of_v4jax_has_a_layer():
    names = {path.stem for path in (ROOT / "v4jax").glob("*.py")} - {"__init__"}
    names |= {path.name for path in (ROOT / "v4jax").iterdir() if (path / "__init__.py").exists()}

    assert names == set().union(*LAYERS)
