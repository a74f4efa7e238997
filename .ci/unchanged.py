"""nbdev_clean, nbdev_export and `make readme` must leave the tree as it is: run them, and name what they changed."""

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIP = {".git", ".venv", "data", "build", "dist", "_proc", "_docs", "__pycache__", ".ipynb_checkpoints",
    ".pytest_cache"}
README = ["jupyter", "nbconvert", "--config", ".ci/readme.py", "--log-level", "WARN", "--output-dir", ".",
    "nbs/index.ipynb"]


def snapshot():
    """{path: hash} of every file of the project, committed or not.

    Data/ and what .gitignore names at the top are left out."""
    found = {}
    for top in ROOT.iterdir():
        if top.name in SKIP or top.suffix == ".egg-info" or top.name.startswith(".venv"):
            continue
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.is_file() and not SKIP & set(path.relative_to(ROOT).parts):
                found[path.relative_to(ROOT).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def main():
    before = snapshot()
    for command in (["nbdev_clean"], ["nbdev_export"], README):
        subprocess.run(command, cwd=ROOT, check=True)
    after = snapshot()
    different = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    for path in different:
        what = "added" if path not in before else "removed" if path not in after else "changed"
        print(f"{what} by nbdev_clean, nbdev_export or make readme: {path}", file=sys.stderr)
    if different:
        sys.exit(
            "The notebooks and what is made from them were not in step. They are now: look at the difference and "
            "commit it.")
    print(f"nbdev_clean, nbdev_export and make readme leave all {len(after)} files unchanged.")


main()
