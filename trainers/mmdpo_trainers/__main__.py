"""`python -m mmdpo_trainers`: the `mmdpo` command, for launchers that start a module."""

import sys

from mmdpo_trainers.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
