"""OpenAI's batch API: files of requests, answered as best effort beside the online ones, kept over restarts."""
