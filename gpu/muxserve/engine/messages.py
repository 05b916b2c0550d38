"""Messages between a worker and its executors: msgspec structs, msgpack, one per SOCK_SEQPACKET datagram.

Executors keep no state of a sequence: jobs name slots and positions, tokens and KV are in memory that both
sides map. So a restarted executor needs `AttachArena` and `AddModel` and nothing else.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from muxserve.engine.spec import KVLayout, ModelSpec


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token of one sequence is chosen. Ranges are checked by the gateway."""

    temperature: float = 1.0
    """0 = greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 = off."""
    min_p: float = 0.0
    seed: int = 0
    """uint64; with the position it is the key of the random number."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    prompt_length: int = 0
    """Tokens of the client's prompt: penalties on output tokens count positions from here on."""
    logprobs: int = -1
    """-1 = none, 0 = of the chosen token, k = and of the k most likely ones."""
    stop_token_ids: tuple[int, ...] = ()


WeightLayout = Literal["canonical", "panels"]
"""How matrices lie in weight memory: rows as they are, for the reference decoder and the GPU, or packed for
the CPU engine (see `muxserve.engine.checkpoint.canonical`)."""


class TensorEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Where one tensor lies in a model's weight memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Byte offset, a multiple of 64."""


class AttachArena(msgspec.Struct, frozen=True, tag=True):
    """First message. One file descriptor comes with it: the arena."""

    block_bytes: int
    blocks: int
    cuda_handle: bytes = b""
    """A cudaIpcMemHandle instead of the descriptor, on a GPU."""


class AddModel(msgspec.Struct, frozen=True, tag=True):
    """Two file descriptors come with it: weights, then tables. With `weights_handle` the tables' alone."""

    model: str
    spec: ModelSpec
    layout: KVLayout
    slots: int
    context: int
    """Tokens of the longest sequence that is served: the width of the tables."""
    weights: tuple[TensorEntry, ...]
    weight_layout: WeightLayout = "canonical"
    weights_handle: bytes = b""
    """A cudaIpcMemHandle of the weights instead of their descriptor, on a GPU."""


class RemoveModel(msgspec.Struct, frozen=True, tag=True):
    model: str


class Shares(msgspec.Struct, frozen=True, omit_defaults=True):
    """Compute shares, in (0, 1], of the jobs of both kinds that run now; 0 = none of that kind runs.

    What they come to is the runner's to say: cores are split by them (`shares.split_cores`), a GPU has lanes
    (`cuda.lanes.Partition`). A job whose own share is 0 was told nothing, and runs as if alone.
    """

    prefill: float = 0.0
    decode: float = 0.0
    decoding: int = 1
    """Decode jobs that run, which have the share of theirs in equal parts."""


class PrefillChunk(msgspec.Struct, frozen=True):
    """Tokens `[start, end)` of `slot`. `sampling` is given for the chunk that ends the known tokens: the
    token at position `end` is then sampled and written to the token table."""

    slot: int
    start: int
    end: int
    limit: int
    """Sequence length at which it finishes with LENGTH."""
    sampling: Sampling | None = None


class PrefillJob(msgspec.Struct, frozen=True, tag=True):
    job: int
    model: str
    chunks: tuple[PrefillChunk, ...]
    shares: Shares = Shares()
    """To begin with; UseShares changes them."""
    lead: float = 0.0
    """Seconds before its end when `NearsEnd` is to tell of it, if the runner can. 0: never."""


class DecodeRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """`length` tokens of `slot` are known, KV of `length - 1` of them, or of fewer, is written."""

    slot: int
    length: int
    limit: int
    sampling: Sampling
    start: int = -1
    """The first token whose KV is not written: it is computed with those after it in the first step, in the
    same pass as the other rows. -1: the last known one alone. A GPU takes nothing else."""


class DecodeJob(msgspec.Struct, frozen=True, tag=True):
    """Up to `steps` steps. A row that finishes leaves the batch; the others go on."""

    job: int
    model: str
    rows: tuple[DecodeRow, ...]
    steps: int
    shares: Shares = Shares()


class EndLease(msgspec.Struct, frozen=True, tag=True):
    """End that decode job after the step that is running."""

    job: int


class UseShares(msgspec.Struct, frozen=True, tag=True):
    """Go on with that job on its part by these shares, from its next step (decode) or layer (prefill) on."""

    job: int
    shares: Shares


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    pass


Command = AttachArena | AddModel | RemoveModel | PrefillJob | DecodeJob | EndLease | UseShares | Shutdown


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Natural logarithms under the model's own distribution (before penalties, temperature and filters)."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


UNFINISHED, STOP, LENGTH = 0, 1, 2


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The executor has mapped the arena and takes jobs."""

    pid: int
    device: str
    partition: str
    """Partition backend chosen at start: "threads", "none", "green_contexts", "mps"."""


class ModelAdded(msgspec.Struct, frozen=True, tag=True):
    model: str
    error: str = ""


class ModelRemoved(msgspec.Struct, frozen=True, tag=True):
    model: str


class Step(msgspec.Struct, frozen=True, tag=True):
    """Tokens of one decode step, or of the sequences whose prompt a prefill job ended. Parallel arrays."""

    job: int
    slots: tuple[int, ...]
    positions: tuple[int, ...]
    tokens: tuple[int, ...]
    finished: tuple[int, ...]
    """UNFINISHED, STOP or LENGTH."""
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    """Empty if no row asked."""
    failed: tuple[int, ...] = ()
    """Slots that left the job without a token, because their logits are not finite."""


class NearsEnd(msgspec.Struct, frozen=True, tag=True):
    """A prefill job will soon have ended: at most once, before its Step and JobDone."""

    job: int


class JobDone(msgspec.Struct, frozen=True, tag=True):
    job: int
    steps: int
    seconds: float
    error: str = ""
    """Not empty: the job failed for a reason of its own (the executor lives on)."""


Report = Ready | ModelAdded | ModelRemoved | NearsEnd | Step | JobDone
