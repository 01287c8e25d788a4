"""Portable optimizer state: one format on disk for every engine, layout, world size and codec.

    from muon_dist.checkpoint import load_state, save_state

    save_state(optimizer, "checkpoints/step-1000")
    print(load_state(optimizer, "checkpoints/step-1000"))

``async_save`` writes in the background.
Where an engine owns the update, its integration has functions of the same names, which take the engine.
"""

from muon_dist.checkpoint.load import LoadReport, load_state
from muon_dist.checkpoint.save import async_save, save_state

__all__ = ["LoadReport", "async_save", "load_state", "save_state"]
