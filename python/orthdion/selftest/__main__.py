"""``python -m orthdion.selftest``; with ``--rank K`` one of the two processes that it starts."""

import sys

from . import main
from .processes import be_a_rank

if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        be_a_rank(int(sys.argv[2]))
    else:
        sys.exit(main())
