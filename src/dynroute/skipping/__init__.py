"""The fast run: the same result as the masked net, from convolutions that are really smaller or absent."""

from dynroute.skipping.executor import MEMORY, FastNet, fast_net
from dynroute.skipping.forms import Forms, load_forms, save_forms
from dynroute.skipping.kernels import packed_works

__all__ = ["MEMORY", "FastNet", "Forms", "fast_net", "load_forms", "packed_works", "save_forms"]
