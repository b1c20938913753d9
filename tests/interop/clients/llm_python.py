"""Simon Willison's `llm`, as its library; a model of one's own is a row of its configuration."""

import llm
from conversation import serve
from llm.default_plugins.openai_models import Chat


def model(question):
    return Chat("tollgate", model_name=question.model, api_base=question.base_url, supports_tools=True)


def whole(question, pieces):
    return model(question).prompt(question.text, stream=False, key=question.key).text()


def streamed(question, pieces):
    pieces.extend(model(question).prompt(question.text, key=question.key))
    return "".join(pieces)


def weather(city: str) -> str:
    """What it is like outside."""
    return "rain"


def tools(question, pieces):
    pieces.extend(model(question).chain(question.text, tools=[llm.Tool.function(weather)], key=question.key))
    return "".join(pieces)


serve(whole=whole, streamed=streamed, tools=tools)
