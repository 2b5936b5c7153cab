# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""Check the version of transformers before its names are imported (part of the shipped file)."""

import transformers

NEEDED = "5.23"  # as in setup.cfg

if tuple(map(int, transformers.__version__.split(".")[:2])) < tuple(map(int, NEEDED.split("."))):
    raise ImportError(
        f"this model needs transformers {NEEDED} or later, {transformers.__version__} is installed: "
        f'pip install "transformers>={NEEDED}"'
    )
