"""The runtimes that a model can be timed in, one file each.

`registry.ENGINES` maps each name in `RuntimeName` to an `Engine`; `opened.open_models` opens models by a `Runtime`,
which names engine, dtype and threads. A new runtime is a file with a class that follows `engine.Engine`, and an entry
of the registry.
"""
