import openai
from conversation import WEATHER, serve


def client(question):
    return openai.OpenAI(base_url=question.base_url, api_key=question.key)


def whole(question, pieces):
    answer = client(question).chat.completions.create(model=question.model, messages=[question.asked])
    return answer.choices[0].message.content


def streamed(question, pieces):
    return final(question, [question.asked], pieces).content


def final(question, messages, pieces, **options):
    create = client(question).chat.completions.stream
    with create(model=question.model, messages=messages, **options) as stream:
        pieces.extend(event.delta for event in stream if event.type == "content.delta")
        return stream.get_final_completion().choices[0].message


def tools(question, pieces):
    messages = [question.asked]
    while (message := final(question, messages, pieces, tools=[WEATHER])).tool_calls:
        messages.append(message)
        messages.extend({"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in message.tool_calls)
    return message.content


def other_route(question, pieces):
    return client(question).responses.create(model=question.model, input=question.text).output_text


serve(whole=whole, streamed=streamed, tools=tools, other_route=other_route)
