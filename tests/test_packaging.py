"""The package as it is installed: light imports, no devices, no environment, no second copy of kernels/."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pylumiere

ROOT = Path(__file__).resolve().parent.parent
MAPPED = [folder for folder in ("kernels", "export") if (ROOT / folder / "__init__.py").exists()]


def run(code, *, cwd=None, flags=("-P",), env=None):
    command = [sys.executable, *flags, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=120, check=False)


def modules():
    """Every module of the package, by name, less those whose extra the tests do not install."""
    roots = {"pylumiere": ROOT / "pylumiere", **{f"pylumiere.{name}": ROOT / name for name in MAPPED}}
    names = []
    for name, folder in roots.items():
        for file in folder.rglob("*.py"):
            parts = [name, *file.relative_to(folder).with_suffix("").parts]
            names.append(".".join(parts).removesuffix(".__init__"))
    if importlib.util.find_spec("ray") is None:
        names.remove("pylumiere.serve.ray_app")
    return sorted(names)


def test_import_is_light():
    done = run("import sys, time; before = set(sys.modules); begun = time.perf_counter(); import pylumiere; "
               "print(time.perf_counter() - begun, *sorted(set(sys.modules) - before))")  # fmt: skip
    seconds, *names = done.stdout.split()
    assert not {"torch", "numpy", "triton", "av", "typer", "pydantic"} & {name.split(".")[0] for name in names}
    assert float(seconds) < 0.1


def test_command_line_starts_without_the_heavy_packages():
    done = run("import sys, pylumiere.cli; print(*{m.split('.')[0] for m in sys.modules})")
    heavy = {"torch", "numpy", "av", "triton", "transformers", "diffusers", "PIL", "sentence_transformers", "scipy"}
    assert not heavy & set(done.stdout.split())


def test_no_import_touches_a_device_or_reads_the_environment():
    """Each module, with every way to a device and to the environment cut; third-party packages are loaded before."""
    code = f"""
import os, sys
import torch, numpy, pydantic, typer, safetensors.torch, tokenizers
import triton, triton.language, triton.compiler
class Watched:
    def __getattr__(self, name):
        return getattr(original, name)
    def look(self, name):
        reader = sys._getframe(2).f_globals.get("__name__", "")
        if reader.startswith("pylumiere"):
            raise SystemExit(f"{{reader}} reads the environment variable {{name}}")
    def __getitem__(self, name):
        self.look(name)
        return original[name]
    def get(self, name, default=None):
        self.look(name)
        return original.get(name, default)
    def __contains__(self, name):
        self.look(name)
        return name in original
    def __iter__(self):
        return iter(original)
original = os.environ
os.environ = Watched()
os.getenv = os.environ.get
def refuse(*a, **k):
    raise SystemExit("an import asked for a device")
for name in ("is_available", "device_count", "current_device", "get_device_properties", "get_device_capability", "init",
             "_lazy_init"):
    setattr(torch.cuda, name, refuse)
import importlib
for name in {modules()!r}:
    importlib.import_module(name)
print("all imported")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = run(code, env=environment)
    assert done.stdout.strip() == "all imported", done.stdout + done.stderr


def test_public_names():
    for name in pylumiere.__all__:
        assert getattr(pylumiere, name) is not None
    assert set(pylumiere.__all__) <= set(dir(pylumiere))
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        _ = pylumiere.Engin
    for name in ("InvalidRequest", "BundleError", "IntegrityError", "VideoError"):
        assert issubclass(getattr(pylumiere, name), ValueError)
    assert issubclass(pylumiere.IntegrityError, pylumiere.BundleError)
    assert issubclass(pylumiere.UnsupportedDevice, RuntimeError)
    assert issubclass(pylumiere.Cancelled, RuntimeError)
    assert issubclass(pylumiere.BudgetExceeded, MemoryError)


@pytest.mark.parametrize("folder", MAPPED)
def test_a_mapped_folder_is_no_package_of_its_own(folder):
    """With the repository root on sys.path the folder would be imported again and register its operators twice."""
    done = run(f"import {folder}", cwd=ROOT, flags=())
    assert done.returncode == 1
    assert f"imported as '{folder}'; it is the package 'pylumiere.{folder}'" in done.stderr
    done = run(f"import pylumiere.{folder} as m; print(m.__file__)")
    assert Path(done.stdout.strip()) == ROOT / folder / "__init__.py", done.stderr


def test_version_has_one_source():
    assert importlib.metadata.version("pylumiere") == pylumiere.__version__
    with open(ROOT / "pyproject.toml", "rb") as file:
        assert tomllib.load(file)["project"]["dynamic"] == ["version"]


def test_pins_fit_the_ranges_and_leave_triton_to_torch():
    from packaging.requirements import Requirement

    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert re.fullmatch(r"==[^*]+", str(requirement.specifier)), line
            pins[requirement.name.lower().replace("_", "-")] = str(requirement.specifier).removeprefix("==")
    assert "triton" not in pins, "the CUDA build of torch brings the triton that fits it"
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        if requirement.name not in ("triton", "pylumiere"):  # the latter names another extra
            assert requirement.specifier.contains(pins[requirement.name.lower()]), text


def test_console_script_is_installed():
    script = Path(sys.executable).parent / "pylumiere"
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "generate" in done.stdout


def test_doctor_reports_json():
    from pylumiere import cli

    done = run("from pylumiere.cli import main; import sys; sys.exit(main(['doctor', '--json']))")
    report = json.loads(done.stdout)
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert findings["generate on the CPU"]["works"]
    assert findings["write mp4"]["works"]
    assert isinstance(report["machine"]["amx_bf16"], bool)
    assert all(finding["works"] or finding["detail"] for finding in findings.values())
    assert callable(cli.main)


def test_an_installation_has_all_modules_and_the_demo_but_no_helper_of_tests(tmp_path):
    """What a wheel holds beside the C++ module, which takes a compiler."""
    command = [sys.executable, "-P", "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    installed = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    sources = {f"pylumiere/{name}": ROOT / name for name in MAPPED} | {"pylumiere": ROOT / "pylumiere"}
    found = {f"{name}/{file.relative_to(folder)}" for name, folder in sources.items() for file in folder.rglob("*.py")}
    assert {name for name in installed if name.endswith(".py")} == found
    assert {name.split("/")[0] for name in installed} == {"pylumiere"}
    assert not [name for name in installed if re.search(r"\b(support|testing|fuzzing|tests?|conftest)\b|test_", name)]
    demo = ("MODEL_CARD.md", "config.json", "base.safetensors", "ssr.safetensors", "styles/ink.safetensors")
    needed = [f"demo/{name}" for name in demo]
    needed += ["kernels/spatial_conv.py", "kernels/csrc/denoise_step.cuh", "export/build.py", "serve/page/index.html"]
    assert {f"pylumiere/{name}" for name in needed} <= installed


def test_no_import_error_is_swallowed():
    """A missing part is said, not passed over."""
    for folder in ["pylumiere", *MAPPED]:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ExceptHandler) and node.type is not None:
                    is_silent = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
                    assert not (is_silent and "ImportError" in ast.unparse(node.type)), f"{file}:{node.lineno}"
