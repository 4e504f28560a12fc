"""Files on disk (atomic writes, locks, hashes, one tensor at a time), free memory, and threads."""
