"""What the serving forward pass shows a gate is what the gate was fitted on."""

from __future__ import annotations

import asyncio

import pytest
import torch
from tests.conftest import make_tiny_model
from tests.serve.embedded.worlds import World, collected

from lorchestra.bank.rows import RowBank
from lorchestra.errors import UserError
from lorchestra.gate.features import FeatureSpec, features
from lorchestra.serve.embedded import seeing
from lorchestra.serve.embedded.decoder import LlamaDecoder
from lorchestra.serve.embedded.generic import GenericDecoder
from lorchestra.serve.embedded.seeing import Sight
from lorchestra.serve.engine import RequestError, StoppingError, TooLongError

PROMPTS = [(5,), tuple(range(4, 40)), tuple(i % 200 + 5 for i in range(411))]


@pytest.fixture(params=[LlamaDecoder, GenericDecoder])
def sight(request):
    decoder = request.param(make_tiny_model(), *((512,) if request.param is LlamaDecoder else ()))
    return Sight(decoder, RowBank(decoder.groups))


@pytest.mark.parametrize("chunk", [512, 64])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_features_are_those_of_the_transformers_model(sight, layers, last, chunk, monkeypatch):
    monkeypatch.setattr(seeing, "ALONE", chunk)
    expected = features(make_tiny_model(), PROMPTS, FeatureSpec(layers, last))
    for prompt, row in zip(PROMPTS, expected, strict=True):
        found = sight.of(prompt, layers, last)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, row, rtol=1e-4, atol=1e-5)


def test_more_layers_than_there_are_is_one_clear_error(sight):
    with pytest.raises(UserError, match="3 layers were asked for, and this base has 2"):
        sight.of((5, 6), 3, False)


@pytest.fixture(params=[False, True], ids=["here", "apart"])
def world(request, tiny_dir, tmp_path):
    made = World(tiny_dir, tmp_path, apart=request.param)
    yield made
    made.close()


def test_the_engine_shows_prompts_beside_sequences_that_run(world):
    spec = FeatureSpec(1)
    expected = features(world.model, PROMPTS, spec)

    async def work():
        running = [asyncio.create_task(collected(world.engine, world.generation({"a0": 1.0}, (7, 8, 9 + i))))
                   for i in range(4)]  # fmt: skip
        seen = await asyncio.gather(*(world.engine.features(prompt, 1, False) for prompt in PROMPTS))
        return seen, [(await task)[0] for task in running]

    seen, answers = world.run(work)
    torch.testing.assert_close(torch.tensor(seen), expected, rtol=1e-4, atol=1e-5)
    assert all(len(tokens) == 8 for tokens in answers)


def test_what_cannot_be_seen_is_refused_and_the_engine_goes_on(world):
    async def work():
        with pytest.raises(RequestError, match="no token"):
            await world.engine.features((), 0, False)
        with pytest.raises(TooLongError, match="513 tokens"):
            await world.engine.features((5,) * 513, 0, False)
        with pytest.raises(UserError, match="3 layers"):
            await world.engine.features((5,), 3, False)
        return await world.engine.features((5,), 0, False)

    assert torch.allclose(torch.tensor(world.run(work)), world.model.get_input_embeddings().weight[5])


def test_who_asks_when_the_engine_has_stopped_is_told(tiny_dir, tmp_path):
    world = World(tiny_dir, tmp_path)
    world.run(lambda: world.engine.features((5,), 0, False))

    async def late():
        await world.engine.stop(1)
        with pytest.raises(StoppingError):
            await world.engine.features((5,), 0, False)

    world._runner.run(late())
    world._runner.close()
