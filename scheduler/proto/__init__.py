"""xllm.proto and the code generated from it; see the head of xllm.proto for the command."""
