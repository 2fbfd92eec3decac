"""dynroute: image classifiers that choose, per image, which parts of themselves to run."""

__version__ = "0.1.0"
