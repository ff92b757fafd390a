"""A tiny Llama with a word-level tokenizer and a chat template: real files, no download."""

import json

import torch

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
WORDS = [f"w{i}" for i in range(40)]


def make_model(directory, chat_template=True, seed=0, **config):
    """Write a model directory that transformers loads; returns its path as a string."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", unk_token="<unk>",
        additional_special_tokens=special[1:4])  # fmt: skip
    if chat_template:
        fast.chat_template = TEMPLATE
    torch.manual_seed(seed)
    sizes = dict(vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, eos_token_id=0,
                 pad_token_id=0, tie_word_embeddings=True)  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**sizes | config))
    model.save_pretrained(directory)
    fast.save_pretrained(directory)
    return str(directory)


def write_rows(path, count=24, words=4, seed=0):
    """Chat rows whose answer repeats the question's words backwards; lengths vary."""
    generator = torch.Generator().manual_seed(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            length = int(torch.randint(1, words + 1, (), generator=generator))
            picked = [WORDS[int(i)] for i in torch.randint(len(WORDS), (length,), generator=generator)]
            chat = [
                {"role": "user", "content": " ".join(picked)},
                {"role": "assistant", "content": " ".join(reversed(picked))},
            ]
            file.write(json.dumps({"messages": chat}) + "\n")
    return str(path)
