"""Entry point: `python train_low_mem.py train`, or the same behind torchrun or accelerate launch. See --help."""

import sys

if __name__ == "__main__":
    try:
        from lowmem.cli import main  # long enough for a Ctrl-C

        sys.exit(main())
    except KeyboardInterrupt:  # of a run that has not begun, or of a command that saves nothing
        sys.exit(75 if sys.argv[1:2] == ["train"] else 130)
