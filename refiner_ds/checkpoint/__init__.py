"""Checkpoints as files: what lies on disk, whether it is whole, and how it is written. No process group, no engine."""
