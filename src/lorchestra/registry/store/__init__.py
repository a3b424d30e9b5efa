"""Bytes under their SHA-256, on a disk or an object store; adapters' directories as such bytes."""
