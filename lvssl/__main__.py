"""`python -m lvssl`, as `lvssl` does; `torchrun ... -m lvssl` for several processes."""

import sys

from lvssl.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
