"""The `muon-dist` command: trains a real model with DistMuon under torchrun, on CPU or CUDA."""
