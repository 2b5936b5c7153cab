# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""Budgets of bytes and work for input of unknown origin: folders, images, recipe files, old checkpoints.

Each is far above what an honest input takes. SECURITY.md states them.
"""

MAX_JSON_BYTES = 2**25  # of a JSON file
MAX_NESTING = 64  # lists and mappings within each other
MAX_RECIPE_BYTES = 2**16  # of a recipe file
MAX_RECIPE_VALUES = 10_000  # of a recipe file, with its aliases written out
MAX_RECIPE_FILES = 16  # that extend each other
MAX_CONFIG_NUMBER = 2**20  # absolute value of a number in a config
MAX_MODULES = 20_000  # of a network
MAX_IMAGE_BYTES = 2**30  # of an image file; 2**26 pixels of four channels and 16 bits have half
MAX_IMAGE_SIDE = 2**14  # pixels
MAX_IMAGE_PIXELS = 2**26  # of an image as stored, and after its resize: 8192 x 8192
MAX_PROCESSED_SIDE = 2**12  # pixels, of the sizes of an image processor
MAX_INPUT_NUMBERS = 2**26  # of an image as a model reads it: channels x height x width
MAX_UNSAVED_BYTES = 2**29  # of the tensors that a constructor computes and no file contains
MAX_TABLE_BYTES = 2**27  # of one of them, and of each tensor on the way to it
MAX_BUILD_CALLS = 500_000  # of functions of torch in a constructor
MAX_BUILD_STEPS = 50_000_000  # calls and returns in a constructor; a TinyViT of 512 pixels makes 41 million
MAX_BUILD_BYTES = 2**30  # of new memory in a constructor, on Linux
MAX_PICKLE_BYTES = 2**24  # of the pickle in an old checkpoint; that of a ResNet-152 with its average has 0.6 MB
MAX_PICKLE_STEPS = 2_000_000  # to read it; that ResNet-152 with AdamW takes 234,368
