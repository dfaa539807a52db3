"""Say how the public harnesses are run against `serve` (paper section 4).

The paper scores with public benchmarks, and so may anyone who serves a run or a released checkpoint: `serve`
speaks OpenAI's API, which lm-evaluation-harness knows under two names.

    local-completions         prompts are token ids; multiple choice by the log-probabilities of the prompt (`echo`)
    local-chat-completions    messages; the chat template is the server's, with thinking, and only answers are compared

zai-org/glm-simple-evals and SWE-bench agents speak the same chat API. What they need beside it, questions and
sandboxes, they download themselves.
"""

import shlex
from pathlib import Path

PORT = 8000


def commands(run: str) -> str:
    """Return the commands that score a model with lm-evaluation-harness, each ready to be pasted.

    run: folder of a run or of a released checkpoint. Raises ValueError if it has no tokenizer.
    """
    folders = [Path(run) / "data", Path(run)]
    tokenizer = next((folder for folder in folders if (folder / "tokenizer.json").exists()), None)
    if tokenizer is None:
        raise ValueError(f"{run} is not a run: neither it nor its folder data has a tokenizer.json")
    name = Path(run).resolve().name
    address = f"http://127.0.0.1:{PORT}/v1"
    tokens = (
        f"base_url={address}/completions,model={name},tokenizer={tokenizer},tokenized_requests=True"
    )
    chat = f"base_url={address}/chat/completions,model={name},max_gen_toks=8192"
    lines = [
        "# once: pip install 'minglm[serve,harness]'",
        f"python -m minglm serve {shlex.quote(run)} --port {PORT}",
        "",
        "# multiple choice, by log-probabilities: the model sees plain text",
        _line("local-completions", f"{tokens},num_concurrent=16", "arc_easy,hellaswag,piqa"),
        "",
        "# answers in a chat; GLM-4.5's sampler of the public evaluations",
        _line("local-chat-completions", f"{chat},num_concurrent=16", "gsm8k,ifeval")
        + " --apply_chat_template --gen_kwargs temperature=0.6,top_p=0.95",
        "",
        f"# zai-org/glm-simple-evals, SWE-bench agents and others: base URL {address}, any key, model {name}",
    ]
    return "\n".join(lines)


def _line(model: str, arguments: str, tasks: str) -> str:
    """Return one call of lm_eval."""
    return f"lm_eval --model {model} --model_args {shlex.quote(arguments)} --tasks {tasks}"
