"""A stream: every document once a pass, one order for a seed, and a place to go on from."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tracemalloc
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pytest
import torch
from shards import documents, made_up, write_shard, write_shards
from tiny_tokenizer import tiny_tokenizer
from torch.utils.data import DataLoader

from qstar.data import DataArguments, RowStream, collate, load_rows
from qstar.data.stream import PASSED_OVER

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
TEXTS = made_up(60)
SPAN, HELD_OUT = 48, 2


def stream(text, seed=0, workers=0, window=400, talk_length=2, **given):
    options = {"span_length": SPAN, "held_out_rows": HELD_OUT, "streaming": True} | given
    return RowStream(DataArguments(text=text, **options), TOKENIZER, talk_length, seed, workers, window)


def tokens_of(texts):
    return [(*TOKENIZER(text)["input_ids"], EOS) for text in texts]


def first_rows(rows, count):
    return list(islice(rows, count))


def passes(rows, count=1):
    """The rows of each of the first passes over the data."""
    found = [[] for _ in range(count)]
    for row in rows:
        epoch = rows.state_dict()["position"][0]
        if epoch == count:
            return found
        found[epoch].append(row)
    return None


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), TEXTS)


@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".json.gz", ".jsonl.zst"])
def test_every_document_is_once_in_a_pass_or_held_out_whatever_the_format(tmp_path, ending):
    if ending.endswith("zst"):
        pytest.importorskip("zstandard", reason="pip install 'qstar[data]'")
    rows = stream(write_shards(tmp_path, TEXTS, ending=ending), span_length=128)
    found = documents(passes(rows)[0])
    held_out = set(documents(rows.held_out))
    assert len(rows.held_out) == HELD_OUT and len(held_out) < 20
    assert len(set(found)) == len(found) and not held_out & set(found)
    # of a document that was read for the held-out rows, but did not come into them, nothing is seen at all
    assert held_out | set(found) <= set(tokens_of(TEXTS))
    assert set(tokens_of(TEXTS[len(TEXTS) // 2 :])) <= set(found)


def test_a_long_document_gives_all_its_spans_in_a_pass(tmp_path):
    texts = made_up(12, longest=200)
    rows = stream(write_shards(tmp_path, texts))
    spans = {
        ids[i : i + SPAN]
        for ids in tokens_of(texts[6:])
        for i in range(0, len(ids), SPAN)
        if i + 1 < len(ids)
    }
    assert spans <= set(documents(passes(rows)[0]))


def test_random_spans_are_one_of_each_document_and_others_in_each_pass(tmp_path):
    texts = made_up(40, longest=200)
    rows = stream(write_shards(tmp_path, texts), spans="random")
    first, second = map(documents, passes(rows, 2))
    begins, sources = [], tokens_of(texts)
    for span in first + second:
        source, at = next(
            (i, at)
            for i, ids in enumerate(sources)
            for at in range(len(ids) - len(span) + 1)
            if ids[at : at + len(span)] == span
        )
        begins.append((source, at))
        assert len(span) == min(SPAN, len(sources[source]))
    before, after = begins[: len(first)], begins[len(first) :]
    assert {source for source, _ in before} == {source for source, _ in after}
    assert len({source for source, _ in before}) == len(before) > 30
    assert len(set(before) & set(after)) < len(before) / 2 and len({at for _, at in before}) > 10


@pytest.mark.parametrize("spans", ["all", "random"])
def test_the_order_is_the_same_for_any_number_of_workers(shards, spans):
    expected = first_rows(stream(shards, spans=spans), 70)  # of two passes
    for workers in (1, 2, 4):
        assert first_rows(stream(shards, spans=spans, workers=workers), 70) == expected


def test_passes_and_seeds_differ_in_order_and_in_nothing_else(shards):
    first, second = passes(stream(shards, window=200), 2)
    other = passes(stream(shards, window=200, seed=1))[0]
    assert first != second and first != other
    assert sorted(documents(first)) == sorted(documents(second))
    rows = stream(shards)
    assert first_rows(rows, 20) == first_rows(rows, 20) == first_rows(stream(shards), 20)


def test_every_pass_and_seed_takes_the_shards_one_at_a_time_in_another_order(tmp_path):
    files = write_shards(tmp_path, TEXTS, count=6)
    shard_of = {ids: i * 6 // len(TEXTS) for i, ids in enumerate(tokens_of(TEXTS))}
    orders = []
    for seed in (0, 1):
        for rows in passes(stream(files, seed=seed, window=1, span_length=128), 2):
            taken = [shard_of[ids] for ids in documents(rows)]
            orders.append([shard for i, shard in enumerate(taken) if i == 0 or shard != taken[i - 1]])
    assert all(sorted(order) == [*range(6)] for order in orders)
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("spans", ["all", "random"])
def test_a_stream_goes_on_exactly_where_another_was(shards, spans, workers):
    rows, resumed = stream(shards, spans=spans), stream(shards, spans=spans, workers=workers)
    expected = first_rows(stream(shards, spans=spans), 70)
    for at in range(0, 60, 1 if workers == 0 else 23):
        assert first_rows(rows, at) == expected[:at]
        state = json.loads(json.dumps(rows.state_dict()))
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert first_rows(resumed, 70 - at) == expected[at:]
        assert resumed.state_dict()["position"][0] == 1


@pytest.mark.parametrize("ending", [".jsonl", ".json.gz"])
def test_a_stream_of_lines_goes_on_within_a_shard(tmp_path, ending):
    rows = stream(write_shards(tmp_path, TEXTS, ending=ending))
    expected = first_rows(rows, 30)
    used = [n for n in range(25) if rows.state_dict(n)["position"][2] > 3]
    assert len(used) > 5
    for at in used:
        rows = stream([str(tmp_path)])
        first_rows(rows, at)
        rows.load_state_dict(rows.state_dict())
        assert first_rows(rows, 30 - at) == expected[at:]


def test_who_fetches_ahead_tells_how_many_rows_were_used(shards):
    rows = stream(shards)
    expected = first_rows(rows, 60)
    for used in (0, 1, 17, 60):
        resumed = stream(shards)
        resumed.load_state_dict(rows.state_dict(used))
        assert first_rows(resumed, 60 - used) == expected[used:]
        assert resumed.state_dict(0) == rows.state_dict(used)
    for used in (-1, 61):
        with pytest.raises(ValueError, match=rf"^taken = {used}: must be in \[0, 60\]"):
            rows.state_dict(used)


def test_rows_that_a_trainer_had_come_empty_and_are_counted(shards):
    expected = first_rows(stream(shards), 40)
    rows = stream(shards)
    first_rows(rows, 40)
    resumed = stream(shards)
    resumed.load_state_dict(rows.state_dict(25), passed=30)
    assert first_rows(resumed, 40) == [PASSED_OVER] * 30 + expected[25:35]
    assert resumed.state_dict(33) == rows.state_dict(28)


def test_going_on_reads_nothing_of_what_was_before(tmp_path):
    shards = write_shards(tmp_path, TEXTS, count=6)
    rows = stream(shards)
    expected = first_rows(rows, 40)
    used = next(n for n in range(40) if rows.state_dict(n)["position"][1] == 3)
    state = rows.state_dict(used)
    for number in np.random.default_rng([0, 0]).permutation(6)[:3]:
        Path(shards[number]).write_bytes(b"gone")
    rows.load_state_dict(state)
    assert first_rows(rows, 5) == expected[used : used + 5]
    with pytest.raises(ValueError, match="cannot be read"):  # the pass after it has them again
        first_rows(rows, 40)


@pytest.mark.parametrize(
    "name, value",
    [("seed", 1), ("span_length", 40), ("held_out_rows", 3), ("window", 500), ("spans", "random")],
)
def test_the_position_in_a_stream_of_another_order_is_refused(shards, name, value):
    rows = stream(shards)
    first_rows(rows, 3)
    with pytest.raises(ValueError, match=rf"^{name} = {value!r}: the stream to resume had"):
        stream(shards, **{name: value}).load_state_dict(rows.state_dict())
    with pytest.raises(ValueError, match=r"^shards = 3: the stream to resume had 4"):
        stream(shards[:3]).load_state_dict(rows.state_dict())


def test_folders_patterns_and_data_sets_are_their_shards(shards):
    folder = str(Path(shards[0]).parent)
    expected = first_rows(stream(shards), 20)
    write_shard(Path(folder) / ".cache" / "part-0.parquet", [{"text": "of a download that was cut"}])
    (Path(folder) / ".cache" / "part-0.parquet.metadata").write_text("{}")
    (Path(folder) / "README.md").write_text("about these data")
    assert first_rows(stream([folder]), 20) == expected
    assert first_rows(stream([f"{folder}/*.parquet"]), 20) == expected
    given = {"span_length": SPAN, "held_out_rows": HELD_OUT, "streaming": True}
    rows, held_out = load_rows(DataArguments(dataset=folder, **given), TOKENIZER, 2)
    assert len(rows.shards) == 4 and held_out == stream(shards).held_out


def test_a_template_fills_in_the_fields_of_a_row_of_parquet(tmp_path):
    rows = [{"q": text, "a": i, "unused": None} for i, text in enumerate(TEXTS)]
    file = write_shard(tmp_path / "a.parquet", rows)
    found = documents(passes(stream([file], template="Q: {q} A: {a}", span_length=128))[0])
    assert set(found) <= set(tokens_of(f"Q: {text} A: {i}" for i, text in enumerate(TEXTS)))


def test_a_text_equal_to_one_that_is_held_out_is_never_trained_on(tmp_path):
    rows = stream(write_shards(tmp_path, TEXTS + TEXTS[:20]), span_length=128)
    trained = {ids for each in passes(rows, 2) for ids in documents(each)}
    held_out = set(documents(rows.held_out))
    assert held_out <= set(tokens_of(TEXTS[:20])) and not held_out & trained


def test_short_documents_leave_little_of_a_row_empty(tmp_path):
    shards = write_shards(tmp_path, made_up(300, longest=20))
    rows = passes(stream(shards, window=2**20, span_length=128))[0]
    assert len(rows) > 20
    assert sum(len(row["input_ids"]) for row in rows) / (128 * len(rows)) > 0.96


def test_no_row_is_too_short_to_be_a_batch_alone(tmp_path):
    texts = ["a b", *made_up(20)]
    rows = stream([write_shard(tmp_path / "a.jsonl", [{"text": t} for t in texts])], talk_length=20, window=1)
    assert min(len(row["input_ids"]) for row in passes(rows)[0] + rows.held_out) > 20


def test_the_random_numbers_of_thoughts_are_left_alone(shards):
    before = torch.get_rng_state()
    for workers in (0, 2):
        first_rows(stream(shards, workers=workers), 30)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_worker_outlives_its_iteration(shards):
    rows = iter(stream(shards, workers=2))
    next(rows)
    assert len(multiprocessing.active_children()) == 2
    del rows
    assert not multiprocessing.active_children()


FULL_PIPES = """
import sys, time, torch
from multiprocessing import active_children
from test_stream import stream
rows = iter(stream([sys.argv[1]], workers=2, window=200_000))
next(rows)
time.sleep(2)  # until windows wait at both ends
print(*(child.pid for child in active_children()), flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_no_worker_outlives_a_process_that_is_killed(tmp_path):
    file = write_shard(tmp_path / "a.jsonl", ({"text": text} for text in made_up(8_000)))
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", FULL_PIPES, file]
    environment = os.environ | {"PYTHONPATH": paths}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as running:
        workers = [psutil.Process(int(pid)) for pid in running.stdout.readline().split()]
        running.kill()
    assert len(workers) == 2
    _, alive = psutil.wait_procs(workers, timeout=60)
    for worker in alive:
        worker.kill()
    assert not alive


def test_memory_does_not_grow_with_the_data(tmp_path):
    peaks = []
    for count in (4, 16):
        shards = write_shards(tmp_path / str(count), made_up(100 * count, seed=count), count=count)
        rows = stream(shards, window=2000)
        arrow = 0
        tracemalloc.start()
        for _ in rows:
            arrow = max(arrow, pyarrow.total_allocated_bytes())
            if rows.state_dict()["position"][0] == 1:
                break
        peaks.append((tracemalloc.get_traced_memory()[1], arrow))
        tracemalloc.stop()
    assert peaks[1][0] < 1.25 * peaks[0][0]
    assert peaks[1][1] < 1.25 * peaks[0][1]


TWO_PROCESSES = """
import json, sys
from functools import partial
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader
from test_stream import SPAN, stream
from qstar.data import collate
torch.set_num_threads(1)
found = []
for one_reads in (True, False):
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=one_reads))
    rows = stream(json.loads(sys.argv[1]))
    loader = accelerator.prepare(DataLoader(rows, 3, collate_fn=partial(collate, length=SPAN)))
    batches = [batch["input_ids"].tolist() for batch, _ in zip(loader, range(4))]
    found.append([batches, rows.state_dict(24) if accelerator.is_main_process else None])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_share_the_rows_of_one_in_its_order_whether_one_reads_or_both(shards):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "PYTHONPATH": paths}
    command = [sys.executable, "-c", TWO_PROCESSES, json.dumps(shards)]
    environments = [os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=x) for x in environments]
    first, second = (json.loads(each.communicate(timeout=300)[0].splitlines()[-1]) for each in running)
    rows = stream(shards)
    loader = DataLoader(rows, 3, collate_fn=partial(collate, length=SPAN))
    expected = [batch["input_ids"].tolist() for batch, _ in zip(loader, range(8))]
    for (own, state), (other, _) in zip(first, second):
        assert [batch for pair in zip(own, other) for batch in pair] == expected
        assert state == rows.state_dict(24)


def test_a_broken_file_is_named_in_one_line(tmp_path):
    good, later = write_shards(tmp_path, TEXTS, count=2)
    whole = Path(later).read_bytes()
    for content in (b"", b"PAR1 is no footer", whole[: len(whole) // 2], whole[:200] + whole[400:]):
        Path(later).write_bytes(content)
        with pytest.raises(ValueError, match=r"part-1\.parquet': cannot be read"):
            first_rows(stream([good, later]), 100)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_line_that_breaks_late_is_named_and_so_is_its_file(tmp_path, workers):
    file = write_shard(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    rows = stream([file], workers=workers)
    with open(file, "a", encoding="utf-8") as more:
        more.write('{"text": "cut sho')
    with pytest.raises(ValueError, match=r"^text = '.*a\.jsonl': line 61 is no JSON: .*") as error:
        first_rows(rows, 100)
    assert "\n" not in str(error.value)


def test_a_compressed_file_that_was_cut_short_is_named(tmp_path):
    good, cut = write_shards(tmp_path, TEXTS, count=2, ending=".json.gz")
    Path(cut).write_bytes(Path(cut).read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"part-1\.json\.gz': cannot be read"):
        first_rows(stream([good, cut]), 100)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_document_that_no_token_of_can_be_predicted_is_told_in_one_line(tmp_path, workers):
    file = write_shard(tmp_path / "a.jsonl", [{"text": t} for t in [*TEXTS, "a"]])
    with pytest.raises(ValueError, match=r"^text: 'a' has 1 tokens, at least 2 are needed$"):
        first_rows(stream([file], workers=workers), 100)


def write_all(folder):
    write_shards(folder / "parquet", TEXTS)
    write_shards(folder / "json", TEXTS, ending=".jsonl")
    (folder / "a.txt").write_text("plain text")
    (folder / "empty").mkdir()
    write_shard(folder / "null.jsonl", [{"text": t} for t in TEXTS] + [{"text": None}])
    write_shard(folder / "list.jsonl", [{"text": "a b c"}, ["no", "object"]])
    (folder / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")


REFUSED = {
    "no column": (
        {"text": ["parquet"], "text_field": "body"},
        "part-0.parquet': has no column ['body']; it has ['text']",
    ),
    "no field": (
        {"text": ["json"], "text_field": "body"},
        "text_field: a record has no ['body']; it has ['text'] (record 1 of ",
    ),
    "null": ({"text": ["null.jsonl"]}, "a record has no ['text']; it has ['text'] (record 61 of "),
    "no object": (
        {"text": ["list.jsonl"], "held_out_rows": 1, "span_length": 4},
        "list.jsonl': line 2 is no JSON object",
    ),
    "two kinds": ({"text": ["parquet", "json"]}, "are json, parquet; give one kind"),
    "plain text": ({"text": ["a.txt"]}, "streaming = True: reads shards of .parquet or .jsonl, and text = ["),
    "no file": ({"text": ["no.parquet"]}, "no.parquet': no such file"),
    "no match": ({"text": ["*.parquet"]}, "*.parquet': no such file"),
    "no shard": ({"text": ["empty"]}, "empty': the folder holds no file of .parquet"),
    "pyarrow": ({"text": ["parquet"]}, "reading it needs the package pyarrow; pip install 'qstar[data]'"),
    "zstandard": ({"text": ["a.jsonl.zst"]}, "needs the package zstandard; pip install 'qstar[data]'"),
    "seed": ({"text": ["parquet"], "seed": -1}, "seed = -1: must be at least 0"),
    "workers": ({"text": ["parquet"], "workers": -1}, "workers = -1: must be at least 0"),
    "window": ({"text": ["parquet"], "window": 0}, "window = 0: must be at least 1"),
    "spans": ({"text": ["parquet"], "spans": "some"}, "spans = 'some': must be one of all, random"),
    "too few": (
        {"text": ["parquet"], "held_out_rows": 99},
        "held_out_rows = 99: with span_length = 48 they leave nothing",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_source_that_is_no_stream_is_refused_and_says_why(tmp_path, monkeypatch, case):
    if case == "zstandard":
        monkeypatch.delitem(__import__("fsspec").compression.compr, "zstd", raising=False)
    write_all(tmp_path)
    if case == "pyarrow":
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    given, message = REFUSED[case]
    files = [str(tmp_path / name) for name in given["text"]]
    with pytest.raises(ValueError) as error:
        first_rows(stream(**(given | {"text": files})), 100)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_stream_needs_a_document_beside_those_held_out(tmp_path):
    for count, enough in ((len(TEXTS) - 1, False), (len(TEXTS), True)):
        texts = [text + " the" * 100 for text in TEXTS[: count - len(TEXTS) + 3]]
        file = write_shard(tmp_path / f"{count}.jsonl", [{"text": t} for t in texts])
        if enough:
            assert passes(stream([file], held_out_rows=4))[0]
        else:
            with pytest.raises(ValueError, match="leave nothing to train on"):
                stream([file], held_out_rows=4)


def test_a_split_that_is_not_there_is_refused(shards):
    given = {"dataset": str(Path(shards[0]).parent), "dataset_split": "test", "streaming": True}
    with pytest.raises(ValueError, match=r"^dataset_split = 'test': must be one of \['train'\]"):
        load_rows(DataArguments(**given), TOKENIZER, 2)


def test_the_workers_of_another_loader_would_read_all_twice_and_are_refused(shards):
    with pytest.raises(ValueError, match="num_workers of the DataLoader: must be 0"):
        next(iter(DataLoader(stream(shards), 2, num_workers=2, collate_fn=collate)))
