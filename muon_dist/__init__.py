"""muon_dist: a sharded Muon optimizer for PyTorch with quantised momentum."""

from importlib.metadata import version

from muon_dist.optimizer import DistMuon

__version__ = version("muon_dist")
__all__ = ["DistMuon", "__version__"]
