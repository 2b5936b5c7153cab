#!/usr/bin/env python
"""Prune, finetune and evaluate an image classifier: `accelerate launch train_accelerate.py [STAGE] [FLAGS]`.

With no arguments it runs the embedded default: real handwritten digits and a small ViT. The same command as
`isoprune`.
"""

import sys

from isoprune_hf.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
