"""The kernels through Triton's compiler, for cards that this machine doesn't have: the interpreter takes programs that
the compiler refuses."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton isn't installed (pip install triton)")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler.compiler import ASTSource, make_backend  # noqa: E402

SIZES = {"B", "n", "columns", "own_start", "own_count", "first", "last", "stride", "tiles"}
TYPES = {"row_ids": "*i64", "candidate_ids": "*i64", "moved": "*i8", "scale": "fp32", "drift": "fp32"}
CEILINGS = {"row_ceiling", "column_ceiling"}
# (kernel, pointers that are None): every combination that kernels.py launches
VARIANTS = {
    "reduce": ("reduce", CEILINGS),
    "reduce, ceilings": ("reduce", set()),
    "values": ("weigh", CEILINGS | {"row_factor", "column_anchor", "column_factor", "moved"}),
    "values again": ("weigh", CEILINGS | {"row_factor", "column_anchor", "column_factor"}),
    "backward, columns": ("weigh", CEILINGS | {"maxima", "totals", "moved"}),
    "backward": ("weigh", {"column_ceiling", "column_anchor", "column_factor", "maxima", "totals", "moved"}),
    "reanchor": ("reanchor", set()),
}


def source(variant: str, operand: torch.dtype, dim: int) -> ASTSource:
    """A kernel with arguments of these types, at the tile that a GPU gets."""
    from trainers.objectives import kernels_triton

    name, absent = VARIANTS[variant]
    jitted = getattr(kernels_triton, name)
    jitted = getattr(jitted, "fn", jitted) if isinstance(jitted, triton.runtime.Autotuner) else jitted
    short = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    types = TYPES | dict.fromkeys(SIZES, "i32") | dict.fromkeys(("queries", "candidates"), short[operand])
    types["weights"] = "*fp32" if operand == torch.float32 else "*bf16"
    constants = kernels_triton.tile_shape(operand.itemsize) | {"D": dim, "KEYS": 2, "PRECISION": "tf32x3", "K": 64}
    constants = {k: v for k, v in constants.items() if k in jitted.arg_names}
    constants |= dict.fromkeys(absent & set(jitted.arg_names))
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in jitted.arg_names}
    aligned = [i for i, n in enumerate(jitted.arg_names) if signature[n].startswith("*") or n == "stride"]
    return ASTSource(jitted, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})


@pytest.mark.parametrize("dim", [1024, 100])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_passes_the_front_end(variant, dim):
    target = GPUTarget("cuda", 90, 32)
    backend, context = make_backend(target), triton._C.libtriton.ir.context()
    triton._C.libtriton.ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options({"num_warps": 8})
    made = source(variant, torch.bfloat16, dim)
    codegen = backend.get_codegen_implementation(options)
    assert made.make_ir(target, options, codegen, backend.get_module_map(), context).verify()


@pytest.mark.proof
@pytest.mark.parametrize(
    ("operand", "capability"), [(torch.bfloat16, 90), (torch.float32, 90), (torch.bfloat16, 80)], ids=str
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_becomes_machine_code_that_fits_the_card(variant, operand, capability):
    made = source(variant, operand, 1024)
    binary = triton.compile(made, GPUTarget("cuda", capability, 32), {"num_warps": 8, "num_stages": 3})
    assert binary.metadata.shared <= {80: 163 * 1024, 90: 227 * 1024}[capability]
    if capability == 90 and variant != "reanchor":
        assert "wgmma.mma_async" in binary.asm["ptx"]
