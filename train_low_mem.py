"""Entry point: `python train_low_mem.py train`, or the same behind torchrun or accelerate launch. See --help."""

import sys

from lowmem.cli import main

if __name__ == "__main__":
    sys.exit(main())
