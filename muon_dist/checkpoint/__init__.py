"""Portable optimizer state: one format on disk for every engine, layout, world size and codec.

    from muon_dist.checkpoint import load_state, save_state

    save_state(optimizer, "checkpoints/step-1000")
    print(load_state(optimizer, "checkpoints/step-1000"))

``async_save`` writes in the background.
Under DeepSpeed give the engine to the functions of the same names in its integration.
"""

from muon_dist.checkpoint.load import LoadReport, load_state
from muon_dist.checkpoint.save import async_save, save_state

__all__ = ["LoadReport", "async_save", "load_state", "save_state"]
