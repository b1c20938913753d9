import OpenAI from "openai";
import { WEATHER, serve } from "./conversation.mjs";

const client = ({ base_url, key }) => new OpenAI({ baseURL: base_url, apiKey: key });

await serve({
  async whole(question) {
    const { model, asked } = question;
    const answer = await client(question).chat.completions.create({ model, messages: [asked] });
    return answer.choices[0].message.content;
  },

  async streamed(question, pieces) {
    const { model, asked } = question;
    const stream = client(question).chat.completions.stream({ model, messages: [asked] });
    stream.on("content", (piece) => pieces.push(piece));
    return await stream.finalContent();
  },

  async tools(question, pieces) {
    const tool = { type: "function", function: { ...WEATHER, function: async () => "rain", parse: JSON.parse } };
    const { model, asked } = question;
    const runner = client(question).chat.completions.runTools({ model, messages: [asked], tools: [tool], stream: true });
    runner.on("content", (piece) => pieces.push(piece));
    return await runner.finalContent();
  },

  async other_route(question) {
    return (await client(question).responses.create({ model: question.model, input: question.text })).output_text;
  },
});
