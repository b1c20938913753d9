import asyncio

from conversation import serve
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


def agent(question, model=OpenAIChatModel, **options):
    provider = OpenAIProvider(base_url=question.base_url, api_key=question.key)
    return Agent(model(question.model, provider=provider), **options)


def whole(question, pieces):
    return agent(question).run_sync(question.text).output


async def read(ours, question, pieces):
    async with ours.run_stream(question.text) as result:
        async for piece in result.stream_text(delta=True, debounce_by=None):
            pieces.append(piece)
    return "".join(pieces)


def streamed(question, pieces):
    return asyncio.run(read(agent(question), question, pieces))


def weather(city: str) -> str:
    """What it is like outside."""
    return "rain"


def tools(question, pieces):
    return asyncio.run(read(agent(question, tools=[weather]), question, pieces))


def other_route(question, pieces):
    return agent(question, OpenAIResponsesModel).run_sync(question.text).output


serve(whole=whole, streamed=streamed, tools=tools, other_route=other_route)
