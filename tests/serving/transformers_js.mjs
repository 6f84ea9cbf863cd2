// Reads {modules, folder, texts, sentences} from stdin: texts to tokenize, sentences to fill, all by transformers.js.
import { readFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { pathToFileURL } from "node:url";

const { modules, folder, texts, sentences } = JSON.parse(readFileSync(0, "utf8"));
const entry = join(modules, "@huggingface/transformers/dist/transformers.node.mjs");
const { AutoTokenizer, env, pipeline } = await import(pathToFileURL(entry));
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);

const tokenizer = await AutoTokenizer.from_pretrained(basename(folder));
const tokens = texts.map((text) => tokenizer.encode(text));
const answers = {};
for (const dtype of ["fp32", "fp16", "q8"]) {
  const fill = await pipeline("fill-mask", basename(folder), { dtype });
  answers[dtype] = [];
  for (const sentence of sentences) answers[dtype].push(await fill(sentence, { top_k: 3 }));
}
console.log(JSON.stringify({ tokens, answers }));
