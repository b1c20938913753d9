// What the Node clients have in common: questions come as lines of JSON on stdin, and answers go out on stdout.
import { createInterface } from "node:readline";

export const WEATHER = {
  name: "weather",
  description: "What it is like outside.",
  parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
};

// Each way is a function of the question and of a list for the pieces of text that it has got so far.
export async function serve(ways) {
  console.log = console.info = console.warn = console.error; // what a library prints by itself is no answer
  for await (const line of createInterface({ input: process.stdin })) {
    const question = JSON.parse(line);
    question.asked = { role: "user", content: question.text };
    const pieces = [];
    let answer;
    try {
      answer = { text: await ways[question.way](question, pieces) };
    } catch (error) {
      answer = { text: pieces.join(""), error: described(error) };
    }
    process.stdout.write(JSON.stringify(answer) + "\n");
  }
}

// An exception as its user sees it; of a wrapped one the first cause that has a status.
function described(error) {
  const chain = [];
  for (let each = error; each && chain.length < 9; each = each.lastError ?? each.cause) chain.push(each);
  const withStatus = chain.find((each) => each.status ?? each.statusCode);
  const name = error?.constructor?.name;
  return {
    class: name === "Error" || !name ? error?.name : name,
    status: withStatus?.status ?? withStatus?.statusCode ?? null,
    message: String(error?.message ?? JSON.stringify(error)).slice(0, 2000),
  };
}
