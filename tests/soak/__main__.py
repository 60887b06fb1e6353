"""``python -m soak --minutes 5 --out runs/soak.json``: campaigns until the time is up; exit status 1 if any failed."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

from .campaign import Campaign, Figures, choose

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Runs campaigns, tells how each one ended, and adds up the figures."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=None, help="of everything; default: the time")
    parser.add_argument("--out", type=Path, default=Path("runs/soak.json"))
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else int(time.time())
    print(f"seed {seed}", flush=True)
    draw, total, failed = random.Random(seed), Figures(), 0
    end = time.monotonic() + 60.0 * options.minutes
    while time.monotonic() < end:
        kind = choose(draw)
        campaign = Campaign(kind, draw.randrange(2**31))
        try:
            figures = campaign.run()
        except AssertionError as e:
            failed += 1
            print(f"FAILED {kind}: {e}", flush=True)
            continue
        total.add(figures)
        print(f"{kind}: {figures}", flush=True)
    print(f"all: {total}; {failed} campaigns failed")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"seed": seed, "failed": failed, **total.__dict__}, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
