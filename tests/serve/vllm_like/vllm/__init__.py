"""What ``python -m vllm.entrypoints.openai.api_server`` starts in the tests: vLLM's endpoints by plain PEFT."""
