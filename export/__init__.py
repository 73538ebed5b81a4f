"""pylumiere.export: one model to one bundle for many GPUs, on a machine that needs none.

`spec.py` says what the exported networks take and give; `to_onnx.py`, `to_tensorrt.py` and `cubins.py` build from it;
`targets.py` chooses what is built for which GPU, `source.py` brings the model's files, `steps.py` runs the builders in
processes of their own, `build.py` puts the bundle together. The folder is mapped to `pylumiere.export` by setup.py.
"""

if not __name__.startswith("pylumiere."):
    raise ImportError(
        f"this folder was imported as {__name__!r}; it is the package 'pylumiere.export'. "
        "Install the project with: pip install --no-build-isolation -e ."
    )
