import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.fakes import CHAT_TEMPLATE, EOS, SPECIAL, EngineFactory, train_byte_level
from tests.runtime.sides import Clock, MakeSide, Side
from xllm_compile.runtime.tokenizer import Tokenizer
from xllm_compile.runtime.transfer.transfer import TransferConfig


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


@pytest.fixture
def make_side(make_engine: EngineFactory) -> Iterator[MakeSide]:
    sides: list[Side] = []

    def make(**options: Any) -> Side:
        clock = Clock()
        given: dict[str, Any] = {
            "max_num_batched_tokens": 8,
            "block_tokens": 4,
            "transfer": TransferConfig(timeout_s=5),
        }
        engine, runner = make_engine(**given | {"clock": clock} | options)
        sides.append(Side(engine, runner, clock))
        return sides[-1]

    yield make
    for side in sides:
        side.engine.close()
