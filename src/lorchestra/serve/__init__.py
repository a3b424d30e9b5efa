"""One resident base, many tenants: the OpenAI API in front of an engine."""
