"""Do two commits make the same bytes? python benchmarks/compare_commits.py OLD NEW [--json FILE]

Each commit is checked out into a temporary folder, its wheel is built and unpacked there with the Python and the
libraries of the running environment, and a process of its own runs `_commit_cases.py` on it: clips of the demo, by
`pylumiere.Engine` and by the command line, each turned into one SHA-256. Only the public contract is used, so any
commit that keeps the contract can be compared. Exit status: 0 all cases agree, 1 some differ, 2 it could not be tried.

Hashes of two machines, or of two thread counts, say nothing: sums are rounded in another order there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CASES = Path(__file__).resolve().with_name("_commit_cases.py")


@contextlib.contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder, commit], cwd=ROOT, check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)


def results_of(commit: str, only: list[str]) -> dict[str, str]:
    """What a commit makes.

    Raises:
        CalledProcessError: it cannot be built, or a case failed; the output says which.
        RuntimeError: a module was imported from another place than the wheel.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # setup.py looks for cmake and ninja on the path.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        site, work = folder / "site", folder / "work"
        work.mkdir()
        install = [sys.executable, "-P", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        install += ["--no-deps", "--no-build-isolation", "--no-cache-dir", "--target", str(site)]
        with checked_out(commit, folder / "tree") as tree:
            subprocess.run([*install, str(tree)], cwd=work, env=environment, check=True)
        child = [sys.executable, "-P", str(CASES), *only]
        environment["PYTHONPATH"] = str(site)
        done = subprocess.run(child, cwd=work, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        report = json.loads(done.stdout)
    for module in report["modules"]:  # an editable install answers for what the wheel lacks
        if not Path(module).is_relative_to(site):
            raise RuntimeError(f"{module} was imported, which is not of the wheel in {site}")
    return report["results"]


def table(old: dict[str, str], new: dict[str, str]) -> tuple[list[str], bool]:
    """A line for each case, and whether all agree; a case that one side lacks does not."""
    names = list(old | new)
    width = max(map(len, names), default=0)
    lines, agree = [], True
    for name in names:
        before, after = old.get(name, "missing"), new.get(name, "missing")
        agree &= before == after
        verdict, shown = ("same", [before]) if before == after else ("DIFFERENT", [before, after])
        lines.append(f"{name:{width}}  {verdict:9}  {' | '.join(map(_short, shown))}")
    return lines, agree


def _short(result: str) -> str:
    """The first digits of a hash, or the beginning of a text."""
    return result[:12] if re.fullmatch("[0-9a-f]{64}", result) else result[:60]


def full_name(commit: str) -> str:
    command = ["git", "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", help="a commit")
    parser.add_argument("new", help="another one")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all fingerprints here")
    options = parser.parse_args()
    try:
        commits = {"old": full_name(options.old), "new": full_name(options.new)}
        old, new = (results_of(commit, options.only) for commit in commits.values())
    except (subprocess.CalledProcessError, RuntimeError) as error:
        print(f"compare_commits: {error}", file=sys.stderr)
        return 2
    if not old:
        print(f"compare_commits: no case contains {options.only}", file=sys.stderr)
        return 2
    lines, agree = table(old, new)
    print("\n".join(lines))
    if options.json is not None:
        cases = {name: {"old": old.get(name), "new": new.get(name)} for name in old | new}
        options.json.write_text(json.dumps({**commits, "cases": cases}, indent=1) + "\n")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
