"""From tokens to what a client receives: text, stop strings, usage."""

from __future__ import annotations

from dataclasses import dataclass

from muxserve.gateway.detokenizer import Detokenizer
from muxserve.gateway.requests import UNFINISHED, Batch
from muxserve.gateway.stops import StopMatcher
from muxserve.v1 import common_pb2, inference_pb2


@dataclass(slots=True)
class Output:
    """The answer to one request as it grows."""

    request_id: str
    prompt_tokens: int
    detokenizer: Detokenizer
    stops: StopMatcher | None
    """None: no string ends it."""
    sent: int = 0
    """Tokens in earlier messages."""

    def respond(self, batch: Batch) -> inference_pb2.GenerateResponse:
        """The next message. Its finish_reason is STOP if a stop string was found: then this is the last.

        Tokens after the one that completed the stop string are dropped and not counted.
        """
        finish_reason, ends = batch.finish_reason, batch.finish_reason != UNFINISHED
        count, stop = len(batch.token_ids), None
        if self.stops is None:
            text = self.detokenizer.push_all(batch.token_ids)
            if ends:
                text += self.detokenizer.flush()
        else:
            text, count, stop = self._scan(self.stops, batch.token_ids, ends)
            if stop is not None:
                finish_reason = common_pb2.FINISH_REASON_STOP
        response = inference_pb2.GenerateResponse(
            request_id=self.request_id,
            index=self.sent,
            token_ids=batch.token_ids[:count],
            text=text,
            logprobs=batch.logprobs[:count],
            finish_reason=finish_reason,
        )
        self.sent += count
        if finish_reason != UNFINISHED:
            response.usage.prompt_tokens = self.prompt_tokens
            response.usage.completion_tokens = self.sent
            response.stop_string = stop or ""
        return response

    def _scan(self, stops: StopMatcher, token_ids: list[int], ends: bool) -> tuple[str, int, str | None]:
        """The text of these tokens up to a stop string, how many tokens it took, and the stop string."""
        texts = []
        for count, token_id in enumerate(token_ids, 1):
            scan = stops.push(self.detokenizer.push(token_id))
            texts.append(scan.text)
            if scan.stop is not None:
                return "".join(texts), count, scan.stop
        stop = None
        if ends:
            scan = stops.push(self.detokenizer.flush())
            stop = scan.stop
            texts += (scan.text, stops.flush() if stop is None else "")
        return "".join(texts), len(token_ids), stop
