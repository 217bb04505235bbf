"""Requests of vLLM's own engine, recorded with a preset and read as a run, against analyses by transformers."""

from __future__ import annotations

import pytest
import torch

import attnstats
from attnstats.integrations.vllm import engine_arguments
from attnstats.study import models
from attnstats.study.analysis import Settings
from attnstats.study.pipeline import measure
from tests.engines.vllm import tiny
from tests.engines.vllm.test_llm import engine, generate

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_what_a_preset_records_is_the_analysis_of_the_answers(tmp_path, temperature):
    model, folder = tiny.save(tmp_path / "model"), tmp_path / "requests"
    tiny.save_tokenizer(model)
    arguments = engine_arguments(preset="paper_v2", folder=folder)
    prompts, lengths = [tiny.prompt(n, n) for n in (20, 70, 5)], (60, 45, 90)
    with engine(model, enable_prefix_caching=True, **arguments) as llm:
        outputs = generate(llm, prompts, lengths, temperature=temperature)
    run = attnstats.load(folder)
    loaded = models.load(str(model), dtype="float32")
    assert len(run) == len(prompts)
    by_prompt = {tuple(analysis.token_ids[: analysis.response_start].tolist()): analysis for analysis in run}
    for prompt, output in zip(prompts, outputs, strict=True):
        ours, answer = by_prompt[tuple(prompt)], list(output.outputs[0].token_ids[:-1])
        expected = measure(loaded, "", prompt, answer, Settings(temperature=temperature))
        assert ours.token_ids.tolist() == prompt + answer
        assert ours.layers == expected.layers
        for name in ("waad", "fai", "entropy"):
            of_both = (getattr(analysis, name)[analysis.response] for analysis in (ours, expected))
            torch.testing.assert_close(*of_both, msg=lambda text, name=name: f"{name}: {text}", atol=1e-4, rtol=1e-4)
        assert torch.equal(ours.fai_valid[ours.response], expected.fai_valid[expected.response])
        torch.testing.assert_close(ours.distance, expected.distance, atol=1e-3, rtol=1e-4)
