import sys

from tqai.cli import main

sys.exit(main())
