#!/usr/bin/env bash
# Train the demo checkpoint on: tokenize a corpus once, then train until the steps or the time are used up.
#
#     scripts/train_checkpoint.sh CORPUS OUTPUT SECONDS [options of pretrain_mlm.py]
#
# CORPUS holds *.jsonl.gz, among them wiki_vital, gensim_wiki and sotu, which are read more often than the others.
# OUTPUT gets the tokenized text (tokens/) and the run (run/); the same command continues where it was cut off.
# SECONDS is the time for everything, tokenizing included. The learning rate reaches its end within that time.
#
# The checkpoint that ships took 1,480 steps, 193 million tokens, in 124 seconds on one H100, from the one before it
# (--model). Training has no dropout; the shipped config keeps hidden_dropout_prob at 0.1 for fine-tuning.
set -euo pipefail

if [ $# -lt 3 ] || ! [[ $3 =~ ^[0-9]+$ ]]; then
    sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
corpus=$1 output=$2 seconds=$3
shift 3
scripts=$(cd "$(dirname "$0")" && pwd)
reserve=30 # seconds to start, load and write the model

if [ ! -f "$output/tokens/documents.json" ]; then
    often=("$corpus"/{wiki_vital,gensim_wiki}.jsonl.gz)
    python "$scripts/pretrain_mlm.py" --tokenize_only --output_dir "$output/tokens" --model "$scripts/.." --train_data \
        "${often[@]}" "${often[@]}" "${often[@]}" "$corpus"/sotu.jsonl.gz{,} "$corpus"/*.jsonl.gz "$@"
fi
left=$((seconds - SECONDS - reserve))
if [ "$left" -lt 1 ]; then
    echo "train_checkpoint.sh: $seconds seconds are used up after tokenizing; run it again to train" >&2
    exit 1
fi
exec python "$scripts/pretrain_mlm.py" --model "$scripts/.." --train_data "$output/tokens" --output_dir "$output/run" \
    --max_length 128 512 2048 --length_shares 0.5 0.3 0.2 --mask_token_share 1 --config_fields hidden_dropout_prob=0.0 \
    --max_grad_norm 1 --tokens_per_row 131072 --global_batch_size 1024 --max_steps 1480 --max_seconds "$left" \
    --learning_rate 1.2e-3 --warmup_share 0.03 --save_steps 200 --save_dtype bfloat16 \
    --resume_from_checkpoint last "$@"
