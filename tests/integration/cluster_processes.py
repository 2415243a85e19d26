"""A gateway and its instances as processes, and clients of them."""

import json
import threading
from contextlib import ExitStack, contextmanager

import httpx

from tests.integration.helpers import until
from tests.integration.serve_process import ServeProcess

NUM_TOKENS = 2000
"""Of a long answer: on a fast machine too it is under way for several reports of load (one each 250 ms)."""


@contextmanager
def clusters(artifact):
    """A function that starts one; all end with the context."""
    with ExitStack() as stack:

        def start(*roles, options=(), gateway_options=()):
            cluster = Cluster(artifact, roles, *options, gateway_options=gateway_options)
            stack.callback(cluster.close)
            return cluster

        yield start


def answers_alone(artifact, prompts):
    """What a server without others answers: a long answer to each prompt."""
    with ServeProcess(artifact, "--threads", "1") as server:
        return {prompt: complete(server, prompt, max_tokens=NUM_TOKENS)[0] for prompt in prompts}


class Cluster:
    """Of one artifact; float32, so that tokens are the same however a step is put together."""

    def __init__(self, artifact, roles, *options, gateway_options=()):
        self._stack = ExitStack()
        self._artifact = artifact
        self._options = options
        """Of the instances."""
        # By load, prompts of any length go from prefill to decode.
        self.gateway = self._start("--role", "gateway", "--registry-port", "0", "--routing", "load", *gateway_options)
        self.instances = {}
        for index, role in enumerate(roles):
            self.add(f"{role}-{index}", role)

    def _start(self, *options):
        return self._stack.enter_context(ServeProcess(self._artifact, *options))

    def add(self, name, role):
        registry = self.gateway.registry
        options = ("--role", role, "--registry", registry, "--name", name, "--threads", "1", *self._options)
        self.instances[name] = self._start(*options)
        until(lambda: any(each["name"] == name and each["health"] == "active" for each in self.members()))

    def members(self):
        return httpx.get(f"{self.gateway.http}/cluster").json()["instances"]

    def counts(self):
        return httpx.get(f"{self.gateway.http}/cluster").json()["counts"]

    def close(self):
        self._stack.close()


def complete(server, prompt, **options):
    body = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True} | options
    answer = httpx.post(f"{server.http}/v1/completions", json=body, timeout=120)
    answer.raise_for_status()
    return [choice["text"] for choice in answer.json()["choices"]]


class Stream(threading.Thread):
    """One long completion, read as it comes."""

    def __init__(self, server, prompt, **options):
        super().__init__()
        self._url = f"{server.http}/v1/completions"
        self._body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
        self._body |= options
        self.text = ""
        self.error = None
        self.start()

    def run(self):
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=120) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            self.error = event["error"]
                        else:
                            self.text += event["choices"][0]["text"]
        except Exception as err:
            self.error = err

    def result(self):
        self.join(120)
        assert self.error is None, self.error
        return self.text


def busiest(cluster):
    until(lambda: any(each["load"]["num_running"] for each in cluster.members()))
    return max(cluster.members(), key=lambda each: each["load"]["num_running"])["name"]
