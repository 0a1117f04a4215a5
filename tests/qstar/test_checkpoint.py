"""Checkpoints: they come back bit for bit, refuse what does not belong together, and survive a crash."""

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, base_model, thinking_model, tokens
from transformers import AutoModelForCausalLM

from qstar import QuietStarForCausalLM, checkpoint

TESTS = Path(__file__).parents[1]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def loss(model):
    return model(tokens(2, 10), generator=torch.Generator().manual_seed(0)).loss


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("shard", ["whole", "sharded"])
@torch.no_grad()
def test_a_checkpoint_comes_back_bit_for_bit_and_its_base_loads_with_stock_transformers(
    tmp_path, kind, shard
):
    model = thinking_model(kind)
    model.save_pretrained(tmp_path, **({"max_shard_size": "10KB"} if shard == "sharded" else {}))
    assert (len(list(tmp_path.glob("model-*.safetensors"))) > 1) == (shard == "sharded")
    attention = "eager" if kind == "gemma2" else "sdpa"
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path, attn_implementation=attention).eval()
    assert loaded.quiet_star == model.quiet_star
    assert_same(loaded.state_dict(), model.state_dict())
    assert torch.equal(loss(loaded), loss(model))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    assert_same(stock.state_dict(), model.base.state_dict())
    assert not list(tmp_path.glob(".*"))


def test_a_tied_head_stays_tied(tmp_path):
    base = base_model(tie_word_embeddings=True)
    QuietStarForCausalLM.from_base(base).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert_same(loaded.base.state_dict(), base.state_dict())


def test_bf16_weights_stay_bf16_and_the_thought_parts_fp32(tmp_path):
    model = thinking_model()
    model.base.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert_same(loaded.state_dict(), model.state_dict())
    assert {x.dtype for x in loaded.base.parameters()} == {torch.bfloat16}
    assert {x.dtype for x in (*loaded.mixing.parameters(), *loaded.boundary.parameters())} == {torch.float32}


@pytest.fixture
def saved(tmp_path):
    thinking_model().save_pretrained(tmp_path)
    return tmp_path


def refused(folder):
    with pytest.raises(ValueError) as error:
        QuietStarForCausalLM.from_pretrained(folder)
    message = str(error.value)
    assert message.startswith(f"path = {str(folder)!r}: ") and "\n" not in message
    return message


def test_another_base_model_in_the_folder_is_refused(saved):
    base_model(seed=5).save_pretrained(saved)
    assert "trained with another base model" in refused(saved)


def test_a_folder_that_is_missing_or_holds_no_thoughts_is_refused(tmp_path):
    assert "no such folder" in refused(tmp_path / "missing")
    base_model().save_pretrained(tmp_path)
    assert "use from_base" in refused(tmp_path)


def _without(tensors):
    del tensors["boundary.end_raw"]


def _left_over(tensors):
    tensors["mixing.layers.9.weight"] = torch.zeros(1)


def _misshapen(tensors):
    tensors["mixing.layers.4.weight"] = torch.zeros(1, 31)


@pytest.mark.parametrize(
    "change, name",
    [(_without, "boundary.end_raw"), (_left_over, "mixing.layers.9.weight"), (_misshapen, "layers.4.weight")],
    ids=["missing", "left-over", "wrong-shape"],
)
def test_thought_parts_that_do_not_fit_are_refused_by_name(saved, change, name):
    tensors = load_file(saved / checkpoint.TENSORS)
    change(tensors)
    save_file(tensors, saved / checkpoint.TENSORS)
    assert name in refused(saved)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"base": "x"}'])
def test_a_description_that_is_none_is_refused(saved, content):
    (saved / checkpoint.DESCRIPTION).write_text(content)
    refused(saved)


def test_thought_parts_cut_short_or_missing_are_refused(saved):
    path = saved / checkpoint.TENSORS
    path.write_bytes(path.read_bytes()[:-100])
    assert checkpoint.TENSORS in refused(saved)
    path.unlink()
    assert checkpoint.TENSORS in refused(saved)


def test_saving_over_more_shards_leaves_no_stale_one(tmp_path):
    thinking_model().save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*"))) > 3
    model = thinking_model(seed=3)
    model.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"]
    assert_same(QuietStarForCausalLM.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_other_files_of_the_folder_are_left_alone(saved):
    (saved / "tokenizer.json").write_text("{}")
    (saved / "curves.png").write_bytes(b"png")
    thinking_model(seed=3).save_pretrained(saved)
    assert (saved / "tokenizer.json").read_text() == "{}"
    assert (saved / "curves.png").read_bytes() == b"png"


def test_a_write_that_fails_leaves_the_previous_checkpoint(saved, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    for module, name in ((checkpoint, "save_file"), (checkpoint, "_flush"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(OSError, match="No space left"):
                thinking_model(seed=3).save_pretrained(saved)
        assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_a_disk_that_is_full_in_the_middle_of_a_file_leaves_the_previous_checkpoint(saved):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails, instead of the process
    for name in ("model.safetensors", checkpoint.TENSORS):
        model = thinking_model(seed=3)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[name]) - 1000, hard))
            with pytest.raises(OSError, match=r"cannot be written: .*File too large"):
                model.save_pretrained(saved)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


SAVE_IN_TURN = """
import os, random, select, signal, sys, time
from tiny_models import thinking_model
from transformers.utils import logging
logging.disable_progress_bar()  # its lock, held by another thread at a fork, would never be released
models = [thinking_model(seed=0), thinking_model(seed=1)]
options = [{}, {"max_shard_size": "10KB"}]
def save(n):
    models[n].save_pretrained(sys.argv[1], **options[n])
save(0)
began = time.perf_counter()
save(1)
one_save = time.perf_counter() - began
moments = random.Random(0)
for line in sys.stdin:
    kill = int(line)
    done, write = os.pipe()
    process = os.fork()
    if process == 0:
        n = kill % 2
        while True:
            save(n)
            os.write(write, b"x")
            n = 1 - n
    for _ in range(kill // 2 % 2):  # let one save end first in every other pair of rounds
        if select.select([done], [], [], 60)[0]:
            os.read(done, 1)
    time.sleep(moments.random() * one_save)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    os.close(done), os.close(write)
    print("killed", flush=True)
"""


@pytest.mark.slow
def test_killing_a_process_that_saves_leaves_one_of_its_two_versions_loadable(tmp_path):
    versions = [thinking_model(seed=n).state_dict() for n in (0, 1)]
    paths = [str(TESTS / "support"), *(str(TESTS.parent / p) for p in ("", "kernels", "bench"))]
    found, interrupted = set(), 0
    with subprocess.Popen(
        [sys.executable, "-c", SAVE_IN_TURN, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        for kill in range(60):
            if kill >= 12 and interrupted and found == {0, 1}:  # on a busy machine later than after 12
                break
            process.stdin.write(f"{kill}\n")
            assert process.stdout.readline() == "killed\n"
            interrupted += any((tmp_path / name).exists() for name in (".staging", ".commit"))
            loaded = QuietStarForCausalLM.from_pretrained(tmp_path).state_dict()
            same = [all(torch.equal(loaded[n], x) for n, x in version.items()) for version in versions]
            assert same.count(True) == 1
            found.add(same.index(True))
            stock = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
            assert_same(
                {f"base.{n}": x for n, x in stock.items()}, {n: loaded[n] for n in loaded if "base." in n}
            )
        process.stdin.close()
    assert interrupted and found == {0, 1}


def crash_points(monkeypatch):
    """Every call that changes the folder, so that a crash can be put before each of them in turn."""
    calls = {"made": 0, "at": None}

    def counted(original):
        def call(*args, **kwargs):
            calls["made"] += 1
            if calls["made"] == calls["at"]:
                raise SystemExit("crash")
            return original(*args, **kwargs)

        return call

    for owner, name in (
        (os, "replace"),
        (Path, "unlink"),
        (Path, "rmdir"),
        (Path, "mkdir"),
        (Path, "write_text"),
        (checkpoint, "save_file"),
        (checkpoint, "_flush"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    # a process that dies tidies nothing up
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
    return calls


def test_a_crash_before_any_single_step_of_saving_leaves_one_of_the_two_versions(tmp_path, monkeypatch):
    old, new = thinking_model(seed=0), thinking_model(seed=1)
    states, found = [m.state_dict() for m in (old, new)], []
    for at in range(1, 200):
        folder = tmp_path / str(at)
        old.save_pretrained(folder, max_shard_size="20KB")
        with monkeypatch.context() as patch:
            calls = crash_points(patch)
            calls["at"] = at
            try:
                new.save_pretrained(folder)
                break
            except SystemExit:
                pass
        loaded = QuietStarForCausalLM.from_pretrained(folder).state_dict()
        found.append(
            [all(torch.equal(loaded[n], x) for n, x in state.items()) for state in states].index(True)
        )
        new.save_pretrained(folder)  # and the next save succeeds
        assert_same(QuietStarForCausalLM.from_pretrained(folder).state_dict(), states[1])
    assert found == sorted(found) and set(found) == {0, 1}  # the old one, and from one moment on the new
