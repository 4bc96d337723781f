"""Tokenizer directories of the same structure as those of published LLMs, trained on a few sentences.

Every one is read by `AutoTokenizer.from_pretrained`, as a user's would be. Chat templates are short ones that write the
same strings as the published ones.
"""

import json

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful answers.",
    "USER: What is in the picture? ASSISTANT: A black cat on two red chairs.\nIt is 12 years old.",
    "[INST] How many dogs are there? [/INST] There are three dogs and a cat.",
    "system\nYou are a helpful assistant.\n\nuser\nmodel\nassistant\n\n",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
GPT_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_TURNS = "{% for m in messages %}{% if m.role == 'user' %}%s{% else %}%s{% endif %}{% endfor %}%s"


def turns(user, answer, prompt=""):
    """A Jinja template from the strings around a message's text."""
    opening = "{% if add_generation_prompt %}" + prompt + "{% endif %}" if prompt else ""
    return _TURNS.replace("%s", user, 1).replace("%s", answer, 1).replace("%s", opening, 1)


def _chatml(role, text="{{ m.content }}"):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def _header(role):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


THINK = "<think>\n\n</think>\n\n"
CHATS = {
    "llama_2": turns(
        "{{ bos_token }}[INST] {{ m.content | trim }} [/INST]", " {{ m.content | trim }} {{ eos_token }}"
    ),
    "llama_3": "{{ bos_token }}"
    + _header("system")
    + "Today Date: {{ date_string or strftime_now('%d %b %Y') }}\n\n<|eot_id|>"
    + turns(
        _header("user") + "{{ m.content | trim }}<|eot_id|>",
        _header("assistant") + "{{ m.content | trim }}<|eot_id|>",
        _header("assistant"),
    ),
    "mistral": "{{ bos_token }}" + turns("[INST] {{ m.content }}[/INST]", " {{ m.content }}{{ eos_token }}"),
    "qwen2": _chatml("system", "You are a helpful assistant.")
    + turns(_chatml("user"), _chatml("assistant"), "<|im_start|>assistant\n"),
    # earlier answers without, the last one with an empty block of reasoning
    "qwen3": turns(
        _chatml("user"),
        _chatml("assistant", "{% if loop.last %}" + THINK + "{% endif %}{{ m.content }}"),
        "<|im_start|>assistant\n{% if enable_thinking is false %}" + THINK + "{% endif %}",
    ),
    "gemma": "{{ bos_token }}"
    + turns(
        "<start_of_turn>user\n{{ m.content | trim }}<end_of_turn>\n",
        "<start_of_turn>model\n{{ m.content | trim }}<end_of_turn>\n",
        "<start_of_turn>model\n",
    ),
}


def _train(tokenizer, specials, byte_level):
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    trainer = trainers.BpeTrainer(
        vocab_size=620, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return json.loads(tokenizer.to_str())["model"]


def _sentencepiece(specials):
    """Vocabulary and merges of a SentencePiece-like BPE with byte fallback."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    return _train(tokenizer, [*specials, *BYTES], False)


def _write(directory, tokenizer, special=(), plain=(), **config):
    """tokenizer.json and tokenizer_config.json."""
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def _with_bos(tokenizer, bos):
    index = tokenizer.token_to_id(bos)
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, index)]
    )


def llama_like(directory, name):
    """Llama 1, 2, Vicuna, Yi, Mistral as tokenizer.json: a dummy space by a normalizer, `legacy` as published."""
    markers = ["[INST]", "[/INST]"] if name == "mistral" else []
    model = _sentencepiece(["<unk>", "<s>", "</s>", *markers])
    tokenizer = Tokenizer(
        models.BPE(
            model["vocab"],
            [tuple(m) for m in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = _with_bos(tokenizer, "<s>")
    _write(
        directory,
        tokenizer,
        ["<unk>", "<s>", "</s>", *markers],
        tokenizer_class="LlamaTokenizer",
        legacy=name != "llama_2",
        add_bos_token=True,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHATS.get(name),
    )


def vicuna(directory):
    """lmsys/vicuna-7b-v1.5: nothing but a SentencePiece model and its settings."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    pieces = [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3), *((byte, 0, 6) for byte in BYTES)]
    found = _sentencepiece(["<unk>", "<s>", "</s>"])["vocab"]
    words = sorted((index, word) for word, index in found.items() if index >= 3 + len(BYTES))
    pieces += [(word, -rank, 1) for rank, (_, word) in enumerate(words)]
    for piece, score, kind in pieces:
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = 2  # BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.add_dummy_prefix = True
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model.SerializeToString())
    config = {
        "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": False,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 4096,
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def byte_level(directory, name):
    """Llama 3 and Qwen: byte-level BPE with markers; Qwen normalises, Llama 3 puts BOS first."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama_3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GPT_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, [], True)
    config = {"chat_template": CHATS[name]}
    if name == "llama_3":
        special = [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ]
        tokenizer.add_special_tokens(special)
        template = _with_bos(tokenizer, "<|begin_of_text|>")
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
        config |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": special[0],
            "eos_token": "<|eot_id|>",
        }
        _write(directory, tokenizer, special, **config)
        return
    tokenizer.normalizer = normalizers.NFC()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    config |= {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    _write(directory, tokenizer, special, ["<think>", "</think>"] if name == "qwen3" else [], **config)


def gemma(directory):
    """Gemma: SentencePiece BPE without a dummy space, spaces replaced by a normalizer."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    model = _sentencepiece(specials)
    tokenizer = Tokenizer(
        models.BPE(
            model["vocab"],
            [tuple(m) for m in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = _with_bos(tokenizer, "<bos>")
    _write(
        directory,
        tokenizer,
        specials,
        ["\n\n"],
        tokenizer_class="GemmaTokenizer",
        add_bos_token=True,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=CHATS["gemma"],
    )


def phi(directory):
    """Phi-2: GPT-2's byte-level BPE, no BOS, runs of spaces as ordinary added tokens, no chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    _train(tokenizer, [], True)
    end = "<|endoftext|>"
    config = {"bos_token": end, "eos_token": end, "unk_token": end, "tokenizer_class": "CodeGenTokenizer"}
    _write(directory, tokenizer, [end], ["    ", "  "], add_prefix_space=False, **config)


def write(directory, name):
    """Writes the tokenizer files of a family."""
    if name == "vicuna":
        vicuna(directory)
    elif name in ("llama_1", "llama_2", "mistral"):
        llama_like(directory, name)
    elif name == "gemma":
        gemma(directory)
    elif name == "phi":
        phi(directory)
    else:
        byte_level(directory, name)
