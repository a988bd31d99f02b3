"""`python -m tools.hub [FOLDER]`: lays the repository out, checks the rules, loads it by `kernels` and runs the card's example."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from tools.hub.layout import CARD, VARIANTS, write
from tools.hub.rules import check_with_kernels, namespaces, violations


def main() -> int:
    """Returns 1 where a rule is broken, with a line for each."""
    parser = argparse.ArgumentParser(prog="python -m tools.hub", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("build/hub"))
    folder = parser.parse_args().folder.resolve()
    write(folder)
    broken = violations(folder)
    for variant in VARIANTS:
        found = namespaces(folder / "build" / variant)
        print(f"{variant}: operators in torch.ops.{', torch.ops.'.join(found)}")
    for line in check_with_kernels(folder):
        print(line)
    print(*broken, sep="\n", end="\n" if broken else "")
    example(folder)
    print(f"{folder}: laid out, checked, loaded by kernels; the card's example ran")
    return 1 if broken else 0


def example(folder: Path) -> None:
    """Run the code blocks of the card as they stand; `kernels` is told to look in the folder in place of the Hub.

    Raises:
        CalledProcessError: they fail.
    """
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (repository,) = set(re.findall(r'get_kernel\("([^"]+)"', CARD.read_text(encoding="utf-8")))
    environment = {**os.environ, "LOCAL_KERNELS": f"{repository}={folder}", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", "\n".join(blocks)], check=True, env=environment)


if __name__ == "__main__":
    sys.exit(main())
