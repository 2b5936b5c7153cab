"""Settings of a cut by classes of scores as they are, without rotation and repair."""

PLAIN = {"allocation": "class", "normalizer": "none", "rotate": False, "reconstruct": "none"}
PLAIN_FLAGS = [word for name, value in PLAIN.items() for word in (f"--prune.{name}", str(value).lower())]
