"""Names the packages, maps the folders kernels/ and export/ into the package, and builds the C++ module with CMake."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def _packages_below(folder: str, name: str) -> list[str]:
    """`name` and the packages in `folder`; empty when the folder is no package."""
    if not (ROOT / folder / "__init__.py").exists():
        return []
    return [name, *(f"{name}.{package}" for package in find_packages(str(ROOT / folder)))]


MAPPED = {"pylumiere.kernels": "kernels", "pylumiere.export": "export"}
PACKAGES = _packages_below("pylumiere", "pylumiere")
for _name, _folder in MAPPED.items():
    PACKAGES += _packages_below(_folder, _name)


class CMakeBuild(build_ext):
    """Runs CMake for `pylumiere._runtime`.

    The variable PYLUMIERE_CUDA (AUTO, ON or OFF) says whether the CUDA step is compiled: AUTO means where a CUDA
    toolkit is installed. A GPU is never looked for.
    """

    def run(self) -> None:
        # CMake reports a missing compiler in forty lines; one is enough.
        if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
            sys.exit("pylumiere: no C++ compiler found. Install one, on Debian: apt-get install g++")
        if shutil.which("cmake") is None:
            sys.exit("pylumiere: cmake not found. Install it, on Debian: apt-get install cmake (or: pip install cmake)")
        if shutil.which("ninja") is None and shutil.which("make") is None:
            sys.exit("pylumiere: neither ninja nor make found. Install one, on Debian: apt-get install ninja-build")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPYLUMIERE_CUDA={os.environ.get('PYLUMIERE_CUDA', 'AUTO')}",
            "-DPYLUMIERE_TESTS=OFF",
        ]  # fmt: skip
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        # A build folder from another interpreter or an isolated pip environment names files that are gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "_runtime", "--parallel"], check=True)


setup(
    packages=PACKAGES,
    package_dir={name: folder for name, folder in MAPPED.items() if name in PACKAGES},
    package_data={
        "pylumiere": ["demo/*", "demo/**/*", "py.typed"],
        "pylumiere.checkpoints": ["layouts/*"],
        "pylumiere.kernels": ["csrc/*"],
        "pylumiere.serve": ["page/*"],
    },
    include_package_data=False,
    ext_modules=[Extension("pylumiere._runtime", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
