"""WHAT is kept and shared: adapters and checkpoints on the disk, and what is computed from them a tensor at a time."""

from .compress import compress, decompress
from .export import export
from .extract import extract
from .inspect import inspect, write_card
from .merge import merge
from .verify import verify

__all__ = ["compress", "decompress", "export", "extract", "inspect", "merge", "verify", "write_card"]
