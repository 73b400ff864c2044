"""Rules that matter are tests: who may import whom, what may never appear."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"bridge", "control", "compute", "models", "ops"}
MAY_IMPORT = {
    "bridge": set(),
    "models": set(),
    "control": {"bridge", "models"},
    "compute": {"bridge", "models"},
    "ops": {"bridge", "control", "models"},
}
HEAVY = {"torch", "mlx", "numba", "transformers"}
NEVER = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """``(line, top-level package)`` of every import of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=found):
                yield from ((node.lineno, alias.name.partition(".")[0]) for alias in found)
            case ast.ImportFrom(module=str(module), level=0):
                yield node.lineno, module.partition(".")[0]
            case ast.ImportFrom(level=level) if level:
                yield node.lineno, "relative"


@pytest.mark.parametrize("layer", sorted(MAY_IMPORT))
def test_a_layer_imports_only_downwards(layer: str) -> None:
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files, f"no such layer: {layer}"
    forbidden = (OURS - MAY_IMPORT[layer] - {layer}) | NEVER | {"relative", "tests"}
    if layer != "compute":
        forbidden |= HEAVY
    for path in files:
        bad = [f"{path}:{line} imports {name}" for line, name in imports(path) if name in forbidden]
        assert not bad, bad


def test_the_control_process_loads_no_tensor_library() -> None:
    """What is imported indirectly counts too."""
    code = f"import sys, ops.node_main, ops.ctl; print(sorted(set(sys.modules) & {HEAVY!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_only_the_agreed_folders_exist_at_the_top() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    tops = {name.partition("/")[0] for name in listed.stdout.splitlines() if "/" in name}
    assert {name for name in tops if not name.startswith(".")} == OURS | {"tests"}
