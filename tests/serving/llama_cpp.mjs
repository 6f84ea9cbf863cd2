// Reads {modules, files, texts} from stdin: the tokens of each text, and its embedding by each file, all by llama.cpp.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const { modules, files, texts } = JSON.parse(readFileSync(0, "utf8"));
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(join(modules, "node-llama-cpp/dist/index.js")));
const llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.error });
const results = { tokens: [], embeddings: {} };
for (const modelPath of files) {
  const model = await llama.loadModel({ modelPath });
  const context = await model.createEmbeddingContext({ contextSize: 4096, batchSize: 4096, threads: 1 });
  results.tokens = texts.map((text) => model.tokenize(text));
  results.embeddings[modelPath] = [];
  for (const text of texts) {
    results.embeddings[modelPath].push(text ? (await context.getEmbeddingFor(text)).vector : null);
  }
  await model.dispose();
}
console.log(JSON.stringify(results));
await llama.dispose();
