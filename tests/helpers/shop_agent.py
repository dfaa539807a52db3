"""Agents of the shop as somebody else would write them: a client or a framework, a loop and a world of their own.

MINGLM_ENDPOINT=http://127.0.0.1:PORT python tests/helpers/shop_agent.py [client] [framework]

client: OpenAI's client, chat completions. framework: the OpenAI Agents SDK, which speaks the Responses API. With both the
sessions alternate.
"""

import asyncio
import itertools
import json
import os
import sys

import httpx

from minglm.envs import ENVIRONMENTS
from minglm.envs.base import Task

TOOLS = ENVIRONMENTS["retail"].tools()
OPENAI_TOOLS = [{"type": "function", "function": tool} for tool in TOOLS]


def opened(session):
    """Return the task of a session and a shop for it."""
    task = Task(**{**session["task"], "messages": tuple(session["task"]["messages"])})
    return task, ENVIRONMENTS["retail"].episode(task)


async def client(session, ask=None):
    """Play an episode in a loop of its own. ask: body -> assistant message; by default OpenAI's client asks."""
    task, episode = opened(session)
    messages = list(task.messages)
    while not episode.done:
        message = (ask or by_client)(
            session, {"model": session["model"], "messages": messages, "tools": OPENAI_TOOLS}
        )
        calls = message.get("tool_calls") or ()
        said = [
            {"name": c["function"]["name"], "arguments": json.loads(c["function"]["arguments"])}
            for c in calls
        ]
        text = message.get("content") or ""
        replies = await episode.step({"role": "assistant", "content": text, "tool_calls": said})
        for call, reply in zip(calls, replies):
            reply["tool_call_id"] = call["id"]
        messages += [message, *replies]
    return await episode.score()


def by_client(session, body):
    """Ask with OpenAI's client."""
    from openai import OpenAI

    with OpenAI(base_url=session["url"], max_retries=0) as openai:
        answer = openai.chat.completions.create(**body)
    return answer.choices[0].message.model_dump(exclude_none=True)


async def framework(session):
    """Play an episode with the framework's loop; the shop is behind its tools, and the customer behind its last word."""
    from agents import Agent, FunctionTool, OpenAIResponsesModel, Runner, set_tracing_disabled
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    task, episode = opened(session)

    def tool(schema):
        async def call(context, arguments):
            number = json.loads(arguments)["order_id"]
            return json.dumps(episode.world.call(schema["name"], {"order_id": number}))

        return FunctionTool(
            name=schema["name"],
            description=schema["description"],
            params_json_schema=schema["parameters"],
            on_invoke_tool=call,
            strict_json_schema=False,
        )

    async with AsyncOpenAI(base_url=session["url"], max_retries=0) as openai:
        model = OpenAIResponsesModel(session["model"], openai)
        agent = Agent(name="shop", model=model, tools=[tool(schema) for schema in TOOLS])
        conversation = list(task.messages)
        while not episode.done:
            result = await Runner.run(agent, conversation)
            said = {"role": "assistant", "content": result.final_output}
            conversation = result.to_input_list() + await episode.step(said)
    return await episode.score()


def main(url, ways):
    """Play sessions until the endpoint is gone."""
    http = httpx.Client(base_url=url, timeout=60)
    for way in itertools.cycle(ways):
        try:
            claimed = http.post("/sessions")
            while claimed.status_code == 204:
                claimed = http.post("/sessions")
            if claimed.status_code != 200:  # the run is over
                return
            session = claimed.json()
            try:
                score = asyncio.run(way(session))
                result = {"reward": score.value, "parts": score.parts}
            except Exception as error:  # what went wrong here says nothing of the model
                result = {"error": f"{type(error).__name__}: {error}"}
            http.post(f"/sessions/{session['id']}/reward", json=result)
        except httpx.TransportError:
            return


if __name__ == "__main__":
    main(
        os.environ["MINGLM_ENDPOINT"],
        [{"client": client, "framework": framework}[w] for w in sys.argv[1:]],
    )
