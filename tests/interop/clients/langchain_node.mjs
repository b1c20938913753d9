import { HumanMessage, ToolMessage } from "@langchain/core/messages";
import { ChatOpenAI } from "@langchain/openai";
import { WEATHER, serve } from "./conversation.mjs";

// By itself it repeats whatever it does not know as hopeless, 424 among it, six times, and buys each time.
const chat = ({ model, base_url, key }, more = {}) =>
  new ChatOpenAI({ model, apiKey: key, configuration: { baseURL: base_url }, maxRetries: 0, ...more });

async function final(model, messages, pieces) {
  let message;
  for await (const chunk of await model.stream(messages)) {
    pieces.push(chunk.text);
    message = message ? message.concat(chunk) : chunk;
  }
  return message;
}

await serve({
  async whole(question) {
    return (await chat(question).invoke(question.text)).text;
  },

  async streamed(question, pieces) {
    return (await final(chat(question), question.text, pieces)).text;
  },

  async tools(question, pieces) {
    const model = chat(question).bindTools([{ type: "function", function: WEATHER }]);
    const messages = [new HumanMessage(question.text)];
    let message;
    while ((message = await final(model, messages, pieces)).tool_calls.length) {
      messages.push(message, ...message.tool_calls.map((call) => new ToolMessage("rain", call.id)));
    }
    return message.text;
  },

  async other_route(question) {
    return (await chat(question, { useResponsesApi: true }).invoke(question.text)).text;
  },
});
