"""`make bench REF=main`: the suite on another commit beside this one, in alternating runs.

The commit is checked out into a temporary git worktree and found there by PYTHONPATH: nothing is installed,
and the suite itself is this one's for both. Two runs of each, since a machine's speed drifts: a change that
is smaller than the difference between two runs of the same commit is none.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUITE = ROOT / "bench" / "suite"
RUNS = 2


def measure(code: Path, storage: Path, name: str, more: list[str]) -> None:
    """Run the suite once on the packages in `code`. Raises CalledProcessError where a benchmark fails."""
    path = os.pathsep.join(str(code / folder) for folder in (".", "kernels", "bench"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(SUITE)]
    command += [f"--benchmark-storage={storage}", f"--benchmark-save={name}", "--benchmark-quiet", *more]
    environment = {**os.environ, "PYTHONPATH": path, "QSTAR_MEASURED": str(code)}  # see conftest.py
    # `python -m` looks into its working folder first
    subprocess.run(command, cwd=code, env=environment, check=True)


def compare(storage: Path) -> None:
    """Print the table of all runs, the median of each benchmark beside the fastest."""
    command = [sys.executable, "-m", "pytest_benchmark", "--storage", str(storage), "compare"]
    command += ["--group-by=name", "--sort=name", "--columns=median,iqr,rounds", "--name=normal"]
    subprocess.run(command, check=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="The suite on another commit beside the working tree.")
    parser.add_argument("ref", help="A commit, branch or tag.")
    args, more = parser.parse_known_args(argv)  # what is left is pytest's, such as -k nll
    git = ["git", "-C", str(ROOT)]
    known = [*git, "rev-parse", "--verify", "--quiet", f"{args.ref}^{{commit}}"]
    if subprocess.run(known, stdout=subprocess.DEVNULL).returncode:
        print(f"REF = {args.ref}: git knows no such commit", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        theirs, storage = Path(folder) / "ref", Path(folder) / "runs"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(theirs), args.ref], check=True)
        try:
            for i in range(RUNS):
                measure(theirs, storage, f"ref-{i + 1}", more)
                measure(ROOT, storage, f"here-{i + 1}", more)
        except subprocess.CalledProcessError as error:
            return error.returncode
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(theirs)], check=True)
        compare(storage)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
