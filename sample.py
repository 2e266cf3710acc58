"""Class-conditional sampling from a checkout: the same as `maskgit sample`."""

import sys

from maskgit.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
