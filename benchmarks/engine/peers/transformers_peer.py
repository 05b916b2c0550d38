"""transformers' `generate` as a contender: `python -m benchmarks.engine.peers.transformers_peer …`."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import transformers

from benchmarks.engine.peers.wire import Generate, Prompts, Stopwatch, Timing, serve


class _Watch(transformers.StoppingCriteria):
    """Never stops anything: it is called once for every token."""

    def __init__(self, clock: Stopwatch) -> None:
        self._clock = clock

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self._clock.arrived([(row, [token]) for row, token in enumerate(ids[:, -1].tolist())])
        return torch.zeros(len(ids), dtype=torch.bool)


def start(options: argparse.Namespace) -> tuple[Generate, dict[str, Any]]:
    """Loads the model."""
    torch.set_num_threads(options.threads)
    # Of a type that is known when the checkpoint is read.
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)

    def generate(prompts: Prompts, new: int) -> Timing:
        clock = Stopwatch(len(prompts))
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=new,
                max_new_tokens=new,
                stopping_criteria=[_Watch(clock)],
            )
        return clock.timing(new)

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return generate, {**versions, "threads": torch.get_num_threads()}


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    serve(lambda: start(options))


if __name__ == "__main__":
    main()
