"""A base model that stays frozen, or learns by an adapter of peft: who gets gradients, and what is saved."""

import sys
import warnings

import pytest
import torch
from tiny_models import base_model, thinking_model, tokens
from torch import nn
from transformers import AutoModelForCausalLM, TrainingArguments

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.data import collate
from qstar.thinker import Thinker
from qstar.training import QuietStarTrainer, last_complete_checkpoint

IDS = tokens(2, 12)
THOUGHTS = torch.randint(2, 60, (2, 11, 2, 3), generator=torch.Generator().manual_seed(5))
ROWS = [{"input_ids": tokens(1, 10, i)[0].tolist(), "position_ids": list(range(10))} for i in range(8)]
PARTS = ("boundary.", "mixing.")


def loss(model):
    return model(IDS, thoughts=THOUGHTS).loss


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    base_model().save_pretrained(folder)
    return folder


def thinking(source):
    """A model whose base comes from a folder, as a user's does."""
    model = thinking_model()
    model.base = QuietStarForCausalLM.from_base(AutoModelForCausalLM.from_pretrained(source)).base
    return model


def adapted(source, trained=True, **options):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'qstar[peft]'")
    model = thinking(source)
    torch.manual_seed(2)
    defaults = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    peft.get_peft_model(model.base, peft.LoraConfig(**(defaults | options)))
    if trained:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
    return model


def trainer(model, folder, **changes):
    options = {"output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 2}
    options |= {"learning_rate": 1e-3, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    args = TrainingArguments(**options, remove_unused_columns=False, **changes)
    return QuietStarTrainer(model=model, args=args, train_dataset=ROWS, data_collator=collate)


# -- LoRA


def test_a_fresh_adapter_changes_no_loss_and_leaves_the_thought_parts_whole(source):
    model = adapted(source, trained=False)
    assert torch.equal(loss(model), loss(thinking(source)))
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n in learns if n.startswith("base.")} == {n for n in learns if ".lora_" in n} != set()
    assert learns >= {n for n, _ in model.named_parameters() if n.startswith(PARTS)}


def test_gradients_reach_adapters_and_thought_parts_and_no_weight_of_the_base(source):
    model = adapted(source)
    loss(model.train()).backward()
    for name, parameter in model.named_parameters():
        if ".lora_" in name or name.startswith(PARTS):
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_an_adapter_is_saved_without_the_base_and_loaded_to_the_same_loss_and_trainable_parts(
    source, tmp_path
):
    model = adapted(source)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "quiet_star.json",
        "quiet_star.safetensors",
    ]
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loss(loaded), loss(model))
    assert not torch.equal(loss(loaded), loss(thinking(source)))
    learns = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, loaded)]
    assert learns[0] == learns[1]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(stock(IDS).logits, model.base(IDS).logits)


def test_a_merged_model_is_a_stock_one_with_the_same_loss(source, tmp_path):
    model = adapted(source)
    model.save_pretrained(tmp_path)  # the whole model replaces it there
    before = loss(model)
    names = set(thinking(source).state_dict())
    model.merge_adapter().save_pretrained(tmp_path)
    assert set(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(loss(model), before, rtol=1e-5, atol=0)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(stock(IDS).logits, model.base(IDS).logits)
    assert type(stock.model.layers[0].self_attn.q_proj) is nn.Linear
    assert torch.equal(loss(QuietStarForCausalLM.from_pretrained(tmp_path)), loss(model))
    assert not list(tmp_path.glob("adapter*"))


def test_the_trainer_saves_adapters_and_goes_on_from_them_as_if_never_stopped(source, tmp_path):
    whole, first, second = (adapted(source) for _ in range(3))
    trainer(whole, tmp_path / "whole").train()
    trainer(first, tmp_path / "cut").train()
    folder = tmp_path / "cut" / "checkpoint-2"
    assert (folder / "adapter_model.safetensors").is_file() and not list(folder.glob("model*"))
    trainer(second, tmp_path / "cut").train(resume_from_checkpoint=str(folder))
    for name, x in whole.state_dict().items():
        assert torch.equal(x, second.state_dict()[name]), name
    assert last_complete_checkpoint(tmp_path / "cut").endswith("checkpoint-4")


def test_another_adapter_than_the_thought_parts_were_trained_with_is_refused(source, tmp_path):
    adapted(source).save_pretrained(tmp_path / "one")
    adapted(source, trained=False).save_pretrained(tmp_path / "two")
    (tmp_path / "two" / "adapter_model.safetensors").replace(tmp_path / "one" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="trained with another base model"):
        QuietStarForCausalLM.from_pretrained(tmp_path / "one")


def test_what_cannot_be_adapted_saved_or_merged_is_told_in_one_line(source, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^the base model has no adapter to merge$"):
        thinking(source).merge_adapter()
    with pytest.raises(ValueError, match=r"^the head is a Linear: an adapter on it"):
        loss(adapted(source, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(
        ValueError, match=r"^modules_to_save = \['model\.layers\.0.*: must be empty to merge the adapter$"
    ):
        adapted(source, modules_to_save=["norm"]).merge_adapter()
    model = adapted(source)
    with pytest.raises(ValueError, match=r"must not be the folder of the adapter's base model$"):
        model.save_pretrained(source)
    assert (source / "model.safetensors").is_file()
    model.save_pretrained(tmp_path)
    model.base.peft_config["default"].base_model_name_or_path = ""
    with pytest.raises(ValueError, match=r"^the adapter does not say which base model it is for"):
        model.save_pretrained(tmp_path / "other")
    model.base.peft_config["second"] = model.base.peft_config["default"]
    with pytest.raises(ValueError, match=r"adapters \['default', 'second'\]: only one at a time"):
        model.save_pretrained(tmp_path / "other")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"needs the package peft; pip install 'qstar\[peft\]'$"):
        QuietStarForCausalLM.from_pretrained(tmp_path)


# -- a frozen base


def test_a_frozen_base_gives_the_thought_parts_the_same_gradients_and_keeps_no_graph_of_the_text(monkeypatch):
    free, frozen = thinking_model().train(), thinking_model().freeze_base().train()
    kept, read_text = {}, Thinker.read_text
    for name, model in {"free": free, "frozen": frozen}.items():

        def watched(*arguments, name=name):
            hidden, text = read_text(*arguments)
            kept[name] = [x.requires_grad for x in (hidden, *text[0])]
            return hidden, text

        monkeypatch.setattr(Thinker, "read_text", watched)
        loss(model).backward()
    assert kept == {"free": [True] * 3, "frozen": [False] * 3}
    assert all(p.grad is None for p in frozen.base.parameters())
    others = dict(free.named_parameters())
    for name, parameter in frozen.named_parameters():
        if name.startswith(PARTS):
            assert parameter.grad.abs().sum() > 0
            torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma3_text"])
def test_of_a_frozen_base_the_last_layers_and_the_final_norm_may_learn(kind):
    model = thinking_model(kind).freeze_base(1).train()
    learns = {n for n, p in model.base.named_parameters() if p.requires_grad}
    layers = {n for n in learns if ".1." in n}
    norm = {n.rsplit(".", 1)[0].rsplit(".", 1)[1] for n in learns - layers}
    assert norm == {{"gpt2": "ln_f", "opt": "final_layer_norm"}.get(kind, "norm")}
    every = {n for n, _ in model.base.named_parameters() if ".1." in n}
    assert layers == every and not any(".0." in n for n in learns)
    model(IDS, thoughts=THOUGHTS).loss.backward()
    assert {n for n, p in model.base.named_parameters() if p.grad is not None} == learns
    with pytest.raises(ValueError, match=r"^trainable_layers = 3: must be in \[0, 2\]$"):
        model.freeze_base(3)


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointed"])
def test_the_trainer_moves_nothing_but_the_thought_parts_of_a_frozen_model(changes, tmp_path):
    model = thinking_model(block_chunk=12).freeze_base()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    if changes:
        changes = changes | {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    run = trainer(model, tmp_path, save_strategy="no", **changes)
    run.train()
    groups = run.optimizer.param_groups
    assert sum(len(g["params"]) for g in groups) == sum(1 for n in before if n.startswith(PARTS))
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]) != name.startswith(PARTS), name


def test_a_frozen_bf16_base_needs_no_warning_and_its_thought_parts_stay_in_fp32():
    base = base_model().to(torch.bfloat16)
    knobs = {"thought_length": 3, "talk_length": 2, "policy_weight": 1.0}
    model = QuietStarForCausalLM.from_base(base, QuietStarConfig(**knobs)).train()
    with pytest.warns(UserWarning, match=r"parameters are torch\.bfloat16"):
        loss(model)
    nn.init.normal_(model.freeze_base().mixing.layers[-1].weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loss(model).backward()
    for name, parameter in model.named_parameters():
        assert name.startswith(PARTS) == (parameter.grad is not None), name
        if name.startswith(PARTS):
            assert parameter.dtype == torch.float32 and parameter.grad.abs().sum() > 0


class Int8Linear(nn.Module):
    """A weight-only quantised layer as such packages make them: rows of int8 and their scale."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.register_buffer("scale", layer.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (layer.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale)


def test_the_thought_parts_learn_on_an_int8_base():
    model, exact = thinking_model().freeze_base().train(), thinking_model().freeze_base().train()
    for path, layer in list(model.base.model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.base.model.set_submodule(path, Int8Linear(layer))
    losses = [loss(m) for m in (model, exact)]
    torch.testing.assert_close(*losses, rtol=0.05, atol=0)
    for each in losses:
        each.backward()
    a, b = (m.boundary.start_raw.grad for m in (model, exact))
    assert 0 < (a - b).norm() < 0.2 * b.norm()
    model.base.lm_head = Int8Linear(model.base.lm_head)
    with pytest.raises(ValueError, match=r"^the head is a Int8Linear"):
        loss(model)
