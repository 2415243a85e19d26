"""What tests of served processes ask for, and how they wait."""

import time

PROMPT = "def add(a, b):\n"
# Thousands of tokens: still running when a test looks, whatever the machine.
LONG = {"prompt": PROMPT, "max_tokens": 450, "n": 8, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": "Write a function that adds two numbers."}]


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.05)
