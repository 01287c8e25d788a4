"""The house is as docs/architecture.md says: imports run one way, and the core knows no engine."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The rooms, and those above each, which it must not import.
ROOMS: dict[str, tuple[str, ...]] = {
    "muon_dist": ("muon_dist.integrations", "muon_dist.launch"),
    "integrations": ("muon_dist.launch",),
    "launch": (),
}
KERNELS = "muon_dist.kernels"
ENGINES = {"deepspeed", "transformers", "accelerate", "lightning", "torchtitan"}


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return name if name.startswith("muon_dist") else f"muon_dist.{name}"


def imported_by(path: Path) -> set[str]:
    """Modules, and names from modules that may be modules themselves; those inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_imports_run_one_way() -> None:
    paths = {module_of(path): (room, path) for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))}
    graph = {}
    for name, (room, path) in paths.items():
        others = {other for other in imported_by(path) & paths.keys() if other != name}
        assert not [other for other in others if other.startswith(ROOMS[room])], name
        if name.startswith(KERNELS):
            assert all(other.startswith(KERNELS) for other in others), name
        # A name that is imported from a package makes no cycle with the module in it that defines the name.
        graph[name] = {other for other in others if not name.startswith(f"{other}.")}
    assert "muon_dist.connections" in graph["muon_dist.optimizer"]
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the modules


def test_the_core_imports_no_engine() -> None:
    for path in (ROOT / "muon_dist").rglob("*.py"):
        assert not {name.split(".")[0] for name in imported_by(path)} & ENGINES, path


def test_files_are_short() -> None:
    """One reason to exist each: a file that grows beyond this has two."""
    for room in ("muon_dist", "integrations", "launch", "benchmarks", "tests"):
        for path in (ROOT / room).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 400, path
