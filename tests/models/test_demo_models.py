"""The checked-in demo models: complete, small, sharing one tokenizer, and trained rather than random."""

import ast
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from xllm_compile.models.demo import corpus as demo_corpus
from xllm_compile.models.demo.evaluate import bits_per_byte, complete
from xllm_compile.models.demo.recipes import RECIPES
from xllm_compile.models.demo.tokenizer import SPECIAL_TOKENS, VOCABULARY_SIZE

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
MODELS = sorted(RECIPES)
MAX_WEIGHT_BYTES = 16_000_000
FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "metrics.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
# Not from the standard library. A uniform guess over the vocabulary costs about 12 bits for every 3.3 bytes.
SNIPPET = '''class Account:
    """A bank account with a balance."""

    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount
        return self.balance
'''
MAX_SNIPPET_BITS_PER_BYTE = {"demo-code": 1.6, "demo-draft": 2.2}


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def loaded():
    return {
        name: (
            AutoModelForCausalLM.from_pretrained(DEMO / name, dtype=torch.float32).eval(),
            AutoTokenizer.from_pretrained(DEMO / name),
        )
        for name in MODELS
    }


def test_directory_is_complete_and_small(name):
    missing = [file for file in FILES if not (DEMO / name / file).is_file()]
    assert missing == []
    assert (DEMO / name / "model.safetensors").stat().st_size <= MAX_WEIGHT_BYTES


def test_config_matches_recipe(name):
    config = json.loads((DEMO / name / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["vocab_size"] == VOCABULARY_SIZE
    assert {key: config[key] for key in RECIPES[name].config} == dict(RECIPES[name].config)


def test_generation_stops_at_both_end_tokens(name):
    config = json.loads((DEMO / name / "generation_config.json").read_text())
    tokenizer = Tokenizer.from_file(str(DEMO / name / "tokenizer.json"))
    ends = {tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")}
    assert set(config["eos_token_id"]) == ends


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x\n",
        "if a:\r\n\tb = 'caf\u00e9 \u6f22\u5b57 \U0001f642'\n\n\n   \n",
        "x = 1234567  # trailing space \n",
        "<|im_start|>user\nhello<|im_end|>\n<|endoftext|>",
    ],
)
def test_tokenizer_round_trips(loaded, name, text):
    tokenizer = loaded[name][1]
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert ids == Tokenizer.from_file(str(DEMO / name / "tokenizer.json")).encode(text).ids


def test_special_tokens_are_single_ids(loaded, name):
    tokenizer = loaded[name][1]
    assert [tokenizer(token).input_ids for token in SPECIAL_TOKENS] == [[i] for i in range(len(SPECIAL_TOKENS))]


def test_models_share_the_tokenizer():
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert len({(DEMO / name / file).read_bytes() for name in MODELS}) == 1


def test_chat_template_matches_the_training_conversations(loaded):
    tokenizer = loaded["demo-code"][1]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nx<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_snippet_costs_few_bits(loaded, name):
    model, tokenizer = loaded[name]
    assert bits_per_byte(model, tokenizer, SNIPPET) < MAX_SNIPPET_BITS_PER_BYTE[name]


def test_recorded_quality_orders_the_models_and_beats_compressors():
    """demo-draft is not held to the compressors: at its size and budget gzip is slightly better."""
    metrics = {name: json.loads((DEMO / name / "metrics.json").read_text()) for name in MODELS}
    bits = {name: metrics[name]["evaluation"]["bits_per_byte"] for name in MODELS}
    code = dict(bits["demo-code"])
    model_bits = code.pop("model_each_file")
    assert model_bits < min(code.values())
    assert model_bits < bits["demo-draft"]["model_each_file"]


def test_completes_a_function_body(loaded):
    prompt = "def add(a, b):\n    "
    model, tokenizer = loaded["demo-code"]
    text = complete(model, tokenizer, prompt, max_new_tokens=48)
    body = text.partition("\n\n")[0]
    ast.parse(prompt + body)


def test_completes_a_loop_header(loaded):
    prompt = "for i in range("
    model, tokenizer = loaded["demo-code"]
    header = complete(model, tokenizer, prompt, max_new_tokens=24).partition("\n")[0]
    ast.parse(prompt + header + "\n    pass\n")


def test_chat_answer_is_a_function_that_ends(loaded):
    model, tokenizer = loaded["demo-code"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Write a Python function named close: Close the file."}],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=256)[0]
    assert output[-1].item() == tokenizer.convert_tokens_to_ids("<|im_end|>")
    ast.parse(tokenizer.decode(output[ids.shape[1] : -1]))


def test_held_out_split_depends_on_the_path_alone():
    files = [demo_corpus.SourceFile(path=f"package/module_{i}.py", text="") for i in range(2000)]
    assert 0.02 < sum(file.is_held_out for file in files) / len(files) < 0.06
    known = demo_corpus.SourceFile(path="fnmatch.py", text="anything")
    assert known.is_held_out


def test_conversations_answer_with_the_function_asked_for():
    text = 'def visit(node, depth=0):\n    """Visit one node.\n\n    Details."""\n    return node\n'
    file = demo_corpus.SourceFile(path="tree.py", text=text)
    (document,) = demo_corpus.chat_documents([file], seed=0)
    assert document.endswith(f"<|im_start|>assistant\n{text.rstrip()}<|im_end|>\n")
    assert "visit" in document.partition("<|im_end|>")[0]
