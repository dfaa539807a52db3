"""Roll out with an engine over HTTP: vLLM, SGLang, or `minglm serve` (paper 3.5: inference on GPUs of its own).

    --rollout_engine http://HOST:PORT        which engine it is, GET /v1/models says: owned_by vllm, sglang or minglm

                    vLLM, minglm                                     SGLang
    generate        POST /v1/completions                             POST /generate
                    prompt = ids, return_token_ids, logprobs = 0     input_ids, return_logprob, sampling_params
                    -> choices[0]: token_ids, logprobs               -> meta_info.output_token_logprobs
    new weights     vLLM: POST /pause, /collective_rpc, /resume      POST /update_weights_from_disk
                    minglm: as SGLang                                {model_path, weight_version}
                    or without a disk, as `minglm.inference.weight_transfer` says
    cancelled       the connection is closed                         the same

Tokens in, tokens out: nothing is tokenized by the engine, and the log-probabilities are those of the
distribution that was sampled from. The weights travel as a released checkpoint in the run's folder, which
engine and trainer both see, or with --rollout_weights tensors (SGLang, minglm) or broadcast (SGLang, vLLM)
without a disk.

Fields were read from vLLM's `entrypoints/openai/completion/protocol.py` (commit 002032e),
`entrypoints/serve/dev/rlhf/ api_router.py` (0100a21) and worker (`reload_weights`), and SGLang's
`srt/entrypoints/http_server.py` (0025436) and `srt/managers/io_struct.py`; no GPU was at hand, so the real
engines have not been run. They are started so:

    VLLM_SERVER_DEV_MODE=1 vllm serve CHECKPOINT --logprobs-mode processed_logprobs
    python -m sglang.launch_server --model-path CHECKPOINT --skip-tokenizer-init
    python -m minglm serve RUN --weights-from RUN/rollout_weights       or --accept-weights, for tensors

Choices
- An answer whose prompt the engine reports otherwise, that holds an id without a log-probability, or that stopped without
  a stop token, is refused: such an engine has another tokenizer or another idea of the request. With SGLang every answer
  also names the version of its weights, so a second trainer on one engine is noticed at its first update.
- What the engine cannot be asked for in these words (a grammar, a budget of reasoning, penalties) is refused by name.

A sharded trainer never has its weights whole: it writes them rank by rank, or gathers and sends them bucket
by bucket. Its first rank speaks to the engine, and each asks for the answers that it is dealt.
"""

import asyncio
import math
import shutil
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from minglm.common.mistakes import shown
from minglm.common.ranks import Ranks
from minglm.config.run import WeightTransfer
from minglm.data.tokenizer import Tokenizer
from minglm.inference.request import AnswerFailed, Completion, FinishReason, Request
from minglm.inference.weight_transfer import (
    BroadcastSender,
    Sender,
    TensorSender,
    VLLMSender,
    in_buckets,
    paused,
)
from minglm.model.glm import GLM
from minglm.model.hf.write import released_tensors, write_stream

if TYPE_CHECKING:  # httpx is an optional package, imported where it is used
    import httpx

JSONObject = dict[str, Any]

UPDATE_SECONDS = 3600.0
ANSWER_SECONDS = 24 * 3600.0
KEPT_UPDATES = 2
"""Checkpoints that stay on disk: an engine may still be reading the one before."""


class EngineKind(StrEnum):
    """Whose engine it is, as its list of models says."""

    VLLM = "vllm"
    """vLLM's `vllm serve`."""
    SGLANG = "sglang"
    """SGLang's `launch_server`."""
    MINGLM = "minglm"
    """The server of this package."""


class RemoteGenerator:
    """A `Generator` over an engine that answers HTTP.

    model: has the shape of all weights. folder: where checkpoints are written for the engine. weights: the
    first ones; None: those of the model. dtype: in which they are written; None: as they are. ranks: all of a
    trainer, which call every method but `generate` together. transfer: the way of the weights.
    Raises ValueError, in one line, for an engine that is not there, that cannot read the weights, or of another size.
    """

    def __init__(
        self,
        url: str,
        model: GLM,
        tokenizer: Tokenizer,
        folder: Path,
        weights: Mapping[str, Tensor] | None = None,
        dtype: str | None = None,
        ranks: Ranks | None = None,
        transfer: WeightTransfer = WeightTransfer.DISK,
    ) -> None:
        self.url = url.rstrip("/")
        self.model = model
        self.tokenizer = tokenizer
        self.folder = folder
        self.dtype = dtype
        self.ranks = ranks or Ranks()
        self.updates = 0
        """Checkpoints that were written; the engine calls its weights by this number."""
        self.version = 0
        """By which the tokens are marked."""
        self.clients: dict[asyncio.AbstractEventLoop, httpx.AsyncClient] = {}
        entry = self.ranks.first(self._served)
        self.kind = EngineKind(entry["owned_by"])
        self.name: str = entry["id"]
        limit = min(entry["max_model_len"], model.config.max_position_embeddings)
        self.limit: int = limit
        self.sender: Sender | None = None
        """Of the first rank, where weights do not go by disk."""
        self.transfer = transfer
        self.ranks.first(self._prepare_sender)
        self.update_weights(model.state_dict() if weights is None else weights)

    def _served(self) -> JSONObject:
        """Return what the engine says of its model. Raises ValueError for one that cannot be used."""
        entry = _first(self._call("GET", "/v1/models").get("data"))
        kinds = [str(kind) for kind in EngineKind]
        if entry.get("owned_by") not in kinds:
            raise ValueError(
                f"rollout_engine = {self.url}: owned by {entry.get('owned_by')!r}; it must be one of {', '.join(kinds)}"
            )
        limit = entry.get("max_model_len")
        if not isinstance(limit, int) or limit < 2:
            raise ValueError(
                f"rollout_engine = {self.url}: it does not say max_model_len; use a newer {entry['owned_by']}"
            )
        if not isinstance(entry.get("id"), str):
            raise ValueError(f"rollout_engine = {self.url}: it does not say the name of its model")
        return entry

    @property
    def max_model_len(self) -> int:
        """Return the largest number of tokens of prompt and answer together."""
        return self.limit

    async def generate(self, request: Request) -> Completion:
        """Answer one request. Raises ValueError for one that cannot be asked for in the engine's words."""
        request.check(self.limit)
        refuse_unsupported(request)
        if self.kind is EngineKind.SGLANG:
            answer = await self._post("/generate", self._sglang_body(request))
            return self._checked_end(self._read_sglang(answer), request)
        answer = await self._post("/v1/completions", self._completions_body(request))
        return self._checked_end(self._read_completions(answer, request), request)

    def _checked_end(self, completion: Completion, request: Request) -> Completion:
        """Return an answer.

        Raises ValueError for one that is said to have stopped, without the token that stops it: all would earn nothing.
        """
        last = completion.tokens[-1]
        if completion.finish_reason == FinishReason.STOP and last not in self._stops(request):
            raise ValueError(
                f"rollout_engine = {self.url}: an answer ended with 'stop' at id {last}, which ends none of the run's;"
                " the engine leaves the stop token out, or stops for a reason of its own"
            )
        return completion

    async def _post(self, path: str, body: JSONObject) -> JSONObject:
        """Return the answer to a request.

        Raises `AnswerFailed` where the engine fails at it, ValueError otherwise.
        """
        import httpx

        loop = asyncio.get_running_loop()
        client = self.clients.get(loop)
        if client is None:
            # A rollout has a loop of its own; the connections of the last one ended with it.
            limits = httpx.Limits(max_connections=None)
            client = httpx.AsyncClient(timeout=ANSWER_SECONDS, limits=limits, trust_env=False)
            self.clients = {loop: client}
        try:
            response = await client.post(self.url + path, json=body)
        except httpx.TransportError as error:
            raise ValueError(
                f"rollout_engine = {self.url}: {error or type(error).__name__}"
            ) from error
        if response.status_code >= 500:
            raise AnswerFailed(f"{self.url}{path}: status {response.status_code}")
        return self._checked(response, path)

    def _completions_body(self, request: Request) -> JSONObject:
        return {
            "model": self.name,
            "prompt": request.prompt,
            "max_tokens": self._room(request),
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k or -1,
            "min_p": request.min_p,
            "seed": request.seed,
            "stop_token_ids": list(self._stops(request)),
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            "add_special_tokens": False,
            "skip_special_tokens": self.kind is EngineKind.MINGLM,  # has no effect on ids
        }

    def _read_completions(self, answer: JSONObject, request: Request) -> Completion:
        choice = _first(_field(answer, "choices", list))
        tokens = _field(choice, "token_ids", list)
        if choice.get("prompt_token_ids", request.prompt) != request.prompt:
            raise ValueError(
                f"rollout_engine = {self.url}: it has read another prompt than the ids it was sent; is its"
                " tokenizer the run's?"
            )
        logprobs = _field(_field(choice, "logprobs", dict), "token_logprobs", list)
        return self._completion(tokens, logprobs, choice.get("finish_reason"))

    def _sglang_body(self, request: Request) -> JSONObject:
        return {
            "input_ids": request.prompt,
            "sampling_params": {
                "max_new_tokens": self._room(request),
                "temperature": request.temperature,
                "top_p": request.top_p,
                "top_k": request.top_k or -1,
                "min_p": request.min_p,
                "sampling_seed": request.seed,
                "stop_token_ids": list(self._stops(request)),
                "ignore_eos": True,
                "skip_special_tokens": False,
                "no_stop_trim": True,
            },
            "return_logprob": True,
            "logprob_start_len": -1,
            "stream": False,
        }

    def _read_sglang(self, answer: JSONObject) -> Completion:
        about = _field(answer, "meta_info", dict)
        version = about.get("weight_version")
        if version != str(self.updates):
            raise ValueError(
                f"rollout_engine = {self.url}: it answers with weights of version {version!r}, not {self.updates};"
                " does another run update it?"
            )
        drawn = _field(about, "output_token_logprobs", list)
        reason = _field(about, "finish_reason", dict).get("type")
        try:
            logprobs, tokens = zip(*(entry[:2] for entry in drawn), strict=True)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"rollout_engine = {self.url}: output_token_logprobs must hold [log-probability, id, ...]"
            ) from error
        return self._completion(tokens, logprobs, reason)

    def _completion(
        self, tokens: Sequence[Any], logprobs: Sequence[Any], reason: Any
    ) -> Completion:
        """Return an answer.

        Raises `AnswerFailed` for one that went wrong, ValueError for one that is none.
        """
        if reason not in (FinishReason.STOP, FinishReason.LENGTH):
            raise AnswerFailed(f"{self.url}: the answer ended with {reason!r}")
        whole = all(isinstance(logprob, int | float) for logprob in logprobs)
        if len(tokens) != len(logprobs) or not whole:
            raise ValueError(
                f"rollout_engine = {self.url}: {len(tokens)} ids came with {len(logprobs)} log-probabilities"
            )
        size = self.model.config.vocab_size
        for token in tokens:
            if type(token) is not int or not 0 <= token < size:
                raise ValueError(
                    f"rollout_engine = {self.url}: it answers with id {shown(token)}, and the run's model has"
                    f" {size}: it serves another model"
                )
        if not all(map(math.isfinite, logprobs)):
            raise AnswerFailed(f"{self.url}: a log-probability of the answer is not finite")
        return Completion(
            list(tokens),
            [float(p) for p in logprobs],
            FinishReason(reason),
            versions=[self.version] * len(tokens),
        )

    def _room(self, request: Request) -> int:
        return min(request.max_new_tokens, self.limit - len(request.prompt))

    def _stops(self, request: Request) -> tuple[int, ...]:
        return self.tokenizer.stop_ids if request.stop_ids is None else request.stop_ids

    def update_weights(self, weights: Mapping[str, Tensor], version: int = 0) -> None:
        """Write the weights as a released checkpoint, and have the engine read it.

        Raises ValueError if it does not.

        version: by which the tokens they draw are marked.
        """
        self.version = version
        self.updates += 1
        if self.transfer != WeightTransfer.DISK:
            self._send_weights(weights)
            return
        folder = self.folder.resolve() / f"update_{self.updates}"
        self.ranks.first(lambda: _make_empty(folder))
        config, origin = self.model.config, self.model.checkpoint_origin
        write_stream(config, origin, weights, folder, self.dtype, self.ranks)
        self.ranks.first(lambda: self._announce(folder))

    def _prepare_sender(self) -> None:
        """Make what sends weights without a disk.

        Raises ValueError, in one line, where the engine takes none.
        """
        if self.transfer == WeightTransfer.DISK:
            return
        match self.kind, self.transfer:
            case EngineKind.MINGLM, WeightTransfer.TENSORS:
                self.sender = TensorSender(self._call)
            case EngineKind.SGLANG, WeightTransfer.TENSORS:
                ranks = self._size("/get_server_info", "tp_size")
                self.sender = TensorSender(self._call, ranks)
            case EngineKind.SGLANG, WeightTransfer.BROADCAST:
                ranks = self._size("/get_server_info", "tp_size")
                backend = "nccl" if self.model.device.type == "cuda" else "gloo"
                self.sender = BroadcastSender(self._call, self.url, ranks, backend)
            case EngineKind.VLLM, WeightTransfer.BROADCAST:
                workers = self._size("/get_world_size", "world_size")
                self.sender = VLLMSender(self._call, self.url, workers, self.model.device)
            case _:
                raise ValueError(
                    f"rollout_weights = {self.transfer}: {self.kind}, which answers at {self.url}, takes no such weights; "
                    "use rollout_weights = disk"
                )

    def _size(self, path: str, name: str) -> int:
        """Return over how many GPUs the engine has divided its model."""
        found = self._call("GET", path).get(name)
        if not isinstance(found, int):
            raise ValueError(f"rollout_engine = {self.url}: it does not say its {name}")
        return found

    def _send_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Send the weights bucket by bucket; all ranks gather each tensor, and the first one sends it."""
        if self.kind == EngineKind.MINGLM:
            named = weights.items()
        else:
            config, origin = self.model.config, self.model.checkpoint_origin
            named = released_tensors(config, origin, weights, self.dtype)
        failure: list[ValueError] = []
        buckets = in_buckets(named)
        if self.sender is not None:
            try:
                self.sender.send(buckets, str(self.updates))
            except ValueError as error:
                failure.append(error)
        for _ in buckets:  # gathered together with the rank that sends, also after a failure
            pass

        def tell() -> None:
            if failure:
                raise ValueError(f"rollout_engine = {self.url}: {failure[0]}")

        self.ranks.first(tell)

    def _announce(self, folder: Path) -> None:
        """Have the engine read the weights in a folder, and remove old ones."""
        if self.kind is EngineKind.VLLM:
            reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            with paused(self._call):
                self._call("POST", "/collective_rpc", reload)
                self._call("POST", "/reset_prefix_cache")
        else:
            body = {"model_path": str(folder), "weight_version": str(self.updates)}
            done = self._call("POST", "/update_weights_from_disk", body)
            if done.get("success") is not True:
                raise ValueError(f"rollout_engine = {self.url}: {done.get('message')}")
        shutil.rmtree(self.folder / f"update_{self.updates - KEPT_UPDATES}", ignore_errors=True)

    def _call(self, verb: str, path: str, body: JSONObject | None = None) -> JSONObject:
        """Call the engine outside a rollout, and return its answer. Raises ValueError, in one line."""
        import httpx

        try:
            with httpx.Client(timeout=UPDATE_SECONDS, trust_env=False) as client:
                response = client.request(verb, self.url + path, json=body)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise ValueError(f"rollout_engine = {self.url}: {error}") from None
        return self._checked(response, path)

    def _checked(self, response: "httpx.Response", path: str) -> JSONObject:
        """Return the JSON of a response. Raises ValueError for another status than 200."""
        if response.status_code == 404:
            raise ValueError(
                f"rollout_engine = {self.url}: it has no {path.partition('?')[0]}; it is too old, or was not started as"
                " minglm/inference/remote.py says"
            )
        if response.status_code != 200:
            raise ValueError(
                f"rollout_engine = {self.url}: {path} has status {response.status_code}: {response.text:.200}"
            )
        try:
            found = response.json()
        except ValueError:  # some commands answer with nothing
            return {}
        if not isinstance(found, dict):
            raise ValueError(f"rollout_engine = {self.url}: {path} answers with no object of JSON")
        return found

    def close(self) -> None:
        """Remove the checkpoints. Requests under way ended with their rollout's loop."""
        self.clients.clear()
        if self.sender is not None:
            self.sender.close()
        if self.ranks.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)


def _make_empty(folder: Path) -> None:
    """Make a folder, without what a run that was killed left in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def refuse_unsupported(request: Request) -> None:
    """Raise ValueError for what these engines are not asked for."""
    asked = {
        "thinking_budget": request.thinking_budget is not None,
        "prompt_logprobs": request.prompt_logprobs is not None,
        "top_logprobs": request.top_logprobs > 0,
        "a grammar, a bias or a penalty": request.changes_logits,
    }
    for name, wanted in asked.items():
        if wanted:
            raise ValueError(f"{name} is not supported with rollout_engine")


def _first(entries: Any) -> JSONObject:
    """Return the first object of a list; an empty one where there is none."""
    first = entries[0] if isinstance(entries, list) and entries else None
    return first if isinstance(first, dict) else {}


def _field(values: Any, name: str, kind: type) -> Any:
    """Return a field of an answer. Raises ValueError where it is missing or of another type."""
    found = values.get(name) if isinstance(values, dict) else None
    if not isinstance(found, kind) or not found:
        raise ValueError(
            f"rollout_engine: the answer has no {name}; the engine is too old, or was not started as"
            " minglm/inference/remote.py says"
        )
    return found
