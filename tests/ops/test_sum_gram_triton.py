"""The Triton kernel of ``sum_gram`` without a GPU.

Two legs, because Triton decides at import whether to interpret:

- ``TRITON_INTERPRET=1 pytest tests/ops/test_sum_gram_triton.py`` runs the kernel on CPU tensors. It proves
  indexing and masking, nothing about concurrency, and knows no bfloat16.
- without it, the kernel is compiled for sm_80 and sm_90 and its resources are read from the binary.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
import taskgrad.ops  # noqa: E402, F401

module = sys.modules["taskgrad.ops.sum_gram"]

interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1")
# Triton 3.6 converts loop bounds in a way that NumPy deprecates (and refuses from 2.4 on)
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
compiled = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 replaces the compiler")

SHAPES = [(1, 1), (2, 127), (3, 128), (7, 129), (16, 300), (17, 130), (64, 257)]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted_kernel_matches_fp64(dtype, shape):
    block = torch.randn(shape).to(dtype)
    total, gram = module.launch(block)
    exact = block.double()
    norms = exact.norm(dim=1)
    assert ((gram - exact @ exact.mT).abs() <= 1e-6 * norms[:, None] * norms[None, :]).all()
    assert torch.equal(gram, gram.mT)
    assert total.dtype == dtype
    torch.testing.assert_close(total, module.reference(block)[0])


@interpreted
def test_interpreted_kernel_takes_several_tiles_per_program():
    columns = 256 * module.tile_config(torch.float32, 64)[0] + 5  # at 64 rows there are at most 256 programs
    block = torch.randn(64, columns)
    total, gram = module.launch(block)
    torch.testing.assert_close(gram, block.double() @ block.double().mT, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(total, module.reference(block)[0])


@interpreted
@pytest.mark.parametrize(
    "block",
    [
        torch.randn(200, 5).mT,
        torch.randn(5, 400)[:, ::2],
        torch.randn(10, 200)[::2],
        torch.randn(5, 400)[:, 7:207],
    ],
    ids=["transposed", "every second column", "every second row", "slice"],
)
def test_interpreted_kernel_takes_any_strides(block):
    total, gram = module.launch(block)
    torch.testing.assert_close(gram, block.double() @ block.double().mT, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(total, module.reference(block)[0])


@compiled
@pytest.mark.parametrize("rows", [16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arch", [80, 90], ids=["sm_80", "sm_90"])
def test_compiles_without_spills(arch, dtype, rows, tmp_path):
    kernel = module.sum_gram_kernel
    pointer = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    types = {"block": pointer, "total": pointer, "partials": "*fp64", "row_stride": "i64"}
    tile, warps = module.tile_config(dtype, rows)
    constants = {"T_PAD": rows, "TILE": tile}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    aligned = [kernel.arg_names.index(name) for name in ("block", "total", "partials", "row_stride")]
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    binary = triton.compile(source, target=target, options={"num_warps": warps})

    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "STACK:0 " in usage, usage  # registers that do not fit go to the stack
    assert "LOCAL:0 " in usage, usage
    assert binary.metadata.shared <= {80: 163, 90: 227}[arch] * 1024
    ptx = binary.asm["ptx"]
    if dtype == torch.float32:
        assert "tf32" not in ptx  # fp32 products must keep all their bits
    else:
        assert "mma.sync" in ptx or "wgmma.mma_async" in ptx
