"""pylumiere.kernels: one operator per file.

Each file holds the formula, `reference` (plain PyTorch, the definition), the Triton kernel, `launch`, the registered
operator with its fake implementation, and `cost`. The folder is mapped to `pylumiere.kernels` by setup.py.
"""

if not __name__.startswith("pylumiere."):
    raise ImportError(
        f"this folder was imported as {__name__!r}; it is the package 'pylumiere.kernels'. "
        "Install the project with: pip install --no-build-isolation -e ."
    )

# One module per operator. `pylumiere.kernels.aot`, the benchmarks and the capability report read this list.
OPS = (
    "spatial_conv",
    "temporal_conv",
    "factorized_conv",
    "norm_affine",
    "groupnorm_silu",
    "layer_norm",
    "geglu",
    "temporal_attention",
    "temporal_shift",
    "denoise_step",
)
