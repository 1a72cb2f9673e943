"""Write tests/data/golden again: what transformers computes of the parity cases and of rotary positions.

    python tests/support/write_goldens.py                 # all cases, some minutes
    python tests/support/write_goldens.py plain space     # some of them

Needs torch and transformers (pip install -e '.[export,validate]'). Do it when a case, the parity text or how
random weights are drawn changes; the tests then say that a file was made from other weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.goldens import write_golden
from support.parity_cases import CASES, GREEDY_BYTES, RULE_CASES, RULE_GREEDY_BYTES
from support.random_models import write_random_model
from support.rope_cases import write_tables


def main() -> int:
    """Run the command; returns the exit code: 0 done, 1 not."""
    by_name = {case.name: case for case in CASES + RULE_CASES}
    parser = argparse.ArgumentParser(description="Write the parity cases' golden files.")
    parser.add_argument("cases", nargs="*", choices=[[], *by_name], metavar="case", help="names; all if none")
    total = 0
    for name in parser.parse_args().cases or by_name:
        case = by_name[name]
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = write_random_model(case, Path(folder))
            path = write_golden(case, checkpoint, GREEDY_BYTES if case in CASES else RULE_GREEDY_BYTES)
        total += path.stat().st_size
        print(f"{path}: {path.stat().st_size:,} bytes", flush=True)
    print(write_tables())
    print(f"{total:,} bytes in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
