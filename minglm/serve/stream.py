"""Sampled tokens to what an OpenAI client sees, token by token (no section in the paper).

    tokens -> bytes -> whole characters -> parser (chat) -> stop strings -> deltas

A delta is what one token adds: {"reasoning_content"}, {"content"}, {"tool_calls"}. An answer that is not streamed is
the sum of its deltas, so the two cannot differ. A call is one delta, sent once it is complete: half a call is of no
use, and its arguments are typed by the schema, which takes the whole value. A malformed call has no delta; the answer
names the fault in `format_error`, which OpenAI's objects do not have and their clients pass on.
"""

import codecs
import json
import secrets

from minglm.chat import Parser


class StopStrings:
    """Passes text on until the first of some strings to end has begun; holds back what may become one.

    `hit` once one has ended. The first to end, not to begin: so it does not depend on how the text is cut.
    """

    def __init__(self, stops):
        self.stops, self.held, self.hit = stops, "", False

    def feed(self, text, last=False):
        """The text that is now known to be before any stop string; with `last`, no more will follow."""
        if self.hit:
            return ""
        text, self.held = self.held + text, ""
        found = [
            (text.find(stop) + len(stop), text.find(stop)) for stop in self.stops if stop in text
        ]
        if found:
            self.hit = True
            return text[: min(found)[1]]
        keep = max(
            (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        if last or not keep:
            return text
        self.held = text[-keep:]
        return text[:-keep]


class Answer:
    """One answer to a `Job` while it grows. `reason` is None until it has ended; `error` names a format fault."""

    def __init__(self, job, tokenizer):
        self.job, self.tokenizer = job, tokenizer
        self.letters = codecs.getincrementaldecoder("utf-8")("replace")
        self.stops = StopStrings(job.stops)
        self.parser = Parser(job.tools, job.opened) if job.chat else None
        if job.prefix:
            self.parser.feed(job.prefix)
        self.ids, self.pending, self.calls, self.reasoning_tokens, self.letters_said = (
            [],
            [],
            0,
            0,
            0,
        )
        self.thinks = job.opened
        self.reason = self.error = None

    def take(self, event):
        """Take in an engine event; returns the list of deltas that it adds."""
        if self.reason is not None:
            return []
        text = ""
        if event.token is not None:
            self.ids.append(event.token)
            self._count_reasoning(event.token)
            if self.job.logprobs is not None:
                self.pending.append(event)
            if event.finish_reason != "stop":
                text = self.letters.decode(self.tokenizer.bytes([event.token]))
        if event.finish_reason is not None:
            text += self.letters.decode(b"", final=True)
        deltas = self._read(text, event.finish_reason is not None)
        if event.finish_reason in ("stop", "length") and self.reason is None:
            self.reason = event.finish_reason
        if self.calls and self.reason == "stop":
            self.reason = "tool_calls"
        if self.reason and self.parser:
            self.error = self.parser.close()["error"]
        return deltas

    def _read(self, text, last):
        if self.parser is None:
            said = self.stops.feed(text, last)
            deltas = [{"text": said}] if said else []
        else:
            events = self.parser.feed(text) + (self.parser.finish() if last else [])
            deltas = [delta for kind, value in events for delta in self._delta(kind, value)]
            rest = self.stops.feed("", last) if last else ""
            deltas += [{"content": rest}] if rest else []
        if self.stops.hit or (self.calls and not self.job.parallel):
            self.reason = "stop"
        return deltas

    def _delta(self, kind, value):
        """What a parser event adds; nothing after a stop string, or after the one call where only one is wanted."""
        if self.stops.hit or (self.calls and not self.job.parallel):
            return
        if kind == "reasoning":
            yield {"reasoning_content": value}
        elif kind == "content":
            said = self.stops.feed(value)
            if said:
                yield {"content": said}
        elif self.job.tools:
            arguments = json.dumps(value["arguments"], ensure_ascii=False)
            function = {"name": value["name"], "arguments": arguments}
            index, self.calls = self.calls, self.calls + 1
            yield {
                "tool_calls": [
                    {
                        "index": index,
                        "id": f"call_{secrets.token_hex(8)}",
                        "type": "function",
                        "function": function,
                    }
                ]
            }

    def _count_reasoning(self, token):
        special = self.tokenizer.special
        if token == special.get("<think>"):
            self.thinks = True
        self.reasoning_tokens += self.thinks
        if token == special.get("</think>"):
            self.thinks = False

    def logprobs(self):
        """The log-probabilities of the tokens since the last call, in the form of the endpoint; None without any."""
        events, self.pending = self.pending, []
        if self.job.logprobs is None or not events:
            return None
        if self.job.chat:
            return {"content": [self._chat_logprob(e) for e in events], "refusal": None}
        texts = [self._text(event.token) for event in events]
        offsets = [self.letters_said]
        for text in texts:
            offsets.append(offsets[-1] + len(text))
        self.letters_said = offsets.pop()
        return {
            "tokens": texts,
            "token_logprobs": [event.logprob for event in events],
            "top_logprobs": [{self._text(t): p for t, p in event.top_logprobs} for event in events],
            "text_offset": offsets,
        }

    def _text(self, token):
        return self.tokenizer.decode([token])

    def _chat_logprob(self, event):
        def entry(token, logprob):
            data = self.tokenizer.bytes([token])
            return {"token": self._text(token), "logprob": logprob, "bytes": list(data)}

        return entry(event.token, event.logprob) | {
            "top_logprobs": [entry(t, p) for t, p in event.top_logprobs]
        }


class Whole:
    """The sum of the deltas of one answer, as the `choices` of an answer that is not streamed hold it."""

    def __init__(self):
        self.texts, self.calls, self.logprobs = {}, [], None

    def add(self, delta, logprobs=None):
        """Add a delta, and the log-probabilities that came with it."""
        for key, value in delta.items():
            if key == "tool_calls":
                self.calls += [{k: v for k, v in call.items() if k != "index"} for call in value]
            elif isinstance(value, str):
                self.texts[key] = self.texts.get(key, "") + value
        if logprobs and self.logprobs:
            for key, values in logprobs.items():
                if values:
                    self.logprobs[key] += values
        self.logprobs = self.logprobs or logprobs

    def message(self):
        """The assistant message of a chat."""
        message = {
            "role": "assistant",
            "content": self.texts.get("content", None if self.calls else ""),
        }
        if "reasoning_content" in self.texts:
            message["reasoning_content"] = self.texts["reasoning_content"]
        if self.calls:
            message["tool_calls"] = self.calls
        return message
