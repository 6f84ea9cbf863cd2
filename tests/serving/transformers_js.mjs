// Reads {modules, folder, texts, calls} from stdin: texts to tokenize, and calls of pipelines, all by transformers.js.
import { readFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { pathToFileURL } from "node:url";

const { modules, folder, texts, calls } = JSON.parse(readFileSync(0, "utf8"));
const entry = join(modules, "@huggingface/transformers/dist/transformers.node.mjs");
const { AutoTokenizer, env, pipeline } = await import(pathToFileURL(entry));
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);

const tokenizer = await AutoTokenizer.from_pretrained(basename(folder));
const tokens = texts.map((text) => tokenizer.encode(text));
const answers = [];
for (const { task, dtype, inputs } of calls) {
  const answer = await (await pipeline(task, basename(folder), { dtype }))(...inputs);
  answers.push(answer.tolist?.() ?? answer);
}
console.log(JSON.stringify({ tokens, answers }));
