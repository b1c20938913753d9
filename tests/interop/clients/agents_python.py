import asyncio

from agents import (
    Agent,
    Runner,
    function_tool,
    set_default_openai_api,
    set_default_openai_client,
    set_tracing_disabled,
)
from conversation import serve
from openai import AsyncOpenAI

set_tracing_disabled(True)


def agent(question, api="chat_completions", **options):
    client = AsyncOpenAI(base_url=question.base_url, api_key=question.key)
    set_default_openai_client(client, use_for_tracing=False)
    set_default_openai_api(api)
    return Agent(name="helper", model=question.model, **options)


def whole(question, pieces):
    return asyncio.run(Runner.run(agent(question), question.text)).final_output


async def read(ours, question, pieces):
    running = Runner.run_streamed(ours, question.text)
    async for event in running.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            pieces.append(event.data.delta)
    return running.final_output


def streamed(question, pieces):
    return asyncio.run(read(agent(question), question, pieces))


@function_tool
def weather(city: str) -> str:
    """What it is like outside."""
    return "rain"


def tools(question, pieces):
    return asyncio.run(read(agent(question, tools=[weather]), question, pieces))


def other_route(question, pieces):
    return asyncio.run(Runner.run(agent(question, "responses"), question.text)).final_output


serve(whole=whole, streamed=streamed, tools=tools, other_route=other_route)
