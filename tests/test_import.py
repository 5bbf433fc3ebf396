"""What importing taco costs, and which module may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import taco

PACKAGE = Path(taco.__file__).parent
DOORS = [PACKAGE / "__init__.py", PACKAGE / "__main__.py"]  # they open to what lies above
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path not in DOORS)

# Imports go down this list only (see docs/architecture.md). Modules that lie directly in taco/ are the bottom.
LAYERS = ["entrypoints", "engine", "tokenizer", "executor", "worker", "guided", "models", "layers", "kernels", "bottom"]

# The host side plans with integers.
TORCH_FREE = ["taco.engine.block_manager", "taco.engine.scheduler"]


LARGE = ["torch", "transformers"]


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    """Layer of a module of taco; "facade" for `taco` itself, which only entrypoints may use."""
    parts = module.split(".")
    if len(parts) == 1:
        return "facade"
    return parts[1] if (PACKAGE / parts[1]).is_dir() else "bottom"


def is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, but those under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if is_typing_only(child):
            for other in child.orelse:
                yield from runtime_nodes(other)
            continue
        yield child
        yield from runtime_nodes(child)


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and name of each module that a file imports, at its top or in a function."""
    for node in runtime_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the module's full name"
            for alias in node.names:
                submodule = PACKAGE.parent.joinpath(*node.module.split("."), alias.name)
                is_module = submodule.is_dir() or submodule.with_suffix(".py").is_file()
                yield node.lineno, f"{node.module}.{alias.name}" if is_module else node.module


def attribute_uses(path: Path, owner: str, attributes: set[str]) -> Iterator[str]:
    """Places where a file touches `owner.attribute`, in code or by an import."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found = node.value.id == owner and node.attr in attributes
        elif isinstance(node, ast.ImportFrom):
            found = node.module == owner and any(alias.name in attributes for alias in node.names)
            found |= any(node.module == f"{owner}.{attribute}" for attribute in attributes)
        elif isinstance(node, ast.Import):
            found = any(
                alias.name.startswith(f"{owner}.{attribute}") for alias in node.names for attribute in attributes
            )
        else:
            continue
        if found:
            yield f"{path.relative_to(PACKAGE.parent)}:{node.lineno}"


def test_import_of_taco_is_fast() -> None:
    code = "import time; start = time.perf_counter(); import taco; print(time.perf_counter() - start)"
    assert min(float(run_python(code)) for _ in range(3)) < 0.3


def test_import_of_taco_loads_no_large_library() -> None:
    code = f"import sys, taco; print([m for m in {[*LARGE, 'numpy']} if m in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_host_side_loads_no_torch() -> None:
    bottom = [module_name(path) for path in FILES if path.parent == PACKAGE]
    code = f"import sys, {', '.join(bottom + TORCH_FREE)}; print([m for m in {LARGE} if m in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_every_public_name_can_be_imported() -> None:
    for name in taco.__all__:
        assert getattr(taco, name) is not None
    assert set(taco.__all__) <= set(dir(taco))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LLLM'"):
        taco.LLLM  # noqa: B018


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down(path: Path) -> None:
    own = layer_of(module_name(path))
    assert own in LAYERS, f"taco/{own} is new: give it a place in LAYERS and in docs/architecture.md"
    for line, module in imported_modules(path):
        if module.split(".")[0] != "taco":
            continue
        target = layer_of(module)
        allowed = own == "entrypoints" if target == "facade" else LAYERS.index(target) >= LAYERS.index(own)
        assert allowed, f"{path}:{line}: {own} must not import {module}"


def test_environment_is_read_in_one_file() -> None:
    uses = [use for path in FILES for use in attribute_uses(path, "os", {"environ", "getenv", "environb"})]
    assert uses and all(use.startswith("taco/envs.py:") for use in uses), uses


def test_cuda_is_used_by_worker_and_kernels_only() -> None:
    uses = [use for path in FILES for use in attribute_uses(path, "torch", {"cuda"})]
    assert all(use.startswith(("taco/worker/", "taco/kernels/")) for use in uses), uses
