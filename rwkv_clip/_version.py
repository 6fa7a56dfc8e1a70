"""The version, in one place: packaging reads this file, code reads `rwkv_clip.__version__`."""

__version__ = "0.1.0"
