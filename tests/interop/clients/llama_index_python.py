import asyncio

from conversation import serve
from llama_index.core.agent.workflow import AgentStream, FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike


def model(question, **options):
    return OpenAILike(
        model=question.model, api_base=question.base_url, api_key=question.key, **{"is_chat_model": True, **options}
    )


def whole(question, pieces):
    return model(question).chat([ChatMessage(question.text)]).message.content


def streamed(question, pieces):
    pieces.extend(piece.delta or "" for piece in model(question).stream_chat([ChatMessage(question.text)]))
    return "".join(pieces)


def weather(city: str) -> str:
    """What it is like outside."""
    return "rain"


async def converse(question, pieces):
    llm = model(question, is_function_calling_model=True)
    running = FunctionAgent(tools=[FunctionTool.from_defaults(weather)], llm=llm).run(question.text)
    async for event in running.stream_events():
        if isinstance(event, AgentStream):
            pieces.append(event.delta or "")
    return str((await running).response.content)


def tools(question, pieces):
    return asyncio.run(converse(question, pieces))


def other_route(question, pieces):
    return model(question, is_chat_model=False).complete(question.text).text


serve(whole=whole, streamed=streamed, tools=tools, other_route=other_route)
