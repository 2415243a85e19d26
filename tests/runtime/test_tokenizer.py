import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.fakes import EOS, VOCAB_SIZE
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.tokenizer import Tokenizer


@pytest.fixture
def copied(tokenizer_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tokenizer_dir, tmp_path / "model"))


def test_encode_and_decode(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"hello {EOS}")
    assert ids[-1] == 2
    assert tokenizer.decode(ids) == "hello "
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"hello {EOS}"
    assert tokenizer.token_text(2) == EOS
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert tokenizer.special_token_ids == {0, 1, 2}


def test_token_bytes_join_to_the_utf8_of_the_text(tokenizer: Tokenizer) -> None:
    text = "na\u00efve \u4f60\u597d \U0001f600 \x00\x7f\u00ad" + EOS
    joined = b"".join(tokenizer.token_bytes(token) for token in tokenizer.encode(text))
    assert joined == text.encode()


def test_eos_of_both_files_count(copied: Path) -> None:
    assert Tokenizer.from_directory(copied).eos_token_ids == {0, 2}
    (copied / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert Tokenizer.from_directory(copied).eos_token_ids == {1, 2}
    (copied / "generation_config.json").unlink()
    (copied / "tokenizer_config.json").unlink()
    assert Tokenizer.from_directory(copied).eos_token_ids == frozenset()


def test_generation_defaults_are_the_default_sampling_params(copied: Path) -> None:
    assert Tokenizer.from_directory(copied).default_sampling_params(max_tokens=5, top_k=7) == SamplingParams(
        temperature=0.6, top_p=0.95, top_k=7, max_tokens=5
    )
    (copied / "generation_config.json").write_text('{"do_sample": false, "temperature": null}')
    assert Tokenizer.from_directory(copied).default_sampling_params() == SamplingParams(temperature=0)


def test_chat_template(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi <b>"}]
    prompt = tokenizer.apply_chat_template(messages)
    assert prompt == f"<|im_start|>user\nhi <b>{EOS}\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == prompt.split("<|im_start|>assist")[0]
    with_tools = tokenizer.apply_chat_template(messages, tools=[{"name": "caf\u00e9 <x>"}])
    assert with_tools.startswith('<tools>[{"name": "caf\u00e9 <x>"}]</tools>')


def test_text_parts_are_joined_and_others_refused(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "one\ntwo" in tokenizer.apply_chat_template([{"role": "user", "content": parts}])
    with pytest.raises(ValueError, match="type 'image_url' is not supported"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image_url"}]}])


def test_what_transformers_offers_to_templates(tokenizer: Tokenizer) -> None:
    source = (
        "{%- for message in messages %}\n"
        "    {%- if loop.index > 1 %}{% break %}{% endif %}\n"
        "    {% generation %}{{ message.content }}{% endgeneration %}\n"
        "{%- endfor %}\n"
        "{{- '|' ~ ({'b': 1, 'a': 2} | tojson(indent=None)) ~ '|' ~ (strftime_now('%Y') | length) ~ thinking }}"
    )
    messages = [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]
    assert tokenizer.apply_chat_template(messages, chat_template=source, thinking=False).split() == [
        'x|{"b":',
        "1,",
        '"a":',
        "2}|4False",
    ]


@pytest.mark.parametrize(
    ("source", "what"),
    [
        (None, "role forbidden is unknown"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for %}", "refused"),
        ("{{ messages[0].content + 1 }}", "refused"),
    ],
)
def test_refusals_of_the_template_and_of_the_sandbox_are_value_errors(
    tokenizer: Tokenizer, source: str | None, what: str
) -> None:
    with pytest.raises(ValueError, match=what):
        tokenizer.apply_chat_template([{"role": "forbidden", "content": "x"}], chat_template=source)


def test_named_templates_in_the_config(copied: Path) -> None:
    (copied / "chat_template.jinja").unlink()
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (copied / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    tokenizer = Tokenizer.from_directory(copied)
    assert tokenizer.apply_chat_template([]) == "plain"
    assert tokenizer.apply_chat_template([], tools=[{}]) == "tools"
    (copied / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates[1:]}))
    with pytest.raises(ValueError, match=r"templates \['tool_use'\] and none named 'default'"):
        Tokenizer.from_directory(copied).apply_chat_template([])


def test_missing_and_damaged_files_name_the_next_step(copied: Path) -> None:
    (copied / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"no chat template; put chat_template\.jinja"):
        Tokenizer.from_directory(copied).apply_chat_template([{"role": "user", "content": "x"}])
    (copied / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer.from_directory(copied)
    (copied / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_directory(copied)
    (copied / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json; save one"):
        Tokenizer.from_directory(copied)


def test_serving_does_not_import_the_build_half() -> None:
    code = (
        "import sys, xllm_compile.runtime.async_engine, xllm_compile.runtime.llm\n"
        "heavy = {'torch._dynamo', 'torch._inductor', 'transformers', 'jinja2', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
