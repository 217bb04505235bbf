"""Records of requests, and the folder that a server writes them into; vLLM itself is not needed."""

import errno
import logging
from pathlib import Path

import pytest
import torch

from attnstats import FAI, WAAD
from attnstats.integrations.vllm import RequestStore, records
from attnstats.integrations.vllm.configuration import RequestSettings
from attnstats.integrations.vllm.store import RequestWriter
from attnstats.transformers.live import PlacedRecording
from tests.integrations.test_vllm_recorder import Engine

SETTINGS = RequestSettings((WAAD(3), FAI(1, 2)), layers=[1, 4])
HEADS = {s: {1: None, 4: (0, 2)} for s in SETTINGS.statistics}


class OneRequest(PlacedRecording):
    def __init__(self, first):
        super().__init__(SETTINGS.reduce, None, first)
        self._head_counts = {s: {1: 3, 4: 2} for s in SETTINGS.statistics}


def record(first=0, tokens=6):
    """Of a request whose rows are 10, 20, .. over five heads, and whose keys got 5 each."""
    recording = OneRequest(first)
    n = tokens - first
    recording.add(WAAD(3), 1, first, 10.0 * torch.arange(1, n + 1)[None])
    recording.add(FAI(1, 2), 1, 0, torch.full((1, tokens), 5.0))
    real = torch.ones(1, n, dtype=torch.bool)
    recording.add_tokens_seen(first, real, real, None)
    return records.encode(SETTINGS, (1, 4), HEADS, recording, list(range(50, 50 + tokens + 1)))


def test_a_record_has_means_and_validity_by_token():
    result = records.decode(record(first=2))
    assert result.tokens.tolist() == [[50, 51, 52, 53, 54, 55]]
    assert (result.cached, result.layers, result.reduce) == (2, (1, 4), ("layers", "heads"))
    assert result.heads == HEADS
    assert result["waad"].tolist() == [[0, 0, 2, 4, 6, 8]]
    assert result.valid["waad"].tolist() == [[False, False, True, True, True, True]]
    # Queries 2 .. 5 at distance 1 or 2 of each key.
    assert result["fai"].tolist() == [[1, 0.5, 0.5, 0.5, 1, 1]]
    assert result.valid["fai"].tolist() == [[True] * 5 + [False]]
    assert repr(result).splitlines()[0] == (
        "Request of 6 tokens, the first 2 of them cached: layers 1, 4, means over layers and heads"
    )


def test_cached_tokens_that_are_computed_after_all_have_rows():
    """As when a request that found its prompt in the cache is preempted, and the cache has lost it since."""
    recording = OneRequest(first=4)
    for begin, end in ((4, 6), (0, 4)):
        recording.add(WAAD(3), 1, begin, 5.0 * torch.arange(begin, end)[None])
        recording.add(FAI(1, 2), 1, 0, torch.zeros(1, 6))
        real = torch.ones(1, end - begin, dtype=torch.bool)
        recording.add_tokens_seen(begin, real, real, None)
    result = records.decode(records.encode(SETTINGS, (1, 4), HEADS, recording, list(range(6))))
    assert result.cached == 0
    assert result["waad"].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert result.valid["waad"].all()


def test_a_failure_is_an_error_for_who_reads_it():
    with pytest.raises(RuntimeError, match="no more memory"):
        records.decode(records.failure("no more memory"))


def test_a_folder_is_read_by_the_ids_of_requests(tmp_path):
    writer = RequestWriter(tmp_path / "requests", 1)
    for request_id in ("cmpl-7/x-0-1a2b3c4d", "1_chat-9-1a2b3c4d", "0_chat-9-1a2b3c4e"):
        writer.write(request_id, record())
    store = RequestStore(tmp_path / "requests")
    assert set(store) == {"cmpl-7/x-0-1a2b3c4d", "1_chat-9-1a2b3c4d", "0_chat-9-1a2b3c4e"}
    assert len(store) == 3
    assert store["cmpl-7/x-0-1a2b3c4d"]["waad"].shape == (1, 6)
    assert [len(store.of(name)) for name in ("cmpl-7/x-0", "chat-9", "chat")] == [1, 2, 0]
    with pytest.raises(KeyError):
        store["cmpl-8"]
    assert repr(store).startswith("RequestStore of 3 requests in ")
    with pytest.raises(ValueError, match="elsewhere: there is none"):
        RequestStore(tmp_path / "elsewhere")


def test_a_folder_has_requests_whose_heads_are_on_several_ranks(tmp_path):
    settings = RequestSettings((WAAD(3), FAI(1, 4)), layers=[0], reduce=(), folder=str(tmp_path / "requests"))
    assert settings.of_rank(0, 1) == settings
    whole, *ranks = (
        Engine(settings.of_rank(*rank), heads) for rank, heads in (((0, 1), (0, 1)), ((0, 2), (0,)), ((1, 2), (1,)))
    )
    store = RequestStore(tmp_path / "requests")
    for engine, name in ((whole, "w"), (ranks[0], "a"), (ranks[1], "a")):
        engine.step({name: (0, 8)})
    whole.step({}, finished=["w"])
    ranks[1].step({}, finished=["a"])
    assert list(store) == ["w"]  # one rank is not done
    with pytest.raises(KeyError):
        store["a"]
    ranks[0].step({}, finished=["a"])
    assert (list(store), len(store)) == (["w", "a"], 2)
    for s in settings.statistics:
        assert store["a"][s].shape == (1, 1, 2, 8)
        torch.testing.assert_close(store["a"][s], store["w"][s])
    for engine, end in zip(ranks, (6, 5), strict=True):
        engine.step({"b": (0, end)})
        engine.recorder.close()
    with pytest.raises(ValueError, match=r"b\.safetensors: the ranks have 6, 5 tokens of it"):
        store["b"]
    assert RequestSettings.of({"statistics": ["waad"], "folder": "x", "quota_mb": 8}).of_rank(1, 4).quota_mb == 2


@pytest.mark.parametrize("name", ["rank-0-of-2", "rank-0-of-many", "../rank-0-of-2", ".."])
def test_a_client_may_name_a_request_as_folders_are_named(tmp_path, name):
    writer = RequestWriter(tmp_path / "requests", 1)
    for each in ("a", name):
        writer.write(each, record())
    store = RequestStore(tmp_path / "requests")
    assert set(store) == {"a", name}
    assert store[name].tokens.shape == (1, 6)


def test_a_file_that_can_not_be_read_is_named(tmp_path):
    of_before = record().replace(records.FORMAT.encode(), b"attnstats vllm request 1")
    files = {"damaged": record()[:-1], "other": b"\x02" + bytes(7) + b"{}", "before": of_before, "cut": record()[:9]}
    for name, content in files.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    for name, fault in {
        "damaged": "a damaged record",
        "other": "its format is None",
        "before": "its format is 'attnstats vllm request 1', not",
        "cut": "a damaged record",
    }.items():
        with pytest.raises(ValueError, match=rf"{name}\.safetensors: {fault}"):
            RequestStore(tmp_path)[name]


def test_one_engine_writes_a_folder_and_the_next_goes_on(tmp_path):
    first = RequestWriter(tmp_path, 1)
    first.write("a-1a2b3c4d", record())
    with pytest.raises(ValueError, match="another engine writes its requests there"):
        RequestWriter(tmp_path, 1)
    first.close()
    (tmp_path / "b-1a2b3c4d.part").write_bytes(b"half")
    second = RequestWriter(tmp_path, 1)
    assert second.bytes == first.bytes > 0
    second.write("b-1a2b3c4d", record())
    assert list(RequestStore(tmp_path)) == ["a-1a2b3c4d", "b-1a2b3c4d"]


def test_a_full_quota_costs_records_which_are_counted(tmp_path, caplog):
    size = len(record())
    writer = RequestWriter(tmp_path, 2.5 * size / 1e6)
    with caplog.at_level(logging.ERROR):
        for i in range(14):
            writer.write(f"{i}-1a2b3c4d", record())
    assert (len(RequestStore(tmp_path)), writer.lost) == (2, 12)
    said = [text for text in caplog.messages if "requests are not in" in text]
    assert [text.split()[1] for text in said] == ["1", "10"]
    assert "of its quota_mb of" in said[0]


def test_records_that_somebody_deletes_leave_room(tmp_path):
    size, now = len(record()), [0.0]
    writer = RequestWriter(tmp_path, 2.5 * size / 1e6, clock=lambda: now[0])
    for i in range(3):
        writer.write(f"{i}-1a2b3c4d", record())
    (tmp_path / "0-1a2b3c4d.safetensors").unlink()
    writer.write("3-1a2b3c4d", record())
    assert set(RequestStore(tmp_path)) == {"1-1a2b3c4d"}
    now[0] += 60
    writer.write("4-1a2b3c4d", record())
    assert set(RequestStore(tmp_path)) == {"1-1a2b3c4d", "4-1a2b3c4d"}
    assert writer.lost == 2


def test_a_record_in_the_place_of_another_counts_once(tmp_path):
    size = len(record())
    writer = RequestWriter(tmp_path, 1.5 * size / 1e6)
    for _ in range(3):
        writer.write("a", record())
    assert (writer.bytes, writer.lost) == (size, 0)


def test_a_full_disk_costs_records(tmp_path, monkeypatch):
    writer = RequestWriter(tmp_path, 1)

    def full(self, content):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        writer.write("a-1a2b3c4d", record())
    assert writer.lost == 1
    assert not list(tmp_path.glob("*.part"))
    writer.write("b-1a2b3c4d", record())
    assert list(RequestStore(tmp_path)) == ["b-1a2b3c4d"]


def test_a_folder_that_can_not_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"folder .*file: File exists; name one that can be written"):
        RequestWriter(tmp_path / "file", 1)
