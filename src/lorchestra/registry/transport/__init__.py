"""What leaves a registry and comes back: bundles, backups, the hub."""
