"""`convert-beton` for a source tree that isn't installed: python -m tools.convert_beton SOURCE OUT.beton"""

import sys

from pipelines.convert.command import main

if __name__ == "__main__":
    sys.exit(main())
