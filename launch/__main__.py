"""`python -m muon_dist.launch` (and `torchrun -m muon_dist.launch`): the same command as `muon-dist`."""

from muon_dist.launch.cli import main

main()
