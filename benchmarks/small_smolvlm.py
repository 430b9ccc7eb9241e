"""A SmolVLM small enough for a laptop: the real architecture and a real processor, random weights, made here without a network.

    python benchmarks/small_smolvlm.py --out models/small-smolvlm

It stands in for HuggingFaceTB/SmolVLM-256M-Instruct where nothing can be downloaded: it goes through the same code, and knows
nothing. It is the one the tests use (tests/families.py).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.families import smolvlm  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to put it")
    parser.add_argument("--seed", type=int, default=0, help="of its random weights")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    smolvlm(args.out)
    print(f"{args.out}: {sum(p.stat().st_size for p in args.out.glob('*.safetensors')) / 1e6:.1f} MB of random weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
