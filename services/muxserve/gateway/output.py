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
    stops: StopMatcher
    sent: int = 0
    """Tokens in earlier messages."""

    def respond(self, batch: Batch) -> inference_pb2.GenerateResponse:
        """The next message. Its finish_reason is STOP if a stop string was found: then this is the last.

        Tokens after the one that completed the stop string are dropped and not counted.
        """
        texts, stop, count = [], None, 0
        for token_id in batch.token_ids:
            count += 1
            scan = self.stops.push(self.detokenizer.push(token_id))
            texts.append(scan.text)
            if scan.stop is not None:
                stop = scan.stop
                break
        finish_reason = batch.finish_reason
        if stop is None and finish_reason != UNFINISHED:
            scan = self.stops.push(self.detokenizer.flush())
            stop = scan.stop
            texts += (scan.text, self.stops.flush() if stop is None else "")
        if stop is not None:
            finish_reason = common_pb2.FINISH_REASON_STOP
        response = inference_pb2.GenerateResponse(
            request_id=self.request_id,
            index=self.sent,
            token_ids=batch.token_ids[:count],
            text="".join(texts),
            logprobs=batch.logprobs[:count],
            finish_reason=finish_reason,
        )
        self.sent += count
        if finish_reason != UNFINISHED:
            response.usage.prompt_tokens = self.prompt_tokens
            response.usage.completion_tokens = self.sent
            response.stop_string = stop or ""
        return response
