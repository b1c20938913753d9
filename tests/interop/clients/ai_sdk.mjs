import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
import { WEATHER, serve } from "./conversation.mjs";

const settings = ({ base_url, key }) => ({ name: "tollgate", baseURL: base_url, apiKey: key });
const model = (question) => createOpenAICompatible(settings(question))(question.model);
const weather = tool({
  description: WEATHER.description,
  inputSchema: jsonSchema(WEATHER.parameters),
  execute: async () => "rain",
});

async function read(result, pieces) {
  for await (const part of result.fullStream) {
    if (part.type === "error") throw part.error;
    if (part.type === "text-delta") pieces.push(part.text ?? part.delta);
  }
  return pieces.join("");
}

const quietly = { onError: () => {} };

await serve({
  async whole(question) {
    return (await generateText({ model: model(question), prompt: question.text })).text;
  },

  async streamed(question, pieces) {
    return await read(streamText({ model: model(question), prompt: question.text, ...quietly }), pieces);
  },

  async tools(question, pieces) {
    const options = { model: model(question), prompt: question.text, tools: { weather }, stopWhen: stepCountIs(3) };
    return await read(streamText({ ...options, ...quietly }), pieces);
  },

  async other_route(question) {
    return (await generateText({ model: createOpenAI(settings(question))(question.model), prompt: question.text })).text;
  },
});
