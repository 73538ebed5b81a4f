"""No circle of imports, module by module. The layers themselves are in pyproject.toml, and `make lint` holds them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module's imports inside functions and for type checkers count, too.
FIND_CIRCLE = """
import graphlib, grimp
graph = grimp.build_graph("pylumiere", cache_dir=None)
imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
try:
    graphlib.TopologicalSorter(imports).prepare()
except graphlib.CycleError as error:
    print(*reversed(error.args[1]), sep=" imports ")
"""


@pytest.fixture
def package(tmp_path):
    """The modules as an installation has them: the editable one keeps kernels/ and export/ out of grimp's sight."""
    for name, folder in (("", "pylumiere"), ("kernels", "kernels"), ("export", "export")):
        ignore = shutil.ignore_patterns("demo", "page", "csrc", "*.so", "__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / "pylumiere" / name, ignore=ignore, dirs_exist_ok=True)
    return tmp_path / "pylumiere"


def circle(package):
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    command = [sys.executable, "-P", "-c", FIND_CIRCLE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


def test_no_module_imports_itself_by_way_of_others(package):
    assert circle(package) == ""


def test_a_circle_of_a_package_and_its_module_is_seen(tmp_path):
    """Which the contract about siblings does not see, here in an import that waits for a call."""
    package = tmp_path / "pylumiere"
    package.mkdir()
    (package / "__init__.py").write_text("from pylumiere import rim\n")
    (package / "rim.py").write_text("def turn():\n    import pylumiere\n")
    assert circle(package) in (
        "pylumiere imports pylumiere.rim imports pylumiere",
        "pylumiere.rim imports pylumiere imports pylumiere.rim",
    )
