import json
from pathlib import Path

import pytest

from tests.runtime.fakes import CHAT_TEMPLATE, EOS, SPECIAL, EngineFactory, train_byte_level
from xllm_compile.runtime.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_byte_level().save(str(directory / "tokenizer.json"))
    config = {"eos_token": EOS, "pad_token": {"content": SPECIAL[0], "special": True}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    generation = {"eos_token_id": [2, 0], "temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_directory(tokenizer_dir)


@pytest.fixture
def make_sync_engine(tokenizer: Tokenizer) -> EngineFactory:
    """Engines that report a step in the call that ran it."""
    return EngineFactory(tokenizer)


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def make_engine(tokenizer: Tokenizer, request: pytest.FixtureRequest) -> EngineFactory:
    return EngineFactory(tokenizer, is_async=request.param)
