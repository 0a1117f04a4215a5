"""Read what `qstar eval` is asked for: its options, and the task and models that they name."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoModelForCausalLM
from transformers.hf_argparser import HfArg

from qstar import checkpoint
from qstar.cli.common_options import DTYPES, CheckpointArguments
from qstar.config import QuietStarConfig
from qstar.data import DataArguments, document_text, load_records, read_text
from qstar.evaluation import questions
from qstar.evaluation.direct import DirectAnswers
from qstar.evaluation.majority import MajorityVote
from qstar.evaluation.predictions import WAYS, evaluated
from qstar.evaluation.run import Contestant, Task
from qstar.evaluation.text import SMOOTHED, PlainText, spans
from qstar.model import QuietStarForCausalLM
from qstar.option_checks import check_choice, check_least
from qstar.reporting import jsonl
from qstar.reporting.benchmark_record import check_device
from qstar.supported import context_length

_T = TypeVar("_T")

# a task's own data: name on the hub, configuration, split
DATA = {
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "gsm8k_cot": ("openai/gsm8k", "main", "test"),
    "commonsense_qa": ("tau/commonsense_qa", None, "validation"),
    "choice": (None, None, None),
    "text": (None, None, None),
}
NAMES = {"without": "w = 0", "pause": "pause", "shuffled": "shuffled thoughts", "thoughts": "thoughts"}


@dataclass
class EvalArguments(CheckpointArguments):
    """What is evaluated, and on what."""

    task: str = HfArg(help=f"One of {', '.join(DATA)}.")
    data: str | None = HfArg(
        default=None, help="A .jsonl or text file, or a name on the hub; default: the task's."
    )
    data_config: str | None = HfArg(default=None, help="Configuration of a name on the hub.")
    data_split: str | None = HfArg(default=None, help="Split of a name on the hub.")
    before: str | None = HfArg(default=None, help="The base model before training: the condition base.")
    control: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME=FOLDER of other models, for instance trained without thoughts."},
    )
    conditions: list[str] = field(
        default_factory=list, metadata={"help": f"Some of {', '.join(WAYS)}; default: all that the task has."}
    )
    limit: int | None = HfArg(default=None, help="Only the first so many questions or spans.")
    batch_size: int = HfArg(default=8, help="Questions or spans read together.")
    thought_temperature: float = HfArg(default=0.0, help="Temperature of the thoughts; 0 is argmax.")
    truncate_prompt: bool = HfArg(default=False, help="Cut a question that is too long on the left.")
    seed: int = HfArg(default=0, help="Seed of sampling, shuffling and the intervals.")
    output: str | None = HfArg(
        default=None, help="JSONL file of each question's figures; resumed if it exists."
    )
    device: str = HfArg(default="cpu", help="cpu or cuda.")
    dtype: str = HfArg(default="float32", help=f"Data type of the weights: {', '.join(DTYPES)}.")

    def __post_init__(self) -> None:
        check_choice(self, task=DATA, dtype=DTYPES)
        check_least(self, limit=1, batch_size=1)
        check_device(self.device)
        if (self.data or DATA[self.task][0]) is None:
            raise ValueError(f"data = None: must be given, the task {self.task} has none of its own")


@dataclass
class SpanArguments:
    """Options of the task text."""

    span_length: int = HfArg(default=256, help="Tokens read at once; a longer text is cut into spans.")
    tokens_per_span: int | None = HfArg(
        default=None, help="Score so many random tokens of a span; default: all."
    )
    text_field: str = HfArg(default="text", help="Field of a record that holds the text.")
    template: str | None = HfArg(default=None, help="Text of a record from its fields, instead of one field.")


@dataclass
class ChainArguments:
    """Options of the task gsm8k_cot."""

    votes: int = HfArg(default=8, help="Chains of thought per question, of which the majority counts.")
    temperature: float = HfArg(default=0.9, help="Temperature of the chains.")
    chain_tokens: int = HfArg(default=384, help="Most tokens in a chain.")


def _records(args: EvalArguments) -> list[tuple[int, dict[str, Any]]]:
    """Return the numbered records of a JSONL file or a data set of the hub."""
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


def _texts(args: EvalArguments, text: SpanArguments) -> list[str]:
    path = Path(str(args.data))
    if path.is_file() and path.suffix != ".jsonl":
        return [read_text("data", str(path))]
    return [document_text(record, text.text_field, text.template) for _, record in _records(args)]


def read_task(
    args: EvalArguments,
    text: SpanArguments,
    chain: ChainArguments,
    tokenizer: Any,
    model: QuietStarForCausalLM,
) -> tuple[DirectAnswers | MajorityVote | PlainText, dict[str, Any], int]:
    """Return the task, the settings that a file of its results must agree in, and how many questions are
    cut. Raises ValueError for data that are unreadable, of another format or too few."""
    names = ("task", "batch_size", "thought_temperature", "seed", "dtype")
    settings = {name: getattr(args, name) for name in names}
    task: DirectAnswers | MajorityVote | PlainText
    cut = 0
    if args.task == "text":
        found = spans(_texts(args, text), tokenizer, text.span_length, text.tokens_per_span, args.seed)
        task = PlainText(found[: args.limit])
        clusters = len({span.cluster for span in task.items})
    else:
        read = questions.gsm8k if args.task.startswith("gsm8k") else questions.choice
        asked = _each(read, _records(args)[: args.limit])
        clusters = len(asked)
        if args.task == "gsm8k_cot":
            settings |= asdict(chain)
            task = MajorityVote([question for _, question in asked], tokenizer, **asdict(chain))
        else:
            whole = [item for _, item in _each(questions.Tokens(tokenizer).item, asked)]
            context = context_length(model.config)
            longest = None if context is None else context + 1 - evaluated(model.quiet_star).slots
            items, cut = questions.fitted(whole, longest, args.truncate_prompt)
            task = DirectAnswers(items)
    if clusters < 2:
        raise ValueError(f"data: {clusters} question or text in all: an interval needs at least 2")
    described = json.dumps([asdict(item) for item in task.items])
    return task, settings | {"questions": hashlib.sha256(described.encode()).hexdigest()}, cut


def _each(read: Callable[[Any], _T], numbered: list[tuple[int, Any]]) -> list[tuple[int, _T]]:
    """Read each. Raises ValueError with the number of the record that cannot be read."""
    found = []
    for number, given in numbered:
        try:
            found.append((number, read(given)))
        except ValueError as error:
            raise ValueError(f"data: record {number} {error}") from error
    return found


def reference_of(args: EvalArguments) -> str:
    """Return the condition whose NLL says which tokens are hard."""
    return NAMES["without"] if args.before is None else "base"


def contestants(args: EvalArguments, task: Task, loaded: list[QuietStarForCausalLM]) -> list[Contestant]:
    """Return the model, which is loaded, then the one before and the controls. Raises ValueError for a name
    that is taken and a condition that the task does not have."""
    allowed = [way for way in NAMES if way in task.ways]
    for way in args.conditions:
        if way not in allowed:
            raise ValueError(f"conditions = {way!r}: the task {args.task} has {', '.join(allowed)}")
    own = {way: NAMES[way] for way in allowed if way in (args.conditions or allowed)}
    found = [Contestant("model", loaded.pop, own)]
    vocabulary = loaded[0].get_input_embeddings().weight.shape[0]

    def other(name: str, folder: str, conditions: dict[str, str]) -> Contestant:
        plain = "without" in conditions

        def load() -> QuietStarForCausalLM:
            if plain:
                base = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[args.dtype])
                model = QuietStarForCausalLM(base, QuietStarConfig(thought_length=0))
            else:
                model = QuietStarForCausalLM.from_pretrained(folder, dtype=DTYPES[args.dtype])
            if model.get_input_embeddings().weight.shape[0] != vocabulary:
                raise ValueError(f"{name} = {folder!r}: has another vocabulary than the model")
            return model.to(args.device)

        return Contestant(name, load, conditions, plain)

    if args.before is not None:
        found.append(other("before", args.before, {"without": "base"}))
    for given in args.control:
        name, equals, folder = given.partition("=")
        taken = {"base", *NAMES.values(), *(name for x in found for name in x.conditions.values())}
        if not equals or not name or not folder or name in taken:
            raise ValueError(f"control = {given!r}: must be NAME=FOLDER, with a name of its own")
        thinks = (Path(folder) / checkpoint.DESCRIPTION).is_file()
        found.append(other(name, folder, {"thoughts" if thinks else "without": name}))
    if isinstance(task, PlainText):
        reference = reference_of(args)
        judge = found[0] if args.before is None else found[1]
        if reference not in judge.conditions.values():
            raise ValueError(
                "conditions: must include without, which says what tokens are hard; or give before"
            )
        judge.conditions[SMOOTHED] = f"{reference}, smoothed"
    return found
