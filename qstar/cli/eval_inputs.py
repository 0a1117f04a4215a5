"""What `qstar eval` is asked for: its options, and the task and models that they name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM

from qstar import checkpoint
from qstar.config import QuietStarConfig
from qstar.data import DataArguments, document_text, load_records
from qstar.evaluation import questions
from qstar.evaluation.direct import DirectAnswers
from qstar.evaluation.majority import MajorityVote
from qstar.evaluation.predictions import WAYS, evaluated
from qstar.evaluation.run import Contestant, Task
from qstar.evaluation.text import SMOOTHED, PlainText, Span, spans
from qstar.model import QuietStarForCausalLM
from qstar.reporting import jsonl
from qstar.reporting.benchmark_record import check_device
from qstar.supported import context_length

_T = TypeVar("_T")

# where the data come from unless told: name on the hub, configuration, split
DATA = {
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "gsm8k_cot": ("openai/gsm8k", "main", "test"),
    "commonsense_qa": ("tau/commonsense_qa", None, "validation"),
    "choice": (None, None, None),
    "text": (None, None, None),
}
NAMES = {"without": "w = 0", "pause": "pause", "shuffled": "shuffled thoughts", "thoughts": "thoughts"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class EvalArguments:
    """What is evaluated, and on what."""

    model: str = field(metadata={"help": "Folder of a Quiet-STaR checkpoint."})
    task: str = field(metadata={"help": f"One of {', '.join(DATA)}."})
    data: str | None = field(
        default=None,
        metadata={"help": "A file (.jsonl; for text any) or a name on the hub; default: the task's own."},
    )
    data_config: str | None = field(default=None, metadata={"help": "Configuration of a name on the hub."})
    data_split: str | None = field(default=None, metadata={"help": "Its split."})
    before: str | None = field(
        default=None, metadata={"help": "The base model before training: the condition base."}
    )
    control: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME=FOLDER of other models, trained without thoughts for instance."},
    )
    conditions: list[str] = field(
        default_factory=list,
        metadata={"help": f"Of the model: some of {', '.join(WAYS)}; default: all that the task has."},
    )
    limit: int | None = field(default=None, metadata={"help": "Only the first so many questions or spans."})
    batch_size: int = field(default=8, metadata={"help": "Questions or spans read together."})
    thought_temperature: float = field(
        default=0.0, metadata={"help": "Temperature of the thoughts; 0 is argmax."}
    )
    truncate_prompt: bool = field(
        default=False, metadata={"help": "Cut a question that is too long for the model on its left."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of sampling, shuffling and the intervals."})
    output: str | None = field(
        default=None,
        metadata={"help": "JSONL file of each question's figures; what it holds is not done again."},
    )
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    dtype: str = field(default="float32", metadata={"help": f"Of the weights: {', '.join(DTYPES)}."})

    def __post_init__(self) -> None:
        for name, allowed in (("task", DATA), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        check_device(self.device)
        if (self.data or DATA[self.task][0]) is None:
            raise ValueError(f"data = None: the task {self.task} has none of its own")


@dataclass
class TextArguments:
    """Options of the task text."""

    span_length: int = field(default=256, metadata={"help": "Tokens read at once; texts are cut into spans."})
    tokens_per_span: int | None = field(
        default=None, metadata={"help": "Score so many tokens of a span, drawn at random; default: all."}
    )
    text_field: str = field(default="text", metadata={"help": "Field of a record that holds the text."})
    template: str | None = field(
        default=None, metadata={"help": "Text of a record from its fields, instead."}
    )


@dataclass
class ChainArguments:
    """Options of the task gsm8k_cot."""

    votes: int = field(
        default=8, metadata={"help": "Chains of thought a question, of which the majority counts."}
    )
    temperature: float = field(default=0.9, metadata={"help": "Temperature of the chains."})
    chain_tokens: int = field(default=384, metadata={"help": "Longest chain."})


def _records(args: EvalArguments) -> list[tuple[int, dict[str, Any]]]:
    """(number, record) of a JSONL file or a data set of the hub."""
    name, config, split = DATA[args.task]
    if args.data is not None:
        if Path(args.data).is_file() or Path(args.data).suffix == ".jsonl":
            return jsonl.read("data", args.data)
        name, config, split = args.data, None, None
    source = DataArguments(
        dataset=name,
        dataset_config=args.data_config or config,
        dataset_split=args.data_split or split or "test",
    )
    return list(enumerate(load_records(source), 1))


def _texts(args: EvalArguments, text: TextArguments) -> list[str]:
    path = Path(str(args.data))
    if not path.is_file() or path.suffix == ".jsonl":
        return [document_text(record, text.text_field, text.template) for _, record in _records(args)]
    try:
        return [path.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise ValueError(f"data = {args.data!r}: is no UTF-8 text: {error}") from error


def read_task(
    args: EvalArguments,
    text: TextArguments,
    chain: ChainArguments,
    tokenizer: Any,
    model: QuietStarForCausalLM,
) -> tuple[DirectAnswers | MajorityVote | PlainText, dict[str, Any], int]:
    """(the task; what a file of its results must agree in; how many questions are cut)."""
    names = ("task", "batch_size", "thought_temperature", "seed", "dtype")
    settings = {name: getattr(args, name) for name in names}
    task: DirectAnswers | MajorityVote | PlainText
    content: Sequence[Any]
    cut = 0
    if args.task == "text":
        found = spans(_texts(args, text), tokenizer, text.span_length, text.tokens_per_span, args.seed)
        task, content = PlainText(found[: args.limit]), found[: args.limit]
    else:
        read = questions.gsm8k if args.task.startswith("gsm8k") else questions.choice
        records = _records(args)[: args.limit]
        asked = _each(read, records)
        if args.task == "gsm8k_cot":
            settings |= asdict(chain)
            task, content = MajorityVote(asked, tokenizer, **asdict(chain)), asked
        else:
            numbered = [(number, question) for (number, _), question in zip(records, asked)]
            whole = _each(questions.Tokens(tokenizer).item, numbered)
            context = context_length(model.config)
            longest = None if context is None else context + 1 - evaluated(model.quiet_star).slots
            items, cut = questions.fitted(whole, longest, args.truncate_prompt)
            task, content = DirectAnswers(items), items
    clusters = len({x.cluster if isinstance(x, Span) else i for i, x in enumerate(content)})
    if clusters < 2:
        raise ValueError(f"data: {clusters} question or text in all: an interval needs at least 2")
    described = json.dumps([asdict(x) for x in content])
    return task, settings | {"questions": hashlib.sha256(described.encode()).hexdigest()}, cut


def _each(read: Callable[[Any], _T], numbered: list[tuple[int, Any]]) -> list[_T]:
    """Raises ValueError with the number of the record that cannot be read."""
    found = []
    for number, given in numbered:
        try:
            found.append(read(given))
        except ValueError as error:
            raise ValueError(f"data: record {number} {error}") from error
    return found


def reference_of(args: EvalArguments) -> str:
    """The condition whose NLL says which tokens are hard."""
    return NAMES["without"] if args.before is None else "base"


def contestants(args: EvalArguments, task: Task, loaded: list[QuietStarForCausalLM]) -> list[Contestant]:
    """The model, which is loaded, then the one before and the controls."""
    ways = args.conditions or [way for way in NAMES if way in task.ways]
    allowed = [way for way in NAMES if way in task.ways]
    for way in ways:
        if way not in allowed:
            raise ValueError(f"conditions = {way!r}: the task {args.task} has {', '.join(allowed)}")
    rows = loaded[0].get_input_embeddings().weight.shape[0]

    def other(name: str, folder: str, conditions: dict[str, str]) -> Contestant:
        def load() -> QuietStarForCausalLM:
            if "thoughts" in conditions:
                model = QuietStarForCausalLM.from_pretrained(folder, dtype=DTYPES[args.dtype])
            else:
                base = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[args.dtype])
                model = QuietStarForCausalLM(base, QuietStarConfig(thought_length=0))
            if model.get_input_embeddings().weight.shape[0] != rows:
                raise ValueError(f"{name} = {folder!r}: has another vocabulary than the model")
            return model.to(args.device)

        return Contestant(name, load, conditions, plain="without" in conditions)

    found = [Contestant("model", loaded.pop, {way: NAMES[way] for way in NAMES if way in ways})]
    if args.before is not None:
        found.append(other("before", args.before, {"without": "base"}))
    for given in args.control:
        name, equals, folder = given.partition("=")
        taken = {condition for x in found for condition in x.conditions.values()}
        if not equals or not name or not folder or name in {"base", *NAMES.values(), *taken}:
            raise ValueError(f"control = {given!r}: must be NAME=FOLDER, the name of its own")
        thinks = (Path(folder) / checkpoint.DESCRIPTION).is_file()
        found.append(other(name, folder, {"thoughts" if thinks else "without": name}))
    if isinstance(task, PlainText):
        reference = reference_of(args)
        judge = found[0] if args.before is None else found[1]
        if reference not in judge.conditions.values():
            raise ValueError("conditions: must hold without, which says what tokens are hard; or give before")
        judge.conditions[SMOOTHED] = f"{reference}, smoothed"
    return found
