"""Which instance does what: pure functions over what the service knows (`scheduler/cluster/state.py`).

The gateway and the simulator (`xllm-bench simulate`) call the same ones.
"""
