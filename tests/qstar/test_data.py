"""Text to batches: every source, every border, every mistake."""

import json
import sys
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from shards import documents, write_shard
from tiny_models import thinking_model
from tiny_tokenizer import PROSE, tiny_tokenizer

from qstar.data import (
    DataArguments,
    ShuffledBatches,
    collate,
    document_text,
    encode,
    load_rows,
    pack_rows,
    text_rows,
)
from qstar.layout import IGNORE

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id


def write(path, text):
    path.write_text(text if isinstance(text, str) else "".join(json.dumps(r) + "\n" for r in text), "utf-8")
    return str(path)


def options(**given):
    return DataArguments(**({"span_length": 12, "held_out_rows": 2} | given))


def load(talk_length=2, seed=0, **given):
    train, held_out = load_rows(options(**given), TOKENIZER, talk_length, seed)
    return list(train), held_out


SENTENCES = [f"number {i}: we meet today to speak of the work." for i in range(40)]


def test_a_text_file_is_one_document_cut_into_spans_that_give_it_back(tmp_path):
    text = PROSE * 5
    train, held_out = load(text=[write(tmp_path / "a.txt", text)])
    spans = sorted(tuple(row["input_ids"]) for row in train + held_out)
    ids = [*TOKENIZER(text)["input_ids"], EOS]
    expected = [tuple(ids[i : i + 12]) for i in range(0, len(ids), 12)]
    assert spans == sorted(s for s in expected if len(s) > 2)
    assert len(held_out) == 2
    assert all(row["position_ids"] == list(range(len(row["input_ids"]))) for row in train)


def test_jsonl_files_give_every_record_whole_as_a_document_of_its_own_that_ends_in_eos(tmp_path):
    files = [write(tmp_path / f"{i}.jsonl", [{"body": s} for s in SENTENCES[i::2]]) for i in range(2)]
    train, held_out = load(text=files, text_field="body", span_length=64)
    found = documents(train + held_out)
    assert sorted(found) == sorted((*TOKENIZER(s)["input_ids"], EOS) for s in SENTENCES)
    assert all(len(row["input_ids"]) <= 64 for row in train)
    assert max(len(documents([row])) for row in train) > 1  # rows are filled


def test_a_template_joins_fields(tmp_path):
    records = [{"q": s, "a": i} for i, s in enumerate(SENTENCES)]
    train, held_out = load(
        text=[write(tmp_path / "a.jsonl", records)], template="Q: {q} A: {a}", span_length=64
    )
    texts = {TOKENIZER.decode(ids[:-1]) for ids in documents(train + held_out)}
    assert texts == {f"Q: {s} A: {i}" for i, s in enumerate(SENTENCES)}


def test_anything_that_load_dataset_reads_is_a_source(tmp_path):
    datasets.Dataset.from_dict({"text": SENTENCES}).to_parquet(tmp_path / "train.parquet")
    train, held_out = load(dataset=str(tmp_path), span_length=64)
    assert len(documents(train + held_out)) == 40


@pytest.mark.parametrize("name", ["a.parquet", "a.json.gz", "a.jsonl"])
def test_files_of_records_are_read_whatever_their_format_by_name_folder_or_pattern(tmp_path, name):
    write_shard(tmp_path / "data" / name, [{"text": s, "url": "x"} for s in SENTENCES])
    for source in (f"data/{name}", "data", "*/a.*"):
        train, held_out = load(text=[str(tmp_path / source)], span_length=64)
        assert len(documents(train + held_out)) == 40


def test_blank_lines_of_a_jsonl_file_are_no_records(tmp_path):
    lines = "\n".join(json.dumps({"text": s}) + "\n" for s in SENTENCES)
    train, held_out = load(text=[write(tmp_path / "a.jsonl", "\n" + lines + "\n\n")], span_length=64)
    assert len(documents(train + held_out)) == 40


def test_held_out_rows_are_in_no_training_row_and_the_seed_decides(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"text": s} for s in SENTENCES])
    train, held_out = load(text=[file], held_out_rows=5, span_length=64)
    assert len(held_out) == 5
    rows = [tuple(row["input_ids"]) for row in train]
    assert not set(rows) & {tuple(row["input_ids"]) for row in held_out}
    again, other = (load(text=[file], held_out_rows=5, span_length=64, seed=s)[0] for s in (0, 1))
    assert again == train and other != train


def test_no_document_of_a_packed_row_attends_to_another(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"text": s} for s in SENTENCES])
    train, _ = load(text=[file], span_length=80)
    batch = collate(train[:2])
    assert int((batch["position_ids"] == 0).sum()) > 4
    batch["input_ids"] %= 61
    batch["labels"] = batch["input_ids"].where(batch["labels"] != IGNORE, IGNORE)
    model = thinking_model(policy_weight=0.0, base_weight=1.0)
    embeddings = []
    model.get_input_embeddings().register_forward_hook(lambda _, __, out: embeddings.append(out))
    model.get_input_embeddings().register_forward_hook(
        lambda _, __, out: out.retain_grad() if out.requires_grad else None
    )
    last = int((batch["position_ids"][0] == 0).nonzero()[-1])  # where the row's last document begins
    batch["labels"][:, :last], batch["labels"][1] = IGNORE, IGNORE
    model(**batch, generator=torch.Generator().manual_seed(0)).loss.backward()
    reached = embeddings[0].grad[0].abs().sum(-1) > 0  # of the first pass, over the text
    end = int(batch["attention_mask"][0].sum())
    assert not reached[:last].any() and reached[last : end - 1].all()


def test_collate_learns_eos_though_it_is_the_padding_id_and_no_first_token():
    rows = [{"input_ids": [5, 6, EOS, 7, EOS], "position_ids": [0, 1, 2, 0, 1]}]
    rows.append({"input_ids": [8, EOS], "position_ids": [0, 1]})
    batch = collate(rows)
    assert batch["labels"].tolist() == [[IGNORE, 6, EOS, IGNORE, EOS], [IGNORE, EOS, *[IGNORE] * 3]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch["input_ids"].tolist() == [rows[0]["input_ids"], [8, EOS, 0, 0, 0]]


def test_rows_are_filled_in_order_with_spans_of_documents_and_never_overfull():
    given = [list(range(100, 107)), [1, 2], [3, 4, 5], list(range(200, 213)), [6]]
    rows = pack_rows(iter(given), span_length=6)
    assert rows["input_ids"] == [
        list(range(100, 106)),  # 106 alone would predict nothing
        list(range(200, 206)),
        list(range(206, 212)),
        [3, 4, 5, 1, 2],
    ]
    assert rows["position_ids"] == [[*range(6)], [*range(6)], [*range(6)], [0, 1, 2, 0, 1]]


def test_a_document_goes_where_it_leaves_least_room():
    rows = pack_rows([[1] * 6, [2] * 5, [3] * 4, [4] * 3, [5] * 2], span_length=10)
    assert rows["input_ids"] == [[1] * 6 + [3] * 4, [2] * 5 + [4] * 3 + [5] * 2]


def test_a_random_span_begins_at_any_token_from_which_it_is_whole():
    draw = np.random.default_rng(0)
    begins = [pack_rows([list(range(9))], 6, draw)["input_ids"][0] for _ in range(60)]
    assert {row[0] for row in begins} == {0, 1, 2, 3}
    assert all(row == list(range(row[0], row[0] + 6)) for row in begins)
    assert pack_rows([[7, 8, 9]], 6, draw)["input_ids"] == [[7, 8, 9]]


def test_random_spans_of_a_text_that_is_held_whole_are_one_a_document_and_the_seed_draws_them(tmp_path):
    files = [write(tmp_path / f"{i}.jsonl", [{"text": f"number {i}: {PROSE}"}]) for i in range(8)]
    drawn = (load(text=files, spans="random", seed=seed) for seed in (0, 0, 1))
    rows, again, other = (documents(train + held_out) for train, held_out in drawn)
    assert len(rows) == 8 and sorted(rows) == sorted(again) != sorted(other)


def test_an_end_of_text_that_is_there_already_is_not_doubled():
    assert (
        list(encode(["the work<eos>", "the work"], TOKENIZER))
        == [[*TOKENIZER("the work").input_ids, EOS]] * 2
    )


def test_no_row_is_too_short_to_be_a_batch_alone(tmp_path):
    text = PROSE * 5
    length = len(TOKENIZER(text)["input_ids"]) + 1
    span = next(n for n in range(9, 40) if 2 <= length % n <= 5)  # the last row has at most the talk length
    train, held_out = load(talk_length=5, text=[write(tmp_path / "a.txt", text)], span_length=span)
    assert min(len(row["input_ids"]) for row in train + held_out) > 5
    assert len(train + held_out) == length // span


TEXT, JSONL = PROSE * 5, [{"text": s} for s in SENTENCES]
REFUSED = {
    "neither": ("a.txt", TEXT, {"text": []}, "text = [], dataset = None: give exactly one of them"),
    "both": ("a.txt", TEXT, {"dataset": "x"}, "give exactly one of them"),
    "missing": ("a.txt", TEXT, {"text": ["no.txt"]}, "text = 'no.txt': no such file"),
    "empty": ("a.txt", "", {}, "a.txt': the file is empty"),
    "blank": ("a.txt", " \n\n ", {}, "a.txt': the file is empty"),
    "empty jsonl": ("a.jsonl", "\n\n", {}, "a.jsonl': the file is empty"),
    "one token": ("a.txt", "a", {}, "text: 'a' has 1 tokens, at least 2 are needed"),
    "shorter than talk": ("a.txt", "a b", {}, "tokens, talk_length = 4 needs more"),
    "few rows": ("a.txt", PROSE, {"held_out_rows": 50}, "held_out_rows = 50: the text has only"),
    "no field": (
        "a.jsonl",
        JSONL,
        {"text_field": "body"},
        "text_field: a record has no ['body']; it has ['text']",
    ),
    "null field": ("a.jsonl", [*JSONL, {"text": None}], {}, "text_field: a record has no ['text']"),
    "blank field": (
        "a.jsonl",
        [*JSONL, {"text": " "}],
        {},
        "text_field = 'text': a record holds no text there",
    ),
    "number field": ("a.jsonl", [{"text": 3}], {}, "text_field = 'text': a record holds no text there"),
    "no template field": ("a.jsonl", JSONL, {"template": "{q} {text}"}, "template: a record has no ['q']"),
    "template of nothing": ("a.jsonl", JSONL, {"template": "Q:"}, "template = 'Q:': must name fields"),
    "template by number": ("a.jsonl", JSONL, {"template": "{}"}, "template = '{}': must name fields"),
    "open template": ("a.jsonl", JSONL, {"template": "{text"}, "template = '{text': expected '}'"),
    "no json": ("a.jsonl", "{'text': 1}\n{\n", {}, "a.jsonl': line 1 is no JSON"),
    "no json later": ("a.jsonl", '{"text": "a"}\n{\n', {}, "a.jsonl': line 2 is no JSON"),
    "span": ("a.txt", TEXT, {"span_length": 5}, "span_length = 5: must be at least 6"),
    "held out": ("a.txt", TEXT, {"held_out_rows": 0}, "held_out_rows = 0: must be at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_source_that_gives_no_rows_is_refused_and_says_why(tmp_path, case):
    name, content, given, message = REFUSED[case]
    with pytest.raises(ValueError) as error:
        load(talk_length=4, **({"text": [write(tmp_path / name, content)]} | given))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["b.parquet", "b.json.gz"])
def test_a_file_that_breaks_late_is_named_among_many(tmp_path, name):
    good = write_shard(tmp_path / name.replace("b", "a"), JSONL)
    broken = write_shard(tmp_path / name, [{"text": s} for s in SENTENCES * 40])
    whole = Path(broken).read_bytes()
    Path(broken).write_bytes(
        whole[: -len(whole) // 3] if name.endswith("gz") else whole[:2000] + whole[2300:]
    )
    with pytest.raises(ValueError, match=rf"{name}'?: cannot be read"):
        load(text=[good, broken])


def test_mixed_kinds_of_files_and_bytes_that_are_no_text_are_refused(tmp_path):
    files = [write(tmp_path / "a.jsonl", JSONL), write(tmp_path / "a.txt", TEXT)]
    with pytest.raises(ValueError, match=r"a\.jsonl', '.*a\.txt'\]: are json, text; give one kind"):
        load(text=files)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"b\.txt': is no UTF-8 text"):
        load(text=[str(tmp_path / "b.txt")])


def test_without_the_package_datasets_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the package datasets; pip install 'qstar\[data\]'"):
        load(text=[write(tmp_path / "a.txt", TEXT)])


def test_a_field_may_be_a_number_inside_a_template():
    assert document_text({"a": 3, "b": "x"}, "text", "{b} = {a:02d}") == "x = 03"


def test_rows_of_texts_at_hand_are_the_packed_rows():
    packed = pack_rows(encode([TEXT, PROSE], TOKENIZER), 8)
    rows = text_rows([TEXT, PROSE], TOKENIZER, 8)
    assert [row["input_ids"] for row in rows] == packed["input_ids"]
    assert [row["position_ids"] for row in rows] == packed["position_ids"]


NUMBERED = [{"input_ids": [i, i], "position_ids": [0, 1]} for i in range(7)]


def numbers(count, **options):
    batches = ShuffledBatches(NUMBERED, 2, **options)
    return [batch["input_ids"][:, 0].tolist() for batch in islice(batches, count)]


@pytest.mark.parametrize("first", [1, 3, 4, 8])
def test_batches_after_so_many_are_those_of_a_run_from_the_beginning(first):
    assert numbers(9 - first, first=first) == numbers(9)[first:]


def test_an_epoch_has_each_row_at_most_once_and_an_order_of_its_own():
    epochs = [numbers(9)[i : i + 3] for i in (0, 3, 6)]
    assert all(len({row for batch in epoch for row in batch}) == 6 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and numbers(3, seed=5) != epochs[0]


@pytest.mark.parametrize("batch_size", [0, 8])
def test_a_batch_of_no_row_or_of_more_than_there_are_is_refused(batch_size):
    with pytest.raises(ValueError, match=rf"^batch_size = {batch_size}: must be in \[1, 7\]"):
        ShuffledBatches(NUMBERED, batch_size)
