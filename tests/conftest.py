"""Tests run on CPU with one thread a process, so that results are the same bits on any number of ranks."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined: they then run on CPU

import tests.ranks  # noqa: F401 - imports what forked ranks need, before the first fork

torch.set_num_threads(1)
