"""The console: a page at ``/console`` for those who operate a registry and the server in front of it."""
