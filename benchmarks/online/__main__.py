"""`python -m benchmarks.online`: popularity flips on two workers of one core each, and models follow.

Six models, skewed by alpha = 2.1; each worker has room for the weights of three. The rate is half of what
both workers serve together when flooded: the most popular model takes most of one of them, and it matters who
is there beside it. In the middle of a run the order of popularity is reversed. (Where the model that was
least popular is beside the most popular one, and nothing else is, the order can be reversed and nothing has
to be moved: with five models that is the best placement for both.) It is measured how long it takes until
requests are served within their objective (8 times the time alone) as often as 0.9 of what the best static
placement for the new popularity does with the same arrivals, and how often they are from the 45th
(`--quick`) or 60th second on:

- with rebalancing on;
- by hand: nothing is moved by itself, an operator calls `muxserve rebalance` ten seconds after the flip and
  every five seconds from then on.

The best static placement is the best of several that get the arrivals after the flip in the same run and are
not changed: what the advisor came to, the most popular model with the two that are asked for least, models by
turns, and what there was before the flip, which shows whether anything has to be moved at all. The last line
is one JSON object.

Both workers are on the same machine: where it is slower for a while, one run has it and another has not. The
same placement with the same arrivals met 82 and 98% in two runs at six tenths of what is served when flooded.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.engine import machine
from benchmarks.engine.contender import ContenderFailed
from benchmarks.engine.lineup import CannotRun
from benchmarks.engine.run import default_model
from benchmarks.online.experiment import QUICK, Experiment, Plan
from benchmarks.online.figures import judge
from benchmarks.online.pictures import plot
from muxserve.bench.targets import Failed

RESULTS = Path(__file__).parents[1] / "results" / "online"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="within eleven minutes")
    parser.add_argument("--model", type=Path, help="GGUF file (default: SmolLM2 of the demo)")
    parser.add_argument("--rate", type=float, help="requests per second (default: by what can be served)")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, help=f"folder for raw JSON and plots, such as {RESULTS.name}/")
    parser.add_argument("--logs", type=Path, help="keep the services' logs there")
    return parser.parse_args()


def main() -> int:
    """Exit code 1 if it could not be measured."""
    options = _arguments()
    plan = replace(QUICK if options.quick else Plan(), seed=options.seed)
    if options.out is not None:  # that it cannot be written is better known now than in the end
        options.out.mkdir(parents=True, exist_ok=True)
    try:
        checkpoint = options.model or default_model()
        described, others = machine.describe(), machine.Others([os.getpid()])
        with TemporaryDirectory(prefix="muxserve-online-") as scratch:
            experiment = Experiment(plan, checkpoint, options.logs or Path(scratch))
            found = asyncio.run(experiment.run(options.rate))
    except (ContenderFailed, CannotRun, Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    record = {"environment": described | {"other_cores": others.cores()}, "plan": asdict(plan)}
    record |= judge(plan, found)
    if options.out is not None:
        name = "online-quick" if options.quick else "online"
        (options.out / f"{name}.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
        plot(record, options.out / f"{name}.png")
    print(json.dumps(record["summary"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
