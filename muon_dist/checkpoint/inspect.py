"""What a portable checkpoint holds, as text."""

from __future__ import annotations

from pathlib import Path

import torch

from muon_dist.checkpoint.contents import Contents, SavedParameter
from muon_dist.checkpoint.saved import SavedTensor
from muon_dist.checkpoint.seal import verify
from muon_dist.checkpoint.storage import TensorReader
from muon_dist.codecs import nbytes
from muon_dist.state import STEP_COUNT


def describe(folder: Path) -> str:
    """A table of parameters, and what saved them.

    Raises:
        ValueError: the checkpoint is damaged; so every file of one that is described is as it was written.
    """
    contents = Contents.from_json(verify(folder, None))
    rows = [("parameter", "shape", "algorithm", "states", "pieces", "bytes")]
    for name, saved in contents.parameters.items():
        shape = "x".join(map(str, saved.shape)) or "scalar"
        states = ", ".join(f"{label} {state.codec}" for label, state in saved.states.items() if label != STEP_COUNT)
        pieces = max(len(state.pieces) for state in saved.states.values())
        rows.append((name, shape, saved.algorithm, states, str(pieces), f"{_nbytes(saved):,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    total = sum(_nbytes(saved) for saved in contents.parameters.values())
    ranks = "1 rank" if contents.world_size == 1 else f"{contents.world_size} ranks"
    lines.append(f"{len(contents.parameters)} parameters, {total:,} bytes of state, saved by {ranks}")
    lines.append(f"steps of AdamW: {_steps(folder, contents)}")
    lines.append(", ".join(f"{name} {version}" for name, version in contents.versions.items()))
    lines.append(", ".join(f"{option}={value}" for option, value in contents.options.items()))
    return "\n".join(lines)


def _nbytes(saved: SavedParameter) -> int:
    return sum(
        nbytes(state.codec_for(label, piece), piece.local_shape)
        for label, state in saved.states.items()
        for piece in state.pieces
    )


def _steps(folder: Path, contents: Contents) -> str:
    """How often the parameters of AdamW were updated; a range where some had no gradient at times."""
    reader, cpu = TensorReader(folder), torch.device("cpu")
    counts = {
        int(SavedTensor(reader, name, STEP_COUNT, state).values(state.pieces[0], cpu))
        for name, saved in contents.parameters.items()
        if (state := saved.states.get(STEP_COUNT))
    }
    if not counts:
        return "none"
    return str(max(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
