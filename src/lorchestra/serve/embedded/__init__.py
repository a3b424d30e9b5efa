"""The default engine: continuous batching over mixed adapters on one base, in a process of its own or in this one."""
