"""WHAT is kept and shared: checkpoints on the disk, and what is computed from them a tensor at a time."""
