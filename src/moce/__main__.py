"""python -m moce"""

import sys

from moce.cli import main

sys.exit(main())
