"""benchmarks/vllm_latency.py runs vLLM's own tool, whose engine records."""

import pytest

from attnstats import FAI, WAAD
from attnstats.integrations.vllm import RequestStore, engine_arguments
from benchmarks.vllm_latency import Contender, Shape, latency
from tests.engines.vllm import tiny

pytestmark = pytest.mark.timeout(900)


def test_the_tool_times_an_engine_that_records(tmp_path):
    model = tiny.save(tmp_path / "model", vocab_size=10000)  # the tool draws tokens below that
    folder = tmp_path / "requests"
    recording = Contender("attnstats", engine_arguments([WAAD(10), FAI(10, 20)], folder=folder))
    shape = Shape(str(model), batch=2, prompt=16, tokens=4, warmups=1, repeats=2)
    assert latency(recording, shape, 4) > 0
    store = RequestStore(folder)
    # The worker hears of the end of requests with the next step, which the last batch may not have had.
    assert len(store) in (4, 6)
    for result in store.values():
        assert result.tokens.shape == (1, 16 + 3)
        assert result.valid["waad"].all()


def test_what_the_tool_says_of_an_error_is_shown(tmp_path):
    contender = Contender("attnstats", {"no_such_option": 1})
    with pytest.raises(RuntimeError, match=r"unrecognized arguments: --no-such-option"):
        latency(contender, Shape(str(tmp_path)), 1)
