"""A frozen writer: thoughts come from the base model as it began, whatever has been learned since."""

import copy

import pytest
import torch
from tiny_models import ARCHITECTURES, plain_slots, thinking_model, tokens, write
from trainer_options import SHORT_RUN
from transformers import AutoModelForCausalLM, TrainingArguments

from qstar import QuietStarForCausalLM
from qstar.data import collate
from qstar.evaluation.predictions import predict
from qstar.layout import TextRows, ThoughtLayout
from qstar.training import QuietStarTrainer

GREEDY = {"thought_temperature": 0.0, "num_thoughts": 1}
FROZEN = {"writer": "base", "policy_weight": 0.0}
ROWS = [{"input_ids": tokens(1, 10, i)[0].tolist(), "position_ids": list(range(10))} for i in range(8)]


def lora(model):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'qstar[peft]'")
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(model.base, config)
    return model


HOW = {
    "whole": lambda model: model,
    "last-layer": lambda model: model.freeze_base(1),
    "frozen": lambda model: model.freeze_base(),
    "adapter": lora,
}


def learned(model, training=True):
    """After steps so large that every part that learns says other things."""
    trained = [p for p in model.train(training).parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.03)
    for seed in range(3):
        optimizer.zero_grad()
        model(tokens(2, 10, seed)).loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def thoughts(model, ids):
    rows = TextRows.from_batch(ids)
    hidden, text = model.thinker.read_text(ids, rows)
    layout = ThoughtLayout.plan(rows, rows.predicts(ids), model.quiet_star)
    return model.thinker.think(ids, hidden, text, layout).tokens


def base_state(model):
    return {n: x.clone() for n, x in model.base.state_dict().items()}


@pytest.mark.parametrize("how", HOW)
def test_after_learning_it_writes_what_the_base_model_wrote_before(how):
    ids = tokens(2, 10, seed=9)
    before = thoughts(thinking_model(**GREEDY), ids)
    frozen, own = (
        learned(HOW[how](thinking_model(**GREEDY, policy_weight=0.0, writer=w))) for w in ("base", "self")
    )
    assert torch.equal(thoughts(frozen, ids), before)
    assert not torch.equal(thoughts(own, ids), before)


def test_an_evaluation_asks_it_too():
    ids = tokens(2, 10, seed=9)
    model = learned(thinking_model(**GREEDY, **FROZEN))
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    everywhere[:, -1] = False  # nothing follows the last token
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = predict(model, batch, everywhere, ways=("thoughts",))["thoughts"]
    assert torch.equal(found.tokens, thoughts(thinking_model(**GREEDY), ids)[:, :, 0].flatten(0, 1))


def test_it_stays_too_where_a_model_learns_in_evaluation_mode():
    ids = tokens(2, 10, seed=9)
    found = thoughts(learned(thinking_model(**GREEDY, **FROZEN), training=False), ids)
    assert torch.equal(found, thoughts(thinking_model(**GREEDY), ids))


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_a_thought_is_the_argmax_of_a_plain_forward_of_the_untrained_model(kind):
    model = thinking_model(kind, **GREEDY, **FROZEN)
    begun = copy.deepcopy(thinking_model(kind))  # the same weights and boundaries
    with torch.enable_grad():
        learned(model)
    ids = tokens(1, 9, seed=4)
    found = thoughts(model, ids)
    begun.base.set_attn_implementation("eager")
    for p in range(8):
        hidden = plain_slots(begun, begun.base, ids[0, : p + 1], found[0, p, 0], ids[0, :0])[:3]
        scores = begun.base.get_output_embeddings()(hidden)
        scores[:, model.suppress] = -torch.inf
        assert scores.argmax(-1).tolist() == found[0, p, 0].tolist()


@pytest.mark.parametrize("how", HOW)
def test_it_has_copies_of_what_has_learned_and_shares_all_else(how):
    model = learned(HOW[how](thinking_model(**FROZEN)))
    of_the_model = {id(p) for part in (model.base, model.boundary) for p in part.parameters()}
    copied = [p for p in model.writer.parameters() if id(p) not in of_the_model]
    assert not any(p.requires_grad for p in copied)
    boundaries = 2 * 32
    learns = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("mixing.")]
    expected = boundaries if how == "adapter" else sum(p.numel() for p in learns)
    assert sum(p.numel() for p in copied) == expected
    names = [name for name in model.state_dict() if name.startswith("writer.")]
    assert len(names) == len(copied)
    if how == "last-layer":
        assert {n for n in names if "layers.0" in n} == set() != {n for n in names if "layers.1" in n}


@pytest.mark.parametrize("how", HOW)
def test_a_checkpoint_gives_back_model_and_writer_bit_for_bit(how, tmp_path):
    thinking_model().base.save_pretrained(tmp_path / "base")
    model = thinking_model(**GREEDY, **FROZEN)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fresh = QuietStarForCausalLM.from_base(base, model.quiet_star).eval()
    with torch.no_grad():
        for mine, theirs in zip(fresh.boundary.parameters(), model.boundary.parameters()):
            mine.copy_(theirs)
        fresh.mixing.load_state_dict(model.mixing.state_dict())
    model = learned(HOW[how](fresh))
    model.save_pretrained(tmp_path / "saved")
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ids = tokens(2, 10, seed=9)
    assert torch.equal(thoughts(loaded, ids), thoughts(model, ids))
    assert torch.equal(thoughts(loaded, ids), thoughts(thinking_model(**GREEDY), ids))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, x in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], x), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_state_dict_alone_moves_the_writer_to_a_fresh_model(tied, tmp_path):
    def fresh():
        model = thinking_model(**GREEDY, **FROZEN)
        if tied:
            model.base.config.tie_word_embeddings = True
            model.base.tie_weights()
            model.writer = type(model.writer)(model.base, model.boundary)
        return model

    model, other = learned(fresh()), fresh()
    other.load_state_dict(model.state_dict())
    ids = tokens(2, 10, seed=9)
    assert torch.equal(thoughts(other, ids), thoughts(fresh(), ids))
    assert torch.equal(other.base(ids).logits, model.base(ids).logits)
    model.save_pretrained(tmp_path)  # of tied weights one, or safetensors refuses
    assert torch.equal(thoughts(QuietStarForCausalLM.from_pretrained(tmp_path), ids), thoughts(model, ids))


def test_loading_a_base_model_alone_or_the_thought_parts_alone_leaves_the_writer():
    model = learned(thinking_model(**GREEDY, **FROZEN))
    ids = tokens(2, 10, seed=9)
    before = thoughts(model, ids)
    for prefix in ("base.", "mixing."):
        part = {n: x for n, x in model.state_dict().items() if n.startswith(prefix)}
        model.load_state_dict(part, strict=False)
        assert torch.equal(thoughts(model, ids), before)


@pytest.mark.parametrize("how", ["whole", "last-layer"])
def test_a_run_that_was_cut_goes_on_with_its_writer_bit_for_bit(how, tmp_path):
    def run(folder, resume=None):
        options = SHORT_RUN | {"save_strategy": "steps", "save_steps": 2, "use_cpu": True}
        model = HOW[how](thinking_model(**FROZEN))
        args = TrainingArguments(str(folder), **(options | {"learning_rate": 1e-2}))
        trainer = QuietStarTrainer(model=model, args=args, train_dataset=ROWS, data_collator=collate)
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole = run(tmp_path)
    again = run(tmp_path, str(tmp_path / "checkpoint-2"))
    assert whole.keys() == again.keys() and any(name.startswith("writer.") for name in whole)
    for name, x in whole.items():
        assert torch.equal(x, again[name]), name


def test_merging_an_adapter_leaves_the_writer_without_it(tmp_path):
    model = learned(lora(thinking_model(**GREEDY, **FROZEN)))
    ids = tokens(2, 10, seed=9)
    before, said = thoughts(model, ids), model.base(ids).logits
    model.merge_adapter().save_pretrained(tmp_path)
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(thoughts(model, ids), before) and torch.equal(thoughts(loaded, ids), before)
    torch.testing.assert_close(model.base(ids).logits, said, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", [1, 3])
def test_thoughts_some_at_a_time_are_those_of_all_at_once(positions):
    model = learned(thinking_model(**FROZEN)).double()
    slots = model.quiet_star.num_thoughts * model.quiet_star.slots
    found = []
    for chunk in (None, positions * slots):
        model.quiet_star = type(model.quiet_star)(**(vars(model.quiet_star) | {"block_chunk": chunk}))
        source = torch.Generator().manual_seed(3)
        found.append(model(tokens(2, 12), generator=source).loss)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("draft", [0, 3])
@pytest.mark.parametrize("length", [0, 3])
@torch.no_grad()
def test_generating_equals_the_parallel_forward_at_the_last_position(draft, length):
    model = thinking_model(**GREEDY, **FROZEN, talk_length=1, thought_length=length)
    with torch.enable_grad():
        learned(model)
    short, long = tokens(1, 5, seed=1)[0], tokens(1, 9, seed=2)[0]
    ids = torch.zeros(2, 9, dtype=torch.long)
    ids[0, 4:], ids[1] = short, long
    mask = (torch.arange(9) >= torch.tensor([[4], [0]])).long()
    out = write(model, ids, mask, max_new_tokens=4, draft_length=draft)
    for b, prompt in enumerate((short, long)):
        text = torch.cat([prompt, out.new_tokens[b], torch.tensor([5])])[None]
        rows = TextRows.from_batch(text)
        hidden, read = model.thinker.read_text(text, rows)
        layout = ThoughtLayout.plan(rows, rows.predicts(text), model.quiet_star)
        thought = model.thinker.think(text, hidden, read, layout)
        for step in range(4):
            p = len(prompt) - 1 + step
            assert thought.tokens[0, p, 0].tolist() == out.thoughts[b, step].tolist()
            w = thought.mix_weight[0, p, 0, 0]
            pair = (thought.base_hidden[0, p, 0, 0], thought.talk_hidden[0, p, 0, 0])
            base, talk = (model.base.get_output_embeddings()(x) for x in pair)
            expected = (1 - w) * base + w * talk
            assert (out.logits[b, step] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_with_another_config_the_writer_stays_goes_or_is_the_base_model_of_now():
    model = learned(thinking_model(**GREEDY, **FROZEN))
    ids, knobs = tokens(2, 10, seed=9), vars(model.quiet_star)
    before, kind = thoughts(model, ids), type(model.quiet_star)
    assert torch.equal(thoughts(model.with_config(kind(**(knobs | {"talk_weight": 0.5}))), ids), before)
    own = thoughts(model.with_config(kind(**(knobs | {"writer": "self"}))), ids)
    assert model.writer is None and not torch.equal(own, before)
    again = learned(model.with_config(kind(**knobs)))
    assert torch.equal(thoughts(again, ids), own)
