"""A portable checkpoint is loaded as it was saved, or not at all."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from muon_dist import DistMuon
from muon_dist.checkpoint import load_state, save, save_state, seal, storage
from muon_dist.codecs import CODECS, FOUR_BIT_CODECS
from muon_dist.codecs.linear8 import Linear8
from muon_dist.options import MomentumState
from tests.ranks import run_ranks


def network(width: int = 33) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, width), nn.LayerNorm(width), nn.Linear(width, 7), nn.Linear(7, 300))


def make(model: nn.Module, **options: Any) -> DistMuon:
    return DistMuon(model.named_parameters(), **{"block_size": 16, "wire": "fp32", **options})


def trained(**options: Any) -> DistMuon:
    model = network()
    optimizer = make(model, **options)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 40)).square().mean().backward()
        optimizer.step()
    return optimizer


def tensors(optimizer: DistMuon) -> list[Tensor]:
    optimizer.state_dict()  # creates what is missing
    return [t.clone() for state in optimizer.state.values() for t in state.values()]


def momenta(optimizer: DistMuon) -> dict[str, Tensor]:
    """Decoded."""
    return {p.shard.name: p.momentum.decode(p.shard.state) for p in optimizer.bound().muon}


@pytest.mark.parametrize("source", CODECS)
@pytest.mark.parametrize("target", CODECS)
def test_any_codec_becomes_any_other(source: MomentumState, target: MomentumState, tmp_path: Path) -> None:
    saved, loaded = trained(momentum_state=source), make(network(), momentum_state=target)
    save_state(saved, tmp_path / "state")
    report = load_state(loaded, tmp_path / "state")
    changed = [] if source == target else [f"{name}: momentum_buffer" for name in momenta(saved)]
    assert list(report.encoded) == changed
    for (name, ours), theirs in zip(momenta(loaded).items(), momenta(saved).values(), strict=True):
        error = float((ours - theirs).norm() / theirs.norm())
        assert error == pytest.approx(report.encoded.get(f"{name}: momentum_buffer", 0.0), abs=1e-6)
    assert report.error <= (0 if target in (source, "fp32") else 0.15 if target in FOUR_BIT_CODECS else 0.03)


def test_the_groups_options_come_back(tmp_path: Path) -> None:
    save_state(trained(lr=0.5, adamw_betas=(0.5, 0.6)), tmp_path / "state")
    loaded = make(network())
    load_state(loaded, tmp_path / "state")
    muon, adamw = loaded.param_groups
    assert muon["lr"] == 0.5
    assert adamw["betas"] == (0.5, 0.6)


@pytest.mark.parametrize(
    ("other", "message", "kept"),
    [
        (lambda: make(network(32)), r"0.weight has shape \(32, 40\), in the checkpoint \(33, 40\)", 3),
        (lambda: make(network(), overrides={"0.weight": "adamw"}), "0.weight goes to adamw, in the checkpoint", 7),
        (lambda: make(network()[:2]), "2.weight is in the checkpoint, not in the optimizer", 4),
        (lambda: make(nn.Sequential(*network(), nn.Linear(300, 2))), "4.weight is in the optimizer, not in the", 8),
    ],
    ids=["shape", "algorithm", "less", "more"],
)
def test_another_model_is_refused_or_skipped_by_name(
    other: Callable[[], DistMuon], message: str, kept: int, tmp_path: Path
) -> None:
    save_state(trained(), tmp_path / "state")
    optimizer = other()
    before = tensors(optimizer)
    with pytest.raises(ValueError, match=f"(?s)does not fit the optimizer.*strict=False.*{message}"):
        load_state(optimizer, tmp_path / "state")
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(optimizer), strict=True))
    report = load_state(optimizer, tmp_path / "state", strict=False)
    assert any(message.split()[0] == name for name in report.skipped)
    loaded = {state.split(":")[0] for state in report.restored}
    assert not loaded & set(report.skipped)
    assert len(loaded) == kept


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def swap(path: Path) -> None:
    """For the file of the same name of another checkpoint."""
    shutil.copy(path.parent.parent / "other" / path.name, path)


@pytest.mark.parametrize("damage", [flip, truncate, grow, swap, Path.unlink])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_damage_is_found_before_anything_changes(damage: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    save_state(trained(), tmp_path / "state")
    save_state(trained(momentum_state="dynamic8"), tmp_path / "other")
    damage(tmp_path / "state" / name)
    loaded = make(network())
    before = tensors(loaded)
    with pytest.raises(ValueError, match=f"(?s)cannot be loaded; use an older checkpoint.*distcp|{name}"):
        load_state(loaded, tmp_path / "state")
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(loaded), strict=True))


def test_every_block_of_a_file_is_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "_BLOCK", 64)
    monkeypatch.setattr(seal, "_READ_AT_ONCE", 24)
    file, content = tmp_path / "file", bytes(range(200))
    for changed in (None, *range(200)):
        file.write_bytes(bytes(byte ^ (i == changed) for i, byte in enumerate(content)))
        found = seal._describe(file)["crc32"]
        assert len(found) == 4
        differ = [i for i, checksum in enumerate(found) if checksum != crc32(content[64 * i : 64 * i + 64])]
        assert differ == ([] if changed is None else [changed // 64])


def test_a_disk_that_fails_is_named_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    def load(rank: int) -> str:
        optimizer = make(DistributedDataParallel(network()))
        if rank == 0:
            monkeypatch.setattr(os, "preadv", fail)  # in a process of its own
        with pytest.raises(ValueError, match="cannot be loaded") as raised:
            load_state(optimizer, tmp_path / "state")
        return str(raised.value)

    save_state(trained(), tmp_path / "state")
    assert all("rank 0: .metadata cannot be read: Input/output error" in text for text in run_ranks(2, load))


def test_tensors_come_back_however_they_lie(tmp_path: Path) -> None:
    tensors = {"turned": torch.randn(5, 7).bfloat16().T, "scalar": torch.tensor(3), "none": torch.empty(0, 4)}
    tensors["columns"] = torch.arange(30, dtype=torch.uint8).view(5, 6)[:, 1:4]
    storage.write(tensors, tmp_path, None)
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    targets["columns"] = torch.zeros(3, 5, dtype=torch.uint8).T
    storage.TensorReader(tmp_path).read(targets)
    assert all(torch.equal(tensor, targets[name]) for name, tensor in tensors.items())


def reseal(folder: Path) -> None:
    """Gives a folder that was tampered with a manifest that fits."""
    facts = json.loads((folder / "manifest.json").read_text())["facts"]
    (folder / "manifest.json").unlink()
    aside = folder.rename(folder.with_name("aside"))
    seal.finish(aside, folder, facts, None)


def test_a_codec_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    save_state(trained(), tmp_path / "state")
    manifest = tmp_path / "state" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"codec": "linear8"', '"codec": "int3"'))
    reseal(tmp_path / "state")
    with pytest.raises(ValueError, match="the codec of momentum_buffer='int3': it must be one of"):
        load_state(make(network()), tmp_path / "state")


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["HARM"],)


def test_a_checkpoint_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    save_state(trained(), tmp_path / "state")
    (tmp_path / "state" / ".metadata").write_bytes(pickle.dumps(Harmful()))
    reseal(tmp_path / "state")
    with pytest.raises(ValueError, match="names posix.mkdir.*do not trust it"):
        load_state(make(network()), tmp_path / "state")
    assert not (tmp_path / "harm").exists()


class Attribute:
    """Pickled as ``getattr`` of a class: so Python 3.11.0 to 3.11.3 pickle the members of enumerations."""

    def __init__(self, of: type, name: str) -> None:
        self.arguments = (of, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.arguments


def test_of_attributes_only_memory_formats_are_read() -> None:
    def read(attribute: Attribute) -> Any:
        return storage._MetadataUnpickler(io.BytesIO(pickle.dumps(attribute))).load()

    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    assert read(Attribute(_MEM_FORMAT_ENCODING, member.name)) is member
    for harmful in (Attribute(Metadata, "__init__"), Attribute(_MEM_FORMAT_ENCODING, "__class__")):
        with pytest.raises(ValueError, match="gets '__.*do not trust it"):
            read(harmful)


def test_a_save_that_fails_leaves_no_checkpoint_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = trained()

    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(save, "write", full)
        with pytest.raises(OSError, match="No space"):
            save_state(optimizer, tmp_path / "state")
    assert not (tmp_path / "state").exists()
    save_state(optimizer, tmp_path / "state")
    load_state(make(network()), tmp_path / "state")
    with pytest.raises(ValueError, match="exists already; save to a new folder"):
        save_state(optimizer, tmp_path / "state")


def test_all_ranks_write_and_replicas_share_it_out(tmp_path: Path) -> None:
    def run(rank: int) -> None:
        model = DistributedDataParallel(network())
        save_state(make(model, adamw_state="dynamic8"), tmp_path / "state")

    run_ranks(2, run)
    sizes = [path.stat().st_size for path in (tmp_path / "state").glob("*.distcp")]
    assert len(sizes) == 2
    assert max(sizes) < 1.5 * min(sizes)
    load_state(make(network(), adamw_state="dynamic8"), tmp_path / "state")  # without DDP's names


@pytest.mark.parametrize("ranks", [2, 3])
def test_rows_move_as_they_are_where_the_codec_allows_it(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A codec that is not row-wise is decoded, unless the layout is the same."""

    def save_on_two(rank: int) -> None:
        model = network()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer = make(model)
        model(torch.ones(4, 40)).square().mean().backward()
        optimizer.step()
        save_state(optimizer, tmp_path / "state")

    def load(rank: int) -> tuple[int, int, int]:
        model = network()
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
        report = load_state(make(model), tmp_path / "state")
        found = [
            sum(state.endswith("momentum_buffer") for state in states)
            for states in (report.restored, report.moved, report.encoded)
        ]
        return found[0], found[1], found[2]

    run_ranks(2, save_on_two)
    assert run_ranks(ranks, load)[0] == ((3, 0, 0) if ranks == 2 else (0, 3, 0))
    monkeypatch.setattr(Linear8, "row_wise", False)
    assert run_ranks(ranks, load)[0] == ((3, 0, 0) if ranks == 2 else (0, 0, 3))
