"""The package installs whole, from a wheel and editable, with integrations/ and launch/ inside it, and works there."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IMPORTS = """
import muon_dist, muon_dist.integrations.fsdp, muon_dist.launch.cli as cli
print(muon_dist.__file__, cli.__file__)
"""
STEP = """
import torch
weight = torch.nn.Parameter(torch.zeros(8, 4))
weight.grad = torch.eye(8, 4)
muon_dist.DistMuon([("up.weight", weight)], lr=1.0).step()
assert (torch.linalg.svdvals(weight) > 0.5).all()
"""


def files_imported(folder: Path, **environment: str) -> list[Path]:
    """By a process in ``folder``, which then takes an optimizer step."""
    result = subprocess.run(
        [sys.executable, "-c", IMPORTS + STEP], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return [Path(line) for line in result.stdout.split()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: a build leaves files behind in its source.
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(source)], check=True, timeout=120)
    (built,) = folder.glob("muon_dist-*.whl")
    return built


def test_a_wheel_imports_and_steps_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    for file in files_imported(tmp_path, PYTHONPATH=str(tmp_path)):
        assert file.is_relative_to(tmp_path / "muon_dist")


def test_a_wheel_holds_the_license_the_command_and_the_files_beside_the_code(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = [archive.read(name).decode() for name in names if name.endswith("entry_points.txt")]
    assert "muon-dist = muon_dist.launch.cli:main" in entry_points
    assert "muon_dist/py.typed" in names
    assert "muon_dist/launch/configs/zero3.json" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert not any(name.startswith("tests/") for name in names)


def test_an_editable_install_imports_from_the_checkout(tmp_path: Path) -> None:
    first, second = files_imported(tmp_path)
    assert first == ROOT / "muon_dist" / "__init__.py"
    assert second == ROOT / "launch" / "cli.py"
