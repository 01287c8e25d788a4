"""The polar factor alone on one GPU: time and accuracy, beside the same iteration in plain torch.

    python benchmarks/polar.py [--out polar.json]

Batches of random matrices in fp16, five Polar Express steps. "torch" is the standard form of torch.optim.Muon's
iteration, batched, with cuBLAS products; "ours" is muon_dist.polar.polar_factor as the optimizer calls it. Times are
medians, by CUDA events. TFLOP/s counts the FLOPs that symmetric products need: in the standard form 5 (3 s^2 l +
s^3), in the Gram form 6 s^2 l + 14 s^3. "error" is the relative distance to the iteration in fp32, for singular
values that fall like 1 / k.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from triton.testing import do_bench

from muon_dist.polar import polar_factor, schedule
from muon_dist.polar.newton_schulz import GRAM_FROM_ASPECT

BATCHES = [
    (16, 1024, 1024),
    (16, 1024, 4096),
    (8, 2048, 2048),
    (8, 2048, 8192),
    (4, 4096, 4096),
    (4, 4096, 11008),
    (4, 4096, 14336),
    (1, 8192, 28672),
]
SCHEDULE = schedule("polar_express", 5)


def torch_standard(matrices: Tensor) -> Tensor:
    """a X + (b A + c A^2) X with A = X X^T, as torch.optim.Muon iterates, for a batch in fp16."""
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = (matrices / (norm * SCHEDULE.margin)).half()
    for a, b, c in SCHEDULE.coefficients:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def falling_spectrum(short: int, long: int) -> Tensor:
    """One matrix whose singular values are 1 / k, with random singular vectors."""
    generator = torch.Generator("cuda").manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, short, device="cuda", generator=generator))[0] for n in (short, long))
    return (u / torch.arange(1, short + 1, device="cuda") @ v.mT).unsqueeze(0)


def milliseconds(function: Callable[[Tensor], Tensor], matrices: Tensor) -> float:
    return float(do_bench(lambda: function(matrices), warmup=50, rep=200, return_mode="median"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    figures = []
    print(f"one {torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print(f"{'batch':>16}{'torch':>12}{'ours':>12}{'speed-up':>10}{'TFLOP/s':>10}{'error torch':>13}{'error ours':>12}")
    for n, short, long in BATCHES:
        matrices = torch.randn(n, short, long, device="cuda", dtype=torch.bfloat16)
        reference, ours = (milliseconds(f, matrices) for f in (torch_standard, lambda m: polar_factor(m, SCHEDULE)))
        standard = 5 * (3 * short**2 * long + short**3)
        gram = 6 * short**2 * long + 14 * short**3
        rate = n * (gram if long >= GRAM_FROM_ASPECT * short else standard) / ours / 1e9
        hard = falling_spectrum(short, long)
        exact = polar_factor(hard, SCHEDULE, form="standard", dtype=torch.float32)
        errors = [
            float((f.float() - exact).norm() / exact.norm())
            for f in (torch_standard(hard), polar_factor(hard, SCHEDULE))
        ]
        figures.append(
            {"batch": [n, short, long], "torch_ms": reference, "ours_ms": ours, "tflops": rate, "errors": errors}
        )
        print(
            f"{f'{n}x{short}x{long}':>16}{reference:>9.2f} ms{ours:>9.2f} ms{reference / ours:>9.2f}x{rate:>10.0f}"
            f"{errors[0]:>13.4f}{errors[1]:>12.4f}"
        )
    if arguments.out:
        machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        arguments.out.write_text(json.dumps({"machine": machine, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
