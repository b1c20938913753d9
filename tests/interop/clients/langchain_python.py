from conversation import serve
from langchain.agents import create_agent
from langchain_core.messages import AIMessageChunk
from langchain_openai import ChatOpenAI


def model(question, **options):
    return ChatOpenAI(model=question.model, base_url=question.base_url, api_key=question.key, **options)


def whole(question, pieces):
    return model(question).invoke(question.text).text


def streamed(question, pieces):
    pieces.extend(chunk.text for chunk in model(question).stream(question.text))
    return "".join(pieces)


def weather(city: str) -> str:
    """What it is like outside."""
    return "rain"


def tools(question, pieces):
    agent = create_agent(model(question), [weather])
    for message, _ in agent.stream({"messages": [question.asked]}, stream_mode="messages"):
        if isinstance(message, AIMessageChunk):
            pieces.append(message.text)
    return "".join(pieces)


def other_route(question, pieces):
    return model(question, use_responses_api=True).invoke(question.text).text


serve(whole=whole, streamed=streamed, tools=tools, other_route=other_route)
