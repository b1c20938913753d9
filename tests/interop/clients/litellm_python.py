import litellm
from conversation import WEATHER, serve


def ask(question, messages, **options):
    return litellm.completion(
        model=f"openai/{question.model}",
        api_base=question.base_url,
        api_key=question.key,
        messages=messages,
        **options,
    )


def whole(question, pieces):
    return ask(question, [question.asked]).choices[0].message.content


def streamed(question, pieces):
    return final(question, [question.asked], pieces).content


def final(question, messages, pieces, **options):
    chunks = []
    for chunk in ask(question, messages, stream=True, **options):
        chunks.append(chunk)
        pieces.append(chunk.choices[0].delta.content or "")
    return litellm.stream_chunk_builder(chunks, messages=messages).choices[0].message


def tools(question, pieces):
    messages = [question.asked]
    while (message := final(question, messages, pieces, tools=[WEATHER])).tool_calls:
        messages.append(message)
        messages.extend({"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in message.tool_calls)
    return message.content


def other_route(question, pieces):
    answer = litellm.text_completion(
        model=f"text-completion-openai/{question.model}",
        api_base=question.base_url,
        api_key=question.key,
        prompt=question.text,
    )
    return answer.choices[0].text


serve(whole=whole, streamed=streamed, tools=tools, other_route=other_route)
