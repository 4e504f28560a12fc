"""What pytest leaves out: modules for hardware that is not there."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") else ["adaptermix/baking/sweep_triton.py"]
