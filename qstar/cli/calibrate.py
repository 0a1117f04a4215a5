"""`qstar calibrate`: measure on a text how uncertain the base prediction must be for a thought to pay."""

from dataclasses import asdict, dataclass, replace

from transformers.hf_argparser import HfArg

from qstar import checkpoint
from qstar.cli.common_options import TextFileArguments
from qstar.cli.options import parse_options
from qstar.cli.score import read_rows
from qstar.evaluation.calibration import threshold
from qstar.evaluation.held_out import held_out
from qstar.reporting import tables

SHARES = (0.5, 0.8, 0.9, 0.95, 0.99)


@dataclass
class CalibrateArguments(TextFileArguments):
    """Options of `qstar calibrate`."""

    keep: float = HfArg(default=0.95, help="Share of the thoughts' gain in NLL to keep.")


def main(argv: list[str]) -> int:
    (args,) = parse_options(CalibrateArguments, argv, prog="qstar calibrate")
    model, _, rows = read_rows(args)
    result = held_out(model, rows, args.batch_size, progress="calibrate")
    gain = result.base_nll - result.mixed_nll
    chosen = threshold(result.base_entropy, gain, args.keep)
    table = [asdict(threshold(result.base_entropy, gain, keep)) for keep in sorted({*SHARES, args.keep})]
    config = replace(model.quiet_star, entropy_threshold=chosen.entropy_threshold)
    checkpoint.save_config(config, args.model)
    if not args.json:
        print(tables.table(table))
        print(
            f"{len(gain)} tokens, mean gain {float(gain.mean()):.4f} nats; {args.model} now holds "
            f"entropy_threshold {chosen.entropy_threshold:.4f}: generate --think adaptive takes it"
        )
    tables.last_line({"chosen": asdict(chosen), "tokens": len(gain), "thresholds": table})
    return 0
