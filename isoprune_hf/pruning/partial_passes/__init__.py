"""Forward passes that start and stop within a network.

Entry points:
    passes.Passes: Micro-batches for passes that start as late as possible.
    waypoints.find_waypoints: The places within a network where a pass can start.
    observation.observe: The order of the modules in one pass, and what they read and return.
    storage.Storage: Room for the outputs that passes start from.

This folder knows nothing about channels, cuts or fits.
"""
