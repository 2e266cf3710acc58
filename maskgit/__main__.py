"""`python -m maskgit`: the same as the `maskgit` command."""

import sys

from maskgit.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
