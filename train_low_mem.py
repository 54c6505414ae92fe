"""Entry point: `python train_low_mem.py train`, or the same under torchrun or accelerate launch. See --help."""

import sys

if __name__ == "__main__":
    try:
        from lowmem.cli import main  # takes long enough to be interrupted by Ctrl-C

        sys.exit(main())
    except KeyboardInterrupt:  # Ctrl-C before the run starts, or in a command that saves nothing
        sys.exit(75 if sys.argv[1:2] == ["train"] else 130)
