"""The polar factor alone on one GPU: time and accuracy, beside the same iteration in plain torch and beside the
gram-newton-schulz package, if it is installed.

    python benchmarks/polar.py [--out polar.json]

Batches of random bf16 matrices. "torch" is the standard form of torch.optim.Muon's iteration, batched, with cuBLAS
products and five Polar Express steps in fp16; "gram-ns" is gram-newton-schulz as it comes, with its CuTe kernels and
the same five steps; "quintic" is muon_dist.polar.polar_factor with these steps, "ours" as the optimizer calls it.
Times are medians, by CUDA events. TFLOP/s counts the FLOPs that ours needs, symmetric products by half. "of GEMM" is
its share of what cuBLAS reaches on this GPU, in this run, for fp16 products of 8192 x 8192.

Accuracy is that of one matrix U S V^T with known singular vectors, whose polar factor is U V^T. "cosine" is to that;
"mixing" is the norm of what U^T O V has beside its diagonal, relative to the exact one's. Most of it is mixed before:
the matrix is rounded to bf16, and what that carries into small singular values is multiplied with them. So "own mixing"
is the same with the singular vectors of the rounded matrix. "fp8" is ours with the last product, that with the whole
matrix, in fp8: what that would bring, and cost. The optimizer does not do it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.testing import do_bench

from muon_dist.plan import polar_flops
from muon_dist.polar import polar_factor, schedule
from muon_dist.polar.chains import doubling_twice
from muon_dist.polar.products import multiply_chain, normalised

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
ACCURACY_SHAPES = [(2048, 2048), (2048, 8192)]
QUINTIC, DOUBLING = schedule("polar_express"), schedule("doubling")
Polar = Callable[[Tensor], Tensor]


def torch_standard(matrices: Tensor) -> Tensor:
    """a X + (b A + c A^2) X with A = X X^T, as torch.optim.Muon iterates, for a batch in fp16."""
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = (matrices / (norm * QUINTIC.margin)).half()
    for a, b, c in QUINTIC.iterations:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def in_fp8(matrices: Tensor) -> Tensor:
    """Both polynomials from one Gram matrix, and Q X in e4m3 with a scale for each row of Q and each column of X."""
    x = torch.empty_like(matrices, dtype=torch.float16)
    normalised(matrices, DOUBLING.margin, out=x)
    q = multiply_chain(x, doubling_twice(*DOUBLING.doublings))
    (rows, of_rows), (columns, of_columns) = rounded_to_fp8(q), rounded_to_fp8(x.mT)
    products = [
        torch._scaled_mm(a, b.T, scale_a, scale_b.T, out_dtype=torch.bfloat16, use_fast_accum=True)
        for a, b, scale_a, scale_b in zip(rows, columns, of_rows, of_columns, strict=True)
    ]
    return torch.stack(products)


@torch.compile
def rounded_to_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    """With the scale of each row, fp32."""
    scale = values.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (values / scale).to(torch.float8_e4m3fn).contiguous(), scale


def competitors() -> dict[str, Polar]:
    found: dict[str, Polar] = {"torch": torch_standard}
    try:
        from gram_newton_schulz import GramNewtonSchulz
    except ImportError:
        pass
    else:
        found["gram-ns"] = GramNewtonSchulz()
    return {
        **found,
        "quintic": partial(polar_factor, schedule=QUINTIC),
        "ours": partial(polar_factor, schedule=DOUBLING),
    }


def spectra(short: int) -> dict[str, Tensor]:
    """Singular values by name, largest first."""
    k = torch.arange(1, short + 1, device="cuda")
    gaussian = torch.randn(short, short, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    spiked = torch.full((short,), 1e-2, device="cuda")
    spiked[:8] = 1.0
    powers = {f"k^-{power}": k**-power for power in (0.5, 1.0, 1.5)}
    return {"Gaussian": torch.linalg.svdvals(gaussian), **powers, "8 spikes": spiked}


class Known(NamedTuple):
    """A matrix U S V^T in bf16, ``[s, l]``, its U and V in fp64, and those of what rounding has made of it."""

    matrix: Tensor
    u: Tensor
    v: Tensor
    own_u: Tensor
    own_v: Tensor

    @classmethod
    def of(cls, values: Tensor, long: int) -> Known:
        short, generator = len(values), torch.Generator("cuda").manual_seed(1)
        u, v = (torch.linalg.qr(torch.randn(n, short, device="cuda", generator=generator))[0] for n in (short, long))
        matrix = ((u * values) @ v.mT).bfloat16()
        exact = matrix.double()
        own_u = torch.linalg.eigh(exact @ exact.mT)[1]
        own_v = exact.mT @ own_u
        return cls(matrix, u.double(), v.double(), own_u, own_v / own_v.norm(dim=0))


def accuracy(polar: Polar, known: Known) -> dict[str, float]:
    found = polar(known.matrix.unsqueeze(0))[0].double()
    inner = known.u.mT @ found @ known.v
    return {
        "cosine": float(inner.trace() / (found.norm() * len(inner) ** 0.5)),
        "mixing": mixing(inner),
        "own mixing": mixing(known.own_u.mT @ found @ known.own_v),
    }


def mixing(inner: Tensor) -> float:
    """What U^T O V, ``[s, s]``, has beside its diagonal."""
    return float((inner - inner.diagonal().diag()).norm() / len(inner) ** 0.5)


def milliseconds(function: Callable[[], Tensor]) -> float:
    return float(do_bench(function, warmup=50, rep=200, return_mode="median"))


def gemm_tflops() -> float:
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    return 2 * 8192**3 / milliseconds(lambda: a @ a) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    arguments = parser.parse_args()
    polars, gemm = competitors(), gemm_tflops()
    print(f"one {torch.cuda.get_device_name()}, torch {torch.__version__}; cuBLAS reaches {gemm:.0f} TFLOP/s\n")
    print(f"{'batch':>16}" + "".join(f"{f'{name}, ms':>13}" for name in polars) + f"{'TFLOP/s':>10}{'of GEMM':>9}")
    times = []
    for n, short, long in BATCHES:
        matrices = torch.randn(n, short, long, device="cuda", dtype=torch.bfloat16)
        found = {name: milliseconds(partial(polar, matrices)) for name, polar in polars.items()}
        rate = n * polar_flops(short, long) / found["ours"] / 1e9
        times.append({"batch": [n, short, long], "milliseconds": found, "tflops": rate})
        print(f"{f'{n}x{short}x{long}':>16}" + "".join(f"{ms:>13.2f}" for ms in found.values()), end="")
        print(f"{rate:>10.0f}{rate / gemm:>9.0%}", flush=True)
    for name in polars.keys() - {"ours"}:
        mean = statistics.geometric_mean(t["milliseconds"][name] / t["milliseconds"]["ours"] for t in times)
        print(f"ours is {mean:.2f} times as fast as {name} in the geometric mean")
    print("\ncosine, mixing of singular vectors, and own mixing")
    print(f"{'matrix':>12}{'spectrum':>12}" + "".join(f"{name:>28}" for name in polars))
    errors: list[dict[str, Any]] = []
    errors_in_fp8: dict[tuple[int, int], dict[str, dict[str, float]]] = {shape: {} for shape in ACCURACY_SHAPES}
    for short, long in ACCURACY_SHAPES:
        for spectrum, values in spectra(short).items():
            known = Known.of(values, long)
            row = {name: accuracy(polar, known) for name, polar in polars.items()}
            errors_in_fp8[short, long][spectrum] = accuracy(in_fp8, known)
            errors.append({"matrix": [short, long], "spectrum": spectrum, **row})
            cells = ("  ".join(f"{figure:.5f}" for figure in f.values()) for f in row.values())
            print(f"{f'{short}x{long}':>12}{spectrum:>12}" + "".join(f"{cell:>28}" for cell in cells), flush=True)
    print("\nwith the last product in fp8: times as fast as ours, and cosine and mixing")
    fp8 = []
    for (n, short, long), time in zip(BATCHES, times, strict=True):
        if (short, long) in ACCURACY_SHAPES:
            matrices = torch.randn(n, short, long, device="cuda", dtype=torch.bfloat16)
            faster = time["milliseconds"]["ours"] / milliseconds(partial(in_fp8, matrices))
            row = errors_in_fp8[short, long]
            fp8.append({"batch": [n, short, long], "faster": faster, **row})
            cells = (f"{name} {f['cosine']:.4f} {f['mixing']:.4f}" for name, f in row.items())
            print(f"{f'{n}x{short}x{long}':>16}{faster:>7.2f}  " + ", ".join(cells))
    if arguments.out:
        machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "gemm_tflops": gemm}
        figures = {"machine": machine, "times": times, "accuracy": errors, "fp8": fp8}
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
