"""Names of adapters, and who may use them."""
