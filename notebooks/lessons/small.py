"""A small random Llama with its own tokenizer, for lessons that train a model: made in a second, no download."""

import json
from pathlib import Path

_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def small_model(directory, hidden: int = 128, layers: int = 4, vocab: int = 1024, seed: int = 0, **config) -> Path:
    """Write a model directory that transformers and `handtuned finetune` load: random weights.

    The tokenizer is a byte-level BPE, trained on the shipped task's rows.

    Args:
        directory: made if it is not there.
        hidden, layers, vocab: sizes; heads are 32 wide, two to each key/value head.
        **config: further fields of `transformers.LlamaConfig`.

    Returns:
        the directory.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    from ..datasets import shipped_dataset

    rows = Path(shipped_dataset()[0]).read_text(encoding="utf-8").splitlines()
    texts = [message["content"] for row in rows for message in json.loads(row)["messages"]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_SPECIAL[0], pad_token=_SPECIAL[0], additional_special_tokens=_SPECIAL[1:]
    )
    fast.chat_template = _TEMPLATE

    heads = hidden // 32
    sizes = {
        "vocab_size": len(fast),
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "max_position_embeddings": 1024,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        # Wide enough for logits that can be sure of something: nothing frozen is ever going to grow.
        "initializer_range": hidden**-0.5,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**sizes | config))
    directory = Path(directory)
    logging.disable_progress_bar()
    model.save_pretrained(directory)
    logging.enable_progress_bar()
    fast.save_pretrained(directory)
    return directory
