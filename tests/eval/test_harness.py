"""lm-evaluation-harness against our server: three tasks made on the spot, and what it must have measured."""

import json
import shlex

import pytest
from helpers.serving import TOKENIZER, running

from minglm.eval.harness import commands
from minglm.inference import Engine, Request
from minglm.testing.model import tiny_model

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'minglm[harness]'")

QUESTIONS = [
    {"question": f"{a}+{b}=", "options": [str(a + b), str(a * b), "no"], "answer": 0}
    for a in range(2, 5)
    for b in range(3, 5)
]

CHOICE = """
task: minglm_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""

SAID = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{options[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def served():
    """Yield (address, engine of its own with the same weights) of a server of a tiny random model."""
    model = tiny_model(0, vocab_size=TOKENIZER.vocab_size)
    engine = Engine(model, TOKENIZER, max_batch=8)
    with running(engine, limit=engine.limit) as (http, _, _):
        alone = Engine(tiny_model(0, vocab_size=TOKENIZER.vocab_size), TOKENIZER)
        yield str(http.base_url).rstrip("/"), alone


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Write the tasks and their data; nothing may be downloaded."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    (tmp_path / "choice.yaml").write_text(CHOICE.format(data=data), encoding="utf-8")
    for name in ("minglm_text", "minglm_chat"):
        text = SAID.format(name=name, data=data)
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    TOKENIZER.save(tmp_path / "tokenizer.json")
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def measured(model, address, task, manager, **options):
    """Return the samples of one task."""
    arguments = {"base_url": address, "model": "tiny", "num_concurrent": 4, "max_retries": 1}
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments | options.pop("model_args", {}),
        tasks=[task],
        task_manager=manager,
        bootstrap_iters=0,
        **options,
    )
    return found["samples"][task], found["results"][task]


@pytest.mark.slow
def test_three_tasks_of_the_public_harness(served, tasks, tmp_path):
    """Log-probabilities of options equal the engine's own; texts are those that the engine says greedily."""
    address, engine = served
    tokens = {"tokenizer": str(tmp_path), "tokenized_requests": True}
    samples, results = measured(
        "local-completions", f"{address}/v1/completions", "minglm_choice", tasks, model_args=tokens
    )
    for sample in samples:
        prompt = TOKENIZER.encode(sample["doc"]["question"])
        for option, (found, _) in zip(
            sample["doc"]["options"], sample["filtered_resps"], strict=True
        ):
            answer = TOKENIZER.encode(option)
            request = Request(prompt + answer, 1, 0.0, prompt_logprobs=0)
            (scored,) = engine.generate([request])
            # the first token of a prompt has no entry
            expected = sum(entry.logprob for entry in scored.prompt_logprobs[len(prompt) - 1 :])
            assert float(found) == pytest.approx(expected, abs=1e-3)
    assert 0 <= results["acc,none"] <= 1

    samples, _ = measured(
        "local-completions", f"{address}/v1/completions", "minglm_text", tasks, model_args=tokens
    )
    for sample in samples:
        prompt = TOKENIZER.encode(sample["doc"]["question"])
        (alone,) = engine.generate([Request(prompt, 6, 0.0)])
        text = TOKENIZER.decode([t for t in alone.tokens if t not in TOKENIZER.stop_ids])
        assert sample["resps"][0][0] == text.split("\n")[0]

    samples, results = measured(
        "local-chat-completions",
        f"{address}/v1/chat/completions",
        "minglm_chat",
        tasks,
        apply_chat_template=True,
    )
    assert len(samples) == len(QUESTIONS)
    assert 0 <= results["exact_match,none"] <= 1


def test_the_printed_commands_name_what_is_served(tmp_path):
    """Server, both clients, the model's name and the folder of its tokenizer, whatever the folder is called."""
    run = tmp_path / "my toy"
    with pytest.raises(ValueError, match="is not a run: neither"):
        commands(str(run))
    for folder in (run, run / "data"):
        folder.mkdir()
        TOKENIZER.save(folder / "tokenizer.json")
        lines = [shlex.split(line, comments=True) for line in commands(str(run)).splitlines()]
        (server,) = [words for words in lines if words[1:4] == ["-m", "minglm", "serve"]]
        assert server[4] == str(run)
        clients = [words for words in lines if words[:1] == ["lm_eval"]]
        assert [words[2] for words in clients] == ["local-completions", "local-chat-completions"]
        settings = dict(word.split("=", 1) for word in clients[0][4].split(","))
        assert (settings["tokenizer"], settings["model"]) == (str(folder), "my toy")
