"""See :mod:`vllm`."""
