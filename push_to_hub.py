#!/usr/bin/env python
"""Upload the folder of a pruned model to the Hugging Face Hub: `python push_to_hub.py FOLDER --repo user/name`."""

import sys

from isoprune_hf.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["push", *sys.argv[1:]]))
